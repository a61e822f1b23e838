"""Deltas between files of torch.save and torch.distributed: exact files come back, and nothing is unpickled."""

from __future__ import annotations

import json
import os
import pickle
import random
import shlex
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from helpers import assert_same_files, tree
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.multiprocessing.spawn import spawn

import sparsedelta
from sparsedelta.channel.publisher import publish_checkpoint
from sparsedelta.cli import main
from sparsedelta.errors import AlreadyApplied, BadMagic, CheckpointError, Corrupt, SparseDeltaError
from sparsedelta.interop.inert_pickle import Made, PickleRefused, children, read_inert
from sparsedelta.interop.regions import RegionFiles, write_regions


def training(n_steps: int) -> dict[str, Any]:
    """Return the state of a small model after some steps, with that of its optimizer."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(40, 30), torch.nn.Linear(30, 20)).bfloat16()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    for step in range(n_steps):
        torch.manual_seed(step)
        model(torch.randn(3, 40).bfloat16()).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return {"model": model.state_dict(), "opt": optimizer.state_dict(), "step": n_steps}


def layout(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    with RegionFiles(path) as opened:
        return {t.name: (t.spec.dtype.name, t.spec.shape) for t in opened.tensors.values()}


def there_and_back(base: Path, target: Path, out: Path, form: str | None = None) -> int:
    """Make a delta and rebuild the target from it; return the number of changed elements."""
    delta = out.with_suffix(".sd")
    report = sparsedelta.convert(target, delta, base=base)
    sparsedelta.convert(delta, out, base=base, write_as=form)
    return report.nnz


def test_one_file_comes_back(tmp_path: Path) -> None:
    base, target, out = tmp_path / "base.pt", tmp_path / "target.pt", tmp_path / "out.pt"
    torch.save(training(1), base)
    torch.save(training(2), target)
    nnz = there_and_back(base, target, out)
    assert out.read_bytes() == target.read_bytes()
    found = layout(target)
    assert found["model.0.weight"] == ("BF16", (30, 40))
    assert found["opt.state.0.exp_avg"] == ("BF16", (30, 40))
    old, new = (torch.load(path, weights_only=True) for path in (base, target))
    bits = [
        (a.view(torch.int16) != b.view(torch.int16)).sum()
        for a, b in zip(tensors(old), tensors(new), strict=True)
        if a.nbytes >= 64 and a.dtype == torch.bfloat16
    ]
    assert nnz == sum(map(int, bits))


def tensors(state: Any) -> list[torch.Tensor]:
    if isinstance(state, torch.Tensor):
        return [state]
    values = state.values() if isinstance(state, dict) else state if isinstance(state, list) else ()
    return [tensor for value in values for tensor in tensors(value)]


def test_dtypes_views_and_parameters(tmp_path: Path) -> None:
    raw = torch.randint(
        0, 256, (960,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )
    dtypes = (
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16,
        torch.int8, torch.uint8, torch.uint16, torch.uint64, torch.float8_e4m3fn, torch.complex64,
    )  # fmt: skip
    state: dict[str, Any] = {str(d): raw.clone().view(d).reshape(2, -1) for d in dtypes}
    state["part"] = torch.arange(100.0)[10:50]
    state["same"] = state["part"]
    state["parameter"] = torch.nn.Parameter(torch.ones(5, 6))
    path = tmp_path / "base.bin"
    torch.save(state, path)
    found = layout(path)
    assert {found[str(d)][1] for d in dtypes} == {(2, 480 // d.itemsize) for d in dtypes}
    assert found["torch.float8_e4m3fn"][0] == "F8_E4M3"
    assert found["part"] == ("F32", (100,))  # the storage as a whole
    assert "same" not in found
    assert found["parameter"] == ("F32", (5, 6))


def test_a_folder_of_shards_comes_back(tmp_path: Path) -> None:
    for name, n_steps in (("base", 1), ("target", 2)):
        (tmp_path / name / "empty").mkdir(parents=True)
        for number, part in enumerate(training(n_steps)["model"].items(), 1):
            torch.save(dict([part]), tmp_path / name / f"pytorch_model-{number:05d}-of-00004.bin")
        (tmp_path / name / "config.json").write_text(f'{{"steps": {n_steps}}}')
    there_and_back(tmp_path / "base", tmp_path / "target", tmp_path / "out", "original")
    assert_same_files(tmp_path / "target", tmp_path / "out")
    assert (tmp_path / "out" / "empty").is_dir()


def save_sharded(rank: int, path: Path) -> None:
    from torch.distributed.fsdp import fully_shard

    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
    torch.distributed.init_process_group("gloo", f"file://{path}/store", rank=rank, world_size=2)
    for name, change in (("base", 0.0), ("target", 1.0)):
        torch.manual_seed(0)
        model = torch.nn.Linear(40, 30)
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
        with torch.no_grad():
            model.weight[rank, :3] += change  # a rank's first row becomes another one
        save({"model": model.state_dict()}, checkpoint_id=path / name)
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_distributed_checkpoint_comes_back(tmp_path: Path) -> None:
    spawn(save_sharded, (tmp_path,), nprocs=2)
    base, target = tmp_path / "base", tmp_path / "target"
    assert len(list(base.glob("*.distcp"))) == 2
    found = layout(base)
    assert found["model.weight"] == ("F32", (15, 40))
    assert found["model.weight@15,0"] == ("F32", (15, 40))
    there_and_back(base, target, tmp_path / "out", "original")
    assert_same_files(target, tmp_path / "out")
    rebuilt = {"model": {"weight": torch.empty(30, 40), "bias": torch.empty(30)}}
    load(rebuilt, checkpoint_id=tmp_path / "out", no_dist=True)
    expected = {"model": {"weight": torch.empty(30, 40), "bias": torch.empty(30)}}
    load(expected, checkpoint_id=target, no_dist=True)
    assert torch.equal(rebuilt["model"]["weight"], expected["model"]["weight"])


def plain_save(path: Path, n_steps: int) -> Path:
    save(training(n_steps), checkpoint_id=path, no_dist=True)
    return path


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_diff_apply_and_verify_read_distributed_checkpoints(tmp_path: Path) -> None:
    one, two, three = (plain_save(tmp_path / str(n), n) for n in (1, 2, 3))
    delta, out = tmp_path / "delta.sd", tmp_path / "out"
    with ThreadPoolExecutor(2) as pool:
        sparsedelta.diff(one, two, executor=pool).save(delta)
        with sparsedelta.diff(one, two) as same:
            assert same.to_bytes() == delta.read_bytes()
        assert sparsedelta.verify(delta, base=one, target=two, executor=pool).target_checked
        with pytest.raises(ValueError, match="rebuilt in this process; leave out executor="):
            sparsedelta.apply(one, delta, out, executor=pool)
    sparsedelta.apply(one, delta, out)
    assert_same_files(two, out)
    sparsedelta.apply(one, [delta, sparsedelta.diff(two, three)], out, overwrite=True)
    assert_same_files(three, out)
    before = tree(tmp_path)
    with pytest.raises(AlreadyApplied, match="already is this delta's target"):
        sparsedelta.apply(two, delta, tmp_path / "other")
    raw = bytearray(delta.read_bytes())
    raw[len(raw) // 2] ^= 1
    with pytest.raises(SparseDeltaError):
        sparsedelta.apply(one, sparsedelta.Delta.from_bytes(bytes(raw)), tmp_path / "other")
    assert tree(tmp_path) == before
    with pytest.raises(CheckpointError, match=r"it is a checkpoint of torch\.distributed, which"):
        publish_checkpoint(sparsedelta.Channel(tmp_path / "channel"), one)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_the_command_diff_reports_on_distributed_checkpoints(tmp_path: Path) -> None:
    base, target = (plain_save(tmp_path / str(n), n) for n in (1, 2))
    delta = tmp_path / "delta.sd"
    result = CliRunner().invoke(main, ["diff", *map(str, (base, target, "-o", delta, "--json"))])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["target_bytes"] == sum(path.stat().st_size for path in target.iterdir())
    assert found["file_bytes"] == delta.stat().st_size


def test_the_command_says_how_the_original_file_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(training(1), "base 1.pt")
    torch.save(training(2), "target.pt")
    made = CliRunner().invoke(main, ["convert", "target.pt", "d.sd", "--base", "base 1.pt"])
    back = made.stdout.partition("original files: sparsedelta ")[2]
    assert back == "convert d.sd OUT --base 'base 1.pt' --to original\n"
    assert CliRunner().invoke(main, shlex.split(back)).exit_code == 0
    assert_same_files(Path("target.pt"), Path("OUT"))


class Run:
    """A pickle of this creates a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[Path]]:
        return Path.touch, (self.path,)


