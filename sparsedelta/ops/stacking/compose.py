"""Changes of one tensor made into one, chunk by chunk, exactly.

Differences in ulps are added modulo 2^w; new bits replace what was there. Only what is known without
the base is used: an element whose difference meets another delta's new bits is known from then on,
and so is every element that does not come from the base, which begins as zero bits.
Memory stays within the changes of one chunk, decoded for one delta at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from sparsedelta.codecs.chunk import CHUNK_ELEMENTS, Chunk, chunk_span, encode_chunk
from sparsedelta.codecs.indices import Positions
from sparsedelta.codecs.values import Bits, ordered, ulp_codes, ulp_differences, unordered
from sparsedelta.errors import ConflictError
from sparsedelta.format.records import TOUCHED_BYTES, Change, TensorSpec, tensor_key
from sparsedelta.format.spool import SpoolPayload
from sparsedelta.tensors.base_bits import ChunkBase, Readable
from sparsedelta.tensors.changes import Stage
from sparsedelta.tensors.parallel import DENSE_ELEMENTS, Pace, dense_places


@dataclass(frozen=True, slots=True)
class Composition:
    """A tensor's changes, in order, as one change.

    Attributes:
        target: the tensor afterwards.
        stages: the changes; at least one.
        keep: leading elements that come from the base.
    """

    target: TensorSpec
    stages: Sequence[Stage]
    keep: int

    @property
    def values(self) -> str:
        """The value encoding of the result: ``ulp`` if all changes are differences."""
        return "ulp" if all(stage.change.values == "ulp" for stage in self.stages) else "target"

    def write(self, payload: SpoolPayload, pace: Pace) -> Change:
        """Return the change, having put its chunks into ``payload``.

        Raises:
            ConflictError: some elements only the base can tell.
        """
        name = self.stages[0].name
        if len(self.stages) == 1:
            only = self.stages[0]
            for record in only.change.chunks:
                payload.append(tensor_key(name), [only.coded(record.number, pace)])
            return only.change
        chunks = []
        touched = _Touched(self.target) if self.keep == 0 else None
        for number in self._numbers():
            coded = self._chunk(number, touched, pace)
            if coded is not None:
                chunk, frames = coded
                payload.append(tensor_key(name), frames)
                chunks.append(chunk)
        return Change(self.keep, self.values, touched.digests() if touched else None, tuple(chunks))

    def _numbers(self) -> list[int]:
        found = {c.number for stage in self.stages for c in stage.change.chunks}
        return sorted(n for n in found if n * CHUNK_ELEMENTS < self.target.n_elements)

    def _chunk(
        self, number: int, touched: _Touched | None, pace: Pace
    ) -> tuple[Chunk, list[bytes]] | None:
        involved = [stage for stage in self.stages if stage.chunk(number)]
        span = chunk_span(self.target.n_elements, number)
        if not touched and len(involved) == 1 and self._stands(involved[0], number, span):
            record = involved[0].chunk(number)
            return (record, [involved[0].coded(number, pace)]) if record else None
        with ExitStack() as place:
            if sum(chunk.nnz for s in involved if (chunk := s.chunk(number))) > DENSE_ELEMENTS:
                place.enter_context(dense_places)
            if self.values == "ulp":
                positions, codes = self._add(involved, number, span, pace)
            else:
                positions, codes = self._replace(involved, number, span, pace)
            if touched:
                touched.update(codes, self.values)
            return encode_chunk(number, span, positions, codes) if len(positions) else None

    def _stands(self, stage: Stage, number: int, span: int) -> bool:
        """Return whether the chunk of the only change that touches it is the result's as it is."""
        same_span = chunk_span(stage.target.n_elements, number) == span
        whole = stage.limit >= number * CHUNK_ELEMENTS + span
        return same_span and whole and stage.change.values == self.values

    def _add(
        self, involved: Sequence[Stage], number: int, span: int, pace: Pace
    ) -> tuple[Positions, Bits]:
        total = np.zeros(span, self.target.dtype.view)
        for stage in involved:
            positions, codes = stage.decode(number, pace)
            total[positions] += ulp_differences(codes)
        found = np.flatnonzero(total)
        return found.astype(np.uint32), ulp_codes(total[found])

    def _replace(
        self, involved: Sequence[Stage], number: int, span: int, pace: Pace
    ) -> tuple[Positions, Bits]:
        dtype = self.target.dtype
        n_kept = min(span, max(0, self.keep - number * CHUNK_ELEMENTS))
        zero = ordered(dtype, np.zeros(1, dtype.view))
        places = np.zeros(span, dtype.view)  # M of what is known, the difference of what is not
        places[n_kept:] = zero
        known = np.zeros(span, np.bool_)
        known[n_kept:] = True
        for stage in involved:
            positions, codes = stage.decode(number, pace)
            if stage.change.values == "ulp":
                places[positions] += ulp_differences(codes)
            else:
                places[positions] = ordered(dtype, codes)
                known[positions] = True
        n_unknown = int(np.count_nonzero(places[~known]))
        if n_unknown:
            raise self._unknown(n_unknown, number)
        known[n_kept:] &= places[n_kept:] != zero
        found = np.flatnonzero(known)
        return found.astype(np.uint32), unordered(dtype, places[found])

    def _unknown(self, n_unknown: int, number: int) -> ConflictError:
        name = self.stages[0].name
        return ConflictError(
            f"tensor {name!r} is changed by differences in one delta and by new values in another;"
            f" what {n_unknown} of its elements in chunk {number} become only the base tells: give it"
            " (--base)",
            tensor=name,
        )


class _Touched:
    """Digests of touched values, all of which were zero bits before."""

    def __init__(self, target: TensorSpec) -> None:
        self._target = target
        self._before, self._after = blake3(), blake3()

    def update(self, codes: Bits, values: str) -> None:
        before = np.zeros(len(codes), codes.dtype)
        after = codes
        if values == "ulp":
            dtype = self._target.dtype
            after = unordered(dtype, ordered(dtype, before) + ulp_differences(codes))
        self._before.update(before.view(np.uint8).data)
        self._after.update(np.ascontiguousarray(after).view(np.uint8).data)

    def digests(self) -> tuple[bytes, bytes]:
        return self._before.digest()[:TOUCHED_BYTES], self._after.digest()[:TOUCHED_BYTES]


def count_overlap(stages: Sequence[Stage], pace: Pace, base: Readable | None = None) -> int:
    """Return how many positions of one tensor more than one of the changes touches.

    Args:
        stages: changes of one base.
        pace: told of the coded bytes.
        base: the base's tensor, if it is available.
    """
    return sum(int(np.count_nonzero(twice)) for twice in _twice(stages, pace, base))


def _twice(
    stages: Sequence[Stage], pace: Pace, base: Readable | None
) -> Iterator[npt.NDArray[np.bool_]]:
    numbers = [chunk.number for stage in stages for chunk in stage.change.chunks]
    for number in sorted({n for n in numbers if numbers.count(n) > 1}):
        span = max(chunk_span(stage.target.n_elements, number) for stage in stages)
        once, twice = np.zeros(span, np.bool_), np.zeros(span, np.bool_)
        for stage in stages:
            if stage.chunk(number):
                dtype, keep = stage.target.dtype, stage.change.keep
                before = ChunkBase(base, dtype, keep, number) if base else None
                positions, _ = stage.decode(number, pace, before)
                twice[positions] |= once[positions]
                once[positions] = True
        yield twice
