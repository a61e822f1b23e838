"""The entry of a version: what ``versions/<n>.json`` says, checked (spec/CHANNEL.md §4)."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, SupportsIndex

from blake3 import blake3

from sparsedelta._typing import JSON
from sparsedelta.errors import BadVersion, FormatError
from sparsedelta.format.strict_json import (
    compact_json,
    hex_bytes,
    integer,
    members,
    optional,
    parse_json,
    text,
)

MAX_ENTRY_BYTES = 1 << 20
_DIGEST_BYTES = 32
_MEMBERS = (
    "version", "previous", "run", "time", "step", "target", "segment", "delta", "anchor", "info",
)  # fmt: skip


def checked_number(name: str, value: SupportsIndex, least: int = 0) -> int:
    """Return a number that an entry can hold.

    Args:
        name: of the argument, for the error.
        value: the number.
        least: the lowest that is allowed.

    Raises:
        ValueError: it is no integer from ``least`` to 2^63 - 1.
    """
    try:
        number = operator.index(value)
    except TypeError:
        number = -1
    if isinstance(value, bool) or not least <= number < 1 << 63:
        raise ValueError(f"{name} is {value!r}, expected an integer from {least} to 2^63 - 1")
    return number


@dataclass(frozen=True, slots=True)
class Object:
    """A delta or an anchor in the store.

    Attributes:
        digest: BLAKE3 of its bytes, 32 bytes.
        n_bytes: its size.
    """

    digest: bytes = field(repr=False)
    n_bytes: int


@dataclass(frozen=True, slots=True)
class AnchorBase:
    """A checkpoint outside the channel.

    Attributes:
        id: where it may be found.
        fingerprint: of the tensors that the anchor is made from.
    """

    id: str | None
    fingerprint: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Anchor(Object):
    """An anchor in the store; ``base``: what it is applied to, None: nothing."""

    base: AnchorBase | None = None


@dataclass(frozen=True)
class Entry:
    """What a channel says of one version.

    Attributes:
        version: its number.
        previous: digest of the entry before it; None for version 1.
        run: id of the publisher's process.
        time: when it was made, seconds since 1970 UTC.
        step: of the training, if known.
        target: fingerprint of the version's tensors.
        segment: the latest version up to this one that has an anchor.
        delta: from the version before it; None: it has only an anchor.
        anchor: makes the version without those before it; None: it has only a delta.
        info: free JSON.
    """

    version: int
    previous: bytes | None = field(repr=False)
    run: str
    time: int
    step: int | None
    target: bytes = field(repr=False)
    segment: int
    delta: Object | None
    anchor: Anchor | None
    info: Mapping[str, JSON]

    @cached_property
    def raw(self) -> bytes:
        """The bytes of the entry as this release writes it."""
        return compact_json(self.fields() | {"info": dict(self.info)})

    @cached_property
    def digest(self) -> bytes:
        """BLAKE3 of its bytes."""
        return blake3(self.raw).digest()

    def fields(self) -> dict[str, Any]:
        """Return all members but ``info``, in order, as JSON has them."""
        anchor, base = self.anchor, self.anchor.base if self.anchor else None
        named = base and {"id": base.id, "fingerprint": base.fingerprint.hex()}
        return {
            "version": self.version,
            "previous": self.previous and self.previous.hex(),
            "run": self.run,
            "time": self.time,
            "step": self.step,
            "target": self.target.hex(),
            "segment": self.segment,
            "delta": self.delta and _object_fields(self.delta),
            "anchor": anchor and _object_fields(anchor) | {"base": named},
        }


def parse_entry(raw: bytes, version: int) -> Entry:
    """Return the entry in the bytes of ``versions/<version>.json``.

    Raises:
        BadVersion: it breaks C1, C2 or C5, or what C3 and C4 say of one entry.
    """
    what = f"the entry of version {version}"
    try:
        entry = _parse(raw, what)
    except FormatError as error:
        raise BadVersion(f"{error}; the channel is damaged") from error
    problem = _problem(entry, raw, version)
    if problem:
        raise BadVersion(f"{what} {problem}; the channel is damaged")
    # The digest is that of the bytes that were read, however ``info`` is spelled in them.
    entry.__dict__["raw"] = raw
    return entry


def check_follows(entry: Entry, before: Entry) -> None:
    """Check that an entry follows the one before it (C3, C4).

    Raises:
        BadVersion: it does not.
    """
    if entry.previous != before.digest:
        raise BadVersion(
            f"the entry of version {entry.version} names another entry before it than that of version"
            f" {before.version} (C3); the channel is damaged",
            expected=entry.previous.hex() if entry.previous else None,
            found=before.digest.hex(),
        )
    if not entry.anchor and entry.segment != before.segment:
        raise BadVersion(
            f"the entry of version {entry.version} says that its segment begins at {entry.segment}, the"
            f" one before it says {before.segment} (C4); the channel is damaged"
        )


def _parse(raw: bytes, what: str) -> Entry:
    version, previous, run, time, step, target, segment, delta, anchor, info = members(
        parse_json(raw, what), what, _MEMBERS
    )
    if type(info) is not dict:
        raise FormatError(f"info of {what} is not an object")
    return Entry(
        integer(version, f"version of {what}"),
        optional(previous, f"previous of {what}", _digest),
        text(run, f"run of {what}"),
        integer(time, f"time of {what}"),
        optional(step, f"step of {what}", integer),
        _digest(target, f"target of {what}"),
        integer(segment, f"segment of {what}"),
        optional(delta, f"delta of {what}", _object),
        optional(anchor, f"anchor of {what}", _anchor),
        info,
    )


def _problem(entry: Entry, raw: bytes, version: int) -> str | None:
    start = compact_json(entry.fields())[:-1] + b',"info":{'
    if not (raw.startswith(start) and raw.endswith(b"}}")):
        return "is not compact JSON with its members in order (C1)"
    if entry.version != version or version < 1:
        return f"says that it is of version {entry.version} (C2)"
    if (entry.previous is None) != (version == 1):
        return "names an entry before the first, or none before another (C3)"
    if entry.segment < 1 or (entry.segment == version) != (entry.anchor is not None):
        return f"says that its segment begins at {entry.segment} (C4)"
    if entry.segment > version:
        return f"says that its segment begins later, at {entry.segment} (C4)"
    if entry.delta is None and entry.anchor is None:
        return "has neither delta nor anchor (C5)"
    if version == 1 and entry.delta is not None:
        return "has a delta on a version before the first (C5)"
    return None


def _digest(value: Any, what: str) -> bytes:
    return hex_bytes(value, what, _DIGEST_BYTES)


def _object(value: Any, what: str) -> Object:
    digest, n_bytes = members(value, what, ("digest", "n_bytes"))
    return Object(_digest(digest, f"digest in {what}"), integer(n_bytes, f"n_bytes in {what}"))


def _anchor(value: Any, what: str) -> Anchor:
    digest, n_bytes, base = members(value, what, ("digest", "n_bytes", "base"))
    return Anchor(
        _digest(digest, f"digest in {what}"),
        integer(n_bytes, f"n_bytes in {what}"),
        optional(base, f"base in {what}", _base),
    )


def _base(value: Any, what: str) -> AnchorBase:
    found, fingerprint = members(value, what, ("id", "fingerprint"))
    return AnchorBase(
        optional(found, f"id of {what}", text), _digest(fingerprint, f"fingerprint of {what}")
    )


def _object_fields(found: Object) -> dict[str, Any]:
    return {"digest": found.digest.hex(), "n_bytes": found.n_bytes}
