"""``prune``: deletes the versions that no follower needs any longer (spec/CHANNEL.md §9).

A segment is closed before it is deleted. Objects that no entry names are garbage and are deleted too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from sparsedelta.channel.entry import Entry, checked_number
from sparsedelta.channel.layout import KINDS, LEASES, Kind, object_name, object_version, slot_of
from sparsedelta.channel.leases import close, is_closed
from sparsedelta.channel.lock import writing
from sparsedelta.channel.versions import Versions


@dataclass(frozen=True, slots=True)
class PruneReport:
    """The result of pruning.

    Attributes:
        first: the oldest version that can still be read; None if the channel has no version.
        n_closed: segments that were closed.
        n_deleted: objects that were deleted.
        leased: the oldest segment that was kept only because it is leased; None if there is none.
    """

    first: int | None
    n_closed: int
    n_deleted: int
    leased: int | None


def prune(channel: Versions, *, keep: int) -> PruneReport:
    """Delete all objects that are not needed to reach the latest versions; see ``Channel.prune``."""
    keep = checked_number("keep", keep, 1)
    channel.check_place()
    with writing(channel, "prune"):
        head = channel.head()
        if head is None:
            return PruneReport(None, 0, 0, None)
        oldest = channel.entry(max(1, head.version - keep + 1))
        begins = [oldest.segment, *_open_before(channel, oldest.segment)][::-1]
        first, n_closed, n_deleted, leased = begins[0], 0, 0, None
        for segment, following in pairwise(begins):
            if not close(channel, segment):
                leased = segment
                break
            first, n_closed = following, n_closed + 1
            n_deleted += _delete(channel, _named(channel, segment, following))
        n_deleted += _delete(channel, _garbage(channel, head.version, first))
        _delete(channel, _old_slots(channel, first))
        return PruneReport(first, n_closed, n_deleted, leased)


def _open_before(channel: Versions, segment: int) -> Iterator[int]:
    """Yield the first versions of the open segments before a segment, the latest first."""
    while segment > 1:
        segment = channel.entry(segment - 1).segment
        if is_closed(channel, segment):
            return
        yield segment


def _named(channel: Versions, segment: int, following: int) -> Iterator[str]:
    for version in range(segment, following):
        yield from _names(channel.entry(version))


def _names(entry: Entry) -> Iterator[str]:
    kinds: dict[Kind, object] = {"deltas": entry.delta, "anchors": entry.anchor}
    for kind in KINDS:
        found = kinds[kind]
        if found:
            yield object_name(kind, entry.version, found)  # type: ignore[arg-type]


def _garbage(channel: Versions, head: int, first: int) -> Iterator[str]:
    """Yield the objects of versions before ``first``, and objects that the entry of their version does not name."""
    for kind in KINDS:
        for name in channel.store.list(f"{kind}/"):
            version = object_version(name)
            if version is None or not 1 <= version <= head:
                continue
            if version < first or name not in _names(channel.entry(version)):
                yield name


def _old_slots(channel: Versions, first: int) -> Iterator[str]:
    """Yield the slots of segments before ``first``, except slot 0, which marks a segment as closed."""
    for name in channel.store.list(LEASES):
        slot = slot_of(name)
        if slot and slot[0] < first and slot[1]:
            yield name


def _delete(channel: Versions, names: Iterator[str]) -> int:
    n_deleted = 0
    for name in names:
        channel.store.delete(name)
        n_deleted += 1
    return n_deleted
