"""A delta on a model in memory: in place, bit for bit, and only if every tensor is what it should be.

Work and memory go with the touched elements. All tensors are looked at before the first is written.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias, get_args

import numpy as np
from blake3 import blake3

from sparsedelta._typing import Model, ModelCheck, Names
from sparsedelta.codecs.chunk import CHUNK_ELEMENTS
from sparsedelta.codecs.values import Bits, ordered, ulp_differences, unordered
from sparsedelta.errors import (
    AlreadyApplied,
    BaseMismatch,
    ConflictError,
    Corrupt,
    MismatchError,
    PartlyApplied,
)
from sparsedelta.format.delta import Delta
from sparsedelta.format.records import DIGEST_BYTES, TOUCHED_BYTES
from sparsedelta.live.bits import chunk_bits, gather, integer_view, scatter
from sparsedelta.live.slots import Place, Slot, find_places, unchanged_places
from sparsedelta.progress import Silent
from sparsedelta.tensors.changes import stage_of
from sparsedelta.tensors.parallel import Pace, run_all

if TYPE_CHECKING:
    import torch

State: TypeAlias = Literal["base", "target", "other"]


@dataclass(frozen=True, slots=True)
class Patch:
    """The touched elements of one tensor, decoded, on the model's device.

    Attributes:
        place: which tensor, and where the model holds it.
        index: flat indices, (nnz,) int64, increasing.
        before: their bits in the base, (nnz,) integers of the element size.
        after: their bits in the target.
    """

    place: Place
    index: torch.Tensor
    before: torch.Tensor
    after: torch.Tensor

    @property
    def n_bytes(self) -> int:
        """What it takes to keep."""
        return sum(t.numel() * t.element_size() for t in (self.index, self.before, self.after))


def apply_(
    delta: Delta, model: Model, *, verify: ModelCheck = "touched", names: Names = None
) -> None:
    """Make the target of the base that a model in memory holds; see ``Delta.apply_``."""
    patches = prepare(delta, model, verify=verify, names=names, undo=False)
    write(patches, undo=False)


def revert_(
    delta: Delta, model: Model, *, verify: ModelCheck = "touched", names: Names = None
) -> None:
    """Make the base of the target that a model in memory holds; see ``Delta.revert_``."""
    patches = prepare(delta, model, verify=verify, names=names, undo=True)
    write(patches, undo=True)


@contextmanager
def applied(
    delta: Delta, model: Model, *, verify: ModelCheck = "touched", names: Names = None
) -> Iterator[None]:
    """Apply a delta for a while; see ``Delta.applied``."""
    patches = prepare(delta, model, verify=verify, names=names, undo=False)
    write(patches, undo=False)
    try:
        yield
    finally:
        write(patches, undo=True)


def prepare(
    delta: Delta, model: Model, *, verify: ModelCheck, names: Names, undo: bool
) -> list[Patch]:
    """Return the decoded changes of a delta, having checked the model; nothing is written.

    Args:
        delta: changes elements in place, and nothing else.
        model: a module or a state dict, holding the base, or with ``undo`` the target.
        verify: what to check.
        names: see ``find_places``.
        undo: the model holds the target.

    Raises:
        MismatchError: the model is not the base, or with ``undo`` the target.
        ConflictError: with ``undo``, the delta holds new values.
        FormatError: the delta is inconsistent.
        ValueError: the check asked for cannot be made.
    """
    if verify not in get_args(ModelCheck):
        raise ValueError(f"verify is {verify!r}, expected one of {', '.join(get_args(ModelCheck))}")
    delta.payload.check()
    places = find_places(delta, model, names)
    for place in places:
        if undo and place.change.values != "ulp":
            raise ConflictError(
                f"the delta holds new values of tensor {place.row.name!r}, not differences; what was"
                " there before it does not know: use applied(), or load the base again",
                tensor=place.row.name,
            )
        if verify == "touched" and place.change.touched is None and place.change.nnz:
            raise ValueError(
                f"the delta has no digests of the touched values of tensor {place.row.name!r}, as one"
                " that was stacked without its base; ask for verify='full' or 'none'"
            )
    if verify == "full":
        _check_whole(delta, model, names, places, undo=undo)
    pace = Pace(Silent())
    found = run_all(
        lambda place: _decode(delta, place, verify=verify, undo=undo, pace=pace),
        places,
        cost=lambda place: place.change.coded_bytes,
        pace=pace,
    )
    if verify == "touched":
        _check_states(
            [(place, state) for place, (_, state) in zip(places, found, strict=True)], undo
        )
    return [patch for patch, _ in found]


def write(patches: Sequence[Patch], *, undo: bool) -> None:
    """Set every touched element to its bits in the target, or with ``undo`` in the base."""
    for patch in patches:
        scatter(patch.place.slot.tensor(), patch.index, patch.before if undo else patch.after)


def _decode(
    delta: Delta, place: Place, *, verify: ModelCheck, undo: bool, pace: Pace
) -> tuple[Patch, State]:
    """Return a tensor's decoded change and what the model holds at its positions."""
    import torch

    dtype, change, tensor = place.target.dtype, place.change, place.slot.tensor()
    index = np.empty(change.nnz, np.int64)
    codes = np.empty(change.nnz, dtype.view)
    stage, start = stage_of(delta, place.row), 0
    for chunk in change.chunks:
        end = start + chunk.nnz
        base = None if undo else chunk_bits(tensor, chunk.number)
        try:
            positions, coded = stage.decode(chunk.number, pace, base)
        except Corrupt as error:
            if not chunk.needs_base:
                raise
            raise BaseMismatch(
                f"tensor {place.row.name!r} of the model is not the base's, or the delta is applied"
                " already: its changes, coded by the base's exponents, make no sense of it",
                tensor=place.row.name,
            ) from error
        np.add(positions, chunk.number * CHUNK_ELEMENTS, out=index[start:end], casting="unsafe")
        codes[start:end] = ulp_differences(coded) if change.values == "ulp" else coded
        start = end
    where = torch.from_numpy(index).to(tensor.device)
    now = gather(tensor, where)
    held = now.cpu().numpy().view(dtype.view)
    other = codes  # reckoned on the host, where digests are made: workers share its cores already
    if change.values == "ulp":
        moved = ordered(dtype, held)
        moved += np.negative(codes, out=codes) if undo else codes
        other = unordered(dtype, moved)
    state: State = "target" if undo else "base"
    if verify == "touched":
        state = _state(place, held, other, undo=undo)
    then = torch.from_numpy(other.view(f"<i{dtype.width}")).to(tensor.device)
    before, after = (then, now) if undo else (now, then)
    return Patch(place, where, before, after), state


