"""Compare a tensor of the base with one of the target: digests of both, and the changes as coded chunks.

Both tensors are read once, block by block. Memory is at most one block of each tensor and the changes
of one chunk, for tensors of any size.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Protocol

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from sparsedelta.codecs.chunk import (
    MAX_SPAN,
    TOUCHED_BYTES,
    Chunk,
    Span,
    encode_chunk,
    touched_digest,
)
from sparsedelta.codecs.context import Positions
from sparsedelta.codecs.exponent_classes import Keys, keys_of
from sparsedelta.codecs.values import VALUE_ENCODINGS, Bits, differences
from sparsedelta.codecs.zstd import Level
from sparsedelta.format.records import DIGEST_BYTES, BaseTensor, Named, Row, default_keep
from sparsedelta.format.spool import SpoolPayload
from sparsedelta.tensors.changes import place_for
from sparsedelta.tensors.parallel import DENSE_ELEMENTS, Pace
from sparsedelta.tensors.start import Readable, RowStart, read_start

BLOCK_BYTES = 1 << 20
_KNOWN_BLOCK_BYTES = 1 << 22


class Source(Named, Readable, Protocol):
    """A tensor that can be read: from a checkpoint, or computed while it is read."""


def digest_tensor(
    tensor: Source, pace: Pace | None = None, *, offset: int = 0, hasher: blake3 | None = None
) -> bytes:
    """Return the digest of a tensor's bytes from ``offset`` on.

    Args:
        tensor: the tensor.
        pace: receives the number of bytes read.
        offset: byte to start at.
        hasher: a hasher to continue, which has the bytes before ``offset``; it is updated. None: a new one.
    """
    pace, hasher = pace or Pace(), hasher or blake3()
    n_bytes = tensor.spec.n_bytes
    buffer = memoryview(bytearray(min(BLOCK_BYTES, n_bytes - offset)))
    while offset < n_bytes:
        block = buffer[: n_bytes - offset]
        tensor.read_into(block, offset)
        hasher.update(block)
        offset += len(block)
        pace.advance(len(block))
    return hasher.digest()[:DIGEST_BYTES]


def base_tensor(tensor: Source, digest: bytes) -> BaseTensor:
    """Return a row's reference to a base tensor with this digest."""
    return BaseTensor(tensor.file, tensor.name, tensor.spec.with_digest(digest))


def kept(base: Source | None, target: Source) -> tuple[Source | None, int]:
    """Return the base tensor that a target tensor is compared with, and how many of its elements are kept."""
    keep = default_keep(base.spec if base else None, target.spec)
    if base is not None and not keep and not base.spec.same_layout(target.spec):
        base = None  # no element of it can be kept
    return base, keep


