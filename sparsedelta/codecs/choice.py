"""The choice of codings for a chunk: the index encoding and the value packing whose streams are smallest.

A small chunk is encoded in every way. In a large one, a sample shows which ways cannot win, and these are not tried. The
sample consists of windows that lie evenly in the chunk, so gaps, exponents and codes are distributed in it as in the chunk.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from sparsedelta.codecs.context import Bits, ChunkContext, Positions, Stream
from sparsedelta.codecs.indices import INDEX_ENCODINGS
from sparsedelta.codecs.indices.tiles import may_be_smaller
from sparsedelta.codecs.packings import VALUE_PACKINGS
from sparsedelta.codecs.zstd import Level, compress_stream

# Classes must save this share and this many bytes, because deltas with classes can be stacked and inverted only with
# the base.
CLASSES_SAVE, CLASSES_SAVE_BYTES = 0.1, 256
# If they save a share within these limits in a sample, ways with and without classes are tried in the whole chunk.
_UNSURE = 0.07, 0.13
_CLOSE = 1.015  # a way is tried if it takes at most this many times the bytes of the smallest in a sample
_LARGE = 1 << 16  # touched positions; in a smaller chunk every way is tried
_WINDOWS, _SAMPLED, _MOST_SHARE = 64, 1 << 14, 32  # touched positions of a sample; at most 1 in 32
# If a sample has fewer touched positions, the classes that are chosen in it are not good enough for the whole chunk.
_FEWEST_FOR_CLASSES = 1 << 13
_MOST_UNEVEN = 0.5  # standard deviation of the positions in a window, relative to their mean


class Way(NamedTuple):
    """An index encoding or a value packing; whether with classes, and their thresholds if these are already chosen."""

    name: str
    classes: bool
    thresholds: Sequence[int] | None = None


class Candidate(NamedTuple):
    """The encoded positions or codes of a chunk."""

    way: Way
    raw: tuple[int, ...]  # the sizes that the record states
    streams: list[bytes]
    n_bytes: int  # of the streams


class _Changes(NamedTuple):
    """The changes of a chunk or of a sample: ``n`` elements, and what encoders may use."""

    positions: Positions
    codes: Bits
    n: int
    context: ChunkContext


class _Parts(NamedTuple):
    """The coded positions and the coded values."""

    positions: Candidate
    codes: Candidate

    @property
    def n_bytes(self) -> int:
        return self.positions.n_bytes + self.codes.n_bytes


def smallest(
    positions: Positions, codes: Bits, n: int, context: ChunkContext, level: Level
) -> tuple[Candidate, Candidate]:
    """Return the positions and the values of a chunk in the smallest coding that the level tries.

    Args:
        positions: (nnz,) uint32, strictly increasing, below ``n``; not empty.
        codes: (nnz,) unsigned codes.
        n: number of elements of the chunk.
        context: what encoders may use; classes are tried if ``before`` is not None.
        level: which codings to try.
    """
    changes = _Changes(positions, codes, n, context)
    ways = _index_ways(changes, level), _packing_ways(changes, level)
    likely = ways
    if level is Level.DEFAULT and len(positions) >= _LARGE:
        likely = _likely(changes, ways)
    candidates = [
        encode(changes, some, level)
        or encode(changes, [way for way in every if not way.classes], level)
        for encode, some, every in zip((_indices, _packings), likely, ways, strict=True)
    ]
    return _best(*candidates)


def _index_ways(changes: _Changes, level: Level) -> list[Way]:
    size = len(changes.positions), changes.n
    return [
        Way(name, classes)
        for name, encoding in INDEX_ENCODINGS.items()
        if encoding.worth_trying(*size) and (level is not Level.FAST or encoding.is_quick(*size))
        for classes in _with_classes(changes, encoding.has_classes)
    ]


def _packing_ways(changes: _Changes, level: Level) -> list[Way]:
    return [
        Way(name, classes)
        for name, packing in VALUE_PACKINGS.items()
        if level is not Level.FAST or packing.is_quick
        for classes in _with_classes(changes, packing.has_classes)
    ]


def _with_classes(changes: _Changes, has_classes: bool) -> tuple[bool, ...]:
    return (False, True) if has_classes and changes.context.before else (False,)


def _indices(changes: _Changes, ways: Sequence[Way], level: Level) -> list[Candidate]:
    """Return the positions, encoded in those of the ways that can store them."""
    positions, _, n, context = changes
    candidates = []
    for way in ways:
        encoding = INDEX_ENCODINGS[way.name]
        stream = encoding.encode(positions, n, context.sorted(way.classes, way.thresholds))
        if stream is not None:
            raw = () if encoding.implied_bytes(n) is not None else (len(stream),)
            stored = compress_stream(stream.data, level)
            candidates.append(Candidate(_chosen(way, stream), raw, [stored], len(stored)))
    return candidates


def _packings(changes: _Changes, ways: Sequence[Way], level: Level) -> list[Candidate]:
    """Return the codes, packed in those of the ways that can store them."""
    candidates = []
    for way in ways:
        packing = VALUE_PACKINGS[way.name]
        keys = changes.context.keys if way.classes else None
        streams = packing.encode(changes.codes, keys, way.thresholds)
        if streams is not None:
            raw = (len(streams[-1]),) if packing.states_size else ()
            stored = [compress_stream(s.data, level) for s in streams]
            n_bytes = sum(map(len, stored))
            candidates.append(Candidate(_chosen(way, streams[0]), raw, stored, n_bytes))
    return candidates


def _chosen(way: Way, stream: Stream) -> Way:
    """Return the way with the thresholds that a stream with classes begins with (FORMAT §6.2)."""
    return way._replace(thresholds=stream[1 : 1 + stream[0]].tolist()) if way.classes else way


def _best(indices: Sequence[Candidate], packings: Sequence[Candidate]) -> _Parts:
    """Return the smallest candidates; classes are used only where they save enough, or were tried alone."""
    found = _least(indices, packings)
    plain = [[one for one in part if not one.way.classes] for part in (indices, packings)]
    if not all(plain):
        return found
    without = _least(*plain)
    saved = without.n_bytes - found.n_bytes
    enough = saved >= CLASSES_SAVE_BYTES and saved >= CLASSES_SAVE * without.n_bytes
    return found if enough else without


_n_bytes = operator.attrgetter("n_bytes")


def _least(indices: Sequence[Candidate], packings: Sequence[Candidate]) -> _Parts:
    return _Parts(min(indices, key=_n_bytes), min(packings, key=_n_bytes))


def _likely(changes: _Changes, ways: tuple[list[Way], list[Way]]) -> tuple[list[Way], list[Way]]:
    """Return those ways to encode a large chunk that may be the smallest, as far as a sample shows."""
    positions, _, n, context = changes
    tiles = Way("tiles", False)
    tiled = tiles in ways[0] and may_be_smaller(positions, n, context)
    sample = _sample(changes)
    if sample is None:
        return [way for way in ways[0] if way != tiles or tiled], ways[1]
    tried = [way for way in ways[0] if way != tiles]
    parts = _indices(sample, tried, Level.DEFAULT), _packings(sample, ways[1], Level.DEFAULT)
    plain = [[one for one in part if not one.way.classes] for part in parts]
    without = _least(*plain)
    saved = 1 - _least(*parts).n_bytes / without.n_bytes
    likely = []
    for every, some in zip(parts, plain, strict=True):
        close = _close(every) if saved >= _UNSURE[0] else []
        if tiled or saved < _UNSURE[1]:
            close += [way for way in _close(some) if way not in close]
        likely.append(close)
    if tiled:
        likely[0].append(tiles)
    if len(sample.positions) < _FEWEST_FOR_CLASSES:
        likely = [[way._replace(thresholds=None) for way in ways] for ways in likely]
    return likely[0], likely[1]


def _close(candidates: Sequence[Candidate]) -> list[Way]:
    """Return the ways of the candidates that are nearly as small as the smallest."""
    most = _CLOSE * min(map(_n_bytes, candidates))
    return [one.way for one in candidates if one.n_bytes <= most]


def _sample(changes: _Changes) -> _Changes | None:
    """Return the changes in windows of a chunk, end to end; None if they are spread too unevenly for a sample."""
    positions, codes, n, context = changes
    size = min(n * _SAMPLED // len(positions), n // _MOST_SHARE) // _WINDOWS
    starts = np.linspace(0, n - size, _WINDOWS).astype(np.uint32)
    edges = np.searchsorted(positions, np.stack([starts, starts + np.uint32(size)]))
    counts = edges[1] - edges[0]
    if counts.std() >= _MOST_UNEVEN * counts.mean():  # also if there are none
        return None
    where = [slice(*edge) for edge in edges.T.tolist()]
    own = np.concatenate([positions[part] for part in where])
    own += (np.arange(_WINDOWS, dtype=np.uint32) * size - starts).repeat(counts)  # modulo 2^32
    keys = context.keys
    if context.before and keys is not None:
        bits = np.concatenate([context.before(start, size).copy() for start in starts.tolist()])
        keys = np.concatenate([keys[part] for part in where])
        context = ChunkContext(lambda start, n: bits[start : start + n], keys=keys)
    else:
        context = ChunkContext()
    return _Changes(own, np.concatenate([codes[part] for part in where]), size * _WINDOWS, context)
