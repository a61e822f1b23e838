"""Checkpoints of torch.distributed.checkpoint that are deltas on the one before, from one and two ranks."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rank_helpers import RankPool
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load as load_state
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.distributed.checkpoint.state_dict_saver import save as save_state
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import sparsedelta
from sparsedelta.distributed import DeltaStorageReader, DeltaStorageWriter, needed

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def state_of(step: int) -> dict[str, Any]:
    """Return the state after some steps, each of which changes 1 % of the elements."""
    draw = torch.Generator().manual_seed(0)
    dtypes = (torch.bfloat16, torch.float32, torch.float16, torch.float64)
    state: dict[str, Any] = {
        f"w{n}": torch.randn(300, 201, generator=draw).to(dtype) for n, dtype in enumerate(dtypes)
    }
    state["w1"][3, 5] = float("nan")
    state["count"] = torch.arange(7)
    state["scalar"] = torch.tensor(1.5)
    for number in range(step):
        for name in ("w0", "w1", "w2", "w3"):
            flat = state[name].view(-1)
            index = torch.randperm(len(flat), generator=draw)[: len(flat) // 100]
            flat[index] += 0.125
        state["count"] += 1
        if number == 1:
            state["new"] = torch.randn(50, generator=draw)
    state["tied"] = state["w0"]  # shares memory
    return {"model": state, "step": step, "name": f"step {step}"}


def blank(state: dict[str, Any]) -> dict[str, Any]:
    return {
        "model": {name: torch.zeros_like(tensor) for name, tensor in state["model"].items()},
        "step": -1,
        "name": "",
    }


def load(folder: Path, step: int) -> dict[str, Any]:
    found = blank(state_of(step))
    load_state(found, storage_reader=DeltaStorageReader(folder), no_dist=True)
    return found


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert (found["step"], found["name"]) == (expected["step"], expected["name"])
    assert found["model"].keys() == expected["model"].keys()
    for name, tensor in expected["model"].items():
        one, other = found["model"][name].reshape(-1), tensor.reshape(-1)
        assert torch.equal(one.view(torch.uint8), other.view(torch.uint8)), name


def n_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def save(writer: DeltaStorageWriter, root: Path, step: int) -> Path:
    folder = root / str(step)
    save_state(state_of(step), storage_writer=writer, checkpoint_id=folder, no_dist=True)
    return folder


@pytest.mark.parametrize("keep_copy", [True, False])
def test_one_process(tmp_path: Path, *, keep_copy: bool) -> None:
    writer = DeltaStorageWriter(tmp_path / "0", full_every=4, level="default", keep_copy=keep_copy)
    folders = [save(writer, tmp_path, step) for step in range(6)]
    for step in (5, 0, 3):
        assert_same(load(folders[step], step), state_of(step))
    assert needed(folders[3]) == folders[3::-1]
    assert needed(folders[5]) == [folders[5], folders[4]]  # the fifth is full again
    sizes = [n_bytes(folder) for folder in folders]
    assert max(sizes[1], sizes[3], sizes[5]) < 0.05 * min(sizes[0], sizes[4])
    plain = blank(state_of(4))
    load_state(plain, checkpoint_id=folders[4], no_dist=True)  # torch reads a full one without us
    assert_same(plain, state_of(4))
    moved = tmp_path / "elsewhere" / "run"
    shutil.copytree(tmp_path, moved, ignore=shutil.ignore_patterns("elsewhere"))
    shutil.rmtree(folders[0])
    assert_same(load(moved / "3", 3), state_of(3))


def test_a_resumed_run_continues_the_chain(tmp_path: Path) -> None:
    save(DeltaStorageWriter(tmp_path / "0"), tmp_path, 0)
    writer = DeltaStorageWriter(tmp_path / "1", base=tmp_path / "0")
    folder = save(writer, tmp_path, 1)
    assert needed(folder) == [folder, tmp_path / "0"]
    assert_same(load(folder, 1), state_of(1))
    shutil.rmtree(tmp_path / "0")  # the next one cannot be a delta
    assert needed(save(writer, tmp_path, 2)) == [tmp_path / "2"]


def test_names_that_look_like_offsets(tmp_path: Path) -> None:
    writer = DeltaStorageWriter(tmp_path / "0")
    for step in (0, 1):
        state = {"w": torch.zeros(4) + step, "w@0": torch.tensor(5.0) + step}
        save_state(state, storage_writer=writer, checkpoint_id=tmp_path / str(step), no_dist=True)
    found = {"w": torch.empty(4), "w@0": torch.tensor(0.0)}
    load_state(found, storage_reader=DeltaStorageReader(tmp_path / "1"), no_dist=True)
    assert (found["w"].tolist(), found["w@0"].item()) == ([1.0] * 4, 6.0)


def test_dtypes_that_a_delta_cannot_hold_are_written_in_full(tmp_path: Path) -> None:
    writer = DeltaStorageWriter(tmp_path / "0")
    for step in (0, 1):
        state = {"z": torch.zeros(4, dtype=torch.complex128) + step, "none": torch.empty(0, 3)}
        save_state(state, storage_writer=writer, checkpoint_id=tmp_path / str(step), no_dist=True)
    found = {"z": torch.empty(4, dtype=torch.complex128), "none": torch.empty(0, 3)}
    load_state(found, storage_reader=DeltaStorageReader(tmp_path / "1"), no_dist=True)
    assert found["z"].tolist() == [1.0] * 4


def test_saving_in_the_background(ranks: RankPool, tmp_path: Path) -> None:
    assert ranks.results(save_async, str(tmp_path)) == [True, True]
    assert len(needed(tmp_path / "2")) == 3
    assert_whole(tmp_path / "2", 2)


def test_a_plain_checkpoint_is_a_base(tmp_path: Path) -> None:
    save_state(state_of(0), checkpoint_id=tmp_path / "0", no_dist=True)
    folder = save(DeltaStorageWriter(tmp_path / "1", base=tmp_path / "0"), tmp_path, 1)
    assert n_bytes(folder) < 0.05 * n_bytes(tmp_path / "0")
    assert_same(load(folder, 1), state_of(1))


def three(tmp_path: Path) -> list[Path]:
    writer = DeltaStorageWriter(tmp_path / "0")
    return [save(writer, tmp_path, step) for step in range(3)]


def error_of(folder: Path, step: int) -> str:
    with pytest.raises(CheckpointException) as caught:
        load(folder, step)
    (failure,) = caught.value.failures.values()
    return f"{type(failure[0]).__name__}: {failure[0]}"


def test_a_missing_link_is_reported(tmp_path: Path) -> None:
    folders = three(tmp_path)
    (folders[0] / ".metadata").unlink()
    assert error_of(folders[2], 2).startswith(
        f"CheckpointError: '{folders[1]}' holds only the changes since '{folders[0]}', which is missing"
    )
    with pytest.raises(sparsedelta.SparseDeltaError, match="which is missing"):
        needed(folders[2])
    with pytest.raises(sparsedelta.SparseDeltaError, match="not a complete checkpoint"):
        DeltaStorageWriter(tmp_path / "9", base=folders[0])


def test_a_replaced_link_is_reported(tmp_path: Path) -> None:
    folders = three(tmp_path)
    shutil.rmtree(folders[1])
    save_state(state_of(1), checkpoint_id=folders[1], no_dist=True)
    assert "which now holds another checkpoint" in error_of(folders[2], 2)


def test_a_damaged_link_is_reported(tmp_path: Path) -> None:
    folders = three(tmp_path)
    whole = folders[1] / "__0.sd"
    raw = bytearray(whole.read_bytes())
    for at in (20, len(raw) // 2, len(raw) - 5):
        damaged = bytearray(raw)
        damaged[at] ^= 4
        whole.write_bytes(damaged)
        assert error_of(folders[2], 2).split(":")[0] in ("BadMagic", "Corrupt", "Truncated")
    whole.write_bytes(raw[:-1])
    assert error_of(folders[2], 2).startswith("Truncated")
    whole.write_bytes(raw)
    full = folders[0] / "__0_0.distcp"
    stored = bytearray(full.read_bytes())
    at = stored.index(state_of(0)["model"]["w2"].numpy().tobytes())
    stored[at + 3000] ^= 4
    full.write_bytes(stored)
    assert "'model.w2@0,0' in '" in error_of(folders[2], 2)
    assert "is damaged or has changed" in error_of(folders[2], 2)


def test_wrong_use_is_refused(tmp_path: Path) -> None:
    folders = three(tmp_path)
    with pytest.raises(CheckpointException, match="which others may need; save into a new folder"):
        save(DeltaStorageWriter(folders[1]), tmp_path, 1)
    assert_same(load(folders[2], 2), state_of(2))
    with pytest.raises(ValueError, match="full_every is 0"):
        DeltaStorageWriter(tmp_path / "9", full_every=0)
    with pytest.raises(ValueError, match="level is 'x'"):
        DeltaStorageWriter(tmp_path / "9", level="x")


@pytest.fixture(scope="module")
def ranks() -> Iterator[RankPool]:
    pool = RankPool(2)
    yield pool
    pool.close()


def net(step: int) -> torch.nn.Module:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(100, 301), torch.nn.Linear(301, 7))
    with torch.no_grad():
        for number in range(step):
            for parameter in model.parameters():
                draw = torch.Generator().manual_seed(number)
                chosen = torch.rand(parameter.shape, generator=draw) < 0.01
                parameter[chosen] += 0.25
    return model


def sharded(step: int) -> dict[str, Any]:
    model = net(step)
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    return {"model": model.state_dict(), "mine": step}


def save_on(rank: int, root: str, steps: list[int], base: str | None) -> list[int]:
    writer = DeltaStorageWriter(f"{root}/0", base=base)
    for step in steps:
        save_state(sharded(step), storage_writer=writer, checkpoint_id=f"{root}/{step}")
    return [len(writer._held), sum(t.numel() for t in writer._held.values())]


def save_async(rank: int, root: str) -> bool:
    writer = DeltaStorageWriter(f"{root}/0")
    for step in range(3):
        folder = f"{root}/{step}"
        begun = async_save(sharded(step), storage_writer=writer, checkpoint_id=folder)
        assert isinstance(begun, Future)
        begun.result()
    return True


def load_on(rank: int, root: str, step: int) -> list[bool]:
    state = sharded(0)
    load_state(state, storage_reader=DeltaStorageReader(f"{root}/{step}"))
    expected = sharded(step)["model"]
    found = state["model"]
    assert all(isinstance(found[name], DTensor) for name in found)
    return [
        torch.equal(
            found[name].to_local().view(torch.int32), expected[name].to_local().view(torch.int32)
        )
        for name in expected
    ]


def fail_on(rank: int, root: str, steps: list[int]) -> list[str]:
    """Save; in the second save, rank 1 fails after rank 0 has written. Then save again."""
    writer = DeltaStorageWriter(f"{root}/0")
    errors = []
    for step in steps:
        if step == steps[1] and rank == 1:
            writer._level = "broken"
        try:
            save_state(sharded(step), storage_writer=writer, checkpoint_id=f"{root}/{step}")
        except CheckpointException as error:
            errors.append(str(sorted(error.failures)))
        writer._level = "fast"
    return errors


def assert_whole(folder: Path, step: int) -> None:
    found: dict[str, Any] = {"model": net(0).state_dict(), "mine": -1}
    load_state(found, storage_reader=DeltaStorageReader(folder), no_dist=True)
    for name, tensor in net(step).state_dict().items():
        assert torch.equal(found["model"][name].view(torch.int32), tensor.view(torch.int32))
    assert found["mine"] == step


def test_two_ranks(ranks: RankPool, tmp_path: Path) -> None:
    held = ranks.results(save_on, str(tmp_path), [0, 1, 2], None)
    total = sum(p.numel() for p in net(0).parameters())
    assert sum(n for _, n in held) == total
    assert all(0.4 * total < n < 0.6 * total for _, n in held)  # each rank wrote its own shards
    assert {p.name for p in (tmp_path / "2").iterdir()} >= {".metadata", "__0.sd", "__1.sd"}
    assert n_bytes(tmp_path / "2") < 0.1 * n_bytes(tmp_path / "0")
    for step in (2, 1, 0):
        assert all(all(one) for one in ranks.results(load_on, str(tmp_path), step))
        assert_whole(tmp_path / str(step), step)  # on one rank


def test_other_numbers_of_ranks(ranks: RankPool, tmp_path: Path) -> None:
    state = {"model": net(0).state_dict(), "mine": 0}
    save_state(
        state,
        storage_writer=DeltaStorageWriter(tmp_path / "0"),
        checkpoint_id=tmp_path / "0",
        no_dist=True,
    )
    ranks.results(save_on, str(tmp_path), [1, 2], str(tmp_path / "0"))
    assert len(needed(tmp_path / "2")) == 3
    assert all(all(one) for one in ranks.results(load_on, str(tmp_path), 2))
    assert_whole(tmp_path / "2", 2)


def test_a_rank_that_fails(ranks: RankPool, tmp_path: Path) -> None:
    assert ranks.results(fail_on, str(tmp_path), [0, 1, 2]) == [["[1]"], ["[1]"]]
    assert not (tmp_path / "1" / ".metadata").exists()
    assert needed(tmp_path / "2") == [tmp_path / "2", tmp_path / "0"]
    for step in (0, 2):
        assert_whole(tmp_path / str(step), step)
        assert all(all(one) for one in ranks.results(load_on, str(tmp_path), step))


def killed_save(rank: int, root: str) -> None:
    """Save twice; one rank is killed in the second save, after the other has written its part."""
    dist.init_process_group("gloo", f"file://{root}/store", rank=rank, world_size=2)
    writer = DeltaStorageWriter(f"{root}/0")
    save_state(sharded(0), storage_writer=writer, checkpoint_id=f"{root}/0")
    if rank == 1:
        DeltaStorageWriter._keep = lambda *args: os._exit(9)  # type: ignore[method-assign]
    save_state(sharded(1), storage_writer=writer, checkpoint_id=f"{root}/1")
    sys.exit(0)


def test_a_rank_that_is_killed(tmp_path: Path) -> None:
    context = torch.multiprocessing.get_context("spawn")
    processes = [context.Process(target=killed_save, args=(r, str(tmp_path))) for r in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        process.kill()
    assert processes[1].exitcode == 9
    assert processes[0].exitcode != 0
    assert (tmp_path / "1" / "__1.sd").exists()
    assert not (tmp_path / "1" / ".metadata").exists()
    assert_whole(tmp_path / "0", 0)
