"""Applies a delta to a model in memory, in place and bit for bit.

All tensors are checked before the first one is written. Time and memory are in proportion to the number of touched
elements.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import get_args

from sparsedelta._typing import Model, ModelCheck, Names
from sparsedelta.codecs.chunk import base_needed
from sparsedelta.errors import (
    AlreadyApplied,
    BaseMismatch,
    ConflictError,
    Corrupt,
    MismatchError,
    PartlyApplied,
    StructureMismatch,
)
from sparsedelta.format.delta import Delta
from sparsedelta.format.records import Row
from sparsedelta.interrupts import uninterrupted
from sparsedelta.live.coordinates import quantized_kind
from sparsedelta.live.decoding import State, decode_place, wanted_and_done
from sparsedelta.live.held import changed_digest, whole_digest
from sparsedelta.live.patch import Patch, Writer
from sparsedelta.live.places import Place, Places, find_places
from sparsedelta.live.ranks import Alone, Group, group_of
from sparsedelta.progress import Silent
from sparsedelta.tensors.changes import naming
from sparsedelta.tensors.parallel import Pace


def apply_(
    delta: Delta, model: Model, *, verify: ModelCheck = "touched", names: Names = None
) -> None:
    """Change a model in memory from the base to the target; see ``Delta.apply_``."""
    group = group_of(model)
    with group.entered():
        patches = prepare(delta, model, verify=verify, names=names, undo=False, group=group)
        Writer(group=group).write(patches)


def revert_(
    delta: Delta, model: Model, *, verify: ModelCheck = "touched", names: Names = None
) -> None:
    """Change a model in memory from the target back to the base; see ``Delta.revert_``."""
    group = group_of(model)
    with group.entered():
        patches = prepare(delta, model, verify=verify, names=names, undo=True, group=group)
        Writer(group=group).write([patch.reversed() for patch in patches])


@contextmanager
def applied(
    delta: Delta, model: Model, *, verify: ModelCheck = "touched", names: Names = None
) -> Iterator[None]:
    """Apply a delta until the context ends; see ``Delta.applied``."""
    patches: list[Patch] = []
    try:
        group = group_of(model)
        with group.entered():
            patches = prepare(delta, model, verify=verify, names=names, undo=False, group=group)
            Writer(group=group).write(patches)
        yield
    finally:
        try:
            _put_back(patches)
        except BaseException:  # an interrupt, or an error: try once more
            _put_back(patches)
            raise


def _put_back(patches: Sequence[Patch]) -> None:
    with uninterrupted():
        Writer().write([patch.in_step().reversed() for patch in patches])


def prepare(
    delta: Delta,
    model: Model,
    *,
    verify: ModelCheck,
    names: Names,
    undo: bool,
    group: Group | None = None,
) -> list[Patch]:
    """Check a model, and return the decoded changes of a delta; nothing is written.

    Args:
        delta: a delta that only changes elements in place.
        model: a module or a state dict that holds the base, or with ``undo`` the target.
        verify: what to check; see ``Delta.apply_``.
        names: see ``find_places``.
        undo: the model holds the target.
        group: the processes that hold the model together; all of them call this. None: this process alone.

    Raises:
        MismatchError: the model is not the base, or with ``undo`` the target.
        ConflictError: with ``undo``, the delta holds new values.
        FormatError: the delta is inconsistent.
        ValueError: the delta lacks the digests that ``verify`` needs.
    """
    if verify not in get_args(ModelCheck):
        raise ValueError(f"verify is {verify!r}, expected one of {', '.join(get_args(ModelCheck))}")
    group = group or Alone()
    places = group.together(lambda: _possible_places(delta, model, verify, names, undo=undo))
    check_same(delta, places, group)
    if verify == "full":
        group.together(lambda: _check_whole(places, group, undo=undo))
    pace = Pace(Silent())

    def decoded() -> list[Patch]:
        found = group.each(
            lambda place: decode_place(delta, place, verify=verify, undo=undo, pace=pace),
            places.changed,
            cost=lambda place: place.row.coded_bytes,
            pace=pace,
        )
        _check_states([(patch.place, state) for patch, state in found], group, undo=undo)
        return [patch for patch, _ in found]

    try:
        patches = group.together(decoded)
    except BaseMismatch:
        # A target is not recognised by touched values if classes of the base say where these are.
        if any(chunk.coding.classes for place in places.changed for chunk in place.row.chunks):
            group.together(lambda: _check_whole(places, group, undo=undo))
        raise
    if verify == "full":
        group.together(
            lambda: group.each(
                lambda patch: _check_result(patch, undo=undo),
                patches,
                cost=lambda patch: patch.place.row.target.n_bytes,
                pace=Pace(Silent()),
            )
        )
    return patches


def _possible_places(
    delta: Delta, model: Model, verify: ModelCheck, names: Names, *, undo: bool
) -> Places:
    places = _places(delta, model, names)
    for place in places.changed:
        _check_possible(place.row, verify, undo=undo)
    return places


def check_same(delta: Delta, places: Places, group: Group) -> None:
    """Check that all processes change the same tensors by the same delta.

    Raises:
        ConflictError: they do not.
    """
    slots = [place.slot.name for place in places.changed]
    rest = [slot.name for _, slot in places.unchanged]
    own = delta.base_fingerprint, delta.target_fingerprint, delta.nnz, slots, rest
    found = group.together(lambda: group.gathered(own))
    if found.count(found[0]) < len(found):
        raise ConflictError(
            "the ranks have different deltas, or models with other tensors; give all of them the same;"
            " nothing was written"
        )


def _places(delta: Delta, model: Model, names: Names) -> Places:
    try:
        return find_places(delta, model, names)
    except StructureMismatch as error:
        kind = quantized_kind(model)
        if kind is None:
            raise
        raise StructureMismatch(
            f"the {kind} is quantized, so that it does not hold the values that the delta changes ({error});"
            " load the target, quantized in the same way (load_model)",
            tensor=error.tensor,
        ) from error


def _check_possible(row: Row, verify: ModelCheck, *, undo: bool) -> None:
    if undo and any(chunk.coding.values != "ulp" for chunk in row.chunks):
        raise ConflictError(
            f"the delta holds new values of tensor {row.name!r}, not differences; what was"
            " there before it does not know: use applied(), or load the base again",
            tensor=row.name,
        )
    if undo and any(chunk.coding.classes for chunk in row.chunks):
        with naming(row):
            raise base_needed()
    if verify == "touched" and any(chunk.touched is None for chunk in row.chunks):
        raise ValueError(
            f"the delta has no digests of the touched values of tensor {row.name!r}, as one"
            " that was stacked without its base; ask for verify='full' or 'none'"
        )


def _check_states(states: Sequence[tuple[Place, State]], group: Group, *, undo: bool) -> None:
    """Check the states that were found: each tensor must be the base's, or with ``undo`` the target's, in all processes."""
    wanted, done = wanted_and_done(undo=undo)
    found = [*zip(*group.gathered([state for _, state in states]), strict=True)]
    states = [
        (place, state)
        for (place, _), kinds in zip(states, found, strict=True)
        for state in dict.fromkeys(kinds)
    ]
    wrong = [place for place, state in states if state == "other"]
    if wrong:
        raise BaseMismatch(
            f"tensor {wrong[0].row.name!r} has at its touched positions neither the values of the"
            f" delta's base nor those of its target, as {len(wrong)} of {len(states)} changed tensors;"
            " nothing was written",
            tensor=wrong[0].row.name,
        )
    finished = [place for place, state in states if state == done]
    if finished:
        raise _applied_error(finished[0].row.name, len(finished), len(states), wanted, done)


def _check_result(patch: Patch, *, undo: bool) -> None:
    """Check that a tensor will have the digest that the delta states; nothing is written.

    The digests of touched elements do not show that other elements of the same bits are meant.
    """
    row, held = patch.place.row, patch.place.slot.tensor()
    known = row.base.spec.digest if row.base and undo else row.target.digest
    found = changed_digest(held, patch.index, patch.before if undo else patch.after)
    if known is not None and found != known:
        raise Corrupt(
            f"tensor {row.name!r} would become one with digest {found.hex()[:12]}…, expected {known.hex()[:12]}…; the model is"
            " right, so the delta is inconsistent; download it again; nothing was written",
            tensor=row.name,
            expected=known.hex(),
            found=found.hex(),
        )


def _applied_error(name: str, n_done: int, n_due: int, wanted: str, done: str) -> MismatchError:
    if n_done == n_due:
        return AlreadyApplied(
            f"the model already is this delta's {done}; there is nothing to do", tensor=name
        )
    return PartlyApplied(
        f"the model has {n_done} of {n_due} changed tensors as in this delta's {done}, {name!r} among"
        f" them, and the others as in its {wanted}; nothing was written",
        tensor=name,
    )


def _check_whole(places: Places, group: Group, *, undo: bool) -> None:
    """Compare the digests of all tensors in the model with those of the base or the target."""
    wanted, done = wanted_and_done(undo=undo)
    slots = [*(place.slot for place in places.changed), *(slot for _, slot in places.unchanged)]
    tensors = [slot.tensor() for slot in slots]
    digests = iter(
        group.each(
            whole_digest,
            tensors,
            cost=lambda t: t.numel() * t.dtype.itemsize,
            pace=Pace(Silent()),
        )
    )
    states: list[tuple[Place, State]] = []
    for place, found in zip(places.changed, digests, strict=False):
        row = place.row
        known = row.base.spec.digest if row.base else None, row.target.digest
        due, becomes = reversed(known) if undo else known
        if due is None:
            raise ValueError(
                f"the delta does not know the digest of tensor {row.name!r} in its target; ask for"
                " verify='touched' or 'none'"
            )
        state = wanted if found == due else done if found == becomes else "other"
        states.append((place, state))
    for (rows, _), found in zip(places.unchanged, digests, strict=True):
        expected = [row.base.spec.digest or b"" for row in rows if row.base]
        if found not in expected:
            raise BaseMismatch(
                f"tensor {rows[0].name!r}, which the delta leaves as it is, has digest"
                f" {found.hex()[:12]}… in the model, expected {expected[0].hex()[:12]}…; nothing was written",
                tensor=rows[0].name,
                expected=expected[0].hex(),
                found=found.hex(),
            )
    _check_states(states, group, undo=undo)
