"""Many small tensors in one call of the compiled kernels: the same files, digests and refusals as tensor by tensor."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from blake3 import blake3
from helpers import Raw, write_file
from kernel_cases import native, numpy_alone

import sparsedelta
from sparsedelta import SparseDeltaError
from sparsedelta.dtypes import DTYPES
from sparsedelta.format.columns import columns_of
from sparsedelta.format.delta import load
from sparsedelta.tensors.small import groups, handled

NAMES = ("BF16", "F32", "I8", "F64", "BOOL", "F8_E4M3", "I32")
SIZES = (1, 3, 40, 64, 500, 513, 3000)

needs_kernels = pytest.mark.skipif(native is None, reason="the compiled kernels are not built")


def pair(folder: Path, *, level: str = "default") -> tuple[Path, Path, Path]:
    """Write a base, a target and their delta: many small tensors, coded in every way that the encoder chooses."""
    draw = np.random.default_rng(7)
    base: dict[str, Raw] = {}
    target: dict[str, Raw] = {}
    for number in range(280):
        dtype = DTYPES[NAMES[number % len(NAMES)]]
        n = SIZES[number // len(NAMES) % len(SIZES)]
        before = draw.integers(0, 256, n * dtype.width).astype(np.uint8).view(dtype.view)
        share = (0.0, 0.01, 0.3, 0.97, 1.0)[number % 5]
        chosen = draw.random(n) < share
        steps = draw.integers(1, 3 if number % 2 else 200, n).astype(dtype.view)
        after = np.where(chosen, before + steps, before)
        name = f"layers.{number}.weight"
        if number % 31 != 30:
            base[name] = Raw(dtype.name, (n,), before.tobytes())
        target[name] = Raw(dtype.name, (n,), after.tobytes())
    paths = folder / "base.safetensors", folder / "target.safetensors", folder / "delta.sd"
    write_file(paths[0], base)
    write_file(paths[1], target)
    with sparsedelta.diff(paths[0], paths[1], level=level) as delta:
        delta.save(paths[2])
    return paths


def outcome(work: Callable[[], Any]) -> tuple[str, str]:
    """Return the code and message of the error that ``work`` raises; empty if it raises none."""
    try:
        work()
    except SparseDeltaError as error:
        return error.code, str(error)
    return "", ""


@needs_kernels
@pytest.mark.parametrize("level", ["fast", "default"])
def test_most_of_them_are_in_groups(tmp_path: Path, level: str) -> None:
    with load(pair(tmp_path, level=level)[2]) as delta:
        columns = columns_of(delta.tensors)
        assert columns is not None
        assert handled(columns).mean() > 0.7
        found = groups(columns, handled(columns), None)
        assert sum(end - start for start, end in found) > 150
        codings = {(one.index, one.packing) for one in columns.chunks.codings}
        assert {"gaps", "bitmap", "rice"} <= {index for index, _ in codings}
        packings = {"planes"} if level == "fast" else {"planes", "steps"}
        assert packings <= {packing for _, packing in codings}


@pytest.mark.parametrize("check", ["full", "touched", "none"])
def test_apply_rebuilds_every_byte(tmp_path: Path, check: Any) -> None:
    base, target, delta = pair(tmp_path)
    sparsedelta.apply(base, delta, tmp_path / "out", verify=check)
    assert (tmp_path / "out").read_bytes() == target.read_bytes()
    with numpy_alone():
        sparsedelta.apply(base, delta, tmp_path / "slow", verify=check)
    assert (tmp_path / "slow").read_bytes() == target.read_bytes()
    report = sparsedelta.verify(delta, base=base, target=target)
    assert report.n_tensors == 280
    with numpy_alone():
        assert sparsedelta.verify(delta, base=base, target=target) == report


def test_damage_is_refused_with_the_same_words(tmp_path: Path) -> None:
    base, _, delta = pair(tmp_path)
    whole, draw = delta.read_bytes(), random.Random(3)
    with load(delta) as opened:
        n_payload = opened.coded_bytes
    for _ in range(20):
        damaged = bytearray(whole)
        damaged[len(whole) - 1 - draw.randrange(n_payload)] ^= 1 << draw.randrange(8)
        delta.write_bytes(damaged)
        for work in (
            lambda: sparsedelta.verify(delta),
            lambda: sparsedelta.apply(base, delta, tmp_path / "out", overwrite=True),
        ):
            found = outcome(work)
            with numpy_alone():
                assert found == outcome(work)
            assert found[0] == "corrupt"


def test_another_base_is_refused_with_the_same_words(tmp_path: Path) -> None:
    base, _, delta = pair(tmp_path)
    whole, draw = base.read_bytes(), random.Random(4)
    for check in ("full", "touched"):
        for _ in range(10):
            other = bytearray(whole)
            other[len(whole) - 1 - draw.randrange(len(whole) // 2)] ^= 1 << draw.randrange(8)
            base.write_bytes(other)

            def work(check: Any = check) -> None:
                sparsedelta.apply(base, delta, tmp_path / "out", verify=check, overwrite=True)

            found = outcome(work)
            with numpy_alone():
                assert found == outcome(work)
            if check == "full":
                assert found[0] == "base_mismatch"


@needs_kernels
@pytest.mark.parametrize("level", ["fast", "default", "max"])
@pytest.mark.parametrize("seed", range(2))
def test_a_few_changes_are_coded_as_one_by_one(tmp_path: Path, level: str, seed: int) -> None:
    """The kernel codes up to 32 changes, repeated ones too; the delta is the one of single tensors."""
    draw = np.random.default_rng(seed)
    base: dict[str, Raw] = {}
    target: dict[str, Raw] = {}
    for number in range(300):
        dtype = DTYPES[NAMES[number // 20 % len(NAMES)]]
        n = int(draw.choice([9, 33, 64, 200, 513, 3000]))
        before = draw.integers(0, 256, n * dtype.width).astype(np.uint8).view(dtype.view)
        k = min(n, int(draw.integers(36)))
        evenly = (draw.integers(n) + np.arange(k) * draw.integers(1, 5)) % n
        where = evenly if number % 2 else draw.choice(n, k, replace=False)
        steps = (
            draw.geometric(0.7, k) * draw.choice([-1, 1], k), np.tile(draw.integers(1, 20, 8), 5)[:k],
            draw.integers(1, 100, k), np.full(k, draw.integers(1, 4)),
        )[number % 4]  # fmt: skip
        after = before.copy()
        after[where] += steps.astype(dtype.view)
        for tensors, bits in ((base, before), (target, after)):
            tensors[f"layers.{number}"] = Raw(dtype.name, (n,), bits.tobytes())
    write_file(tmp_path / "base", base)
    write_file(tmp_path / "target", target)
    for name, most in (("grouped", 4), ("one by one", 1 << 20)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sparsedelta.tensors.small_pairs.FEWEST", most)
            with sparsedelta.diff(tmp_path / "base", tmp_path / "target", level=level) as delta:
                delta.save(tmp_path / name)
    assert (tmp_path / "grouped").read_bytes() == (tmp_path / "one by one").read_bytes()


@needs_kernels
def test_digests_of_many_messages() -> None:
    draw = random.Random(1)
    edges = (0, 1, 63, 64, 65, 1023, 1024, 1025, 2048, 2049, 5000, 7168)
    for _ in range(60):
        sizes = [draw.choice([*edges, draw.randrange(40_000)]) for _ in range(draw.randrange(30))]
        data = draw.randbytes(sum(sizes))
        ends = np.cumsum(sizes, dtype=np.int64)
        found = np.empty(32 * len(sizes), np.uint8)
        native.digests_of(data, ends, 32, found)  # type: ignore[union-attr]
        parts = [data[end - size : end] for size, end in zip(sizes, ends.tolist(), strict=True)]
        assert found.tobytes() == b"".join(blake3(part).digest() for part in parts)


@needs_kernels
def test_wrong_columns_are_refused() -> None:
    """Whatever the table holds, the kernel marks the row as not rebuilt, and touches nothing outside of its arrays."""
    draw = np.random.default_rng(5)
    base, payload = np.zeros(64, np.uint8), np.zeros(32, np.uint8)
    digests, stored = np.zeros(64, np.uint8), np.array([3, 2, 2], np.int64)
    usual = [0, 0, 64, 2, -1, -1, 0, 0, 32, 2, 2, 0, 0, 0, 0, 16]
    values = np.array([-(1 << 63), -2, -1, 0, 1, 2, 3, 8, 33, 64, 65, 1 << 31, (1 << 63) - 1])
    for _ in range(3000):
        table = np.array([usual, usual], np.int64)
        for _ in range(draw.integers(1, 4)):
            table[draw.integers(2), draw.integers(16)] = draw.choice(values)
        out, good = np.zeros(64, np.uint8), np.zeros(2, np.uint8)
        native.rebuild_small(base, payload, digests, stored, table, out, good)  # type: ignore[union-attr]
        assert set(good.tolist()) <= {0, 1}
