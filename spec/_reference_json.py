"""The error of the reference decoder, and JSON by the rules of FORMAT §1.2 and §3.3."""

from __future__ import annotations

import json
import re
from typing import Any


class Refused(Exception):
    """The delta or the base is refused; `code` is an error code of FORMAT §10 or §12."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code


def check(ok: bool, code: str, message: str) -> None:
    """Raise Refused unless `ok`."""
    if not ok:
        raise Refused(code, message)


def compact(value: object) -> bytes:
    """Return a value as compact JSON (§1.2); raises ValueError if a string has a lone surrogate."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8")


def strict_object(raw: bytes, code: str) -> dict[str, Any]:
    """Return a strict JSON object (§3.3); other JSON is refused with `code`.

    The integer -0, which §1.2 does not allow, and very long integers are returned as text.
    """

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        check(len(dict(items)) == len(items), code, "a key occurs twice in an object")
        return dict(items)

    def integer(digits: str) -> int | str:
        return digits if digits == "-0" or len(digits) > 30 else int(digits)

    def constant(word: str) -> None:
        raise Refused(code, f"{word} is not JSON")

    try:
        text = raw.decode("utf-8")
        depth = 0
        for bracket in re.findall(r"[\[\]{}]", re.sub(r'"(?:[^"\\]|\\.)*"', "", text, flags=re.S)):
            depth += 1 if bracket in "[{" else -1
            check(depth <= 64, code, "the JSON has more than 64 levels of nesting")
        value = json.loads(
            text, object_pairs_hook=pairs, parse_int=integer, parse_constant=constant
        )
        compact(value)
    except ValueError as error:
        raise Refused(code, f"not strict JSON: {error}") from error
    check(type(value) is dict, code, "not a JSON object")
    return dict(value)
