"""References to model repositories: ``org/name@revision`` and ``hf://org/name/path@revision``."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace

from sparsedelta.format.paths import DELTA_SUFFIX, WEIGHT_SUFFIX

SCHEME = "hf://"
DELTA_NAME = "delta.sd"
_PATH_SUFFIXES = (DELTA_SUFFIX, WEIGHT_SUFFIX)

_NAME = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,95}"
_ID = rf"{_NAME}/{_NAME}"
_PLAIN = re.compile(rf"(?P<id>{_ID})(?:@(?P<revision>\S+))?")
_WITH_SCHEME = re.compile(rf"(?P<id>{_ID})(?:@(?P<revision>refs/(?:pr|convert)/[^/\s]+|[^/\s]+))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_OTHER_KINDS = ("datasets", "spaces", "buckets", "kernels")


@dataclass(frozen=True, slots=True)
class Reference:
    """A model repository, with an optional revision and path.

    Attributes:
        repo_id: ``org/name``.
        revision: a branch, tag or commit; None: the default branch.
        path: a file or folder in it; None: not specified.
    """

    repo_id: str
    revision: str | None = None
    path: str | None = None

    @property
    def is_pinned(self) -> bool:
        """Whether the revision is a full commit id, so that the reference always means the same files."""
        return self.revision is not None and bool(_COMMIT.fullmatch(self.revision))

    @property
    def delta_paths(self) -> tuple[str, ...]:
        """The paths of a delta that the path may mean, as that of the file or of its folder."""
        return self.path or DELTA_NAME, f"{self.path}/{DELTA_NAME}"

    def at(self, revision: str | None) -> Reference:
        """Return this reference with another revision."""
        return replace(self, revision=revision)

    def __str__(self) -> str:
        text = self.repo_id if self.path is None else f"{SCHEME}{self.repo_id}/{self.path}"
        return text if self.revision is None else f"{text}@{self.revision}"


def parse_reference(text: str) -> Reference | None:
    """Return the reference that a text spells, or None if it is not a reference.

    Raises:
        ValueError: it begins with ``hf://`` but is not a valid reference to a model repository.
    """
    if text.startswith(SCHEME):
        return _parse_with_scheme(text)
    found = _PLAIN.fullmatch(text)
    return Reference(found["id"], found["revision"]) if found else None


def named_repository(text: str) -> Reference | None:
    """Return the repository that a text names, or None if it names a path. An existing path is preferred.

    Raises:
        ValueError: it begins with ``hf://`` and names no repository.
    """
    found = parse_reference(text)
    if found is None or text.startswith(SCHEME):
        return found
    is_path = os.path.lexists(text) or text.endswith(_PATH_SUFFIXES)
    return None if is_path else found


def is_repo_id(text: str) -> bool:
    """Return whether a text is the id of a repository, ``org/name``, and nothing more."""
    return bool(re.fullmatch(_ID, text))


def _parse_with_scheme(text: str) -> Reference:
    rest = text.removeprefix(SCHEME).removeprefix("models/").rstrip("/")
    found = _WITH_SCHEME.match(rest)
    kind = rest.partition("/")[0]
    after = rest[found.end() :] if found else ""
    if not found or kind in _OTHER_KINDS or (after and not after.startswith("/")):
        raise ValueError(f"{text!r} is not a model repository; write hf://org/name/path@revision")
    path: str | None = after[1:] or None
    revision: str | None = found["revision"]
    if path is not None and "@" in path and revision is None:
        path, _, revision = path.rpartition("@")
    return Reference(found["id"], revision, path)
