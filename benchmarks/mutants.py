"""Makes mutants of deltas. Most have right digests, so that they reach the code behind the checks of digests.

A mutant differs from its delta in bytes of the file, in numbers or lists of the decoded manifest, or in streams of the
payload. Numbers become extreme ones, and sets of numbers become others whose sum is the same, or the same modulo 2^64.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate
from typing import Any

import zstandard
from blake3 import blake3
from hostile import build, compact

import sparsedelta

EXTREMES = tuple(
    sign * (1 << bits) + more
    for bits in (0, 7, 8, 15, 16, 31, 32, 48, 53, 59, 60, 61, 62, 63, 64)
    for sign in (1, -1)
    for more in (-1, 0, 1)
)
PARTS_OF_WRAP = (2, 4, 8)  # so many numbers share 2^64
DIGEST_BYTES = 16


@dataclass(frozen=True)
class Parts:
    """A delta, taken apart: structure and notes are JSON, not compressed."""

    structure: bytes
    notes: bytes
    digests: bytes
    payload: bytes

    def build(self) -> bytes:
        """Return the file; all outer sizes and digests are right."""
        return build(self.structure, self.digests, self.notes, self.payload)


@dataclass(frozen=True)
class Place:
    """Where the streams of a chunk are.

    Attributes:
        offset: of the first stream in the payload.
        sizes: of the streams.
        first: number of the first stream among those of all chunks.
        digest: of the streams.
    """

    offset: int
    sizes: tuple[int, ...]
    first: int
    digest: bytes


@lru_cache(256)
def taken_apart(data: bytes) -> Parts:
    """Return the parts of a delta.

    Raises:
        Exception: of any kind, if it is none.
    """
    start = 8 + int.from_bytes(data[:8], "little")
    sizes = [int.from_bytes(data[at : at + 4], "little") for at in range(start, start + 16, 4)]
    texts, at = [], start + 16
    for raw, stored in (sizes[:2], sizes[2:]):
        text = data[at : at + stored]
        texts.append(text if raw == stored else decompressed(text))
        at += stored
    end = start + json.loads(data[8:start])["manifest"]["data_offsets"][1]
    return Parts(texts[0], texts[1], data[at:end], data[end:])


def decompressed(frame: bytes) -> bytes:
    """Return the content of a zstd frame of up to 1 MB."""
    return zstandard.ZstdDecompressor().decompress(frame, max_output_size=1 << 20)


@lru_cache(256)
def places(data: bytes) -> list[Place]:
    """Return the places of all chunks with streams; none if the delta is refused."""
    try:
        with sparsedelta.Delta.from_bytes(data) as delta:
            chunks = [chunk for row in delta.tensors for chunk in row.chunks if sum(chunk.stored)]
    except (ValueError, sparsedelta.SparseDeltaError):
        return []
    firsts = accumulate((len(chunk.stored) for chunk in chunks), initial=0)
    return [
        Place(chunk.offset, chunk.stored, first, chunk.digest)
        for chunk, first in zip(chunks, firsts, strict=False)
    ]


def edited(data: bytes, n: int) -> bytes:
    """Return bytes with ``n`` random edits."""
    result = bytearray(data)
    for _ in range(n):
        at = random.randrange(len(result) + 1)
        edit = random.randrange(5)
        if edit == 0:
            result[at : at + 1] = random.randbytes(1)
        elif edit == 1:
            result[at : at + random.randrange(1, 9)] = b""
        elif edit == 2:
            result[at:at] = random.randbytes(random.randrange(1, 9))
        elif edit == 3 and at < len(result):
            result[at] ^= 1 << random.randrange(8)
        else:
            start = random.randrange(len(result) + 1)
            result[at : at + 4] = result[start : start + random.randrange(1, 9)]
    return bytes(result)


def containers(value: Any) -> Iterator[Any]:
    """Yield all lists and objects in a JSON value."""
    if isinstance(value, dict | list):
        yield value
        for one in value.values() if isinstance(value, dict) else value:
            yield from containers(one)


def is_number(value: Any) -> bool:
    """Return whether a JSON value is an integer."""
    return type(value) is int


def changed_number(number: int) -> int:
    """Return another number."""
    near = number + random.choice((-2, -1, 1, 2, 8, -8))
    return random.choice((near, near, number * 2, -number, *random.sample(EXTREMES, 4)))


def change_numbers(numbers: list[Any], which: list[int]) -> None:
    """Change some numbers of a list: one; two whose sum stays; or several whose sum stays modulo 2^64."""
    kind = random.randrange(4)
    if kind < 2 or len(which) < 2:
        at = random.choice(which)
        numbers[at] = changed_number(numbers[at])
    elif kind == 2:
        one, other = random.sample(which, 2)
        by = random.choice((1, 2, numbers[other], abs(random.choice(EXTREMES))))
        numbers[one] += by
        numbers[other] -= by
    else:
        n = random.choice([n for n in PARTS_OF_WRAP if n <= len(which)])
        for at in random.sample(which, n):
            numbers[at] += (1 << 64) // n


def change_items(values: list[Any]) -> None:
    """Remove, repeat or swap items of a list, or append one."""
    kind, at, other = random.randrange(4), *random.choices(range(len(values)), k=2)
    if kind == 0:
        del values[at]
    elif kind == 1:
        values[at:at] = [values[other]] * random.choice((1, 1, 2, 70))
    elif kind == 2:
        values[at], values[other] = values[other], values[at]
    else:
        values.append(random.choice((0, -1, [], "", None, True, random.choice(EXTREMES))))


def change_columns(columns: dict[str, Any]) -> None:
    """Remove or repeat a row in all columns of an object of lists."""
    lists = [one for one in columns.values() if isinstance(one, list) and one]
    if not lists:
        return
    at, is_removed = random.randrange(len(lists[0])), random.random() < 0.5
    for one in lists:
        if len(one) == len(lists[0]):
            one[at : at + is_removed] = [] if is_removed else [one[at]]


def structure_changed(text: bytes) -> bytes:
    """Return the structure with a few of its values changed."""
    value = json.loads(text)
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        found = [one for one in containers(value) if one]
        one = random.choice(found)
        if isinstance(one, dict):
            if random.random() < 0.5:
                change_columns(one)
                continue
            name = random.choice([*one])
            other = random.choice(found)
            new = [*(other if isinstance(other, list) else other.values()), *EXTREMES[:9], "", None]
            one[name] = json.loads(json.dumps(random.choice(new)))
            continue
        which = [at for at, item in enumerate(one) if is_number(item)]
        if which and random.random() < 0.8:
            change_numbers(one, which)
        else:
            change_items(one)
    return compact(value)


def stream_changed(data: bytes, parts: Parts) -> Parts:
    """Return a delta with a changed stream; its stated sizes and its digest are right."""
    place = random.choice(places(data))
    number = random.choice([i for i, size in enumerate(place.sizes) if size])
    at = place.offset + sum(place.sizes[:number])
    old = parts.payload[at : at + place.sizes[number]]
    if old[:4] == zstandard.FRAME_HEADER and random.random() < 0.7:
        new = zstandard.ZstdCompressor().compress(edited(decompressed(old), random.randrange(1, 4)))
    else:
        new = edited(old, random.randrange(1, 4))
    if random.random() < 0.6:  # the same size
        new = (new + old)[: len(old)]
    payload = parts.payload[:at] + new + parts.payload[at + len(old) :]
    end = place.offset + sum(place.sizes) + len(new) - len(old)
    digest = blake3(payload[place.offset : end]).digest()[:DIGEST_BYTES]
    structure = parts.structure
    if len(new) != len(old):
        value = json.loads(structure)
        value["chunks"]["stored"][place.first + number] = len(new)
        raw = value["chunks"]["raw"]
        same = [i for i, size in enumerate(raw) if size == len(old)]
        if same and random.random() < 0.8:
            raw[random.choice(same)] = len(new)
        structure = compact(value)
    digests = parts.digests.replace(place.digest, digest, 1)
    return replace(parts, structure=structure, digests=digests, payload=payload)


def digests_changed(digests: bytes) -> bytes:
    """Return digests with an edit, or with a digest too few or too many."""
    kind = random.randrange(3)
    if kind == 0:
        return edited(digests, 1)
    return digests[:-DIGEST_BYTES] if kind == 1 else digests + digests[:DIGEST_BYTES]


def mutant(data: bytes) -> bytes:
    """Return a mutated delta.

    Raises:
        Exception: of any kind, if ``data`` is no delta or cannot be changed in the way that was drawn.
    """
    kind = random.randrange(16)
    if kind == 0:
        return edited(data, random.randrange(1, 4))[: random.choice((None, None, len(data) - 9))]
    parts = taken_apart(data)
    if kind == 1:
        parts = replace(parts, structure=edited(parts.structure, 1))
    elif kind == 2:
        parts = replace(parts, notes=edited(parts.notes, 1))
    elif kind == 3:
        parts = replace(parts, digests=digests_changed(parts.digests))
    elif kind == 4:
        parts = replace(parts, payload=edited(parts.payload, random.randrange(1, 4)))
    elif kind < 9:
        parts = stream_changed(data, parts)
    else:
        parts = replace(parts, structure=structure_changed(parts.structure))
        if random.random() < 0.2:
            parts = replace(parts, digests=digests_changed(parts.digests))
    return parts.build()
