"""Deltas, bases and checkpoints on the Hub, downloaded into the cache and returned as paths on disk."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from sparsedelta.errors import (
    BaseMismatch,
    BaseNeeded,
    MismatchError,
    RemoteError,
    RemoteNotFound,
)
from sparsedelta.files.unread import UNREAD_WEIGHT_SUFFIXES, conversion
from sparsedelta.format.delta import Delta
from sparsedelta.format.paths import WEIGHT_SUFFIX
from sparsedelta.hub.base_proof import base_reference, check_link, check_remote_structure
from sparsedelta.hub.chain import (
    Link,
    base_folder,
    links_above,
    open_chain,
    open_link,
    read_record,
)
from sparsedelta.hub.client import Hub, Token
from sparsedelta.hub.folders import folder_of, raise_if_damaged
from sparsedelta.hub.record import differences
from sparsedelta.hub.references import SCHEME, Reference, named_repository, parse_reference
from sparsedelta.hub.repository import Repository, open_repository
from sparsedelta.ops.stack import stack

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class FetchedBase:
    """A base on disk.

    Attributes:
        name: the repository that holds the weights, pinned to a commit.
        folder: the folder with the weights and the side files that are needed.
        deltas: the deltas to apply to it first, if the repository that was named holds a delta.
    """

    name: str
    folder: Path
    deltas: tuple[Delta, ...]


@dataclass(frozen=True, slots=True)
class RemoteBaseReport:
    """What the Hub's metadata shows about the base of a delta.

    Attributes:
        base: the base's repository, pinned to a commit.
        recorded: whether the delta's repository has a record of the verified base, and the base's repository
            has exactly the files of this record.
        n_files: number of these files.
    """

    base: str
    recorded: bool
    n_files: int


def remote_delta(reference: Reference, *, token: Token = None) -> Delta:
    """Return a delta on the Hub. Its header and manifest are downloaded at once, other parts when read.

    Raises:
        FormatError: the file is not a delta that this version can read.
        RemoteError: the delta is not available.
    """
    return open_repository(Hub(token), reference).read_delta()


def fetch_delta(reference: Reference, *, token: Token = None) -> Path:
    """Return the local path of a delta on the Hub, downloaded unless it is in the cache.

    Raises:
        FormatError: the file is damaged, or not a delta that this version can read.
        RemoteError: the delta is not available.
    """
    link = open_link(open_repository(Hub(token), reference))
    link.delta.close()
    return link.local_path


@contextmanager
def fetched(reference: str | Reference, *, token: Token = None) -> Iterator[tuple[Delta, Path]]:
    """Yield a delta on the Hub and the folder of its base with weights, both downloaded or cached.

    If the base is itself a delta, all deltas of the chain are stacked into one. The result can be passed
    to ``sparsedelta.load_model`` or ``sparsedelta.apply``.

    Args:
        reference: ``org/name``, ``org/name@revision`` or ``hf://org/name/path@revision``.
        token: access token for the Hub; None: that of `hf auth login`.

    Raises:
        FormatError: a delta cannot be read.
        MismatchError: a base is not the base of its delta.
        ConflictError: the chain is cyclic or too long, or cannot be stacked.
        BaseNeeded: a delta names no base.
        RemoteError: a repository or file is not available.
        ValueError: ``reference`` is not a reference to a repository.
    """
    wanted = parse_reference(reference) if isinstance(reference, str) else reference
    if wanted is None:
        raise ValueError(f"{reference!r} is not a repository; write org/name or hf://org/name/path")
    hub = Hub(token)
    links, base = open_chain(hub, open_link(open_repository(hub, wanted)))
    with base_folder(base, links[0].delta, links[0]) as folder, _stacked(links, folder) as delta:
        yield delta, folder


@contextmanager
def fetched_above(reference: Reference, base: Path, error: MismatchError) -> Iterator[Delta]:
    """Yield the deltas of a chain above a checkpoint on disk, stacked into one.

    Args:
        reference: the uppermost delta.
        base: the checkpoint.
        error: what is raised if no delta of the chain was made from it.
    """
    hub = Hub(None)
    with _stacked(
        links_above(hub, open_link(open_repository(hub, reference)), base, error), base
    ) as delta:
        yield delta


@contextmanager
def _stacked(links: Sequence[Link], base: Path) -> Iterator[Delta]:
    with ExitStack() as context:
        deltas = [context.enter_context(link.delta) for link in links]
        if len(deltas) == 1:
            yield deltas[0]
            return
        try:
            stacked = stack(*deltas)
        except BaseNeeded:
            stacked = stack(*deltas, base=base)
        yield context.enter_context(stacked)


@contextmanager
def fetched_base(
    reference: Reference, delta: Delta, *, token: Token = None
) -> Iterator[FetchedBase]:
    """Yield a repository as the base of a delta. Only the files that the delta needs are downloaded.

    Raises:
        MismatchError: the repository lacks a file that the delta needs.
        RemoteError: the repository is not available.
    """
    hub = Hub(token)
    base = open_repository(hub, reference)
    links: list[Link] = []
    with ExitStack() as context:
        if base.is_delta_repository:
            links, base = open_chain(hub, open_link(base))
        deltas = tuple(context.enter_context(link.delta) for link in links)
        lowest = links[0] if links else None
        folder = context.enter_context(base_folder(base, (*deltas, delta)[0], lowest))
        yield FetchedBase(base.name, folder, deltas)


@contextmanager
def fetched_checkpoint(reference: Reference, *, token: Token = None) -> Iterator[tuple[str, Path]]:
    """Yield the name of a repository at its commit, and a folder with its files.

    Git's own files and weights in other formats than safetensors are left out.

    Raises:
        RemoteError: the repository is not available, or holds no weights; or a copy in the cache was damaged and has
            been removed.
    """
    repository = open_repository(Hub(token), reference)
    if repository.is_delta_repository:
        raise RemoteNotFound(
            f"'{repository.reference}' is a delta, not a checkpoint; pull it first"
        )
    if not repository.has_weights:
        raise repository.hub.unlisted.get(repository.reference) or RemoteNotFound(
            f"repository '{repository.name}' holds no {WEIGHT_SUFFIX} files; {_conversion(repository)}"
        )
    if not repository.is_listed:
        _log.warning(
            "the files of '%s' are those in the cache, which may lack some (offline)",
            repository.name,
        )
    wanted = [path for path in repository.files if _is_of_checkpoint(path)]
    copies = repository.download(wanted)
    raise_if_damaged(copies.values())  # no digest of a delta would show it
    with folder_of(copies, exact=True) as folder:
        yield repository.name, folder


@contextmanager
def opened_side(text: str) -> Iterator[tuple[str | None, Path]]:
    """Yield a side of ``diff``: the name and files of a repository, or None and the path.

    Raises:
        RemoteError: there is neither such a path nor such a repository, or it holds no weights.
        ValueError: the text begins with ``hf://`` and names no repository.
    """
    reference = named_repository(text)
    if reference is None:
        yield None, Path(text)
        return
    with ExitStack() as context:
        with or_path(text):
            found = context.enter_context(fetched_checkpoint(reference))
        yield found


def check_remote_base(reference: Reference, *, token: Token = None) -> RemoteBaseReport:
    """Compare a delta on the Hub with the metadata of its base, without downloading weights.

    The names, dtypes and shapes of tensors are read from the headers of the base's files. If ``push`` has
    recorded the hashes of the base's files, the Hub must state the same hashes.

    Raises:
        MismatchError: the repository does not hold the base.
        BaseNeeded: the delta names no base.
        RemoteError: the delta or the base is not available.
    """
    hub = Hub(token, cached_listing=False)
    link = open_link(open_repository(hub, reference))
    with link.delta as delta:
        base = open_repository(hub, base_reference(delta, f"the delta in '{reference.repo_id}'"))
        record = read_record(link.repository, link.path)
        different = differences(record, base.files) if record else []
        if different:
            raise BaseMismatch(
                f"file {different[0]!r} of '{base.name}' is not the file that is recorded in"
                f" '{link.repository.name}' as part of the base; pull the delta with a local base"
            )
        if base.is_delta_repository:
            with base.read_delta() as before:
                check_link(before, delta, base.name)
        else:
            check_remote_structure(base, delta)
        n_files = len(record.files) if record else 0
        return RemoteBaseReport(base.name, record is not None, n_files)


def _conversion(repository: Repository) -> str:
    def read(path: str) -> bytes | None:
        return repository.download_one(path).read_bytes() if path in repository.files else None

    place = repository.reference
    return conversion(place.repo_id, repository.files, read, revision=place.revision)


def _is_of_checkpoint(path: str) -> bool:
    name = path.rpartition("/")[2]
    return not name.startswith(".git") and not name.lower().endswith(UNREAD_WEIGHT_SUFFIXES)


@contextmanager
def or_path(text: str) -> Iterator[None]:
    """If the repository is not available, add to the error that no path of this name exists either."""
    try:
        yield
    except RemoteError as error:
        if text.startswith(SCHEME) or (isinstance(error, RemoteNotFound) and not error.expected):
            raise  # the repository exists, but something in it does not
        raise type(error)(f"there is no local path '{text}', and {error}") from error
