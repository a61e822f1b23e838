"""Rebuild one target tensor from its base tensor, block by block, and check both.

Memory is at most one block and the changes of one chunk, for tensors of any size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from blake3 import blake3

from sparsedelta.codecs.chunk import TOUCHED_BYTES, Chunk
from sparsedelta.codecs.indices import Positions
from sparsedelta.codecs.values import Bits, change
from sparsedelta.errors import Corrupt
from sparsedelta.format.records import DIGEST_BYTES, Payload, Row
from sparsedelta.tensors.changes import Segment, decode_row_chunk, place_for, segments
from sparsedelta.tensors.compare import BLOCK_BYTES, Source, digest_tensor
from sparsedelta.tensors.parallel import Pace
from sparsedelta.tensors.start import read_start

Check: TypeAlias = Literal["full", "touched", "none"]
Write: TypeAlias = Callable[[memoryview, int], None]  # bytes, and their offset in the tensor


class BaseDiffers(Exception):
    """A base tensor has another digest than the row expects.

    Attributes:
        row: the row.
        digest: the digest found.
    """

    def __init__(self, row: Row, digest: bytes) -> None:
        super().__init__(row, digest)  # as given, so that it can be pickled
        self.row = row
        self.digest = digest


def check_base_tensor(row: Row, base: Source, pace: Pace) -> None:
    """Raise BaseDiffers if a base tensor has another digest than the row expects."""
    digest = digest_tensor(base, pace)
    if row.base and digest != row.base.spec.digest:
        raise BaseDiffers(row, digest)


def check_touched(
    row: Row,
    base: Source | None,
    pace: Pace,
    expected: tuple[bytes, bytes] | None,
    found: tuple[bytes, bytes],
) -> None:
    """Compare the touched digests of a chunk, before and after; None: the delta lacks them.

    Raises:
        BaseDiffers: they differ, and the base tensor has another digest than the row expects.
        Corrupt: they differ, and the base tensor is right.
    """
    if expected is None or found == expected:
        return
    if base is not None:
        check_base_tensor(row, base, pace.unreported())
    raise Corrupt(
        f"tensor {row.name!r}: its touched values have the digests {found[0].hex()} before and"
        f" {found[1].hex()} after, expected {expected[0].hex()} and {expected[1].hex()};"
        " the base is right, so the delta is inconsistent; download it again",
        tensor=row.name,
        expected=expected[1].hex(),
        found=found[1].hex(),
    )


def check_rebuilt(row: Row, digest: bytes) -> None:
    """Raise Corrupt if a tensor that was rebuilt from the right base has another digest than the row states."""
    expected = row.target.digest
    if expected is None or digest == expected:
        return
    raise Corrupt(
        f"tensor {row.name!r} is rebuilt with digest {digest.hex()[:12]}…, expected"
        f" {expected.hex()[:12]}…; the base is right, so the delta is inconsistent; download it again",
        tensor=row.name,
        expected=expected.hex(),
        found=digest.hex(),
    )


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
    """Rebuild a target tensor from its base tensor, and check both.

    Args:
        row: the tensor.
        base: the base tensor, with the dtype and shape that the row states; None if the row has none.
        payload: holds the coded chunks.
        write: receives the tensor's bytes in order; a block is valid only during the call.
        check: ``"full"`` compares the digests of whole tensors and of touched elements. ``"touched"``
            compares only those of touched elements, but acts like ``"full"`` if a chunk lacks them.
            ``"none"`` compares neither.
        pace: receives the number of bytes of the target.
        every_base: with ``"full"``, always compare the digest of the base tensor. Otherwise this is
            skipped where the digest of the target proves that the base is right.

    Raises:
        BaseDiffers: the base tensor has another digest than the row expects.
        Corrupt: a chunk is damaged, or the right base gives a wrong target.
        ValueError: the row has a base tensor, and ``base`` is None.
    """
    full = effective_check(row, check) == "full"
    checks_base = full and base is not None and (every_base or not _target_proves_base(row))
    work = _rebuild(
        row,
        base,
        payload,
        write,
        pace,
        checks_touched=check != "none",
        target_hash=blake3() if full and row.target.digest is not None else None,
        base_hash=blake3() if checks_base else None,
    )
    work.run(segments(row))
    work.check()


def effective_check(row: Row, check: Check) -> Check:
    """Return ``check``, or ``"full"`` if it is ``"touched"`` and a chunk has no touched digests to compare."""
    lacks = check == "touched" and any(chunk.touched is None for chunk in row.chunks)
    return "full" if lacks else check


def rebuild_part(
    row: Row,
    base: Source | None,
    payload: Payload,
    write: Write,
    part: Iterable[Segment],
    *,
    check: Check,
    pace: Pace,
) -> None:
    """Rebuild some segments of a target tensor; of the digests, only those of touched elements are compared.

    See ``rebuild``. When all parts are written, ``check_written`` compares the other digests.
    """
    work = _rebuild(
        row,
        base,
        payload,
        write,
        pace,
        checks_touched=check != "none",
        target_hash=None,
        base_hash=None,
    )
    work.run(part)


def check_written(
    row: Row, base: Source | None, written: Source, *, check: Check, every_base: bool = False
) -> None:
    """Compare the digests of a tensor that ``rebuild_part`` has written, as ``rebuild`` does.

    Args:
        row: the row.
        base: the base tensor.
        written: the tensor in the output.
        check: see ``rebuild``.
        every_base: see ``rebuild``.

    Raises:
        BaseDiffers: the base tensor has another digest than the row expects.
        Corrupt: the right base gives a wrong target.
    """
    if effective_check(row, check) != "full":
        return
    if base is not None and (every_base or not _target_proves_base(row)):
        check_base_tensor(row, base, Pace())
    digest = digest_tensor(written)
    if digest != row.target.digest and base is not None:
        check_base_tensor(row, base, Pace())
    check_rebuilt(row, digest)


def _rebuild(
    row: Row,
    base: Source | None,
    payload: Payload,
    write: Write,
    pace: Pace,
    *,
    checks_touched: bool,
    target_hash: blake3 | None,
    base_hash: blake3 | None,
) -> _Rebuild:
    if base is None and row.base is not None:
        raise ValueError(f"tensor {row.name!r} needs its base tensor, but base is None")
    dtype = row.target.dtype
    block = np.empty(max(1, min(BLOCK_BYTES // dtype.width, row.target.n_elements)), dtype.view)
    return _Rebuild(
        row=row,
        base=base,
        payload=payload,
        write=write,
        pace=pace,
        checks_touched=checks_touched,
        block=block,
        target_hash=target_hash,
        base_hash=base_hash,
    )


@dataclass(frozen=True, slots=True)
class _Rebuild:
    """The state of one call of ``rebuild``: its arguments, a buffer, and hashes of target and base.

    A hash is None if its digest is not compared.
    """

    row: Row
    base: Source | None
    payload: Payload
    write: Write
    pace: Pace
    checks_touched: bool
    block: Bits
    target_hash: blake3 | None
    base_hash: blake3 | None

    def run(self, part: Iterable[Segment]) -> None:
        """Rebuild and write segments of the tensor."""
        for start, end, chunk in part:
            with place_for(chunk.nnz if chunk else 0, self.row.target.dtype):
                self.rebuild_segment(start, end, chunk)

    def rebuild_segment(self, first: int, end: int, chunk: Chunk | None) -> None:
        """Rebuild and write elements ``first`` to ``end``, which ``chunk``, if any, changes."""
        row, n_block = self.row, len(self.block)
        dtype = row.target.dtype
        positions, codes = np.empty(0, np.uint32), np.empty(0, dtype.view)
        hashes = (blake3(), blake3()) if chunk and chunk.touched and self.checks_touched else ()
        if chunk:
            positions, codes = self._decode_chunk(chunk)
        starts = range(first, end, n_block)
        edges = [0] * (len(starts) + 1)
        if chunk:  # uint32, because otherwise searchsorted copies the positions
            bounds = np.array([*(s - first for s in starts), end - first], np.uint32)
            edges = np.searchsorted(positions, bounds).tolist()
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
            found_digests = before_digest, after_digest
            check_touched(self.row, self.base, self.pace, chunk.touched, found_digests)

    def _decode_chunk(self, chunk: Chunk) -> tuple[Positions, Bits]:
        try:
            return decode_row_chunk(self.row, chunk, self.payload, self.base)
        except Corrupt:
            # Decoding with a wrong base fails, too. In that case report the base, not the delta.
            if chunk.coding.classes:
                self._check_base()
            raise

    def check(self) -> None:
        """Compare the digests of the base tensor and of the rebuilt tensor."""
        row = self.row
        if self.base_hash and self.base is not None and row.base:
            kept_bytes = row.keep * row.target.dtype.width
            pace = self.pace.unreported()
            digest = digest_tensor(self.base, pace, offset=kept_bytes, hasher=self.base_hash)
            if digest != row.base.spec.digest:
                raise BaseDiffers(row, digest)
        if self.target_hash is None:
            return
        digest = self.target_hash.digest()[:DIGEST_BYTES]
        if digest != row.target.digest:
            self._check_base()
        check_rebuilt(row, digest)

    def _check_base(self) -> None:
        """Raise BaseDiffers if the base tensor has another digest than expected."""
        if self.base is not None:
            check_base_tensor(self.row, self.base, self.pace.unreported())


def _target_proves_base(row: Row) -> bool:
    """Return whether a right target digest proves that the base tensor is right.

    Every element of the base must be kept, and all codes must be ``ulp``, which maps bits one to one. A base
    that differs in an element then gives another target, unless it also changes which elements a chunk with
    classes touches. In that case the digest of the old bits of these elements is wrong (FORMAT §10).
    """
    return (
        row.target.digest is not None
        and row.base is not None
        and row.keep == row.base.spec.n_elements == row.target.n_elements
        and all(
            c.coding.values == "ulp" and (c.touched or not c.coding.classes) for c in row.chunks
        )
    )
