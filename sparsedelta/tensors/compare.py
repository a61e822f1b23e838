"""One tensor of base and target, read once in step: digests of both, and what changed as coded chunks.

Memory stays within one block of each and the changes of one chunk, whatever the tensor's size.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from blake3 import blake3

from sparsedelta.codecs.chunk import (
    CHUNK_ELEMENTS,
    Chunk,
    Level,
    chunk_span,
    encode_chunk,
    n_chunks,
)
from sparsedelta.codecs.exponent_classes import keys_of
from sparsedelta.codecs.values import VALUE_ENCODINGS, Bits
from sparsedelta.dtypes import DType
from sparsedelta.format.records import (
    DIGEST_BYTES,
    TOUCHED_BYTES,
    Change,
    TensorDelta,
    TensorSpec,
    tensor_key,
)
from sparsedelta.format.spool import SpoolPayload
from sparsedelta.tensors.base_bits import ChunkBase
from sparsedelta.tensors.parallel import DENSE_ELEMENTS, WIDE_BYTES, Pace, dense_places, wide_places

BLOCK_BYTES = 1 << 19


class Source(Protocol):
    """A tensor whose bytes can be read: of a checkpoint, or made as they are asked for."""

    @property
    def name(self) -> str:
        """Its name in the checkpoint."""

    @property
    def dtype(self) -> DType:
        """Its dtype."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""

    @property
    def n_bytes(self) -> int:
        """Its size."""

    @property
    def n_elements(self) -> int:
        """Its elements, as the format counts them."""

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer`` with the tensor's bytes from ``offset``."""


@dataclass(frozen=True, slots=True)
class Compared:
    """A row, and the whole digests of the tensor in base and target (None where it has none)."""

    row: TensorDelta
    base_digest: bytes | None
    target_digest: bytes | None


def spec_of(tensor: Source, digest: bytes) -> TensorSpec:
    """Return a tensor's dtype, shape and shortened digest."""
    return TensorSpec(tensor.dtype, tensor.shape, digest[:DIGEST_BYTES])


def digest_tensor(
    tensor: Source, pace: Pace, *, offset: int = 0, hasher: blake3 | None = None
) -> bytes:
    """Return the digest of a tensor's bytes from ``offset``, continuing ``hasher`` if one is given."""
    hasher = hasher or blake3()
    buffer = memoryview(bytearray(min(BLOCK_BYTES, tensor.n_bytes - offset)))
    while offset < tensor.n_bytes:
        block = buffer[: tensor.n_bytes - offset]
        tensor.read_into(block, offset)
        hasher.update(block)
        offset += len(block)
        pace.advance(len(block))
    return hasher.digest()


def kept_elements(base: Source | TensorSpec | None, target: Source | TensorSpec) -> int:
    """Return how many leading elements of the base the target can keep (FORMAT §4)."""
    if base is None or base.dtype is not target.dtype:
        return 0
    return min(base.n_elements, target.n_elements)


