"""How versions of a channel are shown."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING

import sparsedelta
from sparsedelta.cli._common import Settings, quiet_client
from sparsedelta.report.text import printable, size

if TYPE_CHECKING:
    from sparsedelta._typing import JSON
    from sparsedelta.channel.entry import Entry

_MOST_INFO, _LONGEST = 8, 40  # what a line shows of a version's info


@contextmanager
def opened(
    settings: Settings, channel: str, *, must_exist: bool = False
) -> Iterator[sparsedelta.Channel]:
    """Yield the channel that an argument names.

    Raises:
        NotADirectoryError: it is a delta or another file.
        FileNotFoundError: ``must_exist``, and it would be in a folder that does not exist.
    """
    from sparsedelta.format.container import is_delta_file  # with numpy

    if "://" in channel:
        quiet_client(settings)
    elif is_delta_file(channel):
        path = quote(channel)
        raise NotADirectoryError(
            f"'{channel}' is a delta, expected a channel; `sparsedelta apply BASE {path} OUT` applies it, `sparsedelta inspect"
            f" {path}` describes it"
        )
    elif Path(channel).is_file():
        raise NotADirectoryError(f"'{channel}' is a file, expected a channel, which is a folder")
    elif must_exist and not Path(channel).is_dir():
        raise FileNotFoundError(f"there is no channel at '{channel}': no such folder")
    with sparsedelta.Channel(channel) as found:
        yield found


def describe(entry: Entry) -> str:
    """Return a version as one line."""
    time = datetime.fromtimestamp(min(entry.time, 1 << 37), UTC).strftime("%Y-%m-%d %H:%M:%S")
    step = "" if entry.step is None else f"  step {entry.step}"
    info = "".join(f"  {part}" for part in _info(entry))
    return f"version {entry.version}  {time}  {', '.join(_parts(entry))}{step}{info}  run {printable(entry.run[:40])}"


def fields(entry: Entry) -> dict[str, JSON]:
    """Return a version as JSON: its entry, and the digest of that."""
    return entry.fields() | {"info": dict(entry.info), "digest": entry.digest.hex()}


def _info(entry: Entry) -> Iterator[str]:
    """Yield the numbers and short texts of a version's info; it may come from a stranger."""
    plain = [
        (name, held) for name, held in entry.info.items() if isinstance(held, str | int | float)
    ]
    for name, held in plain[:_MOST_INFO]:
        text = f"{held:.6g}" if isinstance(held, float) else str(held)
        yield printable(f"{name[:_LONGEST]} {text[:_LONGEST]}")


def _parts(entry: Entry) -> Iterator[str]:
    if entry.delta:
        yield f"delta {size(entry.delta.n_bytes)}"
    if entry.anchor:
        yield f"anchor {size(entry.anchor.n_bytes)}"
