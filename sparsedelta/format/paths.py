"""File paths inside a delta (FORMAT §3.4): plain relative names that cannot leave the output folder."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable

from sparsedelta.errors import Corrupt, LimitExceeded

MAX_PATH_BYTES = 4096
MAX_COMPONENT_BYTES = 255
MAX_COMPONENTS = 64  # making and removing folders recurses, here and in other programs
_FORBIDDEN = re.compile(r"[\x00-\x1f\x7f\\:]")


def path_problem(path: str) -> str | None:
    """Return why a path cannot stand in a delta, None if it can."""
    try:
        coded = path.encode("utf-8")
    except UnicodeEncodeError:
        return "is not UTF-8"
    if len(coded) > MAX_PATH_BYTES:
        return f"is longer than {MAX_PATH_BYTES} bytes"
    if path.count("/") >= MAX_COMPONENTS:
        return f"has more than {MAX_COMPONENTS} components"
    if _FORBIDDEN.search(path):
        return "holds a backslash, a colon or a control character"
    for component in path.split("/"):
        if component in ("", ".", ".."):
            return "is not a plain relative path"
        if len(component.encode("utf-8")) > MAX_COMPONENT_BYTES:
            return f"has a component longer than {MAX_COMPONENT_BYTES} bytes"
    return None


def check_paths(paths: Iterable[str]) -> None:
    """Check all paths of a target, each by itself and against the others.

    Raises:
        Corrupt: a path is not allowed, occurs twice, or is a folder of another.
        LimitExceeded: a path has too many components.
    """
    seen: set[str] = set()
    for path in paths:
        problem = path_problem(path)
        if problem:
            error = LimitExceeded if path.count("/") >= MAX_COMPONENTS else Corrupt
            raise error(f"path {path[:200]!r} {problem}")
        if path in seen:
            raise Corrupt(f"path {path!r} occurs twice")
        seen.add(path)
    # With "/" sorted before every other character a folder stands right before what lies in it.
    ordered = sorted(path.replace("/", "\0") for path in seen)
    for folder, path in itertools.pairwise(ordered):
        if path.startswith(folder + "\0"):
            name = path.replace("\0", "/")
            raise Corrupt(f"path {name!r} lies in a path that is a file or an empty folder")
