"""A delta in a repository and the deltas below it, down to a base with weights.

Every link is checked by digests before any weights are downloaded; a chain that comes back to where it
was is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from sparsedelta.errors import (
    AccessDenied,
    CheckpointError,
    ConflictError,
    FormatError,
    MismatchError,
    RemoteError,
    RemoteNotFound,
)
from sparsedelta.format.delta import Delta, load
from sparsedelta.hub.base_proof import base_reference, check_link
from sparsedelta.hub.client import Hub
from sparsedelta.hub.folders import folder_of, remove_damaged
from sparsedelta.hub.record import MAX_RECORD_BYTES, BaseRecord, parse_record, record_path
from sparsedelta.hub.references import Reference
from sparsedelta.hub.repository import Repository, open_repository

MAX_LINKS = 64


@dataclass(frozen=True)
class Link:
    """A downloaded delta.

    Attributes:
        repository: where it is from.
        path: in the repository.
        place: on disk.
        delta: open.
    """

    repository: Repository
    path: str
    place: Path
    delta: Delta

    @property
    def reference(self) -> Reference:
        """The delta's file, pinned."""
        pinned = self.repository.reference
        return Reference(pinned.repo_id, pinned.revision, self.path)


def read_record(repository: Repository, delta_path: str) -> BaseRecord | None:
    """Return the record of the base of a delta in a repository, None if there is none.

    Raises:
        FormatError: there is one that cannot be read.
    """
    path = record_path(delta_path)
    file = repository.files.get(path)
    if file is None or file.n_bytes > MAX_RECORD_BYTES:
        return None
    raw = repository.download_one(path).read_bytes()
    return parse_record(raw, f"'{path}' of '{repository.name}'")


def open_link(repository: Repository) -> Link:
    """Return the delta that a repository holds, downloaded and opened.

    Raises:
        FormatError: it cannot be read.
        RemoteError: it is not available, or was damaged in the cache and is removed from there.
    """
    file = repository.delta_file()
    place = repository.download_one(file.path)
    raise_if_damaged([place])
    return Link(repository, file.path, place, load(place))


def follow(
    hub: Hub, link: Link, *, base_revision: str | None = None
) -> tuple[list[Link], Repository]:
    """Return a link with all below it, the lowest first, and the repository of the base with weights.

    Args:
        hub: where they are.
        link: the delta to begin with.
        base_revision: of the base of ``link``, in place of the one that its delta names.

    Raises:
        BaseMismatch: a delta was not made from the target of the one below it.
        ConflictError: the chain goes round in a circle, or has no end.
        RemoteError: a part is not available.
    """
    links = [link]
    while True:
        base = _open_base(hub, links[0], base_revision if links[0] is link else None)
        if not base.is_delta_repository:
            return links, base
        _descend(links, base)


def follow_to(hub: Hub, link: Link, is_base: Callable[[Delta], bool]) -> list[Link] | None:
    """Return a link with those below it, down to the one whose base is available.

    Args:
        hub: where they are.
        link: the delta to begin with.
        is_base: returns whether the base that is available is that of a delta.

    Returns:
        the lowest first; None if there is none.

    Raises:
        BaseMismatch, ConflictError, RemoteError: as ``follow``.
    """
    links = [link]
    while not is_base(links[0].delta):
        base = _open_base(hub, links[0], None)
        if not base.is_delta_repository:
            return None
        _descend(links, base)
    return links


def _descend(links: list[Link], base: Repository) -> None:
    """Put the delta in a repository below the lowest link, checking that it belongs there."""
    above, below = links[0], open_link(base)
    if (
        any(below.reference == link.reference for link in links)
        or _comes_back([below, *links])
        or len(links) == MAX_LINKS
    ):
        raise ConflictError(
            f"the bases of '{links[-1].repository.name}' have no end: '{below.reference}' comes up"
            f" again, or more than {MAX_LINKS} deltas lie on one another; pull with a base of your own"
        )
    check_link(below.delta, above.delta, below.repository.name)
    links.insert(0, below)


@contextmanager
def fetching_base(link: Link) -> Iterator[None]:
    """Return the error for a base that is not available, with a way out."""
    try:
        yield
    except (RemoteNotFound, AccessDenied) as error:
        raise type(error)(
            f"the base of '{link.reference.repo_id}' is not available: {error}; or, having a copy of"
            " it, give that as the base"
        ) from error


@contextmanager
def base_folder(base: Repository, delta: Delta, link: Link | None) -> Iterator[Path]:
    """Yield a folder with the files of a base that a delta needs, downloaded or cached.

    If what is made of them turns out wrong, those that were damaged in the cache are removed.

    Args:
        base: the base.
        delta: what is made from it.
        link: the same, if the base is the one that it names.
    """
    with fetching_base(link) if link else nullcontext():
        places = base.download(base.base_files(delta))
    try:
        with folder_of(places) as folder:
            yield folder
    except (MismatchError, FormatError, CheckpointError) as error:
        raise_if_damaged([*places.values()], error)
        raise


def raise_if_damaged(places: list[Path], error: Exception | None = None) -> None:
    """Raise a RemoteError if files of the cache are damaged, having removed them.

    Args:
        places: of the files.
        error: what came of it, if it did.
    """
    damaged = remove_damaged(places)
    if damaged:
        raise RemoteError(
            f"the downloaded copy '{damaged[0]}' was damaged and has been removed; run this again to"
            " download it anew"
        ) from error


def _comes_back(links: list[Link]) -> bool:
    """Return whether the lowest delta was made from what it or one above it makes."""
    lowest = links[0].delta.base_fingerprint
    return any(link.delta.target_fingerprint == lowest for link in links)


def _open_base(hub: Hub, link: Link, base_revision: str | None) -> Repository:
    reference = base_reference(link.delta, f"the delta in '{link.repository.name}'")
    if base_revision is not None:
        reference = reference.at(base_revision)
    with fetching_base(link):
        return open_repository(hub, reference)
