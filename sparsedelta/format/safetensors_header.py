"""Safetensors headers: the JSON that gives name, dtype, shape and offsets of each tensor of a file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sparsedelta.errors import Corrupt, LimitExceeded
from sparsedelta.format.strict_json import (
    compact_json,
    fixed_items,
    integer,
    items,
    parse_json,
    text,
)

MAX_HEADER_BYTES = 100_000_000
MAX_DIMENSIONS = 64
MAX_NAME_BYTES = 65_535
METADATA_KEY = "__metadata__"
ALIGNMENT = 8
_MEMBERS = {"dtype", "shape", "data_offsets"}


@dataclass(frozen=True, slots=True)
class HeaderEntry:
    """One tensor as its header describes it.

    Attributes:
        name, dtype, shape: as in the header; the dtype may be unknown.
        begin, end: its first byte and the byte after its last, counted from the start of the data.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Header:
    """A parsed header.

    Attributes:
        metadata: the ``__metadata__``; None if it is missing or null.
        entries: sorted by offsets; entries with equal offsets keep their order in the header.
        only_known_members: whether a delta can describe everything in the header (FORMAT §3.2).
    """

    metadata: dict[str, str] | None
    entries: Sequence[HeaderEntry]
    only_known_members: bool


def parse_header(raw: bytes, what: str) -> Header:
    """Return the parsed header. Gaps and overlaps between the entries are not checked.

    Args:
        raw: the bytes of the header, including padding.
        what: name of the file, for messages.

    Raises:
        Corrupt: ``raw`` is not a safetensors header.
        LimitExceeded: a name or shape is too long.
    """
    unpadded = raw.rstrip(b" ")
    if not (unpadded.startswith(b"{") and unpadded.endswith(b"}")):
        raise Corrupt(f"the header of {what} is not a JSON object followed by spaces")
    fields = parse_json(unpadded, f"the header of {what}")
    known = fields.get(METADATA_KEY, {}) is not None
    metadata = _metadata(fields.pop(METADATA_KEY, None), what)
    known &= all(type(value) is dict and value.keys() == _MEMBERS for value in fields.values())
    entries = [_entry(name, value, what) for name, value in fields.items()]
    entries.sort(key=lambda entry: (entry.begin, entry.end))
    return Header(metadata, tuple(entries), known)


def render_header(metadata: Mapping[str, str] | None, entries: Iterable[HeaderEntry]) -> bytes:
    """Return the canonical header (FORMAT §3.2), padded to a multiple of ``ALIGNMENT`` bytes."""
    fields: dict[str, Any] = {}
    if metadata is not None:
        fields[METADATA_KEY] = dict(metadata)
    for entry in entries:
        fields[entry.name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [entry.begin, entry.end],
        }
    raw = compact_json(fields)
    return raw + b" " * (-len(raw) % ALIGNMENT)


def _metadata(value: Any, what: str) -> dict[str, str] | None:
    if value is None:
        return None
    where = f"{METADATA_KEY} of {what}"
    if type(value) is not dict:
        raise Corrupt(f"{where} is not an object")
    return {key: text(item, f"{where}, {key[:200]!r}") for key, item in value.items()}


def _entry(name: str, value: Any, what: str) -> HeaderEntry:
    """Return the entry of a tensor from its JSON value."""
    # Most entries pass these checks. They take a third of the time of the others, which say what is wrong.
    if len(name) <= MAX_NAME_BYTES // 4 and type(value) is dict and value.keys() >= _MEMBERS:
        shape, offsets = value["shape"], value["data_offsets"]
        if (
            type(shape) is type(offsets) is list
            and len(shape) <= MAX_DIMENSIONS
            and len(offsets) == 2
        ):
            numbers = [*shape, *offsets]
            begin, end = offsets
            right = type(value["dtype"]) is str and {*map(type, numbers)} == {int}
            if right and min(numbers) >= 0 and begin <= end:
                return HeaderEntry(name, value["dtype"], tuple(shape), begin, end)
    return _checked_entry(name, value, what)


def _checked_entry(name: str, value: Any, what: str) -> HeaderEntry:
    where = f"{what}, {name[:200]!r}"
    if len(name.encode("utf-8")) > MAX_NAME_BYTES:
        raise LimitExceeded(f"{where}: the tensor name is longer than {MAX_NAME_BYTES} bytes")
    if type(value) is not dict or not value.keys() >= _MEMBERS:
        raise Corrupt(f"{where} is not an object with dtype, shape and data_offsets")
    shape = read_shape(value["shape"], where)
    offsets = fixed_items(value["data_offsets"], f"{where}, data_offsets", 2)
    begin, end = (integer(offset, f"{where}, data_offsets") for offset in offsets)
    if end < begin:
        raise Corrupt(f"{where}: data_offsets [{begin}, {end}] do not ascend")
    return HeaderEntry(name, text(value["dtype"], f"{where}, dtype"), shape, begin, end)


def read_shape(value: Any, where: str) -> tuple[int, ...]:
    """Return a shape from its JSON value.

    Raises:
        Corrupt: it is not a list of integers of at least 0.
        LimitExceeded: it has more than ``MAX_DIMENSIONS`` items.
    """
    sizes = items(value, f"{where}, shape", MAX_DIMENSIONS)
    return tuple(integer(size, f"{where}, shape") for size in sizes)
