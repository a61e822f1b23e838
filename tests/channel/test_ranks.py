"""Two ranks publish a model that FSDP2 or tensor parallelism divides between them."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from channel.weights import State
from rank_helpers import RankPool
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import sparsedelta
from sparsedelta.channel.publisher import publish_checkpoint
from sparsedelta.channel.ranks import RankPublisher
from sparsedelta.errors import HeadMoved, SparseDeltaError, StructureMismatch
from sparsedelta.format.spool import SpoolPayload
from sparsedelta.live.homes import Homes


class Net(torch.nn.Module):
    """Sizes that two ranks cannot divide evenly, a buffer, and a parameter of one element."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = torch.nn.Linear(6, 10, dtype=torch.bfloat16)
        self.down = torch.nn.Linear(10, 7, dtype=torch.bfloat16)
        self.scale = torch.nn.Parameter(torch.ones(1))
        self.register_buffer("seen", torch.zeros(3, dtype=torch.int64))


def change(model: Any, step: int) -> None:
    """Change some elements, which their values choose, so that ranks and the whole model agree."""
    for tensor in model.state_dict().values():
        held = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[held.element_size()]
        chosen = held.view(kind) % 5 == step % 3
        held[chosen] += step


def divided(kind: str) -> Any:
    model = Net()
    if kind == "fsdp2":
        return fully_shard(model)
    if kind == "replicated":
        mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicas", "shards"))
        return fully_shard(model, mesh=mesh)
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    if kind == "tensor parallel":
        return parallelize_module(model, init_device_mesh("cpu", (2,)), plan)
    names = ("replicas", "shards", "tensor") if kind == "all three" else ("shards", "tensor")
    mesh = init_device_mesh("cpu", (1, 2, 2)[-len(names) :], mesh_dim_names=names)
    parallelize_module(model, mesh["tensor"], plan)
    return fully_shard(model, mesh=mesh[names[:-1]])


def run(rank: int, kind: str, root: str, n: int, *, gives_whole: bool) -> list[Any]:
    """Publish n versions; return the number of parameters that this rank holds, and the bytes of its whole tensors."""
    model = divided(kind)
    channel = sparsedelta.Channel(f"{root}/channel")
    whole = Net() if gives_whole and rank == 0 else None
    with RankPublisher(channel, model, whole=whole) as publisher:
        for step in range(n):
            if step:
                change(model, step)
            publication = publisher.publish(step)
            assert (publication is None) == (rank != 0)
            if publication:
                publication.result()
        homed = sum(tensor.nbytes for tensor in publisher._shards.held.values())
    held = [t.to_local() if isinstance(t, DTensor) else t for t in model.parameters()]
    return [sum(one.numel() for one in held), homed]


def resumed(rank: int, root: str) -> list[int]:
    """Publish once more from the weights of the last version, and return the versions that have a delta."""
    model = divided("fsdp2")
    for step in (1, 2):
        change(model, step)
    channel = sparsedelta.Channel(f"{root}/channel")
    with RankPublisher(channel, model) as publisher:
        change(model, 3)
        publisher.publish(3)
    return [entry.version for entry in channel.log() if entry.delta]


def overtaken(rank: int, root: str) -> str:
    """Publish after another publisher did; return the error."""
    model = divided("fsdp2")
    channel = sparsedelta.Channel(f"{root}/channel")
    publisher = RankPublisher(channel, model)
    if rank == 0:
        with sparsedelta.Publisher(channel, Net()) as other:
            other.publish()
    try:
        publisher.publish(1)
        publisher.close()
    except SparseDeltaError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def mismatched(rank: int, root: str) -> str:
    whole = torch.nn.Linear(2, 2) if rank == 0 else None
    with pytest.raises(StructureMismatch) as caught:
        RankPublisher(sparsedelta.Channel(f"{root}/channel"), divided("fsdp2"), whole=whole)
    return str(caught.value)


@pytest.fixture(scope="module")
def ranks() -> Iterator[RankPool]:
    pool = RankPool(2)
    yield pool
    pool.close()


def expected(n: int) -> State:
    model = Net()
    for step in range(1, n):
        change(model, step)
    return dict(model.state_dict())


def is_equal(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(one[name].view(torch.uint8), other[name].view(torch.uint8)) for name in one
    )


