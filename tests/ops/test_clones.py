"""Weight files that the target takes whole from the base: cloned where the file system shares data, copied elsewhere."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import Raw, assert_same_files, noise, tree, write_file, write_sharded

import sparsedelta
from sparsedelta.errors import BaseMismatch
from sparsedelta.ops import apply as apply_module
from sparsedelta.ops import rebuilding
from sparsedelta.system import clone, copy_range, write_at

SHARDS = [
    {"a": noise("BF16", 40, 50), "b": noise("F32", 7, seed=1)},
    {"c": noise("BF16", 90_000, seed=2), "d": noise("U8", 3, seed=3)},
]
MANY = [{f"{s}.{i}": noise("BF16", 30, seed=(s, i)) for i in range(80)} for s in range(2)]
Shards = list[dict[str, Raw]]


def pretend_clone(source: int, target: int) -> bool:
    """Copy a file, as a clone looks to its readers."""
    n_bytes = os.fstat(source).st_size
    assert os.pwrite(target, os.pread(source, n_bytes, 0), 0) == n_bytes
    return True


@pytest.fixture(params=["clones", "copies"])
def clones(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the file system clones files."""
    is_clone: bool = request.param == "clones"
    how: Callable[[int, int], bool] = pretend_clone if is_clone else lambda *_: False
    monkeypatch.setattr(apply_module, "clone", how)
    return is_clone


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the blocks that are written from memory."""
    sizes: list[int] = []

    def write(fd: int, data: memoryview, offset: int) -> int:
        sizes.append(len(data))
        return write_at(fd, data, offset)

    monkeypatch.setattr(rebuilding, "write_at", write)
    return sizes


def pair(root: Path, shards: Shards, changed: str) -> tuple[Path, Path, Path]:
    """Write base and target, which differ in one tensor, and the delta."""
    base = write_sharded(root / "base", shards)
    other = [{k: v.changed(0) if k == changed else v for k, v in s.items()} for s in shards]
    target = write_sharded(root / "target", other)
    with sparsedelta.diff(base, target) as delta:
        delta.save(root / "delta.sd")
    return base, target, root / "delta.sd"


@pytest.mark.parametrize("verify", ["full", "touched", "none"])
@pytest.mark.parametrize("shards", [SHARDS, MANY], ids=["few", "many"])
@pytest.mark.parametrize("in_place_of_old", [False, True])
def test_the_target_is_the_same(
    shards: Shards,
    verify: Any,
    in_place_of_old: bool,
    clones: bool,
    written: list[int],
    tmp_path: Path,
) -> None:
    base, target, delta = pair(tmp_path, shards, changed=next(iter(shards[0])))
    before = tree(base)
    if in_place_of_old:
        sparsedelta.apply(base, delta, tmp_path / "out")
        written.clear()
    sparsedelta.apply(base, delta, tmp_path / "out", verify=verify, overwrite=in_place_of_old)
    assert_same_files(target, tmp_path / "out")
    assert tree(base) == before
    whole = sum(path.stat().st_size for path in target.glob("*.safetensors"))
    saves = clones or (verify != "full" and shards is SHARDS)
    assert (sum(written) < 0.9 * whole) == saves


def test_a_clone_is_verified(clones: bool, tmp_path: Path) -> None:
    base, _, delta = pair(tmp_path, SHARDS, changed="a")
    shard = base / "model-00002-of-00002.safetensors"
    content = bytearray(shard.read_bytes())
    content[-40_000] ^= 1
    shard.write_bytes(content)
    with pytest.raises(BaseMismatch, match="tensor 'c'"):
        sparsedelta.apply(base, delta, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_file_with_other_places_is_not_cloned(
    clones: bool, written: list[int], tmp_path: Path
) -> None:
    """The base has the same tensors in another order, or with other metadata."""
    base, target, delta = pair(tmp_path, SHARDS, changed="a")
    shard = base / "model-00002-of-00002.safetensors"
    for number, (tensors, metadata) in enumerate(
        [(dict(reversed(SHARDS[1].items())), None), (SHARDS[1], {"format": "np"})]
    ):
        write_file(shard, tensors, metadata)
        sparsedelta.apply(base, delta, tmp_path / f"out {number}")
        assert_same_files(target, tmp_path / f"out {number}")
    assert sum(written) >= 2 * sum(path.stat().st_size for path in target.glob("*.safetensors"))


def test_copying_within_the_system(tmp_path: Path) -> None:
    data = np.random.default_rng(0).bytes(300_000)
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(data)
    with open(source, "rb") as one, open(target, "w+b") as other:
        if not copy_range(one.fileno(), 1000, other.fileno(), 77, 200_000):
            pytest.skip("the system does not copy between files")
        assert target.read_bytes() == bytes(77) + data[1000:201_000]
        assert not copy_range(one.fileno(), 299_000, other.fileno(), 0, 2000)  # it ends before
        if clone(one.fileno(), other.fileno()):
            assert target.read_bytes()[:300_000] == data
