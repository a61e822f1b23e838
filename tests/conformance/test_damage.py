"""A damaged delta is refused with an error of the decoder's own, and both decoders refuse the same."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3
from decoders import DECODERS, Decoder
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import relaxed
from vector_source.checkpoints import compact
from vector_source.frames import frame, smaller
from vector_source.samples import plain, sample
from vector_source.writer import assemble

CODES = {
    "accepted",
    "bad_magic",
    "truncated",
    "corrupt",
    "limit_exceeded",
    "unsupported_version",
    "unsupported_feature",
}
MASKS = (0x01, 0x20, 0x80, 0xFF)
each_decoder = pytest.mark.parametrize("decoder", DECODERS, ids=lambda decoder: decoder.name)


@each_decoder
def test_every_truncation_is_refused(decoder: Decoder, tmp_path: Path) -> None:
    path, whole = tmp_path / "delta.sd", assemble(sample())
    for n in range(len(whole)):
        path.write_bytes(whole[:n])
        assert decoder.read_code(path) == "truncated", n


@each_decoder
def test_every_flip_is_refused(decoder: Decoder, tmp_path: Path) -> None:
    path, whole = tmp_path / "delta.sd", assemble(sample())
    for position in range(len(whole)):
        flipped = bytearray(whole)
        flipped[position] ^= MASKS[position % len(MASKS)]
        path.write_bytes(flipped)
        assert decoder.read_code(path) in CODES - {"accepted"}, position


def flips(content: bytes, seed: str, n: int) -> Iterator[bytes]:
    """Yield content with one byte changed, at positions drawn at random."""
    draw = random.Random(seed)
    for _ in range(n):
        changed = bytearray(content)
        changed[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        yield bytes(changed)


def agree(data: bytes, folder: Path, more: frozenset[str] = frozenset()) -> None:
    """Check that both decoders accept a delta or both refuse it, with errors of their own, or one of ``more``."""
    path = folder / "delta.sd"
    path.write_bytes(data)
    codes = [decoder.read_code(path) for decoder in DECODERS]
    assert set(codes) <= CODES | more
    assert (codes[0] == "accepted") == (codes[1] == "accepted"), codes


def test_decoders_agree_on_flipped_structures(tmp_path: Path) -> None:
    for flipped in flips(compact(sample().structure), "structure", 300):
        agree(assemble(sample(), text=partial(replaced, flipped)), tmp_path)


def test_decoders_agree_on_flipped_sizes_and_digests(tmp_path: Path) -> None:
    """The manifest's own digest is true to them."""
    delta = sample()
    texts = len(smaller(compact(delta.structure))) + 2  # notes: {}
    for number in range(200):

        def altered(manifest: bytes, number: int = number) -> bytes:
            places = [*range(16), *range(16 + texts, len(manifest))]
            changed = bytearray(manifest)
            changed[places[number * 7 % len(places)]] ^= 1 << number % 8
            return bytes(changed)

        agree(assemble(delta, manifest=altered), tmp_path)


def test_decoders_agree_on_flipped_headers(tmp_path: Path) -> None:
    delta = plain()
    whole = assemble(delta)
    text = whole[8 : 8 + int.from_bytes(whole[:8], "little")]
    for flipped in flips(text, "header", 150):
        agree(assemble(delta, header=partial(replaced, flipped)), tmp_path)


@pytest.mark.parametrize("key", [key for key, data in sample().entries.items() if data])
def test_decoders_agree_on_flipped_entries(key: str, tmp_path: Path) -> None:
    """A part of the payload that is not what it was, with digests that are true to it."""
    for flipped in flips(sample().entries[key], key, 50):
        delta = sample()
        delta.entries[key] = flipped
        if key.startswith("file:"):
            delta.digests["side_files"][0] = blake3(flipped).digest()
        elif key.startswith("header:"):
            delta.digests["headers"][1] = blake3(flipped).digest()[:16]
        agree(assemble(delta), tmp_path)