@pytest.mark.parametrize("gives_whole", [False, True])
@pytest.mark.parametrize("kind", ["fsdp2", "tensor parallel"])
def test_ranks_publish_what_they_hold(
    ranks: RankPool, kind: str, tmp_path: Path, *, gives_whole: bool
) -> None:
    held = ranks.results(run_one, kind, str(tmp_path), 3, gives_whole)
    total = sum(p.numel() for p in Net().parameters())
    n_bytes = sum(tensor.nbytes for tensor in Net().state_dict().values())
    assert all(one[0] < total for one in held)  # no rank holds all
    if gives_whole:
        assert [one[1] for one in held] == [n_bytes, 0]
    else:
        assert sum(one[1] for one in held) == n_bytes
        assert max(one[1] for one in held) < 0.6 * n_bytes
    channel = sparsedelta.Channel(tmp_path / "channel")
    follower = sparsedelta.Follower(channel, tmp_path / "out")
    for version in (1, 3, 2):
        follower.sync(version)
        assert is_equal(load_file(tmp_path / "out"), expected(version)), version
    model = Net()
    sparsedelta.Follower(channel, model).sync()
    assert is_equal(dict(model.state_dict()), expected(3))
    assert [bool(entry.delta) for entry in channel.log()] == [True, True, False]


def test_the_objects_are_those_of_one_process(ranks: RankPool, tmp_path: Path) -> None:
    ranks.results(run_one, "fsdp2", str(tmp_path), 3, False)
    state = expected(1)
    with sparsedelta.Publisher(tmp_path / "other", state) as publisher:
        for step in range(3):
            for name, tensor in expected(step + 1).items():
                state[name].copy_(tensor)
            publisher.publish(step)
    one, other = (sparsedelta.Channel(tmp_path / name).log() for name in ("channel", "other"))
    assert [(e.target, e.delta, e.anchor) for e in one] == [
        (e.target, e.delta, e.anchor) for e in other
    ]


def in_a_folder(rank: int, root: str) -> list[str]:
    """Publish two versions of a folder that only rank 0 reads; return the error for another folder."""
    model = divided("fsdp2")
    folder = f"{root}/folder" if rank == 0 else "nowhere"
    with RankPublisher(f"{root}/channel", model, folder=folder) as publisher:
        publisher.publish(0)
        change(model, 1)
        publisher.publish(1)
    found = []
    for other in (f"{root}/other", f"{root}/missing"):
        try:
            RankPublisher(f"{root}/channel", model, folder=other)
        except (SparseDeltaError, OSError) as error:
            found.append(f"{type(error).__name__}: {error}")
    return found


def test_a_folder(ranks: RankPool, tmp_path: Path) -> None:
    for name, state in (("folder", expected(1)), ("other", {"scale": torch.ones(1)})):
        (tmp_path / name).mkdir()
        save_file(state, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "pytorch_model.bin").write_bytes(b"old weights")
    first, second = ranks.results(in_a_folder, str(tmp_path))
    assert first == second
    assert "may not be" in first[0] or "is not the same in" in first[0]
    assert len(first) == 2
    sparsedelta.Follower(tmp_path / "channel", tmp_path / "out").sync()
    assert is_equal(load_file(tmp_path / "out" / "model.safetensors"), expected(2))
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert [name for name in names if name[0] != "."] == ["config.json", "model.safetensors"]


def with_a_full_disk(rank: int, root: str) -> list[str]:
    """Let rank 0 fail while it receives the second version; then publish again."""
    model = divided("fsdp2")
    real, found = SpoolPayload.add_streams, []

    def full(self: SpoolPayload, coded: bytes) -> int:
        if coded:
            raise OSError(errno.ENOSPC, "no space left")
        return real(self, coded)

    with RankPublisher(f"{root}/channel", model) as publisher:
        first = publisher.publish(0)
        if first:
            first.result()
        for step in (1, 2):
            change(model, step)
            if step == 1:
                SpoolPayload.add_streams = full  # type: ignore[method-assign]
            try:
                publication = publisher.publish(step)
                if publication:
                    publication.result()
            except (OSError, SparseDeltaError) as error:
                found.append(type(error).__name__)
            finally:
                torch.distributed.barrier()
                SpoolPayload.add_streams = real  # type: ignore[method-assign]
    return found


def test_a_full_disk_of_rank_0(ranks: RankPool, tmp_path: Path) -> None:
    """The other ranks are not left waiting, and the next version has the changes too."""
    first, second = ranks.results(with_a_full_disk, str(tmp_path))
    assert (first, second) == (["OSError"], [])
    sparsedelta.Follower(tmp_path / "channel", tmp_path / "out").sync()
    assert is_equal(load_file(tmp_path / "out"), expected(3))


