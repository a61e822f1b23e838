"""A damaged delta is refused with an error of the decoder's own, or means what it meant before."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from decoders import DECODERS, Decoder
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vector_source.samples import plain, sample, with_manifest
from vector_source.writer import Draft, assemble, frame
from vectors import VECTORS, tree

BASE = VECTORS / "invalid" / "base"
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
relaxed = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@each_decoder
def test_every_truncation_is_refused(decoder: Decoder, tmp_path: Path) -> None:
    path, whole = tmp_path / "delta.sd", assemble(sample())
    for n in range(len(whole)):
        path.write_bytes(whole[:n])
        assert decoder.read_code(path) == "truncated", n


@each_decoder
def test_every_flip_is_refused_or_harmless(decoder: Decoder, tmp_path: Path) -> None:
    path, whole = tmp_path / "delta.sd", assemble(sample())
    path.write_bytes(whole)
    decoder.apply(BASE, path, tmp_path / "right")
    right = tree(tmp_path / "right")
    for position in range(len(whole)):
        for mask in MASKS:
            flipped = bytearray(whole)
            flipped[position] ^= mask
            path.write_bytes(flipped)
            if decoder.read_code(path) == "accepted":
                out = tmp_path / f"{position}-{mask}"
                if decoder.apply_code(BASE, path, out) == "accepted":
                    assert tree(out) == right, (position, mask)


def flips(content: bytes, seed: str, n: int) -> Iterator[bytes]:
    """Yield content with one byte changed, at positions drawn at random."""
    draw = random.Random(seed)
    for _ in range(n):
        changed = bytearray(content)
        changed[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        yield bytes(changed)


def agree(data: bytes, folder: Path) -> None:
    """Check that both decoders accept a delta or both refuse it, with errors of their own."""
    path = folder / "delta.sd"
    path.write_bytes(data)
    codes = [decoder.read_code(path) for decoder in DECODERS]
    assert set(codes) <= CODES
    assert (codes[0] == "accepted") == (codes[1] == "accepted"), codes


def test_decoders_agree_on_flipped_manifests(tmp_path: Path) -> None:
    texts: list[bytes] = []

    def noted(text: bytes) -> bytes:
        texts.append(text)
        return text

    assemble(sample(), text=noted)
    for flipped in flips(texts[0], "manifest", 600):
        agree(assemble(sample(), text=partial(replaced, flipped)), tmp_path)


def test_decoders_agree_on_flipped_headers(tmp_path: Path) -> None:
    delta = plain()
    whole = assemble(delta)
    text = whole[8 : 8 + int.from_bytes(whole[:8], "little")]
    for flipped in flips(text.rstrip(), "header", 300):
        agree(assemble(delta, header_text=partial(replaced, flipped)), tmp_path)


@pytest.mark.parametrize("key", sample().entries)
def test_decoders_agree_on_flipped_entries(key: str, tmp_path: Path) -> None:
    delta = sample()
    for flipped in flips(delta.entries[key], key, 150):
        agree(assemble(Draft(delta.manifest, delta.entries | {key: flipped})), tmp_path)


def test_decoders_agree_on_flipped_manifest_frames(tmp_path: Path) -> None:
    delta = plain()
    for flipped in flips(frame(b"{}"), "frame", 50):
        agree(assemble(delta, pack=partial(replaced, flipped)), tmp_path)


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


WORDS = ["", "w", "gone", "BF16", "F4", "gap8", "bitmap", "all", "ulp", "0" * 16, "0" * 32, "a/b"]
NUMBERS = st.integers(-(2**64), 2**64) | st.integers(0, 20) | st.floats()
LEAVES = st.none() | st.booleans() | NUMBERS | st.text(max_size=8) | st.sampled_from(WORDS)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=6,
)


@relaxed
@given(data=st.data())
def test_decoders_agree_on_altered_manifests(data: st.DataObject, tmp_path: Path) -> None:
    def altered(text: bytes) -> bytes:
        manifest = json.loads(text)
        for _ in range(data.draw(st.integers(1, 2))):
            way = data.draw(st.sampled_from(list(places(manifest))))
            holder = manifest
            for step in way[:-1]:
                holder = holder[step]
            if data.draw(st.booleans()) or isinstance(holder, list):
                holder[way[-1]] = data.draw(VALUES)
            else:
                holder[data.draw(st.text(max_size=5))] = holder.pop(way[-1])
        return json.dumps(manifest).encode()

    agree(assemble(sample(), text=altered), tmp_path)


@relaxed
@given(data=st.data())
def test_decoders_agree_on_altered_headers(data: st.DataObject, tmp_path: Path) -> None:
    def altered(header: dict[str, Any]) -> dict[str, Any]:
        way = data.draw(st.sampled_from(list(places(header))))
        holder: Any = header
        for step in way[:-1]:
            holder = holder[step]
        holder[way[-1]] = data.draw(VALUES)
        written.append(json.dumps(header).encode())
        return {}

    written: list[bytes] = []
    agree(assemble(plain(), header=altered, header_text=lambda _: written[0]), tmp_path)


@relaxed
@given(content=st.binary(max_size=300), with_length=st.booleans())
def test_random_bytes_are_refused(content: bytes, with_length: bool, tmp_path: Path) -> None:
    if with_length:
        content = (len(content) // 2).to_bytes(8, "little") + content
    agree(content, tmp_path)


@relaxed
@given(text=st.binary(max_size=60) | VALUES.map(lambda value: json.dumps(value).encode()))
def test_random_manifests_are_refused(text: bytes, tmp_path: Path) -> None:
    agree(assemble(plain(), text=partial(replaced, text)), tmp_path)


@pytest.mark.parametrize(
    ("where", "limit"),
    [
        ("tensors", 1 << 20),
        ("target.weight_files", 1 << 16),
        ("target.side_files", 1 << 16),
        ("target.empty_folders", 1 << 16),
    ],
)
def test_lists_above_their_limits_are_refused(where: str, limit: int, tmp_path: Path) -> None:
    path = tmp_path / "delta.sd"
    for n, code in ((limit, "corrupt"), (limit + 1, "limit_exceeded")):
        whole = with_manifest({where: [0] * n})
        path.write_bytes(whole)
        for decoder in DECODERS:
            assert decoder.read_code(path) == code, (n, decoder.name)
