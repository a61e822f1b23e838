"""Strict JSON for the reference decoder: what FORMAT §3.1 does not allow raises Refused."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any


class Refused(Exception):
    """The delta, or the base for it, is refused; `code` is one of FORMAT §10 and §12."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code


def check(ok: bool, code: str, message: str) -> None:
    """Raise Refused unless `ok`."""
    if not ok:
        raise Refused(code, message)


def parse_json(raw: bytes, not_json: str) -> Any:
    """Return the value of JSON text; `not_json` is the code for text that is no JSON at all."""

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        check(len(dict(items)) == len(items), "corrupt", "a key occurs twice in an object")
        return dict(items)

    def number(digits: str) -> int:
        in_range = len(digits) <= 20 and -(1 << 63) <= int(digits) < 1 << 63
        check(in_range, "corrupt", f"integer out of range: {digits[:30]}")
        return int(digits)

    def constant(word: str) -> None:
        raise Refused(not_json, f"{word} is no JSON")

    try:
        text = raw.decode("utf-8")
        depth = 0
        for bracket in re.findall(r"[\[\]{}]", re.sub(r'"(?:[^"\\]|\\.)*"', "", text)):
            depth += 1 if bracket in "[{" else -1
            check(depth <= 64, "limit_exceeded", "JSON nested deeper than 64")
        value = json.loads(text, object_pairs_hook=pairs, parse_int=number, parse_constant=constant)
        json.dumps(value, ensure_ascii=False).encode("utf-8")  # fails on a lone surrogate
    except ValueError as error:
        raise Refused(not_json, f"not strict JSON: {error}") from error
    return value


def members(value: Any, names: str) -> list[Any]:
    """Return the values of an object that has exactly the members `names`."""
    check(type(value) is dict, "corrupt", f"not an object with {names}")
    unknown = value.keys() - names.split()
    check(not unknown, "unsupported_feature", f"unknown members {sorted(unknown)}")
    check(len(value) == len(names.split()), "corrupt", f"not all of {names} are there")
    return [value[name] for name in names.split()]


def integer(value: Any) -> int:
    """Return a value that is an integer from 0 to 2^63 - 1."""
    check(type(value) is int and 0 <= value < 1 << 63, "corrupt", f"not an integer: {value!r:.40}")
    return int(value)


def string(value: Any) -> str:
    """Return a value that is a string."""
    check(type(value) is str, "corrupt", f"not a string: {value!r:.40}")
    return str(value)


def one_of(value: Any, known: Iterable[str]) -> str:
    """Return a string that is one of those that version 1 knows."""
    check(string(value) in known, "unsupported_feature", f"unknown: {value!r:.40}")
    return str(value)


def hexadecimal(value: Any, n_bytes: int) -> bytes:
    """Return the bytes of lower-case hex of just `n_bytes`."""
    ok = re.fullmatch(r"[0-9a-f]*", string(value)) is not None and len(value) == 2 * n_bytes
    check(ok, "corrupt", f"not {n_bytes} bytes in hex: {value!r:.40}")
    return bytes.fromhex(value)


def listed(value: Any, at_most: int | None = None) -> list[Any]:
    """Return a value that is a list, of at most so many items."""
    check(type(value) is list, "corrupt", f"not a list: {value!r:.40}")
    check(at_most is None or len(value) <= at_most, "limit_exceeded", "a list is too long")
    return list(value)
