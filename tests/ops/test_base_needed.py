"""Deltas coded by their base's exponents: small, exact, and clear about what they need."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers import assert_same_files, of_array, small_chunks, write_file

import sparsedelta
from sparsedelta import Delta
from sparsedelta.errors import BaseMismatch, BaseNeeded, MismatchError

ROWS, COLUMNS = 256, 192


def checkpoint(path: Path, n_steps: int, *, seed: int = 0, rows: slice = slice(None)) -> Path:
    """Write a tensor after some small steps: what is small changes more often, and by more.

    Rows outside ``rows`` do not move.
    """
    draw = np.random.default_rng(100 + seed)
    start = np.random.default_rng(0).normal(0, 0.02, (ROWS, COLUMNS)).astype("<f4")
    master = start.copy()
    for _ in range(n_steps):
        master[rows] += (draw.normal(0, 3e-6, master.shape).astype("<f4"))[rows]
    bits = [(array.view("<u4") >> 16).astype("<u2") for array in (start, master)]
    write_file(path / "model.safetensors", {"w": of_array("BF16", bits[1])})
    return path


@pytest.fixture
def steps(tmp_path: Path) -> list[Path]:
    return [checkpoint(tmp_path / str(n), n) for n in range(3)]


def needs_base(delta: Delta) -> bool:
    return any(chunk.coding.classes for row in delta.tensors for chunk in row.chunks)


def check(delta: Delta, base: Path, target: Path) -> None:
    out = base.parent / "out"
    delta.save(out.with_suffix(".sd"), overwrite=True)
    sparsedelta.apply(base, out.with_suffix(".sd"), out, overwrite=True)
    assert_same_files(target, out)


def test_they_are_smaller_and_make_the_target(steps: list[Path]) -> None:
    with (
        sparsedelta.diff(steps[0], steps[1]) as delta,
        sparsedelta.diff(steps[0], steps[1], standalone=True) as alone,
        sparsedelta.diff(steps[0], steps[1], level="fast") as fast,
    ):
        assert [needs_base(one) for one in (delta, alone, fast)] == [True, False, False]
        sizes = [sum(row.coded_bytes for row in one.tensors) for one in (delta, alone, fast)]
        assert sizes[0] < 0.9 * sizes[1] < sizes[2]
        for one in (delta, alone, fast):
            check(one, steps[0], steps[1])
            sparsedelta.verify(one)
            sparsedelta.verify(one, base=steps[0], target=steps[1])


def test_in_several_chunks(steps: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    small_chunks(monkeypatch, 30_016, 4096)
    with sparsedelta.diff(steps[0], steps[1]) as delta:
        assert needs_base(delta)
        check(delta, steps[0], steps[1])


def test_another_base_is_said_to_be_that(steps: list[Path], tmp_path: Path) -> None:
    other = checkpoint(tmp_path / "other", 5, seed=3)
    with sparsedelta.diff(steps[0], steps[1]) as delta:
        delta.save(tmp_path / "delta.sd")
    with pytest.raises(BaseMismatch):
        sparsedelta.apply(other, tmp_path / "delta.sd", tmp_path / "out")
    with pytest.raises(MismatchError):
        sparsedelta.apply(steps[1], tmp_path / "delta.sd", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_chains_are_stacked_with_the_base(steps: list[Path]) -> None:
    with sparsedelta.diff(steps[0], steps[1]) as one, sparsedelta.diff(steps[1], steps[2]) as two:
        with pytest.raises(BaseNeeded, match="--base"):
            sparsedelta.stack(one, two)
        with sparsedelta.stack(one, two, base=steps[0]) as both:
            check(both, steps[0], steps[2])


def test_siblings_are_stacked_with_the_base(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base", 0)
    upper = checkpoint(tmp_path / "upper", 1, rows=slice(0, 100))
    lower = checkpoint(tmp_path / "lower", 1, rows=slice(100, None))
    both = checkpoint(tmp_path / "both", 1)
    with sparsedelta.diff(base, upper) as one, sparsedelta.diff(base, lower) as two:
        assert needs_base(one)
        assert needs_base(two)
        with pytest.raises(BaseNeeded):
            sparsedelta.stack(one, two)
        with sparsedelta.stack(one, two, base=base) as stacked:
            check(stacked, base, both)


def test_they_are_inverted_with_the_base(steps: list[Path]) -> None:
    with sparsedelta.diff(steps[0], steps[1]) as delta:
        with pytest.raises(BaseNeeded, match="coded with the exponents of the base"):
            sparsedelta.invert(delta)
        with sparsedelta.invert(delta, base=steps[0]) as inverse:
            check(inverse, steps[1], steps[0])


def test_a_chain_whose_tensor_grows_and_shrinks(steps: list[Path], tmp_path: Path) -> None:
    longer = tmp_path / "longer"
    bits = np.random.default_rng(5).integers(0, 1 << 16, (9, COLUMNS)).astype("<u2")
    (old,) = (np.fromfile(steps[1] / "model.safetensors", "<u2")[-ROWS * COLUMNS :],)
    grown = np.concatenate([old, bits.ravel()]).reshape(-1, COLUMNS)
    write_file(longer / "model.safetensors", {"w": of_array("BF16", grown)})
    with (
        sparsedelta.diff(steps[0], steps[1]) as one,
        sparsedelta.diff(steps[1], longer) as two,
        sparsedelta.diff(longer, steps[2]) as three,
        sparsedelta.stack(one, two, three, base=steps[0]) as stacked,
    ):
        assert needs_base(one)
        assert needs_base(three)
        check(stacked, steps[0], steps[2])


def test_unknown_level(steps: list[Path]) -> None:
    with pytest.raises(ValueError, match="level is 'best', expected one of fast, default, max"):
        sparsedelta.diff(steps[0], steps[1], level="best")


def test_merging_needs_no_standalone_deltas(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base", 0)
    tuned = [checkpoint(tmp_path / str(seed), 1, seed=seed) for seed in (1, 2)]
    merged = []
    for standalone in (False, True):
        deltas = [sparsedelta.diff(base, one, standalone=standalone) for one in tuned]
        assert [needs_base(one) for one in deltas] == [not standalone] * 2
        with sparsedelta.merge(base, *deltas) as result:
            result.save(tmp_path / "merged.sd", overwrite=True)
        out = tmp_path / f"out-{standalone}"
        sparsedelta.apply(base, tmp_path / "merged.sd", out)
        merged.append(out)
        for delta in deltas:
            delta.close()
    assert_same_files(*merged)
