"""One tensor of the target, made of the base's block by block, and what it and the base must be.

Memory stays within one block and the changes of one chunk, whatever the tensor's size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from blake3 import blake3

from sparsedelta.codecs.chunk import CHUNK_ELEMENTS, Chunk, chunk_span, decode_chunk, n_chunks
from sparsedelta.codecs.indices import Positions
from sparsedelta.codecs.values import VALUE_ENCODINGS, Bits
from sparsedelta.dtypes import DType
from sparsedelta.errors import Corrupt
from sparsedelta.files.checkpoint import Tensor
from sparsedelta.format.records import (
    DIGEST_BYTES,
    TOUCHED_BYTES,
    Change,
    Payload,
    TensorDelta,
    TensorSpec,
    tensor_key,
)
from sparsedelta.tensors.base_bits import ChunkBase
from sparsedelta.tensors.compare import BLOCK_BYTES, digest_tensor
from sparsedelta.tensors.parallel import DENSE_ELEMENTS, WIDE_BYTES, Pace, dense_places, wide_places

Check: TypeAlias = Literal["full", "touched", "none"]
Write: TypeAlias = Callable[[memoryview, int], None]  # bytes, and their offset in the tensor


class BaseDiffers(Exception):
    """A tensor of the base is not what the row says; ``digest`` is its whole digest."""

    def __init__(self, row: TensorDelta, digest: bytes) -> None:
        super().__init__(row.name)
        self.row = row
        self.digest = digest


@dataclass(frozen=True, slots=True)
class Digests:
    """Whole digests of one tensor in base and target; None: it has none, or was not looked at."""

    base: bytes | None = None
    target: bytes | None = None


def rebuild(
    row: TensorDelta,
    base: Tensor | None,
    payload: Payload,
    write: Write,
    *,
    check: Check,
    pace: Pace,
    every_base: bool = False,
) -> Digests:
    """Make the target's tensor of the base's, and check both.

    Args:
        row: the tensor; one without a target is only checked.
        base: the base's tensor, of the dtype and shape of ``row.base``.
        payload: holds the coded chunks.
        write: receives the tensor's bytes in order; a block is valid only during the call.
        check: ``"full"`` compares digests of all bytes, ``"touched"`` of the touched values,
            or, where the delta has no digests of these, of all bytes.
        pace: told of every byte of the target.
        every_base: with ``"full"``, digest the base's tensor even where the target's digest proves it.

    Raises:
        BaseDiffers: the base's tensor, or its touched values, have another digest than the row says.
        Corrupt: the base is right and the tensor made is not: the delta is inconsistent.
    """
    if row.target is None:
        return Digests(_check_base(row, base, pace) if check == "full" else None)
    if row.change is None:
        return _copy(row, base, write, check=check, pace=pace)
    return _Rebuild(
        row, row.target, row.change, base, payload, write, check, pace, every_base
    ).run()


def _copy(
    row: TensorDelta, base: Tensor | None, write: Write, *, check: Check, pace: Pace
) -> Digests:
    tensor = _required(row, base)
    hasher = blake3() if check == "full" else None
    for offset, block in _blocks(tensor):
        if hasher:
            hasher.update(block)
        write(block, offset)
        pace.advance(len(block))
    if hasher is None:
        return Digests()
    digest = hasher.digest()
    if row.base and digest[:DIGEST_BYTES] != row.base.digest:
        raise BaseDiffers(row, digest)
    return Digests(digest, digest)


def _check_base(row: TensorDelta, base: Tensor | None, pace: Pace) -> bytes:
    digest = digest_tensor(_required(row, base), pace.unreported())
    if row.base and digest[:DIGEST_BYTES] != row.base.digest:
        raise BaseDiffers(row, digest)
    return digest


def _required(row: TensorDelta, base: Tensor | None) -> Tensor:
    if base is None:
        raise ValueError(f"tensor {row.name!r} is made of the base's, and none was given")
    return base


def _blocks(tensor: Tensor) -> Iterator[tuple[int, memoryview]]:
    buffer = memoryview(bytearray(min(BLOCK_BYTES, tensor.n_bytes)))
    for offset in range(0, tensor.n_bytes, BLOCK_BYTES):
        block = buffer[: tensor.n_bytes - offset]
        tensor.read_into(block, offset)
        yield offset, block


class _Rebuild:
    """The work on one changed tensor."""

    def __init__(
        self,
        row: TensorDelta,
        target: TensorSpec,
        change: Change,
        base: Tensor | None,
        payload: Payload,
        write: Write,
        check: Check,
        pace: Pace,
        every_base: bool,
    ) -> None:
        if check == "touched" and change.touched is None:
            check = "full"  # there are no other digests to hold it against
        self._row = row
        self._target = target
        self._change = change
        self._base = base
        self._payload = payload
        self._write = write
        self._pace = pace
        self._decode = VALUE_ENCODINGS[change.values].decode
        self._block = np.zeros(BLOCK_BYTES // target.dtype.width, target.dtype.view)
        self._target_hash = blake3() if check == "full" else None
        hash_base = check == "full" and (every_base or not self._target_proves_base())
        self._base_hash = blake3() if hash_base and base is not None else None
        touched = change.touched if check == "touched" or every_base else None
        self._touched = (blake3(), blake3()) if touched else None

    def run(self) -> Digests:
        """Make the whole tensor."""
        offset = 0
        chunks = {chunk.number: chunk for chunk in self._change.chunks}
        for number in range(n_chunks(self._target.n_elements)):
            chunk = chunks.get(number)
            self._run_chunk(number, chunk, offset)
            offset += sum(chunk.coded_bytes) if chunk else 0
        return self._check()

    def _run_chunk(self, number: int, chunk: Chunk | None, offset: int) -> None:
        dtype, span = self._target.dtype, chunk_span(self._target.n_elements, number)
        with place_for(chunk, dtype):
            positions, codes = np.empty(0, np.uint32), np.empty(0, dtype.view)
            if chunk:
                n_bytes = sum(chunk.coded_bytes)
                key = tensor_key(self._row.name)
                # Not by a name here: the coded bytes may be as many as the codes.
                positions, codes = self._decode_chunk(
                    chunk, span, self._payload.read(key, offset, n_bytes) if n_bytes else b""
                )
            starts = range(0, span, len(self._block))
            edges = np.searchsorted(positions, [*starts, span]).tolist()
            for start, low, high in zip(starts, edges, edges[1:], strict=False):
                n = min(len(self._block), span - start)
                bits = self._read(number * CHUNK_ELEMENTS + start, n)
                if high > low:
                    self._change_block(
                        bits, positions[low:high] - np.uint32(start), codes[low:high]
                    )
                raw = bits.view(np.uint8).data
                if self._target_hash:
                    self._target_hash.update(raw)
                self._write(raw, (number * CHUNK_ELEMENTS + start) * dtype.width)
                self._pace.advance(len(raw))

    def _decode_chunk(self, chunk: Chunk, span: int, coded: bytes) -> tuple[Positions, Bits]:
        dtype, keep = self._target.dtype, self._change.keep
        base = ChunkBase(self._base, dtype, keep, chunk.number) if chunk.needs_base else None
        try:
            return decode_chunk(chunk, dtype, span, coded, base=base)
        except Corrupt:
            # What is read with the help of another base makes no sense: that is the thing to say.
            if base and self._base is not None:
                _check_base(self._row, self._base, self._pace)
            raise

    def _read(self, start: int, n: int) -> Bits:
        """Return elements ``start`` … ``start + n`` before the change, in a buffer used again."""
        bits = self._block[:n]
        kept = max(0, min(n, self._change.keep - start))
        bits[kept:] = 0
        if kept:
            raw = bits[:kept].view(np.uint8).data
            _required(self._row, self._base).read_into(raw, start * self._target.dtype.width)
            if self._base_hash:
                self._base_hash.update(raw)
        return bits

    def _change_block(self, bits: Bits, positions: Positions, codes: Bits) -> None:
        before = bits[positions]
        after = self._decode(self._target.dtype, before, codes)
        bits[positions] = after
        if self._touched:
            for hasher, values in zip(self._touched, (before, after), strict=True):
                hasher.update(np.ascontiguousarray(values).view(np.uint8).data)

    def _check(self) -> Digests:
        base_digest = self._digest_base()
        row, expected = self._row, self._target.digest
        if row.base and base_digest and base_digest[:DIGEST_BYTES] != row.base.digest:
            raise BaseDiffers(row, base_digest)
        if self._touched:
            self._check_touched(self._touched)
        if self._target_hash is None:
            return Digests()
        digest = self._target_hash.digest()
        if expected is not None and digest[:DIGEST_BYTES] != expected:
            if base_digest is None and self._base is not None:
                _check_base(row, self._base, self._pace)
            raise Corrupt(
                f"tensor {row.name!r} becomes {digest.hex()[:12]}…, expected {expected.hex()[:12]}…,"
                " on the right base; the delta is inconsistent; download it again",
                tensor=row.name,
                expected=expected.hex(),
                found=digest[:DIGEST_BYTES].hex(),
            )
        return Digests(base_digest, digest)

    def _digest_base(self) -> bytes | None:
        if self._base is None or self._base_hash is None:
            return None
        kept_bytes = self._change.keep * self._target.dtype.width
        pace = self._pace.unreported()
        return digest_tensor(self._base, pace, offset=kept_bytes, hasher=self._base_hash)

    def _check_touched(self, hashers: tuple[blake3, blake3]) -> None:
        before, after = (hasher.digest()[:TOUCHED_BYTES] for hasher in hashers)
        expected = self._change.touched
        if expected is None or (before, after) == expected:
            return
        if before != expected[0] and self._base is not None:
            _check_base(self._row, self._base, self._pace)
        raise Corrupt(
            f"tensor {self._row.name!r}: its touched values {before.hex()} become {after.hex()},"
            f" expected {expected[0].hex()} and {expected[1].hex()}; the delta is inconsistent;"
            " download it again",
            tensor=self._row.name,
            expected=expected[1].hex(),
            found=after.hex(),
        )

    def _target_proves_base(self) -> bool:
        """Return whether only the right base can become a tensor with the target's digest.

        An ulp code maps the bits before onto the bits after one to one, and so do all of them
        together if every element of the base is kept, and if none was read with the base's help.
        """
        base, target = self._row.base, self._target
        return (
            target.digest is not None
            and self._change.values == "ulp"
            and not any(chunk.needs_base for chunk in self._change.chunks)
            and base is not None
            and self._change.keep == base.n_elements == target.n_elements
        )


def place_for(chunk: Chunk | None, dtype: DType) -> AbstractContextManager[object]:
    """Return a place to decode the chunk in; those in which much changes take turns."""
    if chunk is None or chunk.nnz <= DENSE_ELEMENTS:
        return nullcontext()
    return wide_places if dtype.width == WIDE_BYTES else dense_places