class Comparison:
    """Compares one tensor of the target with the base's of the same name, if there is one."""

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
    ) -> None:
        """Prepare.

        Args:
            base: the tensor in the base.
            target: the tensor in the target.
            values: the value encoding where there is a base value to start from.
            payload: receives the coded chunks.
            pace: told of every byte read.
            level: how much time a smaller delta may cost.
            standalone: use nothing that the base is needed to read.
        """
        self._standalone = standalone
        self._level = level
        self._base = base
        self._target = target
        self._keep = kept_elements(base, target)
        self._values = values if self._keep else "target"
        self._payload = payload
        self._pace = pace
        n_block = BLOCK_BYTES // target.dtype.width
        self._base_block = np.zeros(n_block, target.dtype.view)
        self._target_block = np.zeros(n_block, target.dtype.view)
        self._differs = np.empty(n_block, np.bool_)
        self._base_hash = blake3()
        self._target_hash: blake3 | None = None  # None while the target equals the base so far
        self._touched = (blake3(), blake3())
        self._chunks: list[Chunk] = []

    def run(self) -> Compared:
        """Return the row and both digests; the chunks are in the payload afterwards."""
        base, target = self._base, self._target
        for number in range(n_chunks(target.n_elements)):
            self._compare_chunk(number)
        target_digest = (self._target_hash or self._base_hash).digest()
        if base is None:
            return Compared(
                TensorDelta(target.name, None, spec_of(target, target_digest), self._change()),
                None,
                target_digest,
            )
        base_digest = digest_tensor(
            base, self._pace, offset=self._keep * target.dtype.width, hasher=self._base_hash
        )
        base_spec, target_spec = spec_of(base, base_digest), spec_of(target, target_digest)
        change = None if base_spec == target_spec else self._change()
        return Compared(
            TensorDelta(target.name, base_spec, target_spec, change), base_digest, target_digest
        )

    def _change(self) -> Change:
        before, after = (hasher.digest()[:TOUCHED_BYTES] for hasher in self._touched)
        return Change(self._keep, self._values, (before, after), tuple(self._chunks))

    def _compare_chunk(self, number: int) -> None:
        dtype = self._target.dtype
        span = chunk_span(self._target.n_elements, number)
        # Not resident until filled: a sparse chunk touches few pages of these.
        positions = np.empty(span, np.uint32)
        codes = np.empty(span, dtype.view)
        keys = np.empty(span, np.uint8)
        encode = VALUE_ENCODINGS[self._values].encode
        nnz = 0
        with ExitStack() as place:
            for start in range(0, span, len(self._differs)):
                n = min(len(self._differs), span - start)
                base_bits, target_bits = self._read(number * CHUNK_ELEMENTS + start, n)
                touched = np.flatnonzero(
                    np.not_equal(base_bits, target_bits, out=self._differs[:n])
                )
                self._hash(base_bits, target_bits, number * CHUNK_ELEMENTS + start, len(touched))
                if not len(touched):
                    continue
                before, after = base_bits[touched], target_bits[touched]
                self._touched[0].update(before.view(np.uint8).data)
                self._touched[1].update(after.view(np.uint8).data)
                end = nnz + len(touched)
                if nnz <= DENSE_ELEMENTS < end:
                    place.enter_context(wide_places if dtype.width == WIDE_BYTES else dense_places)
                np.add(touched, start, out=positions[nnz:end], casting="unsafe")
                codes[nnz:end] = encode(dtype, before, after)
                keys[nnz:end] = keys_of(before)
                nnz = end
            if nnz:
                chunk, frames = encode_chunk(
                    number,
                    span,
                    positions[:nnz],
                    codes[:nnz],
                    level=self._level,
                    base=self._base_bits(number),
                    keys=keys[:nnz],
                    columns=self._target.shape[-1] if self._target.shape else 0,
                )
                self._payload.append(tensor_key(self._target.name), frames)
                self._chunks.append(chunk)

    def _base_bits(self, number: int) -> ChunkBase | None:
        """Return a reader of a chunk's bits before the change; None if they must not help or are zero."""
        if self._standalone or self._base is None or self._keep <= number * CHUNK_ELEMENTS:
            return None
        return ChunkBase(self._base, self._target.dtype, self._keep, number)

    def _read(self, start: int, n: int) -> tuple[Bits, Bits]:
        """Return the bits of elements ``start`` … ``start + n`` before and after the change."""
        width = self._target.dtype.width
        kept = max(0, min(n, self._keep - start))
        base_bits, target_bits = self._base_block[:n], self._target_block[:n]
        base_bits[kept:] = 0
        if self._base is not None and kept:
            self._base.read_into(base_bits[:kept].view(np.uint8).data, start * width)
        self._target.read_into(target_bits.view(np.uint8).data, start * width)
        self._pace.advance((kept + n) * width)
        return base_bits, target_bits

    def _hash(self, base_bits: Bits, target_bits: Bits, start: int, n_touched: int) -> None:
        kept = max(0, min(len(base_bits), self._keep - start))
        if self._target_hash is None and (n_touched or kept < len(base_bits)):
            self._target_hash = self._base_hash.copy()
        self._base_hash.update(base_bits[:kept].view(np.uint8).data)
        if self._target_hash is not None:
            self._target_hash.update(target_bits.view(np.uint8).data)
