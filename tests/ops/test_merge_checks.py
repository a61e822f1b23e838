"""A delta whose values are not those of its digests is not merged."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from helpers import noise, write_file

import sparsedelta
from sparsedelta import Delta
from sparsedelta.errors import BaseMismatch, Corrupt


def write_base(path: Path, dtype: str, step: int, n: int) -> Path:
    """Write eight tensors of ``n`` elements, so that they are merged as a group if they are small."""
    tensors = {f"{number}": noise(dtype, n, seed=number) for number in range(8)}
    if step:
        tensors = {name: one.changed(step, step + 5) for name, one in tensors.items()}
    return write_file(path, tensors)


@pytest.mark.parametrize("dtype", ["BF16", "F32", "I32"])
@pytest.mark.parametrize("n", [60, 40_000])
@pytest.mark.parametrize("number", [0, 5])
def test_values_of_another_delta(tmp_path: Path, dtype: str, n: int, number: int) -> None:
    base, one, other = (
        write_base(tmp_path / f"{step}.safetensors", dtype, step, n) for step in (0, 1, 2)
    )
    with sparsedelta.diff(base, one) as right, sparsedelta.diff(base, other) as wrong:
        rows, theirs = [*right.tensors], wrong.tensors[number]
        chunks = [
            replace(chunk, touched=their.touched)
            for chunk, their in zip(rows[number].chunks, theirs.chunks, strict=True)
        ]
        rows[number] = replace(rows[number], target=theirs.target, chunks=tuple(chunks))
        Delta(right.base, right.target, tuple(rows), {}, right.payload).save(tmp_path / "mixed.sd")
        with sparsedelta.load(tmp_path / "mixed.sd") as mixed:
            with pytest.raises(Corrupt, match=rf"tensor '{number}'.*the delta is inconsistent"):
                sparsedelta.merge(base, mixed)
            # A wrong base is reported as such, although it also gives other digests.
            with pytest.raises(BaseMismatch):
                sparsedelta.merge(one, mixed)
        with sparsedelta.merge(base, right) as merged:
            sparsedelta.apply(base, merged, tmp_path / "out")
        assert (tmp_path / "out").read_bytes() == one.read_bytes()
