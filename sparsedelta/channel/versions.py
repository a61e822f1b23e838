"""The versions that a store holds, in order, each checked against the one after it (spec/CHANNEL.md §4, §5)."""

from __future__ import annotations

import time
from collections.abc import Iterator

from sparsedelta.channel.entry import MAX_ENTRY_BYTES, Entry, check_follows, parse_entry
from sparsedelta.channel.layout import (
    CHANNEL,
    CHANNEL_CONTENT,
    HEAD,
    MAX_JSON_BYTES,
    MAX_VERSION,
    check_channel,
    entry_name,
    parse_head,
)
from sparsedelta.errors import BadVersion, Behind, LimitExceeded, RemoteError
from sparsedelta.stores.objects import ObjectStore

STORE_FAILURES = (OSError, RemoteError)  # a call of a store may have taken effect all the same


class Versions:
    """The entries of a channel; see ``Channel``.

    Attributes:
        store: where they are.
    """

    def __init__(self, store: ObjectStore) -> None:
        self.store = store
        self._known = 0  # a version that exists
        self._is_checked = False
        self._clock, self.pause = time.time, time.sleep

    @property
    def now(self) -> int:
        """Whole seconds since 1970 UTC."""
        return int(self._clock())

    def head(self) -> Entry | None:
        """Return the entry of the latest version; None if there is none yet.

        Raises:
            BadVersion: the store holds something else than a channel, or a damaged one.
            UnsupportedVersion: it holds a channel that this release does not know.
        """
        if not self._exists():
            return None
        if not self._known:
            self._known = self._hinted()
        low = self._known
        found = self.find(low) if low else None
        if low and found is None:
            self._is_checked = False  # the whole channel may be gone
            if not self._exists():
                return None
        low = low if found else 0  # a channel that has lost versions is searched from the start
        step = 1
        missing: int | None = None
        while missing is None or missing - low > 1:  # low exists, or is 0; missing does not
            middle = low + step if missing is None else (low + missing) // 2
            if middle > MAX_VERSION:
                raise BadVersion(
                    f"channel '{self.store.name}' seems to have a version for every number; its store is broken"
                )
            entry = self.find(middle)
            if entry is None:
                missing = middle
            else:
                low, found = middle, entry
                step *= 2
        self._known = max(self._known, low)
        return found

    def entry(self, version: int) -> Entry:
        """Return the entry of a version.

        Raises:
            Behind: there is none.
            BadVersion: it breaks a rule.
        """
        entry = self.find(version) if version > 0 and self._exists() else None
        if entry is None:
            raise Behind(f"channel '{self.store.name}' has no version {version}")
        return entry

    def back(self, entry: Entry) -> Iterator[Entry]:
        """Yield an entry and those before it, down to version 1, each checked against the one after it.

        Raises:
            BadVersion: an entry breaks a rule, does not belong to the one after it, or is missing.
        """
        while True:
            yield entry
            if entry.version == 1:
                return
            before = self.find(entry.version - 1)
            if before is None:
                raise BadVersion(
                    f"channel '{self.store.name}' has no entry of version {entry.version - 1}, but one of"
                    f" version {entry.version}; the channel is damaged"
                )
            check_follows(entry, before)
            entry = before

    def check_place(self) -> None:
        """Check that the store is a channel or can become one; see ``head`` for what else it raises.

        Raises:
            FileExistsError: the store holds other objects.
        """
        # A store that can only be read cannot become one, and a web server cannot list what it has.
        others = [] if not self.store.writable or self._exists() else self.store.list("")
        if others:
            raise FileExistsError(
                f"'{self.store.name}' is not a channel, but holds other files, such as {others[0]!r}; give a channel,"
                " or an empty or new place"
            )

    def create(self) -> None:
        """Make the store a channel, unless it is one; see ``check_place`` for what it raises."""
        if not self._exists():
            self.check_place()
            self.store.create(CHANNEL, CHANNEL_CONTENT)
            self._is_checked = False
            self._exists()

    def _exists(self) -> bool:
        if not self._is_checked:
            raw = self._read(CHANNEL, MAX_JSON_BYTES)
            if raw is None:
                return False
            check_channel(raw, self.store.name)
            self._is_checked = True
        return True

    def _hinted(self) -> int:
        raw = self._read(HEAD, MAX_JSON_BYTES)
        hint = parse_head(raw) if raw else 0
        return hint if hint and self.find(hint) else 0

    def find(self, version: int) -> Entry | None:
        """Return the entry of a version, None if there is none.

        Raises:
            BadVersion: it breaks a rule.
        """
        raw = self._read(entry_name(version), MAX_ENTRY_BYTES)
        return None if raw is None else parse_entry(raw, version)

    def _read(self, name: str, max_bytes: int) -> bytes | None:
        try:
            return self.store.read(name, max_bytes)
        except LimitExceeded as error:
            raise BadVersion(f"{error}; the channel is damaged") from error
