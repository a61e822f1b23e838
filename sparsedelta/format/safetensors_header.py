"""Safetensors headers: the JSON that names, places and types the tensors of one file.

Used for the checkpoint files people have and for the container of a delta, which is one too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
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
    """One tensor as a header gives it; offsets in bytes from the start of the data."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Header:
    """A parsed header.

    Attributes:
        metadata: None if there are none, or null.
        entries: sorted by offset, ties in the header's order.
        only_known_members: it has nothing that a delta does not describe (FORMAT §3.2).
    """

    metadata: dict[str, str] | None
    entries: tuple[HeaderEntry, ...]
    only_known_members: bool


def parse_header(raw: bytes, what: str) -> Header:
    """Return a header's metadata and entries. Offsets are sorted but not otherwise checked.

    Args:
        raw: the header's bytes, padding included.
        what: the file, for messages.

    Raises:
        Corrupt: not a header.
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
    """Return the canonical header (FORMAT §3.3), padded to a multiple of ``ALIGNMENT`` bytes."""
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
    where = f"{what}, {name[:200]!r}"
    if len(name.encode("utf-8")) > MAX_NAME_BYTES:
        raise LimitExceeded(f"{where}: the name is longer than {MAX_NAME_BYTES} bytes")
    if type(value) is not dict or not value.keys() >= _MEMBERS:
        raise Corrupt(f"{where} is not an object with dtype, shape and data_offsets")
    shape = read_shape(value["shape"], where)
    offsets = fixed_items(value["data_offsets"], f"{where}, data_offsets", 2)
    begin, end = (integer(offset, f"{where}, data_offsets") for offset in offsets)
    if end < begin:
        raise Corrupt(f"{where}: data_offsets [{begin}, {end}] end before they begin")
    return HeaderEntry(name, text(value["dtype"], f"{where}, dtype"), shape, begin, end)


def read_shape(value: Any, where: str) -> tuple[int, ...]:
    """Return a shape from JSON; raises Corrupt or LimitExceeded if it is none."""
    sizes = items(value, f"{where}, shape", MAX_DIMENSIONS)
    return tuple(integer(size, f"{where}, shape") for size in sizes)
