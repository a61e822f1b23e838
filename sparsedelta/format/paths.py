"""File paths in a delta (FORMAT §3.4): relative paths that stay within the output folder on any system."""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Iterable

from sparsedelta.errors import Corrupt

MAX_PATH_BYTES = 4096
MAX_COMPONENT_BYTES = 255
MAX_COMPONENTS = 64  # programs that create or remove nested folders may recurse
WEIGHT_SUFFIX = ".safetensors"
DELTA_SUFFIX = ".sd"
_FORBIDDEN = re.compile(r'[\x00-\x1f\x7f\\:*?"<>|]')
_RESERVED_NAME = r"(con|prn|aux|nul|(com|lpt)[0-9])(\.[^/]*)?"
_RESERVED = re.compile(_RESERVED_NAME, re.IGNORECASE)
# A fast first test: paths that do not match have no bad component. Paths that match are checked
# component by component.
_SUSPECT = re.compile(
    rf"(?<![^/])(\.?|[^/]*[. ]|\.git|{_RESERVED_NAME})(?![^/])|[^/]{{{MAX_COMPONENT_BYTES // 4},}}",
    re.IGNORECASE,
)


def path_problem(path: str) -> str | None:
    """Return why a path is not allowed in a delta, as the end of a sentence; None if it is allowed."""
    try:
        coded = path.encode("utf-8")
    except UnicodeEncodeError:
        return "is not UTF-8"
    if len(coded) > MAX_PATH_BYTES:
        return f"is longer than {MAX_PATH_BYTES} bytes"
    if path.count("/") >= MAX_COMPONENTS:
        return f"has more than {MAX_COMPONENTS} components"
    if _FORBIDDEN.search(path):
        return 'holds a control character or one of \\ : * ? " < > |'
    if not _SUSPECT.search(path):
        return None
    problems = map(_component_problem, path.split("/"))
    return next((problem for problem in problems if problem), None)


def _component_problem(component: str) -> str | None:
    if component in ("", ".", ".."):
        return "is not a plain relative path"
    if len(component.encode("utf-8")) > MAX_COMPONENT_BYTES:
        return f"has a component longer than {MAX_COMPONENT_BYTES} bytes"
    if component[-1] in ". ":
        return "has a component that ends with a dot or a space"
    if component.lower() == ".git":
        return "has a component '.git'; files of git can run commands"
    if _RESERVED.fullmatch(component):
        return f"has a component {component!r}, a name that Windows reserves"
    return None


def path_collision(paths: Iterable[str]) -> tuple[str, str] | None:
    """Return the first path that collides with another, and the reason; None if there is none.

    Two paths collide if, on a system that ignores case and Unicode form, they are equal or one is a
    parent folder of the other. ``path_problem`` must accept each path.
    """
    # "/" is replaced by the smallest character, so that a folder is sorted right before its content.
    ordered = sorted((_folded(path).replace("/", "\0"), path) for path in paths)
    for (first, path), (second, other) in itertools.pairwise(ordered):
        if path == other:
            return other, "occurs twice"
        if first == second:
            return other, f"is the same as {path!r} on a system that ignores case or Unicode form"
        if second.startswith(first + "\0"):
            return other, f"lies in {path!r}, a file or an empty folder"
    return None


def _folded(path: str) -> str:
    if path.isascii():
        return path.lower()
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", path).casefold())


def check_path(path: str) -> None:
    """Check one path.

    Raises:
        Corrupt: it is not allowed in a delta.
    """
    problem = path_problem(path)
    if problem:
        raise Corrupt(f"path {path[:200]!r} {problem}")


def check_paths(paths: Iterable[str]) -> None:
    """Check all paths of a target: each one, and whether any two collide.

    Raises:
        Corrupt: a path is not allowed, or collides with another.
    """
    known = tuple(paths)
    for path in known:
        check_path(path)
    collision = path_collision(known)
    if collision:
        path, how = collision
        raise Corrupt(f"path {path!r} {how}")