def test_decoders_agree_on_flipped_frames(tmp_path: Path) -> None:
    delta = plain()
    delta.notes = b'{"info":"' + b"x" * 300 + b'"}'
    for flipped in flips(frame(delta.notes), "frame", 60):

        def pack(raw: bytes, flipped: bytes = flipped) -> bytes:
            return flipped if raw == delta.notes else smaller(raw)

        agree(assemble(delta, pack=pack), tmp_path)


def replaced(new: bytes, _: bytes) -> bytes:
    """Return `new`, whatever there was."""
    return new


def places(value: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the way to every value within nested JSON."""
    if above:
        yield above
    steps: Iterable[Any] = ()
    if isinstance(value, dict):
        steps = value
    elif isinstance(value, list):
        steps = range(len(value))
    for step in steps:
        yield from places(value[step], (*above, step))


WORDS = ["", "w", "gone", "BF16", "F4", "X", "f2", "gaps", "rice", "bitmap", "planes", "ulp", "a/b"]
NUMBERS = st.integers(-(2**64), 2**64) | st.integers(0, 20) | st.floats()
LEAVES = st.none() | st.booleans() | NUMBERS | st.text(max_size=8) | st.sampled_from(WORDS)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=6,
)


@relaxed(100)
@given(data=st.data())
def test_decoders_agree_on_altered_structures(data: st.DataObject, tmp_path: Path) -> None:
    delta = sample()
    for _ in range(data.draw(st.integers(1, 2))):
        way = data.draw(st.sampled_from(list(places(delta.structure))))
        holder: Any = delta.structure
        for step in way[:-1]:
            holder = holder[step]
        if data.draw(st.booleans()) or isinstance(holder, list):
            holder[way[-1]] = data.draw(VALUES)
        else:
            holder[data.draw(st.text(max_size=5))] = holder.pop(way[-1])
    agree(assemble(delta), tmp_path)


@relaxed(100)
@given(data=st.data())
def test_decoders_agree_on_altered_numbers(data: st.DataObject, tmp_path: Path) -> None:
    """Numbers near those that were there break fewer rules at once."""
    delta = sample()
    numbers = [way for way in places(delta.structure) if type(found(delta.structure, way)) is int]
    for way in data.draw(st.lists(st.sampled_from(numbers), min_size=1, max_size=2)):
        found(delta.structure, way[:-1])[way[-1]] += data.draw(st.sampled_from([-2, -1, 1, 2, 8]))
    agree(assemble(delta), tmp_path)


def found(value: Any, way: tuple[Any, ...]) -> Any:
    """Return the value at the end of a way within nested JSON."""
    for step in way:
        value = value[step]
    return value


@relaxed(100)
@given(notes=VALUES.map(lambda value: json.dumps(value).encode()) | st.binary(max_size=40))
def test_decoders_agree_on_notes(notes: bytes, tmp_path: Path) -> None:
    for one in (notes, b'{"x":' + notes + b"}"):
        delta = plain()
        delta.notes = one
        agree(assemble(delta), tmp_path)


@relaxed(100)
@given(content=st.binary(max_size=300), with_length=st.booleans())
@example(content=b"Z4DM", with_length=False)
@example(content=b"PULSEPT1", with_length=False)
@example(content=b"GGUF", with_length=False)
def test_random_bytes_are_refused(content: bytes, with_length: bool, tmp_path: Path) -> None:
    """What begins as a delta of another project is read only with its base, which the package then requires."""
    if with_length:
        content = (len(content) // 2).to_bytes(8, "little") + content
    agree(content, tmp_path, frozenset({"base_needed"}))


@relaxed(100)
@given(text=st.binary(max_size=60) | VALUES.map(lambda value: json.dumps(value).encode()))
def test_random_manifests_are_refused(text: bytes, tmp_path: Path) -> None:
    agree(assemble(plain(), text=partial(replaced, text)), tmp_path)
