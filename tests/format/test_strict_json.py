"""Strict JSON: one meaning or a refusal."""

from __future__ import annotations

import json
from typing import Any

import pytest

from sparsedelta.errors import Corrupt, LimitExceeded, UnsupportedFeature
from sparsedelta.format import strict_json
from sparsedelta.format.strict_json import compact_json, parse_json


@pytest.mark.parametrize(
    ("raw", "value"),
    [
        (b'{"a": [1, -2, 0.5, 1e3, true, null, "x"]}', {"a": [1, -2, 0.5, 1e3, True, None, "x"]}),
        (b"9223372036854775807", (1 << 63) - 1),
        (b"-9223372036854775808", -(1 << 63)),
        ('"é🙂"'.encode(), "é🙂"),
        (b'"\\u00e9\\ud83d\\ude42"', "é🙂"),
        (b'"[[[[\\"]]"', '[[[["]]'),
        (b"[" * 64 + b"]" * 64, json.loads("[" * 64 + "]" * 64)),
        (b'{"a":{"b":1},"b":1}', {"a": {"b": 1}, "b": 1}),
    ],
)
def test_accepted(raw: bytes, value: Any) -> None:
    assert parse_json(raw, "it") == value


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"[1,]",
        b"{} {}",
        b"01",
        b"+1",
        b"'a'",
        b"NaN",
        b"[Infinity]",
        b"-Infinity",
        b'"\xff"',
        b'"\xed\xa0\x80"',
        b'"\\ud800"',
        b'{"\\udc00": 1}',
        b'"\\ude42\\ud83d"',
        b'"\n"',
        b"\xef\xbb\xbf{}",
    ],
)
def test_what_is_no_json_is_refused(raw: bytes) -> None:
    with pytest.raises(Corrupt, match=r"^it is not JSON"):
        parse_json(raw, "it")


@pytest.mark.parametrize(
    "raw",
    [
        b'{"a":1,"a":1}',
        b'[{"x":{"a":1,"b":2,"a":3}}]',
        b"1e999",
        b"9223372036854775808",
        b"-9223372036854775809",
        b"1" * 5000,
    ],
)
def test_json_that_is_not_strict_is_refused(raw: bytes) -> None:
    with pytest.raises(Corrupt, match=r"^it is not strict JSON"):
        parse_json(raw, "it")


@pytest.mark.parametrize("bracket", [b"[", b'{"a":'])
def test_depth_is_refused_before_parsing(bracket: bytes) -> None:
    with pytest.raises(Corrupt, match="deeper than 64"):
        parse_json(bracket * 65, "it")
    with pytest.raises(Corrupt, match="deeper than 64"):
        parse_json(bracket * 1_000_000, "it")


def test_compact_escapes_only_what_it_must() -> None:
    text = "".join(map(chr, range(0x20))) + '"\\/\x7fé\u2028🙂'
    escapes = "".join(
        {8: "\\b", 9: "\\t", 10: "\\n", 12: "\\f", 13: "\\r"}.get(c, f"\\u{c:04x}")
        for c in range(0x20)
    )
    assert compact_json(text).decode() == f'"{escapes}\\"\\\\/\x7fé\u2028🙂"'


def test_compact_keeps_order_and_has_no_spaces() -> None:
    assert compact_json({"b": [1, -2, None], "a": {}}) == b'{"b":[1,-2,null],"a":{}}'
    with pytest.raises(ValueError, match="JSON compliant"):
        compact_json(float("nan"))


def test_members() -> None:
    assert strict_json.members({"b": 1, "a": 2}, "it", ("a", "b")) == [2, 1]
    with pytest.raises(UnsupportedFeature, match="it has an unknown member 'c'"):
        strict_json.members({"a": 1, "b": 2, "c": 3}, "it", ("a", "b"))
    with pytest.raises(UnsupportedFeature, match="'c'"):
        strict_json.members({"a": 1, "c": 3}, "it", ("a", "b"))
    with pytest.raises(Corrupt, match="it lacks its member 'b'"):
        strict_json.members({"a": 1}, "it", ("a", "b"))
    with pytest.raises(Corrupt, match="it is a list, expected an object"):
        strict_json.members([], "it", ())


@pytest.mark.parametrize(
    ("read", "right", "wrong"),
    [
        (strict_json.integer, [0, (1 << 63) - 1], [-1, True, 1.0, "1", None]),
        (strict_json.text, ["", "x"], [1, None, ["x"]]),
    ],
)
def test_types(read: Any, right: list[Any], wrong: list[Any]) -> None:
    for value in right:
        assert read(value, "it") is value
    for value in wrong:
        with pytest.raises(Corrupt, match=r"^it is"):
            read(value, "it")


def test_items() -> None:
    assert strict_json.items([1, 2], "it", 2) == [1, 2]
    with pytest.raises(LimitExceeded, match="it has 3 items, the limit is 2"):
        strict_json.items([1, 2, 3], "it", 2)
    with pytest.raises(Corrupt, match="expected a list"):
        strict_json.items({}, "it", 2)


def test_fixed_items() -> None:
    assert strict_json.fixed_items([1, 2], "it", 2) == [1, 2]
    wrong: list[Any] = [[1], [1, 2, 3], {}, None]
    for value in wrong:
        with pytest.raises(Corrupt, match=r"^it "):
            strict_json.fixed_items(value, "it", 2)


def test_hex_bytes() -> None:
    assert strict_json.hex_bytes("00ff", "it", 2) == b"\x00\xff"
    for wrong in ("00FF", "00f", "00ff00", "00fg", "00f\n", "٠٠٠٠", 0, None):
        with pytest.raises(Corrupt, match="it is not 2 bytes in lower-case hex"):
            strict_json.hex_bytes(wrong, "it", 2)


def test_optional() -> None:
    assert strict_json.optional(None, "it", strict_json.text) is None
    assert strict_json.optional("x", "it", strict_json.text) == "x"
