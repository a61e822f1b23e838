"""Compare many small tensors at a time, by one call of the compiled kernels; the others are left to ``Comparison``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from sparsedelta.codecs import kernels
from sparsedelta.codecs.chunk import CODED_DIGEST_BYTES, TOUCHED_BYTES, Chunk, Coding
from sparsedelta.codecs.indices import INDEX_ENCODINGS
from sparsedelta.codecs.values import KINDS
from sparsedelta.codecs.zstd import Level
from sparsedelta.files.checkpoint import Tensor, read_exactly
from sparsedelta.format.columns import starts
from sparsedelta.format.records import DIGEST_BYTES, BaseTensor, Row
from sparsedelta.format.spool import SpoolPayload
from sparsedelta.tensors.parallel import Pace, run_all
from sparsedelta.tensors.small import (
    FEWEST,
    GROUP_BYTES,
    INDICES,
    MOST_GAP_BYTES,
    PACKINGS,
    ROW_BYTES,
    SMALL_BYTES,
    Group,
    rows_outside,
)

Pair = tuple[Tensor | None, Tensor]  # of base and target
Bytes = npt.NDArray[np.uint8]
_MOST_STREAM_BYTES = 127  # of one chunk, as in kernels/_small.h
_LEVELS = {Level.FAST: 0, Level.DEFAULT: 1, Level.MAX: 2}  # as in kernels/_small.h
# The digests of a pair, as in kernels/_small.h: of base, target, streams, touched elements before and after.
_CODED_AT = 2 * DIGEST_BYTES
_BEFORE_AT = _CODED_AT + CODED_DIGEST_BYTES
_AFTER_AT = _BEFORE_AT + TOUCHED_BYTES
_DIGESTS_BYTES = _AFTER_AT + TOUCHED_BYTES


def pair_groups(pairs: Sequence[Pair]) -> list[Group]:
    """Return groups of neighbouring pairs that ``compare_group`` can compare: small tensors in the order of their files.

    Base and target of a pair have the same dtype and shape. All tensors of a group have the same dtype.
    """
    if kernels.native is None:
        return []
    found: list[Group] = []
    start = size = 0
    last: Pair | None = None
    for number, pair in enumerate(pairs):
        fits = _is_small(pair)
        if fits and last is not None and size < GROUP_BYTES and _follows(last, pair):
            size += pair[1].spec.n_bytes + ROW_BYTES
        else:
            if last is not None and number - start >= FEWEST:
                found.append((start, number))
            start, size = number, 0
        last = pair if fits else None
    if last is not None and len(pairs) - start >= FEWEST:
        found.append((start, len(pairs)))
    return found


def _is_small(pair: Pair) -> bool:
    base, target = pair
    return (
        base is not None
        and type(base) is type(target) is Tensor  # others are not read from a file
        and base.fd >= 0 <= target.fd
        and 0 < target.spec.n_bytes <= SMALL_BYTES
        and (base.spec is target.spec or base.spec.same_layout(target.spec))
    )


def _follows(last: Pair, pair: Pair) -> bool:
    for before, tensor in zip(last, pair, strict=True):
        if before is None or tensor is None or before.fd != tensor.fd:
            return False
        gap = tensor.offset - before.offset - before.spec.n_bytes
        if not 0 <= gap <= min(MOST_GAP_BYTES, 4 * tensor.spec.n_bytes):
            return False
    return last[1].spec.dtype is pair[1].spec.dtype


def read_tensors(tensors: Sequence[Tensor]) -> tuple[Bytes, npt.NDArray[np.int64]]:
    """Return the part of a file that holds tensors in ascending order, and where each of them begins in it."""
    first, last = tensors[0], tensors[-1]
    data = np.empty(last.offset + last.spec.n_bytes - first.offset, np.uint8)
    read_exactly(first.fd, data.data, first.offset, first.name)
    return data, np.array([tensor.offset for tensor in tensors], np.int64) - first.offset


class PairComparison:
    """Compares groups of pairs.

    Args:
        values: the value encoding.
        payload: receives the coded chunks.
        level: how much time is spent to make the delta smaller.
    """

    def __init__(self, values: str, payload: SpoolPayload, level: Level = Level.DEFAULT) -> None:
        self._values = values
        self._payload = payload
        self._level = _LEVELS[level]
        self._codings = [
            [Coding(values, index, packing, False) for packing in PACKINGS] for index in INDICES
        ]
        self._is_stated = [INDEX_ENCODINGS[index].implied_bytes(0) is None for index in INDICES]

    def run(self, pairs: Sequence[Pair]) -> list[Row | None]:
        """Return the rows of a group of ``pair_groups``; None for a pair that is left to ``Comparison``."""
        bases, targets = [base for base, _ in pairs if base], [target for _, target in pairs]
        return self.run_on(bases, *read_tensors(bases), targets, *read_tensors(targets))

    def run_on(
        self,
        bases: Sequence[Tensor],
        base: Bytes,
        base_at: npt.NDArray[np.int64],
        targets: Sequence[Tensor],
        target: Bytes,
        target_at: npt.NDArray[np.int64],
    ) -> list[Row | None]:
        """Return rows as ``run`` does, from the bytes of all tensors.

        Args:
            bases: the base tensors.
            base: bytes that hold all of them.
            base_at: where each of them begins in ``base``.
            targets: the target tensors, of the same dtypes and shapes.
            target: bytes that hold all of them.
            target_at: where each of them begins in ``target``.
        """
        n = len(targets)
        dtype = targets[0].spec.dtype
        given = np.empty((n, 5), np.int64)
        given[:, 0], given[:, 1] = base_at, target_at
        given[:, 2] = [tensor.spec.n_bytes for tensor in targets]
        given[:, 3] = dtype.width
        given[:, 4] = KINDS[self._values] + (self._values == "ulp" and dtype.is_float)
        found = np.empty((n, 6), np.int64)
        digests = np.empty(n * _DIGESTS_BYTES, np.uint8)
        streams = np.empty(n * _MOST_STREAM_BYTES, np.uint8)
        n_bytes = kernels.native.compare_small(  # type: ignore[union-attr]
            base, target, given, found, digests, streams, self._level
        )
        offset = self._payload.add_streams(streams[:n_bytes].tobytes()) if n_bytes else 0
        return [*self._rows(bases, targets, found.tolist(), digests.tobytes(), offset)]

    def _rows(
        self,
        bases: Sequence[Tensor],
        targets: Sequence[Tensor],
        found: list[list[int]],
        digests: bytes,
        offset: int,
    ) -> Iterator[Row | None]:
        """Yield the row of each pair from the numbers and digests that the kernel found."""
        at, first = 0, 0  # of the digests and of the streams
        for base, target, (nnz, index, n_index, n_coded, packing, planes) in zip(
            bases, targets, found, strict=True
        ):
            own = digests[at : at + _DIGESTS_BYTES]
            at += _DIGESTS_BYTES
            if nnz < 0:
                yield None
                continue
            spec = target.spec
            before = after = spec.with_digest(own[:DIGEST_BYTES])
            chunks: tuple[Chunk, ...] = ()
            if nnz:
                after = spec.with_digest(own[DIGEST_BYTES : 2 * DIGEST_BYTES])
                raw: tuple[int, ...] = (n_index,) if self._is_stated[index] else ()
                if packing:
                    stored: tuple[int, ...] = (n_coded - n_index,)
                    raw += stored
                else:
                    stored = tuple([nnz * (planes >> j & 1) for j in range(spec.dtype.width)])
                chunks = (
                    Chunk(
                        0,
                        spec.n_elements,
                        nnz,
                        self._codings[index][packing],
                        raw,
                        (n_index, *stored),
                        own[_CODED_AT:_BEFORE_AT],
                        (own[_BEFORE_AT:_AFTER_AT], own[_AFTER_AT:]),
                        offset + first,
                    ),
                )
                first += n_coded
            there = BaseTensor(base.file, base.name, before)
            yield Row(target.file, target.name, after, there, spec.n_elements, chunks)


def run_pairs(
    pairs: Sequence[Pair],
    group: Callable[[int, int], list[Row | None]] | None,
    single: Callable[[int], Row],
    pace: Pace,
    *,
    label: str,
) -> list[Row]:
    """Return the row of each pair.

    Args:
        pairs: all pairs, in order.
        group: returns the rows of a group, from its first pair to the one after its last, and None for those that
            are left to ``single``. None: there are no groups.
        single: returns the row of the pair of a number; it reports its progress.
        pace: receives the number of bytes read.
        label: name of the stage for the progress.
    """
    found = pair_groups(pairs) if group else []
    costs = starts(np.array([t.spec.n_bytes + (b.spec.n_bytes if b else 0) for b, t in pairs]))
    rows: dict[int, Row] = {}

    def cost(item: int | Group) -> int:
        start, end = (item, item + 1) if isinstance(item, int) else item
        return int(costs[end] - costs[start])

    def run(item: int | Group) -> None:
        if isinstance(item, int):
            rows[item] = single(item)
        elif group:
            left = 0
            for number, row in enumerate(group(*item), item[0]):
                left += 0 if row else cost(number)
                rows[number] = row or single(number)
            pace.advance(cost(item) - left)

    items: list[int | Group] = [*found, *rows_outside(found, len(pairs))]
    run_all(run, items, cost=cost, pace=pace, label=label)
    return [rows[number] for number in range(len(pairs))]
