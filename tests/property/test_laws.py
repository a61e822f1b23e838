"""The laws of diff and apply, over checkpoints at random and in tiny chunks."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import reference_decoder
from helpers import assert_same_files, roundtrip, small_chunks, tree
from hypothesis import given
from hypothesis import strategies as st
from strategies import Plan, pairs, relaxed

import sparsedelta
from sparsedelta.errors import MismatchError
from sparsedelta.tensors import parallel

value_encodings = st.sampled_from(["ulp", "target"])
chunk_sizes = st.sampled_from([1, 2, 3, 7, 16, 1 << 24])
block_sizes = st.sampled_from([8, 16, 56, 1 << 19])


@contextmanager
def written(pair: tuple[Plan, Plan]) -> Iterator[tuple[Path, Path, Path]]:
    """Yield base and target on disk and a scratch folder."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        base, target = pair[0].write(root / "base"), pair[1].write(root / "target")
        (root / "scratch").mkdir()
        yield base, target, root / "scratch"


@contextmanager
def in_chunks(n_elements: int, block_bytes: int) -> Iterator[None]:
    """Write chunks of this size, and read blocks of that."""
    with pytest.MonkeyPatch.context() as patch:
        small_chunks(patch, n_elements, block_bytes)
        yield


@relaxed(150)
@given(pairs(), value_encodings, chunk_sizes, block_sizes)
def test_apply_undoes_diff(
    pair: tuple[Plan, Plan], values: str, n_elements: int, block_bytes: int
) -> None:
    with written(pair) as (base, target, scratch), in_chunks(n_elements, block_bytes):
        delta = roundtrip(base, target, scratch, values=values)
        report = sparsedelta.verify(delta, base=base, target=target)
        assert report.nnz == delta.nnz


@relaxed(100)
@given(pairs(), value_encodings, chunk_sizes)
def test_reference_decoder_agrees(pair: tuple[Plan, Plan], values: str, n_elements: int) -> None:
    with written(pair) as (base, target, scratch), in_chunks(n_elements, 16):
        with sparsedelta.diff(base, target, values=values) as delta:
            delta.save(scratch / "delta.sd")
        reference_decoder.apply(base, scratch / "delta.sd", scratch / "out")
        assert_same_files(target, scratch / "out")


@relaxed(50)
@given(pairs(), value_encodings, chunk_sizes)
def test_output_is_deterministic(pair: tuple[Plan, Plan], values: str, n_elements: int) -> None:
    with written(pair) as (base, target, scratch), in_chunks(n_elements, 16):
        saved = set()
        for n_workers in (1, 1, 5):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(parallel, "n_workers", lambda n=n_workers: n)
                with sparsedelta.diff(base, target, values=values) as delta:
                    delta.save(scratch / "delta.sd", overwrite=True)
            saved.add((scratch / "delta.sd").read_bytes())
        with sparsedelta.load(scratch / "delta.sd") as delta:
            delta.save(scratch / "again.sd")
            delta.save(scratch / "delta.sd", overwrite=True)  # over the file it reads from
        saved |= {(scratch / name).read_bytes() for name in ("again.sd", "delta.sd")}
        assert len(saved) == 1


@relaxed(40)
@given(pairs())
def test_every_verify_makes_the_same(pair: tuple[Plan, Plan]) -> None:
    with written(pair) as (base, target, scratch), sparsedelta.diff(base, target) as delta:
        for verify in ("full", "touched", "none"):
            sparsedelta.apply(base, delta, scratch / "out", verify=verify, overwrite=True)
            assert_same_files(target, scratch / "out")


@relaxed(40)
@given(pairs(), value_encodings)
def test_nothing_changed(pair: tuple[Plan, Plan], values: str) -> None:
    with written(pair) as (base, _, scratch):
        same = scratch.parent / "same"
        (shutil.copytree if base.is_dir() else shutil.copy)(base, same)
        delta = roundtrip(base, same, scratch, values=values)
        assert delta.nnz == 0
        # An empty tensor without a counterpart of its name is made from nothing.
        assert all(row.is_copied for row in delta.tensors)
        assert not any(file.stored for file in delta.target.side_files)


@relaxed(40)
@given(pairs(), value_encodings)
def test_only_what_changed_is_touched(pair: tuple[Plan, Plan], values: str) -> None:
    with written(pair) as (base, target, _):
        with sparsedelta.diff(base, target, values=values) as delta:
            for row in delta.tensors:
                if row.base and row.base.spec == row.target:
                    assert row.is_copied
                assert row.nnz <= row.target.n_elements
            changed = {row.key for row in delta.tensors if not row.is_copied}
        with sparsedelta.diff(target, base, values=values) as back:
            mine = {row.key: row for row in back.tensors if row.base and row.base.key == row.key}
            there = mine.keys() & {
                row.key for row in delta.tensors if row.base and row.base.key == row.key
            }
            assert {key for key in there if not mine[key].is_copied} == changed & there


@relaxed(40)
@given(pairs())
def test_targets_and_bases_are_told_apart(pair: tuple[Plan, Plan]) -> None:
    """Applied to its target a delta is refused, unless that holds all it is made from; then it makes the same."""
    with written(pair) as (base, target, scratch), sparsedelta.diff(base, target) as delta:
        before, code = tree(target), ""
        try:
            sparsedelta.apply(target, delta, scratch / "out")
        except MismatchError as error:
            code = error.code
        if code:
            assert not list(scratch.iterdir())
        else:
            assert_same_files(target, scratch / "out")
        assert tree(target) == before


@relaxed(100)
@given(pairs(), st.data())
def test_a_base_with_one_byte_changed_is_refused_or_makes_the_same(
    pair: tuple[Plan, Plan], data: st.DataObject
) -> None:
    """Whatever is not used may differ; all else is noticed."""
    with written(pair) as (base, target, scratch), sparsedelta.diff(base, target) as delta:
        files = [path for path in (base, *sorted(base.rglob("*"))) if path.is_file()]
        path = data.draw(st.sampled_from(files))
        content = bytearray(path.read_bytes())
        if not content:
            return
        content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        path.write_bytes(content)
        try:
            sparsedelta.apply(base, delta, scratch / "out")
        except sparsedelta.SparseDeltaError:
            assert not list(scratch.iterdir())
        else:
            assert_same_files(target, scratch / "out")
