"""How versions of a channel are shown."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import sparsedelta
from sparsedelta.cli._common import Settings, quiet_client
from sparsedelta.report.text import printable, size

if TYPE_CHECKING:
    from sparsedelta._typing import JSON
    from sparsedelta.channel.entry import Entry


@contextmanager
def opened(settings: Settings, channel: str) -> Iterator[sparsedelta.Channel]:
    """Yield the existing channel that an argument names.

    Raises:
        FileNotFoundError: it names a folder that does not exist.
    """
    if "://" in channel:
        quiet_client(settings)
    elif not os.path.isdir(channel):
        raise FileNotFoundError(
            f"there is no channel at '{channel}': the folder does not exist; check the path"
        )
    with sparsedelta.Channel(channel) as found:
        yield found


def describe(entry: Entry) -> str:
    """Return a version as one line."""
    time = datetime.fromtimestamp(min(entry.time, 1 << 37), UTC).strftime("%Y-%m-%d %H:%M:%S")
    step = "" if entry.step is None else f"  step {entry.step}"
    return f"version {entry.version}  {time}  {', '.join(_parts(entry))}{step}  run {printable(entry.run[:40])}"


def fields(entry: Entry) -> dict[str, JSON]:
    """Return a version as JSON: its entry, and the digest of that."""
    return entry.fields() | {"info": dict(entry.info), "digest": entry.digest.hex()}


def _parts(entry: Entry) -> Iterator[str]:
    if entry.delta:
        yield f"delta {size(entry.delta.n_bytes)}"
    if entry.anchor:
        yield f"anchor {size(entry.anchor.n_bytes)}"
