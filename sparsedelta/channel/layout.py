"""What the objects of a channel are called, and the one that says that it is a channel (spec/CHANNEL.md §3)."""

from __future__ import annotations

import re
from typing import Literal, TypeAlias

from sparsedelta.channel.entry import Object
from sparsedelta.errors import BadVersion, FormatError, UnsupportedVersion
from sparsedelta.format.strict_json import compact_json, integer, members, parse_json

Kind: TypeAlias = Literal["deltas", "anchors"]
KINDS: tuple[Kind, ...] = ("deltas", "anchors")
CHANNEL, HEAD, LOCK = "channel.json", "head.json", "lock.json"
LEASES = "leases/"
MAX_JSON_BYTES = 1 << 20
_FORMAT_VERSION = 1
CHANNEL_CONTENT = compact_json({"format": "sparsedelta-channel", "format_version": _FORMAT_VERSION})
_OBJECT = re.compile(r"(deltas|anchors)/([0-9]{10})-[0-9a-f]{16}\.sd")
_SLOT = re.compile(r"leases/([0-9]{10})/([0-9]{10})\.json")
MAX_VERSION = 10**10 - 1  # names have ten digits


def entry_name(version: int) -> str:
    """Return the name of a version's entry."""
    return f"versions/{version:010}.json"


def object_name(kind: Kind, version: int, found: Object) -> str:
    """Return the name of a version's delta or anchor."""
    return f"{kind}/{version:010}-{found.digest.hex()[:16]}.sd"


def slot_name(segment: int, slot: int) -> str:
    """Return the name of a slot of a segment's leases."""
    return f"{LEASES}{segment:010}/{slot:010}.json"


def object_version(name: str) -> int | None:
    """Return the version that a delta or anchor is of, None for any other name."""
    found = _OBJECT.fullmatch(name)
    return int(found[2]) if found else None


def slot_of(name: str) -> tuple[int, int] | None:
    """Return segment and slot of a lease, None for any other name."""
    found = _SLOT.fullmatch(name)
    return (int(found[1]), int(found[2])) if found else None


def check_channel(raw: bytes, where: str) -> None:
    """Check the content of ``channel.json``.

    Raises:
        UnsupportedVersion: it is a channel of a format version that this release does not know.
        BadVersion: it is none.
    """
    try:
        name, version = members(parse_json(raw, CHANNEL), CHANNEL, ("format", "format_version"))
        number = integer(version, f"format_version of {CHANNEL}")
    except FormatError as error:
        raise BadVersion(f"'{where}' is not a channel: {error}") from error
    if name != "sparsedelta-channel":
        raise BadVersion(f"'{where}' is not a channel: format of {CHANNEL} is {str(name)[:40]!r}")
    if number != _FORMAT_VERSION:
        raise UnsupportedVersion(
            f"channel '{where}' has format version {number}, this release reads {_FORMAT_VERSION}; a newer"
            " sparsedelta may read it"
        )


def head_content(version: int) -> bytes:
    """Return the content of ``head.json``."""
    return compact_json({"version": version})


def parse_head(raw: bytes) -> int:
    """Return the version in ``head.json``; 0 if it says nothing: it is a hint."""
    try:
        (version,) = members(parse_json(raw, HEAD), HEAD, ("version",))
        return integer(version, f"version of {HEAD}")
    except FormatError:
        return 0
