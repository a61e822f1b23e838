"""Safetensors headers: parsed strictly, rendered canonically."""

from __future__ import annotations

import pytest
from helpers import compact, header_fields, noise

from sparsedelta.errors import Corrupt, LimitExceeded
from sparsedelta.format.safetensors_header import HeaderEntry, parse_header, render_header

W = b'{"dtype":"U8","shape":[2],"data_offsets":[0,2]}'


def test_parse() -> None:
    raw = (
        b'{"b":{"dtype":"F32","shape":[],"data_offsets":[2,6]},'
        b'"__metadata__":{"format":"pt"},"a":' + W + b"}  "
    )
    header = parse_header(raw, "it")
    assert header.metadata == {"format": "pt"}
    assert header.entries == (
        HeaderEntry("a", "U8", (2,), 0, 2),
        HeaderEntry("b", "F32", (), 2, 6),
    )
    assert header.only_known_members


def test_entries_of_equal_offsets_keep_the_headers_order() -> None:
    empty = b'{"dtype":"U8","shape":[0],"data_offsets":[2,2]}'
    raw = b'{"z":' + empty + b',"y":' + empty + b',"w":' + W + b"}"
    assert [entry.name for entry in parse_header(raw, "it").entries] == ["w", "z", "y"]


def test_no_and_null_metadata() -> None:
    assert parse_header(b"{}", "it").metadata is None
    assert parse_header(b'{"__metadata__":null}', "it").metadata is None
    assert parse_header(b'{"__metadata__":{}}', "it").metadata == {}


def test_what_a_delta_does_not_describe_is_told() -> None:
    assert parse_header(b'{"__metadata__":{}}', "it").only_known_members
    assert not parse_header(b'{"__metadata__":null}', "it").only_known_members
    assert not parse_header(b'{"w":' + W[:-1] + b',"x":1}}', "it").only_known_members


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b" {}",
        b"[]",
        b"{}\n",
        b"{}x ",
        b'{"w":1}',
        b'{"w":[]}',
        b'{"w":{}}',
        b'{"w":' + W + b',"w":' + W + b"}",
        W.join([b'{"w":', b"}"]).replace(b'"U8"', b"8"),
        W.join([b'{"w":', b"}"]).replace(b"[2]", b"2"),
        W.join([b'{"w":', b"}"]).replace(b"[2]", b"[2.0]"),
        W.join([b'{"w":', b"}"]).replace(b"[2]", b"[true]"),
        W.join([b'{"w":', b"}"]).replace(b"[2]", b"[-2]"),
        W.join([b'{"w":', b"}"]).replace(b"[0,2]", b"[0]"),
        W.join([b'{"w":', b"}"]).replace(b"[0,2]", b"[-0,2]"),
        W.join([b'{"w":', b"}"]).replace(b"[0,2]", b"[2,0]"),
        W.join([b'{"w":', b"}"]).replace(b"[0,2]", b"[0,18446744073709551616]"),
        b'{"__metadata__":[]}',
        b'{"__metadata__":{"a":1}}',
        b'{"__metadata__":{"a":null}}',
    ],
)
def test_refused(raw: bytes) -> None:
    with pytest.raises(Corrupt, match="it"):
        parse_header(raw, "it")


def test_limits() -> None:
    name = "é" * 32767
    assert parse_header(b'{"' + name.encode() + b'":' + W + b"}", "it").entries[0].name == name
    with pytest.raises(LimitExceeded, match="65535"):
        parse_header(b'{"' + name.encode() + b'xx":' + W + b"}", "it")
    sizes = W.replace(b"[2]", b"[" + b"1," * 63 + b"2]")
    assert len(parse_header(b'{"w":' + sizes + b"}", "it").entries[0].shape) == 64
    with pytest.raises(LimitExceeded, match="64"):
        parse_header(b'{"w":' + sizes.replace(b"[1,", b"[1,1,") + b"}", "it")


def test_render_is_canonical() -> None:
    entries = [HeaderEntry("b", "U8", (2,), 0, 2), HeaderEntry('"é', "F32", (1, 3), 2, 14)]
    raw = render_header({"z": "1", "a": "é\n"}, entries)
    assert raw.decode() == (
        '{"__metadata__":{"z":"1","a":"é\\n"},'
        '"b":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},'
        '"\\"é":{"dtype":"F32","shape":[1,3],"data_offsets":[2,14]}}'
        "    "
    )
    assert len(raw) % 8 == 0
    assert render_header(None, []) == b"{}      "
    assert render_header({}, []) == b'{"__metadata__":{}}' + b" " * 5


def test_render_gives_back_what_safetensors_writes() -> None:
    tensors = {f"layer.{i}": noise("BF16", i, 3) for i in range(12)}
    raw = compact(header_fields(tensors, {"format": "pt"}))
    parsed = parse_header(raw, "it")
    assert render_header(parsed.metadata, parsed.entries) == raw
