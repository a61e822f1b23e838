"""A chain of deltas on the Hub: a delta, the delta that is its base, and so on down to a base with weights.

Every link is checked by digests before any weights are downloaded. A cyclic chain is an error.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from sparsedelta.errors import (
    AccessDenied,
    BaseMismatch,
    CheckpointError,
    ConflictError,
    FormatError,
    MismatchError,
    RemoteError,
    RemoteNotFound,
    StructureMismatch,
)
from sparsedelta.files.checkpoint import Checkpoint, Tensor
from sparsedelta.files.side_files import check_base_files
from sparsedelta.format.delta import Delta, load
from sparsedelta.hub.base_proof import base_reference, check_link, parse_base_id
from sparsedelta.hub.client import Hub
from sparsedelta.hub.folders import folder_of, raise_if_damaged, rename_in
from sparsedelta.hub.record import MAX_RECORD_BYTES, BaseRecord, parse_record, record_path
from sparsedelta.hub.references import DELTA_NAME, Reference
from sparsedelta.hub.repository import Repository, open_repository
from sparsedelta.ops.base_check import find_base, open_base
from sparsedelta.tensors.compare import digest_tensor

MAX_LINKS = 64


@dataclass(frozen=True)
class Link:
    """A downloaded delta of a chain.

    Attributes:
        repository: the repository that holds it.
        path: its path in the repository.
        local_path: its path on disk.
        delta: the opened delta.
    """

    repository: Repository
    path: str
    local_path: Path
    delta: Delta

    @property
    def reference(self) -> Reference:
        """The reference to the delta's file, pinned to a commit."""
        pinned = self.repository.reference
        return Reference(pinned.repo_id, pinned.revision, self.path)


def read_record(repository: Repository, delta_path: str) -> BaseRecord | None:
    """Return the record of a delta's base that is stored beside the delta, or None if there is none.

    Raises:
        FormatError: the record cannot be read.
    """
    path = record_path(delta_path)
    file = repository.files.get(path)
    if file is None or file.n_bytes > MAX_RECORD_BYTES:
        return None
    raw = repository.download_one(path).read_bytes()
    return parse_record(raw, f"'{path}' of '{repository.name}'")


def open_link(repository: Repository) -> Link:
    """Return the delta in a repository, downloaded and opened.

    Raises:
        FormatError: the delta cannot be read.
        RemoteError: the delta is not available; or its copy in the cache was damaged and has been removed.
    """
    file = repository.delta_file()
    local_path = repository.download_one(file.path)
    raise_if_damaged([local_path])
    return Link(repository, file.path, local_path, load(local_path))


def open_chain(
    hub: Hub, link: Link, *, base_revision: str | None = None
) -> tuple[list[Link], Repository]:
    """Return the links of a chain, the lowest first, and the repository of the base with weights.

    Args:
        hub: the Hub.
        link: the uppermost link.
        base_revision: revision of the base of ``link``; None: the one that its delta names.

    Raises:
        BaseMismatch: a delta was not made from the target of the one below it.
        ConflictError: the chain is cyclic, or longer than ``MAX_LINKS``.
        BaseNeeded: a delta names no base.
        RemoteError: a repository or file is not available.
    """
    links = [link]
    while True:
        base = _open_base(hub, links[0], base_revision if links[0] is link else None)
        if not base.is_delta_repository:
            return links, base
        _insert_below(links, base)


def open_chain_from(hub: Hub, link: Link, reference: Reference) -> tuple[list[Link], Repository]:
    """Return the links above a repository that is given as the base, and the base with weights below them.

    Args:
        hub: the Hub.
        link: the uppermost link.
        reference: the repository of any checkpoint of the chain, or of a copy of the base of ``link``. Without a
            revision, the commit is the one that the chain names.

    Raises:
        BaseMismatch, BaseNeeded, ConflictError, RemoteError: as for ``open_chain``.
    """
    links = [link]
    given = _in_chain(hub, links, reference)
    if given is None:
        _close_below(links)
        links, given = [link], reference
    base = open_repository(hub, given)
    while base.is_delta_repository:
        _insert_below(links, base)
        base = _open_base(hub, links[0], None)
    return links, base


def _in_chain(hub: Hub, links: list[Link], reference: Reference) -> Reference | None:
    """Insert the links above a repository; return its place, or None if no delta of the chain names it."""
    while (named := parse_base_id(links[0].delta.base.id)) is not None:
        is_there = reference.path is None or (named.path or DELTA_NAME) in reference.delta_paths
        if named.repo_id == reference.repo_id and is_there:
            return named.at(reference.revision or named.revision)
        try:
            below = open_repository(hub, named)
            if not below.is_delta_repository:
                return None
            _insert_below(links, below)
        except (RemoteError, MismatchError, ConflictError, FormatError):
            return None  # what the chain names has moved or is not available, and may not be needed
    return None


