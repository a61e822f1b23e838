"""Strided regions of flat memory, maps between two regions, and the composition of two maps.

Every map is exact and one-to-one. If strides cannot express a map, ``NotStrided`` is raised.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache


class NotStrided(ValueError):
    """Strides cannot express a map."""


@dataclass(frozen=True, slots=True)
class Region:
    """Elements of flat memory, in row-major order of a shape.

    Attributes:
        shape: number of elements in each direction.
        offset: offset of the first element.
        strides: step from one element to the next in each direction, counted in elements.
    """

    shape: tuple[int, ...]
    offset: int
    strides: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Piece:
    """A map from elements of one memory to elements of another.

    Attributes:
        source: the elements in the first memory.
        target: the elements in the second memory, in the same order and shape.
    """

    source: Region
    target: Region


def whole(shape: Sequence[int]) -> Region:
    """Return the region of a contiguous tensor."""
    strides = itertools.accumulate(reversed(shape[1:]), lambda a, b: a * b, initial=1)
    return Region(tuple(shape), 0, tuple(reversed([*strides]))[: len(shape)])


def identity(n_elements: int) -> Piece:
    """Return the map from memory to itself."""
    line = whole((n_elements,))
    return Piece(line, line)


def are_disjoint(regions: Sequence[Region]) -> bool:
    """Return whether no element is in two of the regions.

    Raises:
        NotStrided: the strides of two regions do not divide each other.
    """
    spans = sorted(((r.offset, _last(r), r) for r in regions if r.numel), key=lambda span: span[:2])
    for (_, last, one), (first, _, other) in itertools.combinations(spans, 2):
        if first <= last and compose(Piece(one, one), Piece(other, other)):
            return False
    return True


@lru_cache(4096)
def compose(first: Piece, second: Piece) -> tuple[Piece, ...]:
    """Return the maps from the source of the first to the target of the second.

    Args:
        first: maps to a memory.
        second: maps from the same memory.

    Returns:
        Maps of the elements that are in both; empty if there are none.

    Raises:
        NotStrided: the strides in the memory between them do not divide each other.
    """
    if not first.source.numel or not second.source.numel:
        return ()
    weights = _weights(first.target, second.source)
    there = _boxes(first.target, first.source, weights)
    back = [*_boxes(second.source, second.target, weights)]
    met = (_meet(one, other) for one in there for other in back)
    return tuple(piece for piece in met if piece is not None)


def _last(region: Region) -> int:
    steps = zip(region.shape, region.strides, strict=True)
    return region.offset + sum((size - 1) * step for size, step in steps)


@dataclass(frozen=True, slots=True)
class _Box:
    """Addresses of a memory as ranges of their digits, with the steps of each digit in another memory."""

    ranges: tuple[tuple[int, int], ...]
    steps: tuple[int, ...]
    origin: int


def _weights(*regions: Region) -> tuple[int, ...]:
    """Return the weights of the digits of addresses: the strides of all regions, ascending."""
    steps = {1}
    for region in regions:
        steps |= {s for n, s in zip(region.shape, region.strides, strict=True) if n > 1}
    weights = sorted(steps)
    if weights[0] < 1 or any(high % low for low, high in itertools.pairwise(weights)):
        raise NotStrided(f"{weights} do not divide each other")
    return tuple(weights)


def _boxes(here: Region, there: Region, weights: Sequence[int]) -> Iterator[_Box]:
    """Yield boxes that make up a region, each with the strides of the other side."""
    own = sorted(
        (step, size, other)
        for size, step, other in zip(here.shape, here.strides, there.strides, strict=True)
        if size > 1
    )
    tops = [step for step, _, _ in [*own, (0, 0, 0)][1:]]
    origin = there.offset
    lowest = own[0][0] if own else 0
    digits = [[_fixed(here.offset, weights, 0, lowest)]]
    steps = [0] * len(weights)
    for (step, size, other), top in zip(own, tops, strict=True):
        low = (here.offset % top if top else here.offset) // step
        if top and low + size > top // step:
            raise NotStrided("a row crosses the end of the row above it")
        origin -= low * other
        between = [w for w in weights if w >= step and (not top or w < top)]
        for weight in between:
            steps[weights.index(weight)] = other * (weight // step)
        radices = [b // a for a, b in itertools.pairwise(between)]
        digits.append([*_split(low, low + size, radices)])
    for parts in itertools.product(*digits):
        yield _Box(tuple(itertools.chain.from_iterable(parts)), tuple(steps), origin)


def _fixed(
    offset: int, weights: Sequence[int], bottom: int, top: int
) -> tuple[tuple[int, int], ...]:
    """Return the digits of an offset below a weight; all digits if the weight is 0."""
    below = [w for w in weights if not top or w < top]
    ends = [*below, top][1:]
    found = [(offset % end if end else offset) // w for w, end in zip(below, ends, strict=True)]
    return tuple((digit, digit + 1) for digit in found)


def _split(low: int, high: int, radices: Sequence[int]) -> Iterator[tuple[tuple[int, int], ...]]:
    """Yield the boxes of digits that make up a range of numbers; the last digit has no limit."""
    if not radices:
        yield ((low, high),)
        return
    radix, rest = radices[0], radices[1:]
    first, last = low // radix, (high - 1) // radix
    if first == last:
        inner = (low % radix, (high - 1) % radix + 1)
        yield from ((inner, *outer) for outer in _split(first, first + 1, rest))
        return
    if low % radix:
        head = (low % radix, radix)
        yield from ((head, *outer) for outer in _split(first, first + 1, rest))
        first += 1
    end = last
    if high % radix:
        tail = (0, high % radix)
        yield from ((tail, *outer) for outer in _split(last, last + 1, rest))
    else:
        end += 1
    if first < end:
        yield from (((0, radix), *outer) for outer in _split(first, end, rest))


def _meet(one: _Box, other: _Box) -> Piece | None:
    ranges = [
        (max(a, c), min(b, d)) for (a, b), (c, d) in zip(one.ranges, other.ranges, strict=True)
    ]
    if any(low >= high for low, high in ranges):
        return None
    axes = [
        (high - low, step, other_step)
        for (low, high), step, other_step in zip(ranges, one.steps, other.steps, strict=True)
    ]
    starts = [
        box.origin + sum(low * step for (low, _), step in zip(ranges, box.steps, strict=True))
        for box in (one, other)
    ]
    return _piece(axes, starts[0], starts[1])


def _piece(axes: Sequence[tuple[int, int, int]], source: int, target: int) -> Piece:
    """Return a map with as few axes as possible, in the order of the source."""
    merged: list[tuple[int, int, int]] = []
    for size, step, other in sorted(axes, key=lambda axis: -axis[1]):
        if size == 1:
            continue
        if merged and merged[-1][1:] == (step * size, other * size):
            size *= merged.pop()[0]
        merged.append((size, step, other))
    shape = tuple(size for size, _, _ in merged)
    return Piece(
        Region(shape, source, tuple(step for _, step, _ in merged)),
        Region(shape, target, tuple(other for _, _, other in merged)),
    )
