"""Decodes the changes of one tensor for a model in memory, where the model holds it."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np
from blake3 import blake3

from sparsedelta._typing import ModelCheck
from sparsedelta.codecs.chunk import Chunk, OpenChunk, open_chunk, touched_digest
from sparsedelta.codecs.context import Bits, Positions
from sparsedelta.codecs.exponent_classes import Choice, keys_of
from sparsedelta.codecs.values import VALUE_ENCODINGS, ordered, ulp_differences, unordered
from sparsedelta.dtypes import DType
from sparsedelta.errors import BaseMismatch, Corrupt
from sparsedelta.format.delta import Delta
from sparsedelta.format.records import Row
from sparsedelta.live.bits import flat_bits, on_host
from sparsedelta.live.classes import HOST, find_on_device
from sparsedelta.live.divided import Divided
from sparsedelta.live.held import Held, gather, in_order, whole_digest
from sparsedelta.live.patch import Patch, regions_of
from sparsedelta.live.places import Place
from sparsedelta.tensors.changes import naming, read_coded
from sparsedelta.tensors.parallel import Pace

if TYPE_CHECKING:
    import torch

State: TypeAlias = Literal["base", "target", "other"]
_Read: TypeAlias = "Callable[[int, int], torch.Tensor]"
_INT32_ELEMENTS = 1 << 31


def decode_place(
    delta: Delta, place: Place, *, verify: ModelCheck, undo: bool, pace: Pace
) -> tuple[Patch, State]:
    """Return the decoded changes of a tensor, and which state of it the model holds.

    Positions that depend on the base's elements are found where these are. Of each touched element, the device
    receives a position or a rank, and the new value; the host receives the old value.

    Of a tensor that is divided among ranks, all ranks check all touched elements, one chunk after the other. The changes
    are those of the elements that this rank holds.
    """
    import torch

    if not isinstance(place.slot.tensor(), Divided):
        return _decode(delta, place, verify=verify, undo=undo, pace=pace)
    patches, states = [], set[State]()
    for chunk in place.row.chunks:
        one = replace(place, row=place.row.with_chunks((chunk,)))
        patch, state = _decode(delta, one, verify=verify, undo=undo, pace=pace)
        patches.append(patch)
        states.add(state)
    columns = zip(*((p.index, p.before, p.after) for p in patches), strict=True)
    index, before, after = map(torch.cat, columns)
    digest = blake3(b"".join(patch.index_digest for patch in patches)).digest()
    patch = Patch(place, index, digest, before, after, patches[0].regions)
    return patch, states.pop() if len(states) == 1 else "other"


def _decode(
    delta: Delta, place: Place, *, verify: ModelCheck, undo: bool, pace: Pace
) -> tuple[Patch, State]:
    import torch

    row, tensor = place.row, place.slot.tensor()
    dtype = row.target.dtype
    ends = itertools.accumulate(chunk.nnz for chunk in row.chunks)
    parts = [(c, slice(end - c.nnz, end)) for c, end in zip(row.chunks, ends, strict=True)]
    is_small = tensor.numel() <= _INT32_ELEMENTS
    where = torch.empty(
        row.nnz, dtype=torch.int32 if is_small else torch.int64, device=tensor.device
    )
    base = _reader(tensor)
    index_digest, opened = blake3(), []
    for chunk, part in parts:
        with _of_base(place, chunk):
            opened.append(_open(delta, row, chunk))
            positions = _positions(opened[-1].positions, chunk, base, index_digest)
        where[part].copy_(positions).add_(chunk.start)
        pace.advance(chunk.stored_bytes)
    now = gather(tensor, where)
    held = on_host(now).view(dtype.view)
    other = np.empty_like(held)  # digests are made of it: workers share the host's cores already
    possible: set[State] = {"base", "target"}
    for (chunk, part), one in zip(parts, opened, strict=True):
        with _of_base(place, chunk):
            codes = one.codes(keys_of(held[part]) if one.needs_keys else None)
        other[part] = _moved(dtype, chunk, held[part], codes, undo=undo)
        if verify == "touched":
            possible &= _possible_states(row, chunk, held[part], other[part], undo=undo)
    then = torch.from_numpy(other.view(f"<i{dtype.width}")).to(tensor.device)
    if isinstance(tensor, Divided):
        mask = tensor.here(where)
        where, now, then = where[mask], now[mask], then[mask]
    before, after = (then, now) if undo else (now, then)
    wanted, done = wanted_and_done(undo=undo)
    state = wanted if wanted in possible else done if done in possible else "other"
    digest, regions = index_digest.digest(), regions_of(tensor)
    return Patch(place, where, digest, before, after, regions), state


def _reader(tensor: Held) -> _Read:
    """Return a function that reads the bits of a range of elements."""
    if isinstance(tensor, Divided):
        return tensor.read
    base = functools.cache(lambda: flat_bits(in_order(tensor)))
    return lambda start, end: base()[start:end]


def _open(delta: Delta, row: Row, chunk: Chunk) -> OpenChunk:
    coded = read_coded(row, chunk, delta.payload)
    with naming(row):
        return open_chunk(chunk, row.target.dtype, coded)


def _positions(
    found: Positions | Choice, chunk: Chunk, base: _Read, digest: blake3
) -> torch.Tensor:
    """Return the positions of a chunk's elements, and update the digest with what states them.

    Args:
        found: the positions, or how to find them.
        chunk: the chunk.
        base: returns the bits of a range of elements of the tensor in the base.
        digest: equal digests of two chunks of one base mean equal positions.
    """
    import torch

    digest.update(f"{chunk.start} {chunk.span}".encode())
    if not isinstance(found, Choice):
        digest.update(found.view(np.uint8).data)
        return torch.from_numpy(found.view(np.int32))
    digest.update(bytes(found.thresholds))
    for ranks, of_rest in found.listed:
        digest.update(f" {len(ranks)} {of_rest}".encode())
        digest.update(ranks.view(np.uint8).data)
    part = base(chunk.start, chunk.end)
    if part.device.type not in HOST:
        return find_on_device(found, part)
    bits = part.numpy().view(f"<u{part.element_size()}")
    return torch.from_numpy(found.find(lambda start, n: bits[start : start + n])[0].view(np.int32))


@contextmanager
def _of_base(place: Place, chunk: Chunk) -> Iterator[None]:
    """Report a chunk with classes that cannot be decoded as a wrong base, if the model is not the base."""
    row, classes = place.row, chunk.coding.classes
    try:
        yield
    except Corrupt as error:
        if not classes or (row.base and whole_digest(place.slot.tensor()) == row.base.spec.digest):
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


def wanted_and_done(*, undo: bool) -> tuple[State, State]:
    """Return the state that the model must have before the change, and the state after it."""
    return ("target", "base") if undo else ("base", "target")
