"""The rows of a delta whose base is on disk and whose target is divided among ranks.

A chunk is coded by one of the ranks that hold elements of it; they take turns. One rank computes the digests of a
tensor, from the base and its coded chunks. So a rank has the changed elements of few chunks in memory, and blocks.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from blake3 import blake3

from sparsedelta.codecs.chunk import MAX_SPAN, Chunk
from sparsedelta.codecs.context import Bits, Positions
from sparsedelta.errors import CheckpointError, StructureMismatch
from sparsedelta.files.checkpoint import Checkpoint, Tensor
from sparsedelta.format.records import DIGEST_BYTES, Row, default_keep
from sparsedelta.format.spool import SpoolPayload
from sparsedelta.live.bits import TensorBytes
from sparsedelta.live.shards import homes_of, local_of, parts_of_ranks
from sparsedelta.live.wire import Wire
from sparsedelta.tensors.compare import BLOCK_BYTES, base_tensor, digest_tensor
from sparsedelta.tensors.compare_tasks import Coder
from sparsedelta.tensors.parallel import Pace
from sparsedelta.tensors.rebuild import BaseDiffers, rebuild

_SENT_ELEMENTS = 1 << 20
_SENT_BYTES = 1 << 24

Chunks = dict[int, list[Chunk]]  # by the number of the tensor


class _Item(NamedTuple):
    """A chunk to code: the number of its tensor, its first element, its number of elements, and the rank that codes it."""

    number: int
    first: int
    span: int
    coder: int


class _Changes(NamedTuple):
    """The changed elements of a chunk: positions in it, and bits before and after, ``(nnz,)`` each."""

    positions: Positions
    before: Bits
    after: Bits

    @classmethod
    def empty(cls, n: int, like: np.dtype[Any]) -> _Changes:
        """Return arrays for ``n`` elements. Pages that nothing is written to take no memory."""
        return cls(np.empty(n, np.uint32), np.empty(n, like), np.empty(n, like))

    def part(self, start: int, end: int) -> _Changes:
        return _Changes(*(one[start:end] for one in self))

    def put(self, start: int, part: _Changes) -> int:
        """Copy a part to ``start``; return its end."""
        end = start + len(part.positions)
        for one, given in zip(self, part, strict=True):
            one[start:end] = given
        return end

    def in_order(self) -> _Changes:
        if (self.positions[1:] > self.positions[:-1]).all():
            return self
        order = np.argsort(self.positions)
        return _Changes(*(one[order] for one in self))


class ShardRows:
    """Makes the rows. All ranks call the same methods.

    Args:
        wire: the ranks.
        base: the base, which is also the target but for the tensors of the model.
        held: by the number of a base tensor, the tensor of the model that replaces it: a DTensor, or one that is the same
            on all ranks. It has the same dtype and shape.
        coder: codes the changes.
        payload: receives the streams of this rank.
        group: the ranks, as ``wire`` has them.

    Raises:
        StructureMismatch: the ranks do not hold each element once, or not the same tensors.
        ValueError: the ranks have other options.
    """

    def __init__(
        self,
        wire: Wire,
        base: Checkpoint,
        held: Mapping[int, torch.Tensor],
        coder: Coder,
        payload: SpoolPayload,
        group: dist.ProcessGroup | None,
    ) -> None:
        self._wire = wire
        self._base = base
        self._tensors: Sequence[Tensor] = [*base.tensors.values()]
        self._coder = coder
        self._payload = payload
        layouts = [(one.key, one.spec.dtype.name, one.spec.shape) for one in self._tensors]
        seen = blake3(repr((layouts, sorted(held))).encode()).digest()
        for what, mine in (("another base or model", seen), ("other options", coder)):
            if any(one != mine for one in wire.agree(mine)):
                raise ValueError(
                    f"a rank has {what}; call this with the same arguments on all ranks"
                )
        self._held = {
            number: TensorBytes(local_of(held[number].detach())) for number in sorted(held)
        }
        self._parts = parts_of_ranks({number: held[number] for number in self._held}, group)
        for number in self._held:
            tensor = self._tensors[number]
            n_held = sum(parts[number].n_sent for parts in self._parts)
            if n_held != tensor.spec.n_elements:
                raise StructureMismatch(
                    f"the ranks hold {n_held} elements of tensor {tensor.name!r}, expected {tensor.spec.n_elements};"
                    " all ranks of the model must take part",
                    tensor=tensor.name,
                )

    def rows(self) -> list[Row]:
        """Return all rows on rank 0, whose payload then has all streams; nothing on the others.

        Raises:
            CheckpointError: the base differs between the ranks, or a file of it became shorter.
            SparseDeltaError: another rank has failed.
        """
        chunks = self._joined(self._coded())
        digests = self._digests(chunks)
        return (
            []
            if self._wire.rank
            else [
                self._row(number, chunks.get(number, []), digests[number])
                for number in range(len(self._tensors))
            ]
        )

    def _coded(self) -> Chunks:
        """Return the chunks that this rank has coded."""
        found: Chunks = defaultdict(list)
        failure: Exception | None = None
        for items in self._rounds():
            changed: list[_Changes] = []
            try:
                changed = [self._changed(item) for item in items]
            except Exception as error:
                failure = failure or error
            counts = self._wire.agree([len(one.positions) for one in changed], failure)
            for at, item in enumerate(items):
                whole = self._collected(item, changed, at, [one[at] for one in counts])
                changed[at] = _Changes.empty(0, np.dtype(np.uint8))  # frees the memory
                if whole is None or failure is not None:
                    continue
                try:
                    tensor = self._tensors[item.number]
                    work = self._coder.comparison((tensor, tensor), self._payload, digests=False)
                    found[item.number].append(work.encode_known(item.first, item.span, *whole))
                except Exception as error:
                    failure = error
        self._wire.agree(None, failure)
        return found

    def _rounds(self) -> Iterator[list[_Item]]:
        """Yield the chunks to code, at most one for each rank at a time."""
        queues: list[list[_Item]] = [[] for _ in range(self._wire.size)]
        turn = 0
        for number in self._held:
            n_elements = self._tensors[number].spec.n_elements
            for first in range(0, n_elements, MAX_SPAN):
                end = min(first + MAX_SPAN, n_elements)
                holders = [
                    rank
                    for rank, parts in enumerate(self._parts)
                    if parts[number].is_sent
                    and parts[number].n_before(end) > parts[number].n_before(first)
                ]
                coder = holders[turn % len(holders)]
                turn += 1
                queues[coder].append(_Item(number, first, end - first, coder))
        for items in zip_longest(*queues):
            yield [item for item in items if item is not None]

    def _changed(self, item: _Item) -> _Changes:
        """Return the changed elements that this rank sends."""
        tensor, part = self._tensors[item.number], self._parts[self._wire.rank][item.number]
        held, dtype = self._held[item.number], tensor.spec.dtype.view
        if not part.is_sent:
            return _Changes.empty(0, dtype)
        end = item.first + item.span
        found = _Changes.empty(part.n_before(end) - part.n_before(item.first), dtype)
        n_block, nnz = BLOCK_BYTES // dtype.itemsize, 0
        for start in range(item.first, end, n_block):
            low, high = part.n_before(start), part.n_before(min(start + n_block, end))
            if low == high:
                continue
            after = np.empty(high - low, dtype)
            held.read_into(after.view(np.uint8).data, low * dtype.itemsize)
            first, last = part.in_whole(np.array([low, high - 1])).tolist()
            before = np.empty(last + 1 - first, dtype)
            tensor.read_into(before.view(np.uint8).data, first * dtype.itemsize)
            if len(before) == len(after):
                at = np.flatnonzero(before != after)
                places = at + (first - item.first)
            else:  # other ranks hold elements between these
                inside = part.in_whole(np.arange(low, high)) - first
                before = before[inside]
                at = np.flatnonzero(before != after)
                places = inside[at] + (first - item.first)
            nnz = found.put(nnz, _Changes(places.astype(np.uint32), before[at], after[at]))
        return found.part(0, nnz)

    def _collected(
        self, item: _Item, changed: list[_Changes], at: int, counts: Sequence[int]
    ) -> _Changes | None:
        """Return the changed elements of a chunk on the rank that codes it; None on others, or if there are none."""
        own, rank = changed[at], self._wire.rank
        if rank != item.coder:
            for start in range(0, len(own.positions), _SENT_ELEMENTS):
                self._wire.send(tuple(own.part(start, start + _SENT_ELEMENTS)), item.coder)
            return None
        if counts[rank] == sum(counts):
            return own if sum(counts) else None
        found, end = _Changes.empty(sum(counts), own.before.dtype), 0
        for sender, n in enumerate(counts):
            if sender == rank:
                end = found.put(end, own)
                continue
            for _ in range(0, n, _SENT_ELEMENTS):
                end = found.put(end, _Changes(*self._wire.receive(sender)))
        return found.in_order()

    def _joined(self, own: Chunks) -> Chunks:
        """Return all chunks on rank 0, in the order of their elements; nothing on the others."""
        if self._wire.rank:
            self._send(own, 0)
            return {}
        for rank in range(1, self._wire.size):
            for number, chunks in self._received(rank).items():
                own[number] += chunks
        return {number: sorted(chunks, key=lambda one: one.start) for number, chunks in own.items()}

    def _digests(self, chunks: Chunks) -> dict[int, tuple[bytes, bytes]]:
        """Return the digests of all base tensors and of what they become; ``chunks`` are those of rank 0."""
        shared = self._shared()
        own = {n: chunks[n] for n in shared[0] if n in chunks}
        if self._wire.rank:
            own = self._received(0)
        else:
            for rank in range(1, self._wire.size):
                self._send({n: chunks[n] for n in shared[rank] if n in chunks}, rank)
        found = self._wire.together(
            lambda: {n: self._digests_of(n, own.get(n, [])) for n in shared[self._wire.rank]}
        )
        return {n: pair for one in self._wire.agree(found) for n, pair in one.items()}

    def _shared(self) -> list[list[int]]:
        """Return the numbers of the tensors whose digests each rank computes, about as many bytes for each."""
        sizes = {number: tensor.spec.n_bytes for number, tensor in enumerate(self._tensors)}
        found: list[list[int]] = [[] for _ in range(self._wire.size)]
        for number, rank in homes_of(sizes, self._wire.size).items():
            found[rank].append(number)
        return found

    def _digests_of(self, number: int, chunks: Sequence[Chunk]) -> tuple[bytes, bytes]:
        tensor = self._tensors[number]
        before = digest_tensor(tensor)
        if not chunks:
            return before, before
        hasher = blake3()

        def add(data: memoryview, offset: int) -> None:
            hasher.update(data)

        row = self._row(number, chunks, (before, None))
        try:
            rebuild(row, tensor, self._payload, add, check="touched", pace=Pace())
        except BaseDiffers as error:
            raise CheckpointError(
                f"tensor {tensor.name!r} of '{self._base.path}' differs between the ranks; give all ranks the same base"
            ) from error
        return before, hasher.digest()[:DIGEST_BYTES]

    def _row(
        self, number: int, chunks: Sequence[Chunk], digests: tuple[bytes, bytes | None]
    ) -> Row:
        tensor = self._tensors[number]
        before, after = digests
        keep = default_keep(tensor.spec, tensor.spec)
        there = base_tensor(tensor, before)
        return Row(
            tensor.file, tensor.name, tensor.spec.with_digest(after), there, keep, tuple(chunks)
        )

    def _send(self, chunks: Chunks, rank: int) -> None:
        """Send chunks and their streams to a rank."""
        end = 0
        moved: Chunks = {}
        for number, own in chunks.items():
            moved[number] = []
            for chunk in own:
                moved[number].append(chunk.at(end))
                end += chunk.stored_bytes
        self._wire.send((moved, end), rank)
        waiting = b""
        for chunk in (chunk for own in chunks.values() for chunk in own):
            waiting += self._payload.read(chunk.offset, chunk.stored_bytes)
            while len(waiting) >= _SENT_BYTES:
                self._wire.send(waiting[:_SENT_BYTES], rank)
                waiting = waiting[_SENT_BYTES:]
        if waiting:
            self._wire.send(waiting, rank)

    def _received(self, rank: int) -> Chunks:
        """Return the chunks that a rank sends; their streams are added to the payload."""
        moved, n_bytes = self._wire.receive(rank)
        start, n_received = 0, 0
        while n_received < n_bytes:
            streams = self._wire.receive(rank)
            at = self._payload.add_streams(streams)
            start = start if n_received else at
            n_received += len(streams)
        return {
            number: [chunk.at(start + chunk.offset) for chunk in own]
            for number, own in moved.items()
        }
