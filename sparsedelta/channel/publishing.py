"""The publisher's side of the protocol: one version after the other, each durable before the next (spec/CHANNEL.md §6).

What counts as published moves only after the entry of a version was created. A version whose entry may or may not have
been created, since the store failed, is finished before another is begun.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import takewhile
from typing import Protocol

from sparsedelta._typing import JSON
from sparsedelta.channel.entry import (
    MAX_ENTRY_BYTES,
    Anchor,
    AnchorBase,
    Entry,
    Object,
    checked_number,
    parse_entry,
)
from sparsedelta.channel.layout import HEAD, Kind, entry_name, head_content
from sparsedelta.channel.lock import writing
from sparsedelta.channel.objects import put
from sparsedelta.channel.versions import STORE_FAILURES, Versions
from sparsedelta.errors import BadVersion, BaseMismatch, Behind, HeadMoved

_log = logging.getLogger(__name__)
_TRIES, _PAUSE_SECONDS = 4, 0.2  # of creating an entry while the store fails


class Change(Protocol):
    """What is sent: a delta or an anchor."""

    def blocks(self) -> Iterator[bytes]:
        """Yield the bytes of its file."""

    def close(self) -> None:
        """Let go of it."""


class Weights(Protocol):
    """Weights as they were captured; they stay so until the copy of their source moves."""

    def change(self) -> tuple[Change, bytes]:
        """Return the delta from the copy to the weights, and the fingerprint of its target."""

    def anchor(self) -> tuple[Change, bytes, AnchorBase | None]:
        """Return an anchor of the weights, the fingerprint of its target, and what it is applied to."""


class Source(Protocol):
    """Weights that are published, and the copy of what was published last."""

    def is_at(self, target: bytes) -> bool:
        """Return whether the copy has this fingerprint."""

    def capture(self) -> Weights:
        """Return the weights as they are now; they may change afterwards."""

    def advance(self, change: Change) -> None:
        """Move the copy to the target of a change that was made from it."""


@dataclass(frozen=True, slots=True)
class AnchorRule:
    """When a version gets an anchor besides its delta.

    Attributes:
        ratio: when the deltas since the last anchor weigh more than this times that anchor; None: never.
        every: when the last anchor is so many versions old; None: never.
    """

    ratio: float | None = 1.0
    every: int | None = None

    def __post_init__(self) -> None:
        if self.ratio is not None and not self.ratio > 0:
            raise ValueError(f"anchor_ratio is {self.ratio}, expected a number above 0, or None")
        if self.every is not None and self.every < 1:
            raise ValueError(f"anchor_every is {self.every}, expected at least 1, or None")

    def is_due(self, last: Entry, version: int, n_bytes: int) -> bool:
        """Return whether a version gets one.

        Args:
            last: the entry with the last anchor.
            version: the number of the version.
            n_bytes: of the deltas after the last anchor, with this version's.
        """
        weight = last.anchor.n_bytes if last.anchor else 0
        by_age = self.every is not None and version - last.version >= self.every
        return by_age or (self.ratio is not None and n_bytes > self.ratio * weight)


@dataclass(frozen=True, slots=True)
class _Pending:
    """A version whose objects are written, and whose entry may be."""

    entry: Entry
    change: Change


@dataclass(frozen=True, slots=True)
class Captured:
    """What is to become a version.

    Attributes:
        weights: to be published.
        step: of the training.
        info: free JSON.
        finished: the version that the store had failed at and that was finished just before.
    """

    weights: Weights
    step: int | None
    info: Mapping[str, JSON]
    finished: Entry | None


class Run:
    """One publisher's run: the versions that it adds to a channel.

    Args:
        channel: where to.
        source: the weights.
        rule: when a version gets an anchor.
        head: the entry of the version that ``source`` was compared with, the latest; None if there is none. The next version
            follows it, or ``add`` raises HeadMoved.
    """

    def __init__(
        self, channel: Versions, source: Source, rule: AnchorRule, head: Entry | None
    ) -> None:
        self.id = secrets.token_hex(8)
        self._channel = channel
        self._source = source
        self._rule = rule
        channel.check_place()
        self._head = head
        self._is_at_head = head is not None and source.is_at(head.target)
        self._pending: _Pending | None = None
        self._since: tuple[Entry, int] | None = (
            None  # the last anchor, bytes of the deltas after it
        )

    @property
    def head(self) -> Entry | None:
        """The entry of the version that the next one follows."""
        return self._head

    @property
    def is_at_head(self) -> bool:
        """Whether the copy of what was published is the head; if not, the next version is an anchor."""
        return self._is_at_head

    def publish(self, *, step: int | None, info: Mapping[str, JSON]) -> Entry:
        """Add a version with what the weights are now; return its entry when it is durable.

        Raises:
            HeadMoved: another publisher has added a version since this run has begun.
            OSError, RemoteError: the store failed; call again. The version is then finished or begun anew.
        """
        return self.add(self.capture(step=step, info=info))

    def capture(self, *, step: int | None, info: Mapping[str, JSON]) -> Captured:
        """Return what the weights are now, for ``add``; a version that the store failed at is finished first.

        The copy of what was published must not move between this call and ``add``. See ``publish`` for what it raises.

        Raises:
            ValueError: ``step`` is not an integer from 0 to 2^63 - 1.
        """
        step = None if step is None else checked_number("step", step)
        finished = None
        if self._pending:
            with writing(self._channel, self.id):
                finished = self._finish()
        return Captured(self._source.capture(), step, info, finished)

    def add(self, captured: Captured) -> Entry:
        """Add a version that was captured; return its entry when it is durable; see ``publish``."""
        with writing(self._channel, self.id):
            self._check_head()
            change, target = captured.weights.change()
            finished = captured.finished
            if finished and (finished.target, finished.step) == (target, captured.step):
                change.close()  # this is the call after the one in which the store failed
                return finished
            try:
                entry = self._entry(captured, change, target)
                self._pending = _Pending(entry, change)
            except BaseException:
                change.close()
                raise
            self._finish()
            return entry

    def _check_head(self) -> None:
        """Check that nobody else has added a version, and that what was published is still there."""
        head, last = self._channel.head(), self._head
        if last and (head is None or head.version < last.version):
            raise BadVersion(
                f"version {last.version} of channel '{self._channel.store.name}' was published and is no longer there: the"
                " channel was deleted, or an older copy was restored; a new Publisher starts from what is there"
            )
        if head and head.digest != (last and last.digest):
            raise self._moved(head)

    def _moved(self, head: Entry) -> HeadMoved:
        return HeadMoved(
            f"version {head.version} of channel '{self._channel.store.name}' was added by another publisher,"
            f" run {head.run[:40]}; stop that one or this one; a new Publisher continues from there"
        )

    def _entry(self, captured: Captured, change: Change, target: bytes) -> Entry:
        """Write the objects of a new version; return its entry."""
        channel, head = self._channel, self._head
        version = head.version + 1 if head else 1
        if head:
            _warn_of_earlier_step(head, version, captured.step)
        delta = self._put("deltas", version, change) if self._is_at_head else None
        anchor = self._anchor(captured.weights, version, delta, target)
        entry = Entry(
            version=version,
            previous=head.digest if head else None,
            run=self.id,
            time=channel.now,
            step=captured.step,
            target=target,
            segment=version if anchor or not head else head.segment,
            delta=delta,
            anchor=anchor,
            info=captured.info,
        )
        if len(entry.raw) > MAX_ENTRY_BYTES:
            raise ValueError(
                f"info makes an entry of {len(entry.raw)} bytes, the limit is {MAX_ENTRY_BYTES}"
            )
        try:
            parse_entry(entry.raw, version)
        except BadVersion as error:  # nobody could read it, and no version could follow it
            raise ValueError(f"version {version} was not published: {error}") from error
        return entry

    def _anchor(
        self, weights: Weights, version: int, delta: Object | None, target: bytes
    ) -> Anchor | None:
        """Write the anchor of a version if one is due."""
        if delta is not None and self._head is not None:
            last, n_bytes = self._since_anchor(self._head)
            if not self._rule.is_due(last, version, n_bytes + delta.n_bytes):
                return None
        anchor, made, base = weights.anchor()
        try:
            if made != target:
                raise BaseMismatch(
                    "the weights have changed since they were captured: a folder that was written meanwhile,"
                    " or elements of a model that are not trained; make a new publisher while the weights rest"
                )
            found = self._put("anchors", version, anchor)
        finally:
            anchor.close()
        return Anchor(found.digest, found.n_bytes, base)

    def _put(self, kind: Kind, version: int, change: Change) -> Object:
        """Write a delta or an anchor; the store becomes a channel now, so that a change that fails leaves nothing."""
        self._channel.create()
        return put(self._channel, kind, version, change.blocks())

    def _since_anchor(self, head: Entry) -> tuple[Entry, int]:
        """Return the entry with the last anchor, and the bytes of the deltas after it."""
        if self._since is None:
            entries = list(takewhile(lambda entry: not entry.anchor, self._channel.back(head)))
            last = self._channel.entry(head.segment)
            self._since = last, sum(entry.delta.n_bytes for entry in entries if entry.delta)
        return self._since

    def _finish(self) -> Entry | None:
        """Create the entry of a pending version, and move the copy; return the entry."""
        pending = self._pending
        if pending is None:
            return None
        entry = pending.entry
        found = self._created(entry)
        if found.digest != entry.digest:
            self._pending = None
            pending.change.close()
            raise self._moved(found)
        self._source.advance(pending.change)
        self._head, self._is_at_head, self._pending = entry, True, None
        self._since = _since(self._since, entry)
        pending.change.close()
        try:
            self._channel.store.write(HEAD, head_content(entry.version))
        except STORE_FAILURES as error:  # a hint, and the next version writes it again
            _log.info("%s was not written: %s", HEAD, error)
        return entry

    def _created(self, entry: Entry) -> Entry:
        """Return the entry of a number, having created it if there was none."""
        channel, name = self._channel, entry_name(entry.version)
        for number in range(_TRIES):
            failure: Exception | None = None
            try:
                if channel.store.create(name, entry.raw):
                    return entry
            except STORE_FAILURES as error:
                failure = error
            try:
                return channel.entry(entry.version)
            except Behind:
                failure = failure or OSError(f"store '{channel.store.name}' does not create {name}")
            except STORE_FAILURES as error:
                failure = error
            if number == _TRIES - 1:
                raise failure
            channel.pause(_PAUSE_SECONDS * 2**number)
        raise AssertionError


def _warn_of_earlier_step(head: Entry, version: int, step: int | None) -> None:
    if step is not None and head.step is not None and step < head.step:
        _log.warning(
            "version %d has step %d and the version before it has step %d; this is right if the training was resumed from"
            " an earlier checkpoint, otherwise check the step that is given",
            version, step, head.step,
        )  # fmt: skip


def _since(before: tuple[Entry, int] | None, entry: Entry) -> tuple[Entry, int] | None:
    """Return the last anchor and the bytes of the deltas after it when an entry comes after others."""
    if entry.anchor:
        return entry, 0
    return before and (before[0], before[1] + (entry.delta.n_bytes if entry.delta else 0))
