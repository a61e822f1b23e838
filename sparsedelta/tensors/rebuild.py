"""One tensor of the target, made from the base's block by block, and what it and the base must be.

Memory stays within one block and the changes of one chunk, whatever the tensor's size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from blake3 import blake3

from sparsedelta.codecs.chunk import TOUCHED_BYTES, Chunk
from sparsedelta.codecs.indices import Positions
from sparsedelta.codecs.values import Bits, change
from sparsedelta.errors import Corrupt
from sparsedelta.format.records import DIGEST_BYTES, Payload, Row
from sparsedelta.tensors.changes import decode_row_chunk, place_for, segments
from sparsedelta.tensors.compare import BLOCK_BYTES, Source, digest_tensor
from sparsedelta.tensors.parallel import Pace
from sparsedelta.tensors.start import read_start

Check: TypeAlias = Literal["full", "touched", "none"]
Write: TypeAlias = Callable[[memoryview, int], None]  # bytes, and their offset in the tensor


class BaseDiffers(Exception):
    """A base tensor is not what the row says; ``digest`` is its digest."""

    def __init__(self, row: Row, digest: bytes) -> None:
        super().__init__(row.name)
        self.row = row
        self.digest = digest


def check_base_tensor(row: Row, base: Source, pace: Pace) -> None:
    """Raise BaseDiffers if a base tensor is another than the row says."""
    digest = digest_tensor(base, pace)
    if row.base and digest != row.base.spec.digest:
        raise BaseDiffers(row, digest)


def rebuild(
    row: Row,
    base: Source | None,
    payload: Payload,
    write: Write,
    *,
    check: Check,
    pace: Pace,
    every_base: bool = False,
) -> None:
    """Make a target tensor from its base tensor, and check both.

    Args:
        row: the tensor.
        base: the base tensor, of the dtype and shape that the row says; None if it has none.
        payload: holds the coded chunks.
        write: receives the tensor's bytes in order; a block is valid only during the call.
        check: ``"full"`` compares digests of all bytes and of touched elements, ``"touched"`` only
            those of touched elements or, of a tensor with chunks that have none, all.
        pace: told of every byte of the target.
        every_base: with ``"full"``, digest the base tensor even where the target's digest proves it.

    Raises:
        BaseDiffers: the base tensor has another digest than the row says.
        Corrupt: the base tensor is right and the one made is not: the delta is inconsistent; or a
            chunk is damaged.
    """
    if base is None and row.base is not None:
        raise ValueError(f"tensor {row.name!r} is made from a base tensor, and none was given")
    if check == "touched" and any(chunk.touched is None for chunk in row.chunks):
        check = "full"  # there are no other digests to hold it against
    full, dtype = check == "full", row.target.dtype
    wants_base = full and base is not None and (every_base or not _target_proves_base(row))
    work = _Rebuild(
        row=row,
        base=base,
        payload=payload,
        write=write,
        pace=pace,
        checks_touched=check != "none",
        block=np.zeros(max(1, min(BLOCK_BYTES // dtype.width, row.target.n_elements)), dtype.view),
        target_hash=blake3() if full and row.target.digest is not None else None,
        base_hash=blake3() if wants_base else None,
    )
    for start, end, chunk in segments(row):
        with place_for(chunk.nnz if chunk else 0, dtype):
            work.make(start, end, chunk)
    work.check()


@dataclass(frozen=True, slots=True)
class _Rebuild:
    """The work on one tensor: what ``rebuild`` is given, and a hash of what it is to digest."""

    row: Row
    base: Source | None
    payload: Payload
    write: Write
    pace: Pace
    checks_touched: bool
    block: Bits
    target_hash: blake3 | None
    base_hash: blake3 | None

    def make(self, first: int, end: int, chunk: Chunk | None) -> None:
        """Make a segment of the tensor."""
        row, n_block = self.row, len(self.block)
        dtype = row.target.dtype
        positions, codes = np.empty(0, np.uint32), np.empty(0, dtype.view)
        hashes = (blake3(), blake3()) if chunk and chunk.touched and self.checks_touched else ()
        if chunk:
            positions, codes = self._decode_chunk(chunk)
        starts = range(first, end, n_block)
        edges = np.searchsorted(positions, [*(s - first for s in starts), end - first]).tolist()
        for start, low, high in zip(starts, edges, edges[1:], strict=False):
            bits = self.block[: min(n_block, end - start)]
            read_start(self.base, row.keep, start, bits)
            if self.base_hash:
                n_kept = max(0, min(len(bits), row.keep - start))
                self.base_hash.update(bits[:n_kept].view(np.uint8).data)
            if high > low and chunk:
                values, part = chunk.coding.values, slice(low, high)
                made = change(dtype, bits, start - first, positions[part], values, codes[part])
                for hasher, found in zip(hashes, made, strict=False):
                    hasher.update(np.ascontiguousarray(found).view(np.uint8).data)
            raw = bits.view(np.uint8).data
            if self.target_hash:
                self.target_hash.update(raw)
            self.write(raw, start * dtype.width)
            self.pace.advance(len(raw))
        if hashes and chunk:
            before_digest, after_digest = (h.digest()[:TOUCHED_BYTES] for h in hashes)
            self._check_touched(chunk, (before_digest, after_digest))

    def _decode_chunk(self, chunk: Chunk) -> tuple[Positions, Bits]:
        try:
            return decode_row_chunk(self.row, chunk, self.payload, self.base)
        except Corrupt:
            # What is read with the help of another base makes no sense: that is the thing to say.
            if chunk.coding.classes:
                self._check_base()
            raise

    def _check_touched(self, chunk: Chunk, found: tuple[bytes, bytes]) -> None:
        if found == chunk.touched or chunk.touched is None:
            return
        self._check_base()
        raise Corrupt(
            f"tensor {self.row.name!r}: its touched values {found[0].hex()} become {found[1].hex()},"
            f" expected {chunk.touched[0].hex()} and {chunk.touched[1].hex()}, on the right base; the delta is"
            " inconsistent; download it again",
            tensor=self.row.name,
            expected=chunk.touched[1].hex(),
            found=found[1].hex(),
        )

    def check(self) -> None:
        """Compare the digests of what was made, and of what it was made from."""
        row = self.row
        if self.base_hash and self.base is not None and row.base:
            kept_bytes = row.keep * row.target.dtype.width
            pace = self.pace.unreported()
            digest = digest_tensor(self.base, pace, offset=kept_bytes, hasher=self.base_hash)
            if digest != row.base.spec.digest:
                raise BaseDiffers(row, digest)
        if self.target_hash is None:
            return
        digest, expected = self.target_hash.digest()[:DIGEST_BYTES], row.target.digest
        if expected is not None and digest != expected:
            self._check_base()
            raise Corrupt(
                f"tensor {row.name!r} becomes {digest.hex()[:12]}…, expected {expected.hex()[:12]}…,"
                " on the right base; the delta is inconsistent; download it again",
                tensor=row.name,
                expected=expected.hex(),
                found=digest.hex(),
            )

    def _check_base(self) -> None:
        """Raise BaseDiffers if the base tensor is another."""
        if self.base is not None:
            check_base_tensor(self.row, self.base, self.pace.unreported())


def _target_proves_base(row: Row) -> bool:
    """Return whether only the right base tensor can become one with the target's digest.

    An ulp code maps the bits before onto the bits after one to one, and so do all of them
    together if every element of the base is kept, and if none was read with the base's help.
    """
    return (
        row.target.digest is not None
        and row.base is not None
        and row.keep == row.base.spec.n_elements == row.target.n_elements
        and all(c.coding.values == "ulp" and not c.coding.classes for c in row.chunks)
    )
