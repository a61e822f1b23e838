"""Laws of stacking and inverting, over value encodings, dtypes, structure changes and files."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import Raw
from hypothesis import given
from hypothesis import strategies as st
from property.algebra_strategies import (
    IN_PLACE,
    SPAN,
    WIDTHS,
    Place,
    State,
    place,
    spans,
    states,
    values,
)
from strategies import relaxed

import sparsedelta
from sparsedelta import Delta
from sparsedelta.errors import BaseNeeded
from sparsedelta.format.records import Row

FEW = relaxed(60)


Codes = list[tuple[str, int]]  # value encoding and span of each delta
PLAIN: Codes = [("ulp", SPAN)] * 3


def codes(n: int) -> st.SearchStrategy[Codes]:
    """Return how a number of deltas are coded."""
    return st.lists(st.tuples(values, spans), min_size=n, max_size=n)


def chain(here: Place, folders: Sequence[Path], coded: Codes) -> list[Delta]:
    """Return the deltas from each checkpoint to the next."""
    steps = zip(folders, folders[1:], coded, strict=False)
    return [here.diff(a, b, values=v, span=n, info={"to": b.name}) for a, b, (v, n) in steps]


def stacked(here: Place, deltas: Sequence[Delta], base: Path) -> Delta:
    """Return the stack; where encodings meet that cannot without the base, with that."""
    used = {c.coding.values for d in deltas for row in d.tensors for c in row.chunks}
    if len(used) < 2:
        return here.stack(*deltas)
    try:
        return here.stack(*deltas)
    except BaseNeeded:
        return here.stack(*deltas, base=base)


def check_makes(delta: Delta, base: Path, target: Path) -> None:
    """Check that a delta makes every file of a target, and that everything in it is right."""
    report = sparsedelta.verify(delta, base=base, target=target)
    assert report.base_checked
    assert report.target_checked


@FEW
@given(states(4), codes(3))
def test_a_stacked_chain_does_what_the_deltas_do(sequence: list[State], coded: Codes) -> None:
    with place() as here:
        folders = here.checkpoints(sequence)
        deltas = chain(here, folders, coded)
        result = here.saved(stacked(here, deltas, folders[0]), "stack")
        check_makes(result, folders[0], folders[-1])
        sparsedelta.apply(folders[0], result, here.path / "out")


@FEW
@given(states(4), codes(3))
def test_with_the_base_a_stack_makes_the_same(sequence: list[State], coded: Codes) -> None:
    with place() as here:
        folders = here.checkpoints(sequence)
        result = here.stack(*chain(here, folders, coded), base=folders[0])
        check_makes(here.saved(result, "stack"), folders[0], folders[-1])
        assert all(chunk.touched for row in result.tensors for chunk in row.chunks)


@FEW
@given(states(4), st.booleans(), st.lists(spans, min_size=3, max_size=3))
def test_stacking_is_associative(sequence: list[State], with_base: bool, sizes: list[int]) -> None:
    with place() as here:
        folders = here.checkpoints(sequence)
        a, b, c = chain(here, folders, [("ulp", size) for size in sizes])
        base = folders[0] if with_base else None
        whole = here.stack(a, b, c, base=base)
        left = here.stack(here.stack(a, b, base=base), c, base=base)
        right = here.stack(a, here.stack(b, c, base=folders[1] if with_base else None), base=base)
        for result in (whole, left, right):
            check_makes(result, folders[0], folders[-1])
            assert result.target == whole.target
            assert result.info == whole.info
            assert [(r.key, r.target) for r in result.tensors] == [
                (r.key, r.target) for r in whole.tensors
            ]
            if not with_base:  # else what came back may be found under the name it has on the way
                assert result.base == whole.base
                assert [r.base for r in result.tensors] == [r.base for r in whole.tensors]


@FEW
@given(states(4, IN_PLACE))
def test_grouping_leaves_the_coded_changes_alone(sequence: list[State]) -> None:
    with place() as here:
        a, b, c = chain(here, here.checkpoints(sequence), PLAIN)
        whole = here.stack(a, b, c)
        for result in (here.stack(here.stack(a, b), c), here.stack(a, here.stack(b, c))):
            assert list(map(untouched, result.tensors)) == list(map(untouched, whole.tensors))


@FEW
@given(states(4, IN_PLACE))
def test_differences_stack_to_what_diff_finds(sequence: list[State]) -> None:
    with place() as here:
        folders = here.checkpoints(sequence)
        deltas = chain(here, folders, PLAIN)
        direct = here.diff(folders[0], folders[-1], info={"to": "s3"})
        for result in (here.stack(*deltas), here.stack(*deltas, base=folders[0])):
            assert result.nnz == direct.nnz
            for found, wanted in zip(result.tensors, direct.tensors, strict=True):
                assert untouched(found) == untouched(wanted)
                for one, other in zip(found.chunks, wanted.chunks, strict=True):
                    assert one.touched in (None, other.touched)


def untouched(row: Row) -> Row:
    """Return a row without the digests of touched elements, which a stack may not know."""
    return replace(row, chunks=tuple(replace(chunk, touched=None) for chunk in row.chunks))


@FEW
@given(states(2), codes(1))
def test_the_identity_changes_nothing(sequence: list[State], coded: Codes) -> None:
    with place() as here:
        base, target = here.checkpoints(sequence)
        before, after = here.diff(base, base), here.diff(target, target)
        (delta,) = chain(here, [base, target], coded)
        for result in (here.stack(before, delta), here.stack(delta, after)):
            check_makes(result, base, target)
            assert result.tensors == delta.tensors
            assert result.target == delta.target


@FEW
@given(states(2), codes(1))
def test_the_inverse_gives_the_base_back(sequence: list[State], coded: Codes) -> None:
    with place() as here:
        base, target = here.checkpoints(sequence)
        (delta,) = chain(here, [base, target], coded)
        inverse = here.saved(here.invert(delta, base=base), "undo")
        check_makes(inverse, target, base)
        assert all(chunk.touched for row in inverse.tensors for chunk in row.chunks)
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
        (delta,) = chain(here, [base, target], PLAIN)
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
@given(states(2, IN_PLACE), st.integers(0, 2**32), codes(2), st.booleans())
def test_disjoint_siblings_have_all_changes(
    sequence: list[State], seed: int, coded: Codes, with_base: bool
) -> None:
    with place() as here:
        base, both = sequence
        parts = split(base, both, seed)
        folders = here.checkpoints([base, *parts, both])
        deltas = [
            here.diff(folders[0], folder, values=value, span=n)
            for folder, (value, n) in zip(folders[1:3], coded, strict=True)
        ]
        if with_base or meet(*deltas):
            result = here.stack(*deltas, base=folders[0])
            direct = here.diff(folders[0], folders[-1])
            assert result.target_fingerprint == direct.target_fingerprint
            assert result.target == direct.target
            if coded == PLAIN[:2]:
                assert result.tensors == direct.tensors
        else:
            result = here.stack(*deltas)
        check_makes(here.saved(result, "both"), folders[0], folders[-1])


def meet(one: Delta, other: Delta) -> bool:
    """Return whether two deltas of one base have chunks that overlap; stacking them is then refused."""
    found = any(
        a.start < b.end and b.start < a.end
        for row, beside in zip(one.tensors, other.tensors, strict=True)
        for a in row.chunks
        for b in beside.chunks
    )
    if found:
        with pytest.raises(BaseNeeded, match="--base"):
            sparsedelta.stack(one, other)
    return found


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
