"""Repositories in the place of paths: fetched into the cache, and given as files and folders on disk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from sparsedelta.errors import (
    BaseMismatch,
    BaseNeeded,
    ConflictError,
    RemoteNotFound,
)
from sparsedelta.files.unread import UNREAD_WEIGHT_SUFFIXES, conversion
from sparsedelta.format.delta import Delta
from sparsedelta.format.paths import WEIGHT_SUFFIX
from sparsedelta.hub.base_proof import base_reference, check_link, check_remote_structure
from sparsedelta.hub.chain import (
    Link,
    base_folder,
    follow,
    open_link,
    read_record,
)
from sparsedelta.hub.client import Hub, Token
from sparsedelta.hub.folders import folder_of
from sparsedelta.hub.record import differences
from sparsedelta.hub.references import Reference, parse_reference
from sparsedelta.hub.repository import Repository, open_repository
from sparsedelta.ops.stack import stack


@dataclass(frozen=True, slots=True)
class FetchedBase:
    """A base on disk.

    Attributes:
        name: the repository with its weights, pinned.
        folder: the weights and the side files wanted.
        deltas: those to be applied to it first, where the repository named is itself a delta.
    """

    name: str
    folder: Path
    deltas: tuple[Delta, ...]


@dataclass(frozen=True, slots=True)
class RemoteBaseReport:
    """What the Hub's word shows of the base of a delta.

    Attributes:
        base: its repository, pinned.
        recorded: whether the delta's repository records which files were proved to be its base, and
            the Hub has just these.
        n_files: how many they are.
    """

    base: str
    recorded: bool
    n_files: int


def remote_delta(reference: Reference, *, token: Token = None) -> Delta:
    """Return a delta on the Hub of which only header and manifest are fetched; the rest when it is read.

    Raises:
        FormatError: it is not a delta this version can read.
        RemoteError: it is not available.
    """
    return open_repository(Hub(token), reference).read_delta()


def fetch_delta(reference: Reference, *, token: Token = None) -> Path:
    """Return where a delta on the Hub is on disk, downloaded unless it is in the cache.

    Raises:
        FormatError: it is not a delta this version can read, or damaged.
        RemoteError: it is not available.
    """
    link = open_link(open_repository(Hub(token), reference))
    link.delta.close()
    return link.place


@contextmanager
def fetched(reference: str | Reference, *, token: Token = None) -> Iterator[tuple[Delta, Path]]:
    """Yield a delta on the Hub and the folder of its base with weights, both downloaded or cached.

    Of a delta whose base is a delta itself, all of the chain is stacked into one. So nothing is
    written, and ``sparsedelta.load_model`` or ``sparsedelta.apply`` can take both.

    Args:
        reference: ``org/name``, ``org/name@revision`` or ``hf://org/name/path@revision``.
        token: of the Hub; None: the one that is logged in.

    Raises:
        FormatError, MismatchError, ConflictError: a part is not what it should be.
        RemoteError: a part is not available.
        ValueError: ``reference`` names no repository.
    """
    wanted = parse_reference(reference) if isinstance(reference, str) else reference
    if wanted is None:
        raise ValueError(f"{reference!r} is not a repository; write org/name or hf://org/name/path")
    hub = Hub(token)
    links, base = follow(hub, open_link(open_repository(hub, wanted)))
    with ExitStack() as context:
        deltas = [context.enter_context(link.delta) for link in links]
        folder = context.enter_context(base_folder(base, deltas[0], links[0]))
        delta = deltas[0] if len(deltas) == 1 else context.enter_context(_stacked(deltas, folder))
        yield delta, folder


def _stacked(deltas: Sequence[Delta], base: Path) -> Delta:
    try:
        return stack(*deltas)
    except (BaseNeeded, ConflictError):  # chunks coded against the base, or mixed encodings
        return stack(*deltas, base=base)


@contextmanager
def fetched_base(
    reference: Reference, delta: Delta, *, token: Token = None
) -> Iterator[FetchedBase]:
    """Yield a repository as the base for a delta; only the files that the delta needs are downloaded.

    Raises:
        MismatchError: it cannot be the base.
        RemoteError: it is not available.
    """
    hub = Hub(token)
    base = open_repository(hub, reference)
    links: list[Link] = []
    with ExitStack() as context:
        if base.is_delta_repository:
            links, base = follow(hub, open_link(base))
        deltas = tuple(context.enter_context(link.delta) for link in links)
        lowest = links[0] if links else None
        folder = context.enter_context(base_folder(base, (*deltas, delta)[0], lowest))
        yield FetchedBase(base.name, folder, deltas)


@contextmanager
def fetched_checkpoint(reference: Reference, *, token: Token = None) -> Iterator[tuple[str, Path]]:
    """Yield a repository's name at its commit, and its files that belong to a checkpoint in a folder.

    Weights in other formats than safetensors and git's own files are left out.

    Raises:
        RemoteError: it is not available, or holds no weights.
    """
    repository = open_repository(Hub(token), reference)
    if not repository.has_weights:
        hint = (
            "it holds a delta, pull it first"
            if repository.is_delta_repository
            else _conversion(repository)
        )
        raise RemoteNotFound(
            f"repository '{repository.name}' holds no {WEIGHT_SUFFIX} files; {hint}"
        )
    wanted = [path for path in repository.files if _is_of_checkpoint(path)]
    with folder_of(repository.download(wanted), only=True) as folder:
        yield repository.name, folder


def check_remote_base(reference: Reference, *, token: Token = None) -> RemoteBaseReport:
    """Return what the Hub shows of the base of a delta there, without a download of weights.

    The names, dtypes and shapes of the tensors that the delta is made from are compared by headers; the
    hashes of files with those that were proved to be the base's when the delta was pushed, if that was
    recorded.

    Raises:
        MismatchError: the base is another.
        RemoteError: the delta or the base is not available.
    """
    hub = Hub(token, cache_will_do=False)
    link = open_link(open_repository(hub, reference))
    with link.delta as delta:
        base = open_repository(hub, base_reference(delta, f"the delta in '{reference.repo_id}'"))
        record = read_record(link.repository, link.path)
        different = differences(record, base.files) if record else []
        if different:
            raise BaseMismatch(
                f"file {different[0]!r} of '{base.name}' is not the one that is recorded in"
                f" '{link.repository.name}' as proved to be the base; pull the delta with a base of your own"
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
