"""Numbers, sizes and names formatted for people."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence

_UNBOUNDED = 1 << 16

# The colour of a tensor's state in the terminal, as a style of rich.
STATE_STYLES = {
    "changed": "yellow",
    "added": "green",
    "resized": "cyan",
    "reshaped": "cyan",
    "renamed": "blue",
    "unchanged": "dim",
}


def printable(text: str) -> str:
    """Return a text with all unprintable characters escaped, such as terminal control sequences."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def size(n_bytes: int) -> str:
    """Return a size with three significant digits, such as ``1.23 MB``; 1 kB is 1000 bytes."""
    if n_bytes < 1000:
        return f"{n_bytes} B"
    value = float(n_bytes)
    for unit in ("kB", "MB", "GB"):
        value /= 1000
        if value < 999.5:
            return f"{_three_digits(value)} {unit}"
    return f"{_three_digits(value / 1000)} TB"


def percent(share: float) -> str:
    """Return a share with three significant digits, such as ``0.935 %``; only 0 and 1 give 0 % and 100 %."""
    value = share * 100
    if 0 < value < 0.0001:
        return "<0.0001 %"
    if 99.95 <= value < 100:
        return ">99.9 %"
    return f"{_three_digits(value)} %"


def count(number: int, noun: str | None = None) -> str:
    """Return a number with thousands separators, followed by the noun, in the plural unless the number is 1."""
    if noun is None:
        return f"{number:,}"
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def listed(names: Sequence[str], limit: int) -> str:
    """Return the first ``limit`` names, and how many more there are."""
    shown = ", ".join(printable(name) for name in names[:limit])
    return f"{shown} and {len(names) - limit:,} more" if len(names) > limit else shown


def numbers(value: object, limit: int) -> str | None:
    """Return the count and the range of more than ``limit`` numbers; None for anything else."""
    found = list(value.values()) if isinstance(value, dict) else value
    if not isinstance(found, list) or len(found) <= limit:
        return None
    if not all(isinstance(one, int | float) and not isinstance(one, bool) for one in found):
        return None
    return f"{count(len(found), 'number')}, {min(found):.4g} to {max(found):.4g}"


def line_width(*, is_terminal: bool) -> int:
    """Return the maximum width of lines: that of the terminal, unbounded if the output is no terminal."""
    if is_terminal or "COLUMNS" in os.environ:
        return shutil.get_terminal_size().columns
    return _UNBOUNDED


def _three_digits(value: float) -> str:
    if value >= 99.95:
        return f"{value:,.0f}"
    return f"{value:#.3g}" if value >= 0.1 else f"{value:.2g}"