def test_a_pickle_is_never_executed(tmp_path: Path) -> None:
    base, target, out = tmp_path / "base.pt", tmp_path / "target.pt", tmp_path / "out.pt"
    torch.save({"w": torch.zeros(40)}, base)
    torch.save({"w": torch.ones(40), "run": Run(tmp_path / "ran")}, target)
    there_and_back(base, target, out)
    assert out.read_bytes() == target.read_bytes()
    assert layout(target) == {"w": ("F32", (40,))}
    assert not (tmp_path / "ran").exists()
    torch.load(target, weights_only=False)
    assert (tmp_path / "ran").exists()  # it would have been


def test_a_pickle_of_another_kind_leaves_tensors_without_names(tmp_path: Path) -> None:
    path, other = tmp_path / "base.pt", tmp_path / "other.pt"
    torch.save({"w": torch.zeros(40), "raw": bytearray(3)}, path)
    torch.save({"w": torch.zeros(40), "raw": bytearray(3)}, other, pickle_protocol=5)
    assert layout(path) == {"w": ("F32", (40,))}
    assert layout(other) == {"data/0": ("U8", (160,))}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"]",  # no end
        b"0.",  # nothing to remove
        b"a.",
        b"(.",
        b"}K\x01s.",  # a key without a value
        b"K\x01K\x02a.",
        b"c__builtin__\neval\n(I1\n",
        b"\x96" + (1 << 40).to_bytes(8, "little") + b".",  # a bytearray of a terabyte
        b"I" + b"9" * 5000 + b"\n.",
        b"r\xff\xff\xff\xff.",  # memo number 4 billion, of nothing
    ],
)
def test_pickles_that_are_refused(content: bytes) -> None:
    with pytest.raises(PickleRefused):
        read_inert(content)