def links_above(hub: Hub, link: Link, base: Path, error: MismatchError) -> list[Link]:
    """Return the links of a chain above a checkpoint on disk, the lowest first.

    Args:
        hub: the Hub.
        link: the uppermost link.
        base: the checkpoint.
        error: what is raised if no delta of the chain was made from it.

    Raises:
        MismatchError: ``error``.
        BaseMismatch, BaseNeeded, ConflictError: as for ``open_chain``.
    """
    below = parse_base_id(link.delta.base.id)
    if below is None:
        raise error
    try:
        if not open_repository(hub, below).is_delta_repository:
            raise error
        with open_base(base, link.delta) as checkpoint:
            # With the right tensors, the error is about the file that is missing or another.
            for files in (True, False):
                links = _open_chain_to(hub, link, _base_test(checkpoint, files=files))
                if links is not None:
                    return links
    except RemoteError as cause:
        error.args = (
            f"{error}; whether it is the base of an earlier delta was not found out: {cause}",
        )
        raise error from cause
    raise error


def _open_chain_to(hub: Hub, link: Link, is_base: Callable[[Delta], bool]) -> list[Link] | None:
    """Return the links of a chain down to the first one whose base is available; None if there is none."""
    links = [link]
    while not is_base(links[0].delta):
        base = _open_base(hub, links[0], None)
        if not base.is_delta_repository:
            _close_below(links)
            return None
        _insert_below(links, base)
    return links


def _close_below(links: list[Link]) -> None:
    for one in links[:-1]:
        one.delta.close()


def _base_test(checkpoint: Checkpoint, *, files: bool) -> Callable[[Delta], bool]:
    """Return a function that tests whether a checkpoint has all tensors, and all ``files``, that a delta was made from."""
    digest: Callable[[Tensor], bytes] = functools.cache(digest_tensor)

    def is_base(delta: Delta) -> bool:
        try:
            found = find_base(delta, checkpoint)
        except StructureMismatch:
            return False
        if any(digest(found[row.key]) != row.base.spec.digest for row in delta.tensors if row.base):
            return False
        try:
            if files:
                check_base_files(delta, checkpoint)
        except BaseMismatch:
            return False
        return True

    return is_base


def _insert_below(links: list[Link], base: Repository) -> None:
    """Insert the delta in a repository below the lowest link, after a check that it is its base."""
    above, below = links[0], open_link(base)
    is_cyclic = any(below.reference == link.reference for link in links)
    if is_cyclic or len(links) == MAX_LINKS:
        raise ConflictError(
            f"the chain of deltas below '{links[-1].repository.name}' is cyclic or longer than"
            f" {MAX_LINKS}, at '{below.reference}'; pull with a local base"
        )
    check_link(below.delta, above.delta, below.repository.name)
    links.insert(0, below)


@contextmanager
def fetching_base(link: Link) -> Iterator[None]:
    """If the base is not available, add to the error that a local copy can be given instead."""
    try:
        yield
    except (RemoteNotFound, AccessDenied) as error:
        raise type(error)(
            f"the base of '{link.reference.repo_id}' is not available: {error}; or give a local copy as"
            " the base"
        ) from error


@contextmanager
def base_folder(base: Repository, delta: Delta, link: Link | None) -> Iterator[Path]:
    """Yield a folder with the files of a base that a delta needs, downloaded or cached.

    If the block raises an error about wrong data, damaged files are removed from the cache and reported.

    Args:
        base: the repository of the base.
        delta: the delta that is applied to it.
        link: the link of this delta, if the delta names the base; it makes the errors clearer.
    """
    with fetching_base(link) if link else nullcontext():
        copies = base.download(base.base_files(delta))
    try:
        with folder_of(copies) as folder:
            yield folder
    except (MismatchError, FormatError, CheckpointError) as error:
        raise_if_damaged([*copies.values()], error)
        rename_in(error, folder, base.name)
        raise


def _open_base(hub: Hub, link: Link, base_revision: str | None) -> Repository:
    reference = base_reference(link.delta, f"the delta in '{link.repository.name}'")
    if base_revision is not None:
        reference = reference.at(base_revision)
    with fetching_base(link):
        return open_repository(hub, reference)
