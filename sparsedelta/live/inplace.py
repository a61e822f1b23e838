"""Applies a delta to a model in memory, in place and bit for bit.

All tensors are checked before the first one is written. Time and memory are in proportion to the number of touched
elements.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, TypeAlias, get_args

import numpy as np
from blake3 import blake3

from sparsedelta._typing import Model, ModelCheck, Names
from sparsedelta.codecs.chunk import Chunk, touched_digest
from sparsedelta.codecs.context import Bits, Positions
from sparsedelta.codecs.values import VALUE_ENCODINGS, ordered, ulp_differences, unordered
from sparsedelta.dtypes import DType
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
from sparsedelta.format.records import DIGEST_BYTES, Row
from sparsedelta.interrupts import uninterrupted
from sparsedelta.live.bits import TensorBytes, flat_bits
from sparsedelta.live.coordinates import quantized_kind
from sparsedelta.live.held import gather, in_order
from sparsedelta.live.patch import Patch, Writer
from sparsedelta.live.slots import AnySlot, Place, Places, find_places
from sparsedelta.progress import Silent
from sparsedelta.tensors.changes import decode_row_chunk
from sparsedelta.tensors.parallel import Pace, run_all

State: TypeAlias = Literal["base", "target", "other"]
_BLOCK_ELEMENTS = 1 << 24
_INT32_ELEMENTS = 1 << 31


def apply_(
    delta: Delta, model: Model, *, verify: ModelCheck = "touched", names: Names = None
) -> None:
    """Change a model in memory from the base to the target; see ``Delta.apply_``."""
    patches = prepare(delta, model, verify=verify, names=names, undo=False)
    Writer().write(patches)


def revert_(
    delta: Delta, model: Model, *, verify: ModelCheck = "touched", names: Names = None
) -> None:
    """Change a model in memory from the target back to the base; see ``Delta.revert_``."""
    patches = prepare(delta, model, verify=verify, names=names, undo=True)
    Writer().write([patch.reversed() for patch in patches])


@contextmanager
def applied(
    delta: Delta, model: Model, *, verify: ModelCheck = "touched", names: Names = None
) -> Iterator[None]:
    """Apply a delta until the context ends; see ``Delta.applied``."""
    patches = prepare(delta, model, verify=verify, names=names, undo=False)
    try:
        Writer().write(patches)
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
    delta: Delta, model: Model, *, verify: ModelCheck, names: Names, undo: bool
) -> list[Patch]:
    """Check a model, and return the decoded changes of a delta; nothing is written.

    Args:
        delta: a delta that only changes elements in place.
        model: a module or a state dict that holds the base, or with ``undo`` the target.
        verify: what to check; see ``Delta.apply_``.
        names: see ``find_places``.
        undo: the model holds the target.

    Raises:
        MismatchError: the model is not the base, or with ``undo`` the target.
        ConflictError: with ``undo``, the delta holds new values.
        FormatError: the delta is inconsistent.
        ValueError: the delta lacks the digests that ``verify`` needs.
    """
    if verify not in get_args(ModelCheck):
        raise ValueError(f"verify is {verify!r}, expected one of {', '.join(get_args(ModelCheck))}")
    places = _places(delta, model, names)
    for place in places.changed:
        _check_possible(place.row, verify, undo=undo)
    if verify == "full":
        _check_whole(places, undo=undo)
    pace = Pace(Silent())
    try:
        found = run_all(
            lambda place: _decode(delta, place, verify=verify, undo=undo, pace=pace),
            places.changed,
            cost=lambda place: place.row.coded_bytes,
            pace=pace,
        )
        _check_states([(patch.place, state) for patch, state in found], undo=undo)
    except BaseMismatch:
        # A target is not recognised by touched values if classes of the base say where these are.
        if any(chunk.coding.classes for place in places.changed for chunk in place.row.chunks):
            _check_whole(places, undo=undo)
        raise
    return [patch for patch, _ in found]


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
    if verify == "touched" and any(chunk.touched is None for chunk in row.chunks):
        raise ValueError(
            f"the delta has no digests of the touched values of tensor {row.name!r}, as one"
            " that was stacked without its base; ask for verify='full' or 'none'"
        )


def _decode(
    delta: Delta, place: Place, *, verify: ModelCheck, undo: bool, pace: Pace
) -> tuple[Patch, State]:
    """Return the decoded changes of a tensor, and which state of it the model holds."""
    import torch

    row, tensor = place.row, place.slot.tensor()
    dtype = row.target.dtype
    index = np.empty(row.nnz, np.int32 if tensor.numel() <= _INT32_ELEMENTS else np.int64)
    codes = np.empty(row.nnz, dtype.view)
    ends = itertools.accumulate(chunk.nnz for chunk in row.chunks)
    parts = [(c, slice(end - c.nnz, end)) for c, end in zip(row.chunks, ends, strict=True)]
    by_base = not undo and any(chunk.coding.classes for chunk in row.chunks)
    base = TensorBytes(in_order(tensor)) if by_base else None
    for chunk, part in parts:
        positions, codes[part] = _decode_chunk(delta, place, chunk, base)
        np.add(positions, np.int64(chunk.start), out=index[part], casting="unsafe")
        pace.advance(chunk.stored_bytes)
    where = torch.from_numpy(index).to(tensor.device)
    now = gather(tensor, where)
    held = now.cpu().numpy().view(dtype.view)
    other = codes  # computed on the host, where digests are made: workers share its cores already
    possible: set[State] = {"base", "target"}
    for chunk, part in parts:
        other[part] = _moved(dtype, chunk, held[part], codes[part], undo=undo)
        if verify == "touched":
            possible &= _possible_states(row, chunk, held[part], other[part], undo=undo)
    then = torch.from_numpy(other.view(f"<i{dtype.width}")).to(tensor.device)
    before, after = (then, now) if undo else (now, then)
    wanted, done = _wanted_and_done(undo=undo)
    state = wanted if wanted in possible else done if done in possible else "other"
    index_digest = blake3(index.view(np.uint8).data).digest()
    return Patch(place, where, index_digest, before, after), state


def _decode_chunk(
    delta: Delta, place: Place, chunk: Chunk, base: TensorBytes | None
) -> tuple[Positions, Bits]:
    row, classes = place.row, chunk.coding.classes
    try:
        return decode_row_chunk(row, chunk, delta.payload, base)
    except Corrupt as error:
        if not classes or (row.base and _whole_digest(place.slot) == row.base.spec.digest):
            raise
        raise BaseMismatch(
            f"tensor {row.name!r} of the model is not the base's: its changes, coded by the base's"
            " exponents, make no sense of it; nothing was written",
            tensor=row.name,
        ) from error


def _moved(dtype: DType, chunk: Chunk, held: Bits, codes: Bits, *, undo: bool) -> Bits:
    """Return the new bits of touched elements; with ``undo`` the codes are differences."""
    if not undo:
        return VALUE_ENCODINGS[chunk.coding.values].decode(dtype, held, codes)
    places = ordered(dtype, held)
    places -= ulp_differences(codes)
    return unordered(dtype, places)


def _possible_states(row: Row, chunk: Chunk, now: Bits, then: Bits, *, undo: bool) -> set[State]:
    """Return the states that the digests of the touched elements of a chunk allow.

    Raises:
        Corrupt: the old values are right, but the new values are not those that the delta states.
    """
    before, after = chunk.touched or (b"", b"")
    found = touched_digest(now)
    wanted, becomes = (after, before) if undo else (before, after)
    if found == wanted and touched_digest(then) != becomes:
        raise Corrupt(
            f"tensor {row.name!r}: its touched values are right, but they become others than the delta"
            " states; the delta is inconsistent; download it again",
            tensor=row.name,
        )
    kinds: list[tuple[State, bytes]] = [("base", before), ("target", after)]
    return {state for state, digest in kinds if digest == found}


def _wanted_and_done(*, undo: bool) -> tuple[State, State]:
    """Return the state that the model must have before the change, and the state after it."""
    return ("target", "base") if undo else ("base", "target")


def _check_states(states: Sequence[tuple[Place, State]], *, undo: bool) -> None:
    """Check the states that were found: each tensor must be the base's, or with ``undo`` the target's."""
    wanted, done = _wanted_and_done(undo=undo)
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


def _check_whole(places: Places, *, undo: bool) -> None:
    """Compare the digests of all tensors in the model with those of the base or the target."""
    wanted, done = _wanted_and_done(undo=undo)
    states: list[tuple[Place, State]] = []
    for place in places.changed:
        row = place.row
        digests = row.base.spec.digest if row.base else None, row.target.digest
        due, becomes = reversed(digests) if undo else digests
        if due is None:
            raise ValueError(
                f"the delta does not know the digest of tensor {row.name!r} in its target; ask for"
                " verify='touched' or 'none'"
            )
        found = _whole_digest(place.slot)
        state = wanted if found == due else done if found == becomes else "other"
        states.append((place, state))
    for rows, slot in places.unchanged:
        found = _whole_digest(slot)
        expected = [row.base.spec.digest or b"" for row in rows if row.base]
        if found not in expected:
            raise BaseMismatch(
                f"tensor {rows[0].name!r}, which the delta leaves as it is, has digest"
                f" {found.hex()[:12]}… in the model, expected {expected[0].hex()[:12]}…; nothing was written",
                tensor=rows[0].name,
                expected=expected[0].hex(),
                found=found.hex(),
            )
    _check_states(states, undo=undo)


def _whole_digest(slot: AnySlot) -> bytes:
    bits = flat_bits(in_order(slot.tensor()))
    hasher = blake3()
    for start in range(0, len(bits), _BLOCK_ELEMENTS):
        block = bits[start : start + _BLOCK_ELEMENTS].cpu().numpy()
        hasher.update(block.view(np.uint8).data)
    return hasher.digest()[:DIGEST_BYTES]