def killed(rank: int, root: str, who: int, at: str) -> None:
    """Publish while a rank kills itself in the background; the other one writes down its error."""
    model = divided("fsdp2")
    publisher = RankPublisher(f"{root}/channel", model)
    publisher.publish(0)
    real = Homes._do

    def faulty(self: Homes, command: Any, options: Any) -> Any:
        if rank == who and command == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, command, options)

    try:
        change(model, 1)
        publisher._shards.update()  # the version before is durable now
        publisher.close()
        publisher = RankPublisher(f"{root}/channel", model)
        Homes._do = faulty  # type: ignore[method-assign]
        change(model, 2)
        found = publisher.publish(2)
        if found:
            found.result()
        publisher.close()
    except (SparseDeltaError, RuntimeError) as error:
        Path(root, "error").write_text(str(error), encoding="utf-8")
    os._exit(0)


@pytest.mark.parametrize(
    ("who", "at"),
    [(1, "capture"), (1, "change"), (1, "anchor"), (1, "advance"), (0, "change")],
)
def test_a_killed_rank(ranks: RankPool, tmp_path: Path, who: int, at: str) -> None:
    """The others get an error; ranks that start again continue the channel, and followers end with the right bits."""
    pool = RankPool(2)
    try:
        with pytest.raises((EOFError, ConnectionResetError)):
            pool.results(killed, str(tmp_path), who, at)
    finally:
        pool.close()
    assert (tmp_path / "error").read_text(encoding="utf-8")
    n = len(sparsedelta.Channel(tmp_path / "channel").log())
    assert n == (2 if at == "advance" else 1)
    ranks.results(resumed, str(tmp_path))
    sparsedelta.Follower(tmp_path / "channel", tmp_path / "out").sync()
    assert is_equal(load_file(tmp_path / "out"), expected(4))
    assert len(sparsedelta.Channel(tmp_path / "channel").log()) == n + 1


def run_one(rank: int, kind: str, root: str, n: int, gives_whole: bool) -> list[Any]:
    return run(rank, kind, root, n, gives_whole=gives_whole)


@pytest.mark.parametrize("kind", ["fsdp2 and tensor parallel", "all three"])
def test_four_ranks_in_two_directions(kind: str, tmp_path: Path) -> None:
    pool = RankPool(4)
    try:
        pool.results(run_one, kind, str(tmp_path), 3, False)
    finally:
        pool.close()
    follower = sparsedelta.Follower(sparsedelta.Channel(tmp_path / "channel"), tmp_path / "out")
    for version in (1, 3):
        follower.sync(version)
        assert is_equal(load_file(tmp_path / "out"), expected(version)), version


def test_replicas_send_once(ranks: RankPool, tmp_path: Path) -> None:
    """Ranks that hold the same part: the first of them sends it."""
    ranks.results(run_one, "replicated", str(tmp_path), 2, False)
    sparsedelta.Follower(sparsedelta.Channel(tmp_path / "channel"), tmp_path / "out").sync()
    assert is_equal(load_file(tmp_path / "out"), expected(2))


def test_a_run_that_resumes_continues_with_deltas(ranks: RankPool, tmp_path: Path) -> None:
    ranks.results(run_one, "fsdp2", str(tmp_path), 3, False)
    assert ranks.results(resumed, str(tmp_path))[0] == [4, 3, 2]
    sparsedelta.Follower(sparsedelta.Channel(tmp_path / "channel"), tmp_path / "out").sync()
    assert is_equal(load_file(tmp_path / "out"), expected(4))


def onto_another_kind(rank: int, root: str) -> str:
    try:
        RankPublisher(f"{root}/channel", divided("fsdp2"), folder=f"{root}/folder")
    except (SparseDeltaError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def test_the_other_kind_is_refused(ranks: RankPool, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    save_file(expected(1), tmp_path / "folder" / "model.safetensors")
    publish_checkpoint(
        sparsedelta.Channel(tmp_path / "channel"), tmp_path / "folder" / "model.safetensors"
    )
    first, second = ranks.results(onto_another_kind, str(tmp_path))
    assert first.startswith("ValueError: the versions of channel")
    assert "are single files, and what this publisher adds is a folder" in first
    assert second.startswith("RankFailed: rank 0 has failed")


def test_an_error_of_rank_0_is_raised_on_all(ranks: RankPool, tmp_path: Path) -> None:
    first, second = ranks.results(overtaken, str(tmp_path))
    assert first.startswith(f"{HeadMoved.__name__}: version 1")
    assert second.startswith("RankFailed: rank 0 has failed: version 1")
    found = ranks.results(mismatched, str(tmp_path))
    assert found[0] == found[1]
    assert "the whole model has no tensor 'scale'" in found[0]