class Comparison:
    """The comparison of one target tensor with its base tensor, if there is one."""

    def __init__(
        self,
        base: Source | None,
        target: Source,
        *,
        values: str,
        payload: SpoolPayload,
        pace: Pace,
        level: Level = Level.DEFAULT,
        standalone: bool = False,
        base_digest: bytes | None = None,
        digests: bool = True,
    ) -> None:
        """Prepare the comparison; ``run`` does it.

        Args:
            base: the tensor in the base; None if the target tensor has no counterpart.
            target: the tensor in the target.
            values: the value encoding for elements that start with the base's bits; the other
                elements use ``target``.
            payload: receives the coded chunks.
            pace: receives the number of bytes read.
            level: how much time is spent to make the delta smaller.
            standalone: code the changes so that they can be decoded without the base.
            base_digest: digest of the base tensor; None: it is computed.
            digests: compute the digests while reading. Without them only ``chunks`` can be called.
        """
        spec = target.spec
        base, keep = kept(base, target)
        self._base = base
        self._target = target
        self._dtype = spec.dtype
        self._n_elements = spec.n_elements
        self._columns = spec.shape[-1] if spec.shape else 0
        self._keep = keep
        self._values = values
        self._standalone = standalone
        self._level = level
        self._payload = payload
        self._pace = pace
        self._digests = digests
        n_block = max(1, min(BLOCK_BYTES // self._dtype.width, self._n_elements))
        self._base_block = np.empty(n_block, self._dtype.view)
        self._target_block = np.empty(n_block, self._dtype.view)
        self._base_hash = blake3()
        self._base_digest = base_digest
        # None while all bytes so far are equal, so that hashing the base's bytes is enough.
        self._target_hash = blake3() if base_digest else None

    def run(self) -> Row:
        """Return the row; its chunks are added to the payload."""
        base, target = self._base, self._target
        chunks = self.chunks(0, self._n_elements)
        digest = (self._target_hash or self._base_hash).digest()[:DIGEST_BYTES]
        found = None
        if base is not None:
            kept_bytes = self._keep * self._dtype.width
            found = base_tensor(
                base,
                self._base_digest
                or digest_tensor(base, self._pace, offset=kept_bytes, hasher=self._base_hash),
            )
        spec = target.spec.with_digest(digest)
        return Row(target.file, target.name, spec, found, self._keep, tuple(chunks))

    def chunks(self, first: int, end: int) -> list[Chunk]:
        """Return the chunks from element ``first``, a multiple of ``MAX_SPAN``, to ``end``; they are added to the payload."""
        starts = range(first, end, MAX_SPAN)
        found = [self._compare_chunk(start, min(MAX_SPAN, end - start)) for start in starts]
        return [chunk for chunk in found if chunk]

    def run_on_changes(self, positions: npt.NDArray[np.int64], bits: Bits) -> Row:
        """Return the row as ``run`` does, if the changed elements are known; the target is not read.

        The base must have the target's dtype and shape. Its digest is computed if it was not given.

        Args:
            positions: flat indices of the changed elements, increasing, (nnz,).
            bits: their bits in the target, (nnz,).
        """
        base = self._base
        if base is None:
            raise ValueError("the changes are relative to a base")
        before, hasher = np.empty_like(bits), blake3()
        buffer = np.empty(
            min(_KNOWN_BLOCK_BYTES // self._dtype.width, self._n_elements), bits.dtype
        )
        for start in range(0, self._n_elements, max(1, len(buffer))):
            block = buffer[: self._n_elements - start]
            base.read_into(block.view(np.uint8).data, start * self._dtype.width)
            low, high = np.searchsorted(positions, [start, start + len(block)]).tolist()
            inside = positions[low:high] - start
            if self._base_digest is None:
                self._base_hash.update(block.view(np.uint8).data)
            before[low:high] = block[inside]
            block[inside] = bits[low:high]
            hasher.update(block.view(np.uint8).data)
            self._pace.advance(2 * block.nbytes)
        chunks = []
        for start in range(0, self._n_elements, MAX_SPAN):
            span = min(MAX_SPAN, self._n_elements - start)
            low, high = np.searchsorted(positions, [start, start + span]).tolist()
            if low < high:
                own = slice(low, high)
                in_chunk = (positions[own] - start).astype(np.uint32)
                known = before[own], bits[own]
                chunks.append(self.encode_known(start, span, in_chunk, *known))
        spec = self._target.spec.with_digest(hasher.digest()[:DIGEST_BYTES])
        digest = self._base_digest or self._base_hash.digest()[:DIGEST_BYTES]
        found = base_tensor(base, digest)
        return Row(self._target.file, self._target.name, spec, found, self._keep, tuple(chunks))

    def encode_known(
        self, first: int, span: int, positions: Positions, before: Bits, after: Bits
    ) -> Chunk:
        """Return the chunk of ``span`` elements from ``first``, if its changed elements are known; it is added to the payload.

        Args:
            first: flat index of its first element, a multiple of ``MAX_SPAN``.
            span: number of its elements.
            positions: which of them change, increasing, (nnz,).
            before: their bits before the change, (nnz,).
            after: their bits in the target, (nnz,).
        """
        values = self._values if first < self._keep else "target"
        with place_for(len(positions), self._dtype):
            codes = VALUE_ENCODINGS[values].encode(self._dtype, before, after)
            digests = touched_digest(before), touched_digest(after)
            return self._encode(first, span, positions, codes, keys_of(before), digests)

    def _compare_block(self, first: int, span: int) -> Chunk | None:
        """Compare a chunk that fits in one block."""
        base_bits, target_bits = self._read(first, span)
        positions = np.empty(span, np.uint32)
        before, after = differences(base_bits, target_bits, 0, positions)
        self._hash(base_bits, target_bits, first, len(before))
        if not len(before):
            return None
        return self.encode_known(first, span, positions[: len(before)], before, after)

    def _compare_chunk(self, first: int, span: int) -> Chunk | None:
        dtype = self._dtype
        if span <= len(self._base_block):
            return self._compare_block(first, span)
        values = self._values if first < self._keep else "target"
        # np.empty takes no memory until a page is written, so a sparse chunk takes little.
        positions = np.empty(span, np.uint32)
        codes = np.empty(span, dtype.view)
        keys = np.empty(span, np.uint8)
        encode = VALUE_ENCODINGS[values].encode
        touched_hashes = blake3(), blake3()
        nnz = 0
        with ExitStack() as place:
            for start in range(0, span, len(self._base_block)):
                n = min(len(self._base_block), span - start)
                base_bits, target_bits = self._read(first + start, n)
                before, after = differences(base_bits, target_bits, start, positions[nnz:])
                self._hash(base_bits, target_bits, first + start, len(before))
                if not len(before):
                    continue
                for hasher, bits in zip(touched_hashes, (before, after), strict=True):
                    hasher.update(bits.view(np.uint8).data)
                end = nnz + len(before)
                if nnz <= DENSE_ELEMENTS < end:
                    place.enter_context(place_for(end, dtype))
                codes[nnz:end] = encode(dtype, before, after)
                keys[nnz:end] = keys_of(before)
                nnz = end
            if not nnz:
                return None
            before_digest, after_digest = (h.digest()[:TOUCHED_BYTES] for h in touched_hashes)
            digests = before_digest, after_digest
            return self._encode(first, span, positions[:nnz], codes[:nnz], keys[:nnz], digests)

    def _encode(
        self,
        first: int,
        span: int,
        positions: Positions,
        codes: Bits,
        keys: Keys,
        digests: tuple[bytes, bytes],
    ) -> Chunk:
        chunk, streams = encode_chunk(
            Span(first, span, self._columns, self._start(first)),
            positions,
            codes,
            values=self._values if first < self._keep else "target",
            touched=digests,
            level=self._level,
            keys=keys,
        )
        return self._payload.add_chunk(chunk, streams)

    def _start(self, first: int) -> RowStart | None:
        """Return a reader of the row's start from ``first``.

        None if the start is zero there, or if the delta must be decodable without the base.
        """
        if self._standalone or self._base is None or self._keep <= first:
            return None
        return RowStart(self._base, self._dtype, self._keep, first)

    def _read(self, start: int, n: int) -> tuple[Bits, Bits]:
        """Return the bits of ``n`` elements from ``start``, before and after the change."""
        width = self._dtype.width
        kept = max(0, min(n, self._keep - start))
        base_bits, target_bits = self._base_block[:n], self._target_block[:n]
        read_start(self._base, self._keep, start, base_bits)
        self._target.read_into(target_bits.view(np.uint8).data, start * width)
        self._pace.advance((kept + n) * width)
        return base_bits, target_bits

    def _hash(self, base_bits: Bits, target_bits: Bits, start: int, n_touched: int) -> None:
        if not self._digests:
            return
        n_kept = max(0, min(len(base_bits), self._keep - start))
        if self._target_hash is None and (n_touched or n_kept < len(base_bits)):
            self._target_hash = self._base_hash.copy()
        if not self._base_digest:
            self._base_hash.update(base_bits[:n_kept].view(np.uint8).data)
        if self._target_hash is not None:
            self._target_hash.update(target_bits.view(np.uint8).data)