def _state(place: Place, now: Bits, then: Bits, *, undo: bool) -> State:
    """Return what the model holds, told by the digests of the touched values.

    Raises:
        Corrupt: it is right, and what it becomes is not.
    """
    expected, change = place.change.touched, place.change
    if expected is None or not change.nnz:
        return "target" if undo else "base"
    found = _digest(now)
    if found != expected[int(undo)]:
        kinds: dict[bytes, State] = {expected[0]: "base", expected[1]: "target"}
        return kinds.get(found, "other")
    if _digest(then) != expected[int(not undo)]:
        raise Corrupt(
            f"tensor {place.row.name!r}: its touched values are the base's, but applying the delta gives"
            " other values than it states; the delta is inconsistent; download it again",
            tensor=place.row.name,
        )
    return "target" if undo else "base"


def _digest(bits: Bits) -> bytes:
    return blake3(np.ascontiguousarray(bits).view(np.uint8).data).digest()[:TOUCHED_BYTES]


def _check_states(states: Sequence[tuple[Place, State]], undo: bool) -> None:
    """ModelCheck that every tensor is the base's, or with ``undo`` the target's, by what was found."""
    due = [(place, state) for place, state in states if place.change.nnz]
    wanted, done = ("target", "base") if undo else ("base", "target")
    wrong = [place for place, state in due if state == "other"]
    if wrong:
        raise BaseMismatch(
            f"tensor {wrong[0].row.name!r} has at its touched positions neither the values of the"
            f" delta's base nor those of its target, as {len(wrong)} of {len(due)} changed tensors;"
            " nothing was written",
            tensor=wrong[0].row.name,
        )
    finished = [place for place, state in due if state == done]
    if finished:
        raise _applied_error(finished[0].row.name, len(finished), len(due), wanted, done)


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


def _check_whole(
    delta: Delta, model: Model, names: Names, places: Sequence[Place], *, undo: bool
) -> None:
    """Compare the digests of all tensors that the model has with those of the base or target."""
    states: list[tuple[Place, State]] = []
    for place in places:
        row = place.row
        digests = [spec.digest if spec else None for spec in (row.base, row.target)]
        if digests[int(undo)] is None:
            raise ValueError(
                f"the delta does not know the digest of tensor {row.name!r} in its target; ask for"
                " verify='touched' or 'none'"
            )
        found = _whole_digest(place.slot)
        kinds: dict[bytes | None, State] = {digests[1]: "target", digests[0]: "base"}
        states.append((place, kinds.get(found, "other")))
    for row, slot in unchanged_places(delta, model, names):
        found = _whole_digest(slot)
        if row.base and found != row.base.digest:
            raise BaseMismatch(
                f"tensor {row.name!r}, which the delta leaves as it is, has digest {found.hex()[:12]}…"
                f" in the model, expected {(row.base.digest or b'').hex()[:12]}…; nothing was written",
                tensor=row.name,
                expected=(row.base.digest or b"").hex(),
                found=found.hex(),
            )
    _check_states(states, undo)


def _whole_digest(slot: Slot) -> bytes:
    tensor = slot.tensor()
    bits = integer_view(tensor).contiguous().view(-1)
    hasher = blake3()
    for start in range(0, len(bits), CHUNK_ELEMENTS):
        block = bits[start : start + CHUNK_ELEMENTS].cpu().numpy()
        hasher.update(block.view(np.uint8).data)
    return hasher.digest()[:DIGEST_BYTES]
