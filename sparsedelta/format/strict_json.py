"""Strict JSON for untrusted input (FORMAT §3.3): ambiguous or unbounded text raises an error."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from sparsedelta.errors import Corrupt, FormatError, LimitExceeded, UnsupportedFeature

MAX_DEPTH = 64
MAX_INTEGER = (1 << 63) - 1
_BLOCK_BYTES = 1 << 20
_MAX_DIGITS = 4000  # Python can convert integers of this many digits to text
_SHOWN = 200  # characters of untrusted text in a message

_UNUSUAL_INTEGER = re.compile(
    rb"-0|[0-9]{19}"
)  # all others are in range; also matches some strings
_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")
_HEX = re.compile(r"[0-9a-f]*")

T = TypeVar("T")


class _NotStrict(ValueError):
    """The JSON is ambiguous or out of range."""


def parse_json(raw: bytes, what: str, *, any_numbers: bool = False) -> Any:
    """Return the value of strict JSON text.

    Args:
        raw: the text, UTF-8.
        what: name of the text, for messages.
        any_numbers: accept numbers of any size; those that Python cannot hold are returned as text.

    Raises:
        Corrupt: the text is not JSON, or has bad UTF-8, NaN, a lone surrogate, a key twice in one
            object, an integer beyond 63 bits, or more than ``MAX_DEPTH`` levels.
    """
    try:
        _check_depth(raw, what)
        check = _any_integer if any_numbers else _integer
        value = json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_int=check if _UNUSUAL_INTEGER.search(raw) else None,
            parse_float=_any_number if any_numbers else _number,
            parse_constant=_constant,
        )
        if _SURROGATE_ESCAPE.search(raw):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except _NotStrict as error:
        raise Corrupt(f"{what} is not strict JSON: {error}") from error
    except ValueError as error:
        if isinstance(error, FormatError):
            raise
        raise Corrupt(f"{what} is not JSON: {error}") from error
    return value


def compact_json(value: Any) -> bytes:
    """Return a value as compact JSON (FORMAT §1.2); members keep their order."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.encode("utf-8")


def members(value: Any, what: str, names: Sequence[str]) -> list[Any]:
    """Return the values of the members ``names`` of an object, in this order.

    Raises:
        Corrupt: ``value`` is not an object, or a member is missing.
        UnsupportedFeature: the object has a member that is not in ``names``.
    """
    if type(value) is not dict:
        raise Corrupt(f"{what} is {_kind(value)}, expected an object")
    if len(value) != len(names) or any(name not in value for name in names):
        for name in value:
            if name not in names:
                raise UnsupportedFeature(f"{what} has an unknown member {name[:_SHOWN]!r}")
        missing = next(name for name in names if name not in value)
        raise Corrupt(f"{what} lacks its member {missing!r}")
    return [value[name] for name in names]


def items(value: Any, what: str, limit: int | None = None) -> list[Any]:
    """Return a list; ``limit``, if given, is the largest number of items allowed.

    Raises:
        Corrupt: ``value`` is not a list.
        LimitExceeded: the list has more items.
    """
    if type(value) is not list:
        raise Corrupt(f"{what} is {_kind(value)}, expected a list")
    if limit is not None and len(value) > limit:
        raise LimitExceeded(f"{what} has {len(value)} items, the limit is {limit}")
    return value


def fixed_items(value: Any, what: str, n: int) -> list[Any]:
    """Return a list of exactly ``n`` items; anything else raises Corrupt."""
    found = items(value, what)
    if len(found) != n:
        raise Corrupt(f"{what} has {len(found)} items, expected {n}")
    return found


def integer(value: Any, what: str) -> int:
    """Return an integer from 0 to 2^63 − 1; anything else, such as a boolean, raises Corrupt."""
    if type(value) is not int or value < 0:
        raise Corrupt(f"{what} is {_kind(value)}, expected an integer from 0 to 2^63 - 1")
    return value


def text(value: Any, what: str) -> str:
    """Return a string; anything else raises Corrupt."""
    if type(value) is not str:
        raise Corrupt(f"{what} is {_kind(value)}, expected a string")
    return value


def hex_bytes(value: Any, what: str, n_bytes: int) -> bytes:
    """Return ``n_bytes`` bytes from lower-case hex; anything else raises Corrupt."""
    if type(value) is not str or len(value) != 2 * n_bytes or not _HEX.fullmatch(value):
        raise Corrupt(f"{what} is not {n_bytes} bytes in lower-case hex")
    return bytes.fromhex(value)


def optional(value: Any, what: str, read: Callable[[Any, str], T]) -> T | None:
    """Return None for null, else ``read(value, what)``."""
    return None if value is None else read(value, what)


def _check_depth(raw: bytes, what: str) -> None:
    # This runs before parsing, because the parser recurses and deep nesting would exhaust its stack.
    # It works block by block, in linear time. A regular expression would take a hundred bytes of
    # memory for each character of a long string, and quadratic time for unclosed quotes.
    text = np.frombuffer(raw, np.uint8)
    depth, in_string, n_backslashes, has_escapes = 0, False, 0, b"\\" in raw
    for start in range(0, len(text), _BLOCK_BYTES):
        block = text[start : start + _BLOCK_BYTES]
        quotes = block == ord('"')
        if has_escapes:
            escaped, n_backslashes = _escaped(block, n_backslashes)
            quotes &= ~escaped
        inside = np.logical_xor.accumulate(quotes) ^ in_string
        steps = ((block == ord("[")) | (block == ord("{"))).astype(np.int32)
        steps -= (block == ord("]")) | (block == ord("}"))
        steps[inside] = 0
        depths = np.cumsum(steps, dtype=np.int64) + depth
        if int(depths.max()) > MAX_DEPTH:
            raise Corrupt(f"{what} is nested deeper than {MAX_DEPTH}")
        depth, in_string = int(depths[-1]), bool(inside[-1])


def _escaped(block: npt.NDArray[np.uint8], n_before: int) -> tuple[npt.NDArray[np.bool_], int]:
    """Return which bytes a backslash escapes, and how many backslashes in a row end the block.

    A byte is escaped if an odd number of backslashes in a row stands right before it.

    Args:
        block: at least one byte.
        n_before: how many backslashes in a row stand right before the block.
    """
    backslash = block == ord("\\")
    numbers = np.arange(len(block))
    last = np.maximum.accumulate(np.where(backslash, -1 - n_before, numbers))
    run = numbers - last  # length of the run of backslashes that ends with each byte
    before = np.concatenate(([n_before], run[:-1]))
    return before % 2 == 1, int(run[-1])


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise _NotStrict(f"key {twice[:_SHOWN]!r} occurs twice in one object")
    return result


def _integer(digits: str) -> int | float:
    if digits == "-0":
        return -0.0  # "-0" is not an integer (FORMAT §1.2)
    if len(digits) > 20 or not -MAX_INTEGER - 1 <= int(digits) <= MAX_INTEGER:
        raise _NotStrict(f"integer {digits[:24]} does not fit in 63 bits and a sign")
    return int(digits)


def _number(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise _NotStrict(f"number {digits[:24]} is not finite")
    return number


def _any_integer(digits: str) -> int | str:
    return int(digits) if len(digits) <= _MAX_DIGITS else digits


def _any_number(digits: str) -> float | str:
    number = float(digits)
    return number if math.isfinite(number) else digits


def _constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return f"the number {value}"
    if isinstance(value, str):
        return "a string"
    return "a list" if isinstance(value, list) else "an object"
