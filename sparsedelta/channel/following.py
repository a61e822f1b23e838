"""The follower's side of the protocol: what to read for a version, checked and whole before anything changes (spec/CHANNEL.md §7)."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import IO, Literal, Protocol, TypeAlias

from sparsedelta.channel.entry import AnchorBase, Entry, Object
from sparsedelta.channel.layout import Kind
from sparsedelta.channel.leases import CLOCK_SECONDS, is_closed, take_lease
from sparsedelta.channel.objects import Pruned, fetch
from sparsedelta.channel.versions import STORE_FAILURES, Versions
from sparsedelta.errors import (
    BadVersion,
    BaseNeeded,
    Behind,
    CheckpointError,
    ConflictError,
    FormatError,
    MismatchError,
    StructureMismatch,
    Uncertain,
)

_log = logging.getLogger(__name__)
_TRIES = 8  # of reaching a version while pruning goes on
_QUICKER = 3  # times that another follower of one place is taken to have been there first
_RENEW_SECONDS = 5 * 60  # a lease that is left for less is renewed

Onto: TypeAlias = Literal["held", "anchor"]


class Replica(Protocol):
    """Where a follower keeps the version that it holds."""

    def fingerprint(self) -> bytes | None:
        """Return the fingerprint of the tensors that are there; None: there are none that can be read."""

    def is_present(self) -> bool:
        """Return whether there is anything."""

    @property
    def has_other_files(self) -> bool:
        """Whether a version has files that its fingerprint does not tell; only ``hints`` can then say which one is there."""

    def hints(self) -> Sequence[tuple[int, bytes]]:
        """Return versions that are probably there, by number and digest of the entry, the likeliest first."""

    @property
    def last(self) -> int:
        """The latest version that was there; 0 if that is unknown or does not matter."""

    def has_base(self, base: AnchorBase) -> bool:
        """Return whether a checkpoint outside the channel that an anchor is applied to is available."""

    def move(
        self,
        files: Sequence[IO[bytes]],
        onto: Onto,
        base: AnchorBase | None,
        held: Entry | None,
        to: Entry,
        becomes: Callable[[Entry | None], None],
    ) -> None:
        """Become a version, whole or not at all.

        Args:
            files: of deltas, each on the target of the one before it.
            onto: what the first is applied to: the version that is held; or, being an anchor, ``base``.
            base: of the anchor; None: it is applied to nothing.
            held: the version that is held.
            to: the version.
            becomes: called with the version that is held from now on, None if it is unknown, while nobody can read.

        Raises:
            MismatchError: what is held is not the base of the first. Nothing was changed.
            Uncertain: it is neither the one nor the other now.
        """


@dataclass(frozen=True, slots=True)
class SyncReport:
    """What a follower has done.

    Attributes:
        version: that it holds now.
        step: of the training.
        before: the version that it held; None: none, or none that is known.
        n_versions: deltas and anchors that were applied, as one change.
        n_bytes: that were read for it.
        anchor: whether it went by an anchor.
    """

    version: int
    step: int | None
    before: int | None
    n_versions: int
    n_bytes: int
    anchor: bool


@dataclass(frozen=True, slots=True)
class _Route:
    """A way to a version: what is read, in order."""

    onto: Onto
    base: AnchorBase | None
    objects: tuple[tuple[Kind, Entry, Object], ...]

    @property
    def n_bytes(self) -> int:
        return sum(found.n_bytes for _, _, found in self.objects)

    @property
    def segment(self) -> int:
        """Of the first version that is read."""
        return self.objects[0][1].segment


class Pursuit:
    """What a follower does: find out what is held, choose a way, read it, and move.

    Args:
        channel: what is followed.
        replica: where versions are kept.
    """

    def __init__(self, channel: Versions, replica: Replica) -> None:
        self.id = secrets.token_hex(8)
        self.held: Entry | None = None
        self._channel = channel
        self._replica = replica
        self._is_known = False  # whether ``held`` was found out
        self._lease: tuple[int, int] | None = None  # the segment that it begins with, and its end

    def sync(self, version: int | None) -> SyncReport:
        """Move to a version, the latest if none is given; see ``Follower.sync``."""
        channel, n_quicker = self._channel, 0
        for _ in range(_TRIES):
            head = channel.head()
            if head is None:
                channel.check_place()
            if head is None or (version is not None and version > head.version):
                there = (
                    f"its latest version is {head.version}"
                    if head
                    else "it has no version yet, or does not exist"
                )
                wanted = "" if version is None else f"version {version} is not published: "
                raise Behind(f"{wanted}channel '{channel.store.name}': {there}")
            if version is None:
                self._check_not_back(head)
            target = head if version is None else channel.entry(version)
            if self._is_known and not self._replica.is_present():
                self.forget()  # the folder was deleted
            self._identify(head)
            if self.held and self.held.digest == target.digest:
                return SyncReport(target.version, target.step, target.version, 0, 0, False)
            try:
                report = self._move(target)
            except FileExistsError:
                n_quicker += 1
                if self.held or n_quicker == _QUICKER or not self._replica.hints():
                    raise
                self.forget()  # another follower of this place was quicker
                continue
            if report:
                return report
        if not is_closed(channel, target.segment):
            anchor = channel.entry(target.segment).anchor
            if anchor and anchor.base and not self._replica.has_base(anchor.base):
                raise self._without_base(target, anchor.base)
            raise BadVersion(
                f"channel '{channel.store.name}' lacks objects of version {target.version} or of one before it, and that was not"
                " pruned: they were deleted, or the copy of the channel is not complete; copy it again, or publish a full version"
            )
        raise Behind(
            f"version {target.version} of channel '{channel.store.name}' was pruned, or is pruned faster than"
            " it can be read; follow a later one, or keep more (prune --keep)"
        )

    def forget(self) -> None:
        """Find out again in the next call which version is held."""
        self.held, self._is_known = None, False

    def _check_not_back(self, head: Entry) -> None:
        """Check that the channel's head is not before what was held last."""
        last = max(self.held.version if self.held else 0, self._replica.last)
        if head.version < last:
            raise Behind(
                f"the head of channel '{self._channel.store.name}' is version {head.version}, and version {last} was"
                " held before: an older copy of the channel was read or restored, or this is another channel; what is"
                f" held is unchanged; give the version to go back to it, {head.version}, or a new place"
            )

    def _identify(self, head: Entry) -> None:
        """Find out by digests which version is held, if that is not known."""
        if self._is_known:
            return
        found = self._replica.fingerprint()
        self.held = None
        for entry in self._candidates(head) if found else ():
            if entry.target == found:
                self.held = entry
                break
        self._is_known = True

    def _candidates(self, head: Entry) -> Iterator[Entry]:
        for version, digest in self._replica.hints():
            entry = self._channel.find(version) if 0 < version <= head.version else None
            if entry and entry.digest == digest:
                yield entry
        for entry in () if self._replica.has_other_files else self._channel.back(head):
            yield entry
            if entry.version < head.segment:
                break

    def _move(self, target: Entry) -> SyncReport | None:
        """Move to a version; return None if what it takes is being pruned.

        Raises:
            BadVersion: an object is damaged, and no way goes round it.
        """
        damage: BadVersion | None = None
        for route in self._routes(target):
            with ExitStack() as context:
                try:
                    files = [context.enter_context(file) for file in self._read(route)]
                except Pruned as error:
                    _log.info("pruned: %s", error)
                    continue
                except BadVersion as error:
                    damage = damage or error
                    continue
                before = self.held
                self._apply(files, route, target)
            return SyncReport(
                version=target.version,
                step=target.step,
                before=before.version if before else None,
                n_versions=len(route.objects),
                n_bytes=route.n_bytes,
                anchor=route.onto == "anchor",
            )
        if damage:
            raise damage
        return None

    def _apply(self, files: Sequence[IO[bytes]], route: _Route, target: Entry) -> None:
        held, self._is_known = self.held, False  # unless all goes well it is found out again
        number = target.version
        try:
            self._replica.move(files, route.onto, route.base, held, target, self._becomes)
        except StructureMismatch:
            raise
        except Uncertain:
            self._becomes(None)
            raise
        except (MismatchError, CheckpointError) as error:
            if route.onto == "anchor":
                if route.base:
                    named = route.base.id or "a checkpoint outside the channel"
                    error.args = (f"the base of the channel's anchor is {named}: {error}",)
                raise
            self._becomes(None)
            raise Uncertain(
                f"what is held is not version {held.version if held else '?'}, which it was: {error}; sync"
                " again to rebuild it from an anchor"
            ) from error
        except (FormatError, ConflictError, BaseNeeded) as error:
            raise BadVersion(f"version {number} cannot be made: {error}") from error
        self.held, self._is_known = target, True

    def _becomes(self, entry: Entry | None) -> None:
        self.held = entry

    def _routes(self, target: Entry) -> list[_Route]:
        """Return the ways to a version, the one with the fewest bytes first.

        Raises:
            Behind: there is none.
        """
        held, found = self.held, list[_Route]()
        later: list[tuple[Kind, Entry, Object]] = []
        n_bytes, base = 0, None
        for entry in self._channel.back(target):
            if held and entry.version == held.version:
                if entry.digest != held.digest:
                    raise BadVersion(
                        f"version {held.version} of channel '{self._channel.store.name}' is not the one that is"
                        " held: this is another channel, or it began anew in this place; what is held is unchanged; a new"
                        " follower takes what is there"
                    )
                found.append(_Route("held", None, tuple(reversed(later))))
                break
            if entry.anchor and entry.version == target.segment:
                base = entry.anchor.base
                if base is None or self._replica.has_base(base):
                    steps = (("anchors", entry, entry.anchor), *reversed(later))
                    found.append(_Route("anchor", base, steps))
            can_be_reached = held is not None and held.version < entry.version and entry.delta
            n_bytes += entry.delta.n_bytes if entry.delta else 0
            is_dearer = bool(found) and n_bytes >= found[0].n_bytes
            if entry.version <= target.segment and (is_dearer or not can_be_reached):
                break
            if entry.delta:
                later.append(("deltas", entry, entry.delta))
        if not found:
            raise self._without_base(target, base)
        return sorted(found, key=lambda route: route.n_bytes)

    def _without_base(self, target: Entry, base: AnchorBase | None) -> Behind:
        return Behind(
            f"version {target.version} of channel '{self._channel.store.name}' has an anchor on"
            f" {base.id if base and base.id else 'a checkpoint outside the channel'}, which is not here;"
            " give it (base=, --base)"
        )

    def _read(self, route: _Route) -> Iterator[IO[bytes]]:
        """Yield the files of a route, each checked; raises Pruned if one is gone or will be."""
        for kind, entry, expected in route.objects:
            self._keep(route.segment)
            yield fetch(self._channel, kind, entry.version, expected)

    def _keep(self, segment: int) -> None:
        """Keep a segment from being pruned, as far as the store lets this be done."""
        ends = self._lease[1] if self._lease and self._lease[0] <= segment else 0
        if ends > self._channel.now + CLOCK_SECONDS + _RENEW_SECONDS:
            return
        store = self._channel.store
        try:
            if not (store.writable and store.has_create):
                return
            until = take_lease(self._channel, segment, self.id)
        except STORE_FAILURES as error:  # such as one that only lets others write
            _log.info("no lease was taken: %s", error)
            return
        if until is None:
            raise Pruned(f"segment {segment}")
        self._lease = segment, until
