"""Leases: a follower keeps a segment and all later ones from being pruned for a while (spec/CHANNEL.md §8).

The slots of a segment are a list that only grows. A lease and the closing of the segment compete for its next
slot, so that either the pruner sees the lease or the follower sees that the segment is closed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sparsedelta.channel.layout import MAX_JSON_BYTES, slot_name
from sparsedelta.channel.versions import STORE_FAILURES, Versions
from sparsedelta.errors import BadVersion, FormatError
from sparsedelta.format.strict_json import compact_json, integer, members, parse_json, text

LEASE_SECONDS = 15 * 60
_MAX_LEASE_SECONDS = 60 * 60
CLOCK_SECONDS = 60  # the largest difference between two clocks
_CLOSED = compact_json({"closed": True})


@dataclass(frozen=True, slots=True)
class Slot:
    """One slot of a segment: a lease until a time, or the mark that the segment is closed."""

    holder: str
    until: int
    is_closed: bool = False


def take_lease(channel: Versions, segment: int, holder: str) -> int | None:
    """Take a lease; return its end in seconds since 1970 UTC, or None if the segment is closed.

    Args:
        channel: the channel.
        segment: the first version of the segment.
        holder: a name for the holder, for people who inspect the store.
    """
    if is_closed(channel, segment):
        return None
    until = channel.now + LEASE_SECONDS
    content = compact_json({"holder": holder, "until": until})
    at = _first_missing(channel, segment)
    while True:
        before = _read(channel, segment, at - 1) if at else None
        if at and (before is None or before.is_closed):
            return None
        if _create(channel, slot_name(segment, at), content):
            break
        at += 1
    return None if is_closed(channel, segment) else until


def is_closed(channel: Versions, segment: int) -> bool:
    """Return whether the first slot of a segment says that it is closed."""
    slot = _read(channel, segment, 0)
    return slot is not None and slot.is_closed


def close(channel: Versions, segment: int) -> bool:
    """Close a segment unless it is leased; return whether it is closed now."""
    at = 0
    while True:
        slot = _read(channel, segment, at)
        if slot is None:
            if _create(channel, slot_name(segment, at), _CLOSED):
                break
            continue  # another took the slot: look at it
        if slot.is_closed:
            break
        if -CLOCK_SECONDS < slot.until - channel.now <= _MAX_LEASE_SECONDS + CLOCK_SECONDS:
            return False
        at += 1
    if at:
        channel.store.write(slot_name(segment, 0), _CLOSED)
    return True


def _first_missing(channel: Versions, segment: int) -> int:
    """Return the number of the first missing slot; slots may be deleted at the same time."""
    low, step = -1, 1
    missing: int | None = None
    while missing is None or missing - low > 1:
        middle = low + step if missing is None else (low + missing) // 2
        if _read(channel, segment, middle) is None:
            missing = middle
        else:
            low = middle
            step *= 2
    return missing


def _create(channel: Versions, name: str, content: bytes) -> bool:
    """Create a slot; return whether it has this content afterwards, even if the store reported a failure."""
    try:
        if channel.store.create(name, content):
            return True
    except STORE_FAILURES:
        if channel.store.read(name, MAX_JSON_BYTES) != content:
            raise
        return True
    return channel.store.read(name, MAX_JSON_BYTES) == content


def _read(channel: Versions, segment: int, slot: int) -> Slot | None:
    raw = channel.store.read(slot_name(segment, slot), MAX_JSON_BYTES)
    if raw is None:
        return None
    what = f"slot {slot} of segment {segment}"
    try:
        return _parse(parse_json(raw, what), what)
    except FormatError as error:
        raise BadVersion(f"{error}; the channel is damaged") from error


def _parse(value: Any, what: str) -> Slot:
    if value == {"closed": True}:
        return Slot("", 0, is_closed=True)
    holder, until = members(value, what, ("holder", "until"))
    return Slot(text(holder, f"holder of {what}"), integer(until, f"until of {what}"))
