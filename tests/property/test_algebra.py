"""Laws of stacking and inverting, over value encodings, dtypes, structure changes and files."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

from helpers import Raw
from hypothesis import given, settings
from hypothesis import strategies as st
from property.algebra_strategies import IN_PLACE, WIDTHS, Place, State, place, states, values

import sparsedelta
from sparsedelta import Delta
from sparsedelta.errors import ConflictError

FEW = settings(max_examples=60, deadline=None)


def chain(here: Place, folders: Sequence[Path], encodings: Sequence[str]) -> list[Delta]:
    """Return the deltas from each checkpoint to the next."""
    pairs = zip(folders, folders[1:], encodings, strict=False)
    return [here.diff(a, b, values=v, info={"to": b.name}) for a, b, v in pairs]


def stacked(here: Place, deltas: Sequence[Delta], base: Path) -> Delta:
    """Return the stack; where encodings meet that cannot without the base, with that."""
    used = {row.change.values for d in deltas for row in d.tensors if row.change}
    if len(used) < 2:
        return here.stack(*deltas)
    try:
        return here.stack(*deltas)
    except ConflictError:
        return here.stack(*deltas, base=base)


def check_makes(delta: Delta, base: Path, target: Path) -> None:
    """Check that a delta makes every file of a target, and that everything in it is right."""
    report = sparsedelta.verify(delta, base=base, target=target)
    assert report.base_checked
    assert report.target_checked


@FEW
@given(states(4), st.lists(values, min_size=3, max_size=3))
def test_a_stacked_chain_does_what_the_deltas_do(sequence: list[State], codes: list[str]) -> None:
    with place() as here:
        folders = here.checkpoints(sequence)
        deltas = chain(here, folders, codes)
        result = here.saved(stacked(here, deltas, folders[0]), "stack")
        check_makes(result, folders[0], folders[-1])
        sparsedelta.apply(folders[0], result, here.path / "out")


@FEW
@given(states(4), st.lists(values, min_size=3, max_size=3))
def test_with_the_base_a_stack_makes_the_same(sequence: list[State], codes: list[str]) -> None:
    with place() as here:
        folders = here.checkpoints(sequence)
        result = here.stack(*chain(here, folders, codes), base=folders[0])
        check_makes(here.saved(result, "stack"), folders[0], folders[-1])
        assert all(row.change.touched for row in result.tensors if row.change)


@FEW
@given(states(4), st.booleans())
def test_stacking_is_associative(sequence: list[State], with_base: bool) -> None:
    with place() as here:
        folders = here.checkpoints(sequence)
        a, b, c = chain(here, folders, ["ulp"] * 3)
        base = folders[0] if with_base else None
        whole = here.stack(a, b, c, base=base)
        left = here.stack(here.stack(a, b, base=base), c, base=base)
        right = here.stack(a, here.stack(b, c, base=folders[1] if with_base else None), base=base)
        for result in (whole, left, right):
            check_makes(result, folders[0], folders[-1])
            assert result.base == whole.base
            assert result.target == whole.target
            assert result.info == whole.info
            assert [(r.name, r.base, r.target) for r in result.tensors] == [
                (r.name, r.base, r.target) for r in whole.tensors
            ]


@FEW
@given(states(4, IN_PLACE))
def test_grouping_leaves_the_coded_changes_alone(sequence: list[State]) -> None:
    with place() as here:
        a, b, c = chain(here, here.checkpoints(sequence), ["ulp"] * 3)
        whole = here.stack(a, b, c)
        for result in (here.stack(here.stack(a, b), c), here.stack(a, here.stack(b, c))):
            assert [(r.name, r.change and r.change.chunks) for r in result.tensors] == [
                (r.name, r.change and r.change.chunks) for r in whole.tensors
            ]


@FEW
@given(states(4, IN_PLACE))
def test_differences_stack_to_what_diff_finds(sequence: list[State]) -> None:
    with place() as here:
        folders = here.checkpoints(sequence)
        deltas = chain(here, folders, ["ulp"] * 3)
        direct = here.diff(folders[0], folders[-1], info={"to": "s3"})
        for result in (here.stack(*deltas), here.stack(*deltas, base=folders[0])):
            assert result.nnz == direct.nnz
            for found, wanted in zip(result.tensors, direct.tensors, strict=True):
                assert (found.name, found.base, found.target) == (
                    wanted.name, wanted.base, wanted.target,
                )  # fmt: skip
                assert (found.change is None) == (wanted.change is None)
                if found.change and wanted.change:
                    assert found.change.chunks == wanted.change.chunks
                    assert found.change.keep == wanted.change.keep
                    assert found.change.touched in (None, wanted.change.touched)


@FEW
@given(states(2), values)
def test_the_identity_changes_nothing(sequence: list[State], code: str) -> None:
    with place() as here:
        base, target = here.checkpoints(sequence)
        before, after = here.diff(base, base), here.diff(target, target)
        (delta,) = chain(here, [base, target], [code])
        for result in (here.stack(before, delta), here.stack(delta, after)):
            check_makes(result, base, target)
            assert result.tensors == delta.tensors
            assert result.target == delta.target


@FEW
@given(states(2), values)
def test_the_inverse_gives_the_base_back(sequence: list[State], code: str) -> None:
    with place() as here:
        base, target = here.checkpoints(sequence)
        (delta,) = chain(here, [base, target], [code])
        inverse = here.saved(here.invert(delta, base=base), "undo")
        check_makes(inverse, target, base)
        assert all(row.change.touched for row in inverse.tensors if row.change)
        again = here.invert(inverse, base=target)
        check_makes(here.saved(again, "again"), base, target)
        assert dict(again.info) == dict(delta.info)
        nothing = here.stack(delta, inverse, base=base)
        check_makes(nothing, base, base)
        assert nothing.nnz == 0


@FEW
@given(states(2, IN_PLACE))
def test_differences_are_inverted_without_the_base(sequence: list[State]) -> None:
    with place() as here:
        base, target = here.checkpoints(sequence)
        (delta,) = chain(here, [base, target], ["ulp"])
        inverse = here.invert(delta)
        check_makes(here.saved(inverse, "undo"), target, base)
        assert inverse.tensors == here.diff(target, base).tensors
        assert here.bytes_of(here.invert(inverse)) == here.bytes_of(delta)
        assert here.stack(delta, inverse).nnz == 0


@FEW
@given(states(3, IN_PLACE))
def test_from_variant_to_variant(sequence: list[State]) -> None:
    with place() as here:
        base, one, other = here.checkpoints(sequence)
        to_one, to_other = here.diff(base, one), here.diff(base, other)
        across = here.stack(here.invert(to_one), to_other)
        check_makes(here.saved(across, "across"), one, other)


@FEW
@given(states(2, IN_PLACE), st.integers(0, 2**32), values, st.booleans())
def test_disjoint_siblings_have_all_changes(
    sequence: list[State], seed: int, code: str, with_base: bool
) -> None:
    with place() as here:
        base, both = sequence
        parts = split(base, both, seed)
        folders = here.checkpoints([base, *parts, both])
        deltas = [here.diff(folders[0], folder, values=code) for folder in folders[1:3]]
        result = here.stack(*deltas, base=folders[0] if with_base else None)
        check_makes(here.saved(result, "both"), folders[0], folders[-1])
        if with_base:
            direct = here.diff(folders[0], folders[-1], values=code)
            assert result.tensors == direct.tensors
            assert result.target == direct.target


def split(base: State, both: State, seed: int) -> list[State]:
    """Return two checkpoints, of which each has some of the changed elements of ``both``."""
    draw = random.Random(seed)
    tensors: list[dict[str, Raw]] = [{}, {}]
    for name, before in base.tensors.items():
        after, width = both.tensors[name], WIDTHS[before.dtype]
        halves = [bytearray(before.data), bytearray(before.data)]
        for start in range(0, len(before.data), width):
            draw.choice(halves)[start : start + width] = after.data[start : start + width]
        for made, data in zip(tensors, halves, strict=True):
            made[name] = before.with_data(bytes(data))
    return [State(made, base.files, base.sharded, base.spaced) for made in tensors]
