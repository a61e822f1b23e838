"""One tensor through several deltas: the changes it meets, decoded one chunk at a time (FORMAT §4–§7)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from sparsedelta.codecs.chunk import CHUNK_ELEMENTS, Chunk, chunk_span, decode_chunk
from sparsedelta.codecs.context import BaseBits
from sparsedelta.codecs.indices import Positions
from sparsedelta.codecs.values import Bits
from sparsedelta.errors import Corrupt
from sparsedelta.format.delta import Delta
from sparsedelta.format.records import Change, Payload, TensorDelta, TensorSpec, tensor_key
from sparsedelta.tensors.parallel import Pace

_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Stage:
    """The change that one delta makes to a tensor.

    Attributes:
        number: of the delta, from 1, for messages.
        name: the tensor's.
        target: the tensor afterwards.
        change: how it came to be.
        payload: holds the coded chunks.
        limit: elements from here on are cut by a later change, or begin anew.
    """

    number: int
    name: str
    target: TensorSpec
    change: Change
    payload: Payload = field(repr=False)
    limit: int
    _places: dict[int, tuple[Chunk, int]] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        offset = 0
        for chunk in self.change.chunks:
            self._places[chunk.number] = (chunk, offset)
            offset += sum(chunk.coded_bytes)

    def chunk(self, number: int) -> Chunk | None:
        """Return the record of a chunk, None if the change does not touch it or it is cut whole."""
        if number * CHUNK_ELEMENTS >= self.limit or number not in self._places:
            return None
        return self._places[number][0]

    def decode(
        self, number: int, pace: Pace, base: BaseBits | None = None
    ) -> tuple[Positions, Bits]:
        """Return positions within a chunk, below the limit, and their codes.

        Args:
            number: the chunk.
            pace: told of the coded bytes.
            base: the bits of the chunk's elements before this change, if they are available.

        Raises:
            BaseNeeded: they are not, and are needed.
        """
        chunk, _ = self._places[number]
        coded = self.coded(number, pace)
        span = chunk_span(self.target.n_elements, number)
        positions, codes = decode_chunk(chunk, self.target.dtype, span, coded, base=base)
        left = self.limit - number * CHUNK_ELEMENTS
        if left < span:
            n_kept = int(np.searchsorted(positions, left))
            positions, codes = positions[:n_kept], codes[:n_kept]
        return positions, codes

    def coded(self, number: int, pace: Pace) -> bytes:
        """Return the coded streams of a chunk, end to end."""
        chunk, offset = self._places[number]
        n_bytes = sum(chunk.coded_bytes)
        pace.advance(n_bytes)
        return self.payload.read(tensor_key(self.name), offset, n_bytes) if n_bytes else b""


def chain_stages(rows: Sequence[tuple[Delta, TensorDelta | None]]) -> tuple[list[Stage], int]:
    """Return the changes that make the last target of a chain, and how many base elements it keeps.

    Changes before one that keeps nothing leave no trace and are left out.

    Args:
        rows: each delta with its row of one tensor; None where the tensor is in neither of its
            checkpoints. The last has a target.
    """
    stages: list[Stage] = []
    limit: int | None = None  # None: every element so far
    for number in range(len(rows), 0, -1):
        delta, row = rows[number - 1]
        if limit == 0 or row is None or row.target is None:
            break
        if row.change is not None:
            n_elements = row.target.n_elements
            end = n_elements if limit is None else limit
            stages.append(Stage(number, row.name, row.target, row.change, delta.payload, end))
            limit = min(end, row.change.keep)
    if limit is None:
        last = rows[-1][1]
        limit = last.target.n_elements if last and last.target else 0
    return stages[::-1], limit


def stage_of(delta: Delta, row: TensorDelta, number: int = 1) -> Stage:
    """Return the change of one row.

    Raises:
        ValueError: it has none.
    """
    if row.target is None or row.change is None:
        raise ValueError(f"tensor {row.name!r} is not changed")
    return Stage(number, row.name, row.target, row.change, delta.payload, row.target.n_elements)


def check_alike(name: str, found: TensorSpec | None, expected: TensorSpec | None) -> None:
    """Check that the target's tensor of one delta is the base's of the next.

    Raises:
        Corrupt: it is not, although the fingerprints agree.
    """
    if found and expected and found.same_layout(expected):
        if found.digest is None or found.digest == expected.digest:
            return
    elif found is None and expected is None:
        return
    raise Corrupt(
        f"tensor {name!r}: the target of one delta and the base of the next have one fingerprint, but"
        " differ in it; one of the deltas is inconsistent",
        tensor=name,
    )
