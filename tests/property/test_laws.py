"""The laws of diff and apply, over checkpoints at random and in tiny chunks."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import _reference_manifest
import pytest
import reference_decoder
from helpers import assert_same_files, roundtrip, small_chunks, tree
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import Plan, pairs, relaxed

import sparsedelta
from sparsedelta.errors import CheckpointError
from sparsedelta.tensors import parallel

value_encodings = st.sampled_from(["ulp", "target"])
chunk_sizes = st.sampled_from([1, 2, 3, 7, 16, 1 << 24])
block_sizes = st.sampled_from([8, 16, 56, 1 << 19])


@contextmanager
def written(pair: tuple[Plan, Plan]) -> Iterator[tuple[Path, Path, Path]]:
    """Yield base and target on disk and a scratch folder; gives up on names that clash."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        base, target = pair[0].write(root / "base"), pair[1].write(root / "target")
        (root / "scratch").mkdir()
        try:
            sparsedelta.diff(target, base).close()
            sparsedelta.diff(base, target).close()
        except CheckpointError as error:
            assume("occurs twice" not in str(error))  # model's "m:w" and m's "w"
            raise
        yield base, target, root / "scratch"


@contextmanager
def in_chunks(n_elements: int, block_bytes: int) -> Iterator[None]:
    """Work in chunks of this size, the reference decoder too."""
    with pytest.MonkeyPatch.context() as patch:
        small_chunks(patch, n_elements, block_bytes)
        for module in (reference_decoder, _reference_manifest):
            if hasattr(module, "SPAN"):
                patch.setattr(module, "SPAN", n_elements)
        yield


@relaxed(300)
@given(pairs(), value_encodings, chunk_sizes, block_sizes)
def test_apply_undoes_diff(
    pair: tuple[Plan, Plan], values: str, n_elements: int, block_bytes: int
) -> None:
    with written(pair) as (base, target, scratch), in_chunks(n_elements, block_bytes):
        delta = roundtrip(base, target, scratch, values=values)
        report = sparsedelta.verify(delta, base=base, target=target)
        assert report.nnz == delta.nnz


@relaxed(150)
@given(pairs(), value_encodings, chunk_sizes)
def test_reference_decoder_agrees(pair: tuple[Plan, Plan], values: str, n_elements: int) -> None:
    with written(pair) as (base, target, scratch), in_chunks(n_elements, 16):
        with sparsedelta.diff(base, target, values=values) as delta:
            delta.save(scratch / "delta.sd")
        reference_decoder.apply(base, scratch / "delta.sd", scratch / "out")
        assert_same_files(target, scratch / "out")


@relaxed(80)
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


@relaxed(60)
@given(pairs())
def test_every_verify_makes_the_same(pair: tuple[Plan, Plan]) -> None:
    with written(pair) as (base, target, scratch), sparsedelta.diff(base, target) as delta:
        for verify in ("full", "touched", "none"):
            sparsedelta.apply(base, delta, scratch / "out", verify=verify, overwrite=True)
            assert_same_files(target, scratch / "out")


@relaxed(60)
@given(pairs(), value_encodings)
def test_nothing_changed(pair: tuple[Plan, Plan], values: str) -> None:
    with written(pair) as (base, _, scratch):
        same = scratch.parent / "same"
        (shutil.copytree if base.is_dir() else shutil.copy)(base, same)
        delta = roundtrip(base, same, scratch, values=values)
        assert delta.nnz == 0
        assert not any(row.change for row in delta.tensors)
        assert not any(file.carried for file in delta.target.side_files)


@relaxed(60)
@given(pairs(), value_encodings)
def test_only_what_changed_is_touched(pair: tuple[Plan, Plan], values: str) -> None:
    with written(pair) as (base, target, _):
        with sparsedelta.diff(base, target, values=values) as delta:
            for row in delta.tensors:
                if row.base and row.target and row.base == row.target:
                    assert row.change is None
                if row.change is not None and row.target is not None:
                    assert row.change.nnz <= row.target.n_elements
            changed = {row.name for row in delta.tensors if row.change}
        with sparsedelta.diff(target, base, values=values) as back:
            there = {row.name for row in back.tensors if row.base and row.target}
            assert {row.name for row in back.tensors if row.change} & there == changed & there


@relaxed(60)
@given(pairs())
def test_targets_and_bases_are_told_apart(pair: tuple[Plan, Plan]) -> None:
    """Applied to its target a delta is refused, unless the target has the base's tensors."""
    with written(pair) as (base, target, scratch), sparsedelta.diff(base, target) as delta:
        before = tree(target)
        if delta.base.fingerprint == delta.target.fingerprint:
            return
        with pytest.raises(sparsedelta.SparseDeltaError) as caught:
            sparsedelta.apply(target, delta, scratch / "out")
        assert getattr(caught.value, "code", None) in {
            "already_applied",
            "structure_mismatch",
            "base_mismatch",
        }
        assert not list(scratch.iterdir())
        assert tree(target) == before
