"""Globs that match some files of a folder and no others, for hints in error messages."""

from __future__ import annotations

import glob
from collections.abc import Iterable, Iterator, Sequence

from sparsedelta.files.junk import matches


def covering(paths: Iterable[str], others: Iterable[str]) -> list[str]:
    """Return globs that match all of ``paths`` and none of ``others``; one glob for several similar paths."""
    wanted, kept = list(paths), list(others)
    found: list[str] = []
    for path in wanted:
        if not matches(path, found):
            found.append(next(_globs(path, wanted, kept)))
    return found


def _globs(path: str, wanted: Sequence[str], kept: Sequence[str]) -> Iterator[str]:
    """Yield globs that match ``path``. Those that match several of ``wanted`` come first, its own name last."""
    folder, _, name = path.rpartition("/")
    suffix = name[name.rindex(".") :] if "." in name[1:] else ""
    patterns = [f"*{glob.escape(suffix)}"] if suffix else []
    patterns += [f"{glob.escape(folder)}/*"] if folder else []
    for pattern in patterns:
        is_shared = sum(matches(one, [pattern]) for one in wanted) > 1
        if is_shared and not any(matches(one, [pattern]) for one in kept):
            yield pattern
    yield glob.escape(path)