def test_too_many_operations_are_refused() -> None:
    with pytest.raises(PickleRefused, match="operations"):
        read_inert(b"]" * 2_000_000 + b".")


@pytest.mark.parametrize("protocol", range(2, 5))
def test_plain_pickles_are_read(protocol: int) -> None:
    value = {
        "a": [1, -2, 1 << 70, None, True, 0.5],
        "b": ((), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)),
        "c": "ü" * 300,
    }
    read = read_inert(pickle.dumps(value, protocol))
    assert isinstance(read, Made)
    assert read.get("c") == value["c"]
    assert read.get("b") == value["b"]
    assert [part for _, part in children(read.get("a"))] == value["a"]


def test_files_that_are_not_archives_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "base.pt"
    torch.save({"w": torch.zeros(1000)}, path)
    content = path.read_bytes()
    for end in (4, 100, 2000, len(content) - 1):
        path.write_bytes(content[:end])
        with pytest.raises(CheckpointError):
            RegionFiles(path)


def test_files_without_a_tensor_that_can_be_found_come_back(tmp_path: Path) -> None:
    base, small, packed = (tmp_path / f"{name}.pt" for name in ("base", "small", "packed"))
    torch.save({"w": torch.zeros(3)}, base)
    torch.save({"w": torch.ones(3)}, small)
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data/0", bytes(1000))
    for target in (small, packed):
        there_and_back(base, target, tmp_path / f"out-{target.stem}.pt")
        assert (tmp_path / f"out-{target.stem}.pt").read_bytes() == target.read_bytes()


def test_damaged_files_are_refused_or_copied_exactly(tmp_path: Path) -> None:
    base, damaged, out = tmp_path / "base.pt", tmp_path / "damaged.pt", tmp_path / "out.pt"
    torch.save(training(1), base)
    content = base.read_bytes()
    draw = random.Random(0)
    n_copied = 0
    for _ in range(60):
        data = bytearray(content)
        for _ in range(draw.randrange(1, 4)):
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        if draw.random() < 0.3:
            del data[draw.randrange(len(data)) :]
        damaged.write_bytes(data)
        try:
            sparsedelta.convert(damaged, out.with_suffix(".sd"), base=base, overwrite=True)
        except SparseDeltaError:
            continue
        sparsedelta.convert(out.with_suffix(".sd"), out, base=base, overwrite=True)
        assert out.read_bytes() == bytes(data)
        n_copied += 1
    assert 10 <= n_copied < 60


def test_targets_that_cannot_be_written(tmp_path: Path) -> None:
    base = tmp_path / "base.pt"
    torch.save({"w": torch.zeros(1000)}, base)
    with RegionFiles(base) as opened:
        (file,) = opened.weight_files
        skeleton = opened.side_files["file.skeleton"]
        skeleton.write_bytes(b"1 " + skeleton.read_bytes())
        with pytest.raises(Corrupt, match="lies between"):
            write_regions(opened, tmp_path / "out.pt")
        opened.weight_files = (
            type(file)(".git.safetensors", file.raw_header, file.header, file.tensors),
        )
        opened.side_files = {".git.skeleton": skeleton}
        with pytest.raises(Corrupt, match=r"'\.git'"):
            write_regions(opened, tmp_path / "out")
        opened.side_files = {}
        with pytest.raises(ValueError, match="was not made from files"):
            write_regions(opened, tmp_path / "out")


def test_a_delta_of_other_files_is_neither_inverted_nor_pushed(tmp_path: Path) -> None:
    base, target, delta = tmp_path / "base.pt", tmp_path / "target.pt", tmp_path / "d.sd"
    torch.save(training(1), base)
    torch.save(training(2), target)
    sparsedelta.convert(target, delta, base=base)
    for given in (None, base):
        with pytest.raises(ValueError, match=r"`sparsedelta convert BASE back\.sd --base TARGET`"):
            sparsedelta.invert(delta, base=given)
    with pytest.raises(ValueError, match=r"upload it as a file: `hf upload me/tuned .*d\.sd`"):
        sparsedelta.push(delta, "me/tuned", base_id="org/base")


def test_a_file_of_an_old_torch_says_how_to_save_it_again(tmp_path: Path) -> None:
    base, old = tmp_path / "base.pt", tmp_path / "old.pt"
    torch.save(training(1), base)
    torch.save(training(2), old, _use_new_zipfile_serialization=False)
    with pytest.raises(BadMagic, match=r"an old version of torch\.save wrote it; convert it with"):
        sparsedelta.convert(old, tmp_path / "d.sd", base=base)
