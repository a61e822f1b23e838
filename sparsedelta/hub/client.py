"""The Hub, asked through its own client: one small class, whose every failure is one of ours.

Requests that only read are tried again when the Hub is busy; a commit is sent once.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from sparsedelta.errors import Corrupt, RemoteError, Unreachable
from sparsedelta.format.paths import path_problem
from sparsedelta.hub.errors import not_cached, told
from sparsedelta.hub.references import Reference
from sparsedelta.stores.ranges import Ranges

if TYPE_CHECKING:
    from huggingface_hub import HfApi

T = TypeVar("T")
Token = str | bool | None

_TRIES = 5
_MAX_WAIT_SECONDS = 60.0
_BUSY = (408, 429, 500, 502, 503, 504)


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file of a repository at a commit.

    Attributes:
        path: in the repository.
        n_bytes: its size.
        sha256: of the content of a large file, hex.
        git_oid: git's name of a file that is not large, hex.
    """

    path: str
    n_bytes: int
    sha256: str | None
    git_oid: str | None


@dataclass(frozen=True, slots=True)
class Refs:
    """The names a repository has for commits."""

    branches: Mapping[str, str]
    tags: Mapping[str, str]


class Hub:
    """A connection to the Hub, with a token or without.

    Args:
        token: None: the one that is logged in.
        cache_will_do: whether what is in the cache may stand for a repository's list of files while
            the Hub cannot be asked. It may lack files, so nothing may be written on its account.
    """

    def __init__(self, token: Token = None, *, cache_will_do: bool = True) -> None:
        import sparsedelta

        self.token = token
        self._cache_will_do = cache_will_do
        self.api: HfApi = _import_client()(
            token=token, library_name="sparsedelta", library_version=sparsedelta.__version__
        )

    @property
    def endpoint(self) -> str:
        """Address of the Hub."""
        return str(self.api.endpoint)

    def pin(self, reference: Reference) -> Reference:
        """Return the reference at the commit that its revision is now, or offline was last.

        Raises:
            RemoteError: there is none, or the Hub cannot be asked.
        """
        with told(reference):
            found = self.ask(
                lambda: self.api.resolve_revision(reference.repo_id, revision=reference.revision)
            )
            return reference.at(found.resolved)

    def files(self, pinned: Reference) -> dict[str, RemoteFile]:
        """Return the files of a repository at a commit by path; offline, those in the cache.

        The latter are known by name and size alone.

        Raises:
            RemoteError: there is no such repository or commit, or the Hub cannot be asked.
        """
        try:
            with told(pinned):
                # Not list_repo_tree: the client would try that for half a minute without a connection.
                info = self.ask(
                    lambda: self.api.model_info(
                        pinned.repo_id, revision=pinned.revision, files_metadata=True
                    )
                )
        except Unreachable:
            cached = self._cached_files(pinned) if self._cache_will_do else {}
            if not cached:
                raise
            return cached
        return {
            entry.rfilename: RemoteFile(
                entry.rfilename,
                entry.lfs.size if entry.lfs else entry.size or 0,
                entry.lfs.sha256 if entry.lfs else None,
                None if entry.lfs else entry.blob_id,
            )
            for entry in info.siblings or ()
        }

    def refs(self, repo_id: str) -> Refs | None:
        """Return the branches and tags of a repository; None if this token sees no such repository."""
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

        with told(Reference(repo_id)):
            try:
                found = self.ask(lambda: self.api.list_repo_refs(repo_id))
            except GatedRepoError:
                raise
            except RepositoryNotFoundError:
                return None
        return Refs(
            {ref.name: ref.target_commit for ref in found.branches},
            {ref.name: ref.target_commit for ref in found.tags},
        )

    def metadata(self, pinned: Reference) -> dict[str, Any]:
        """Return what the card of a repository says of it in its head; nothing if it has none."""
        with told(pinned):
            info = self.ask(lambda: self.api.model_info(pinned.repo_id, revision=pinned.revision))
        return {} if info.card_data is None else dict(vars(info.card_data))

    def download(self, pinned: Reference, paths: Iterable[str]) -> dict[str, Path]:
        """Return where files of a repository are on disk, having downloaded those not in the cache.

        Raises:
            RemoteError: one is not available.
            Corrupt: one has a name that leads out of its folder.
        """
        wanted = sorted(set(paths))
        for path in wanted:
            check_remote_path(path, pinned)
        if not wanted:
            return {}
        with told(pinned):
            if len(wanted) == 1:
                return {wanted[0]: self._download_one(pinned, wanted[0])}
            folder = Path(
                self.api.snapshot_download(
                    pinned.repo_id,
                    revision=pinned.revision,
                    allow_patterns=[re.sub(r"([*?[])", r"[\1]", path) for path in wanted],
                )
            )
        found = {path: folder / path for path in wanted}
        for path, place in found.items():
            if not place.is_file():
                raise not_cached(Reference(pinned.repo_id, pinned.revision, path))
        return found

    def _download_one(self, pinned: Reference, path: str) -> Path:
        with told(Reference(pinned.repo_id, pinned.revision, path)):
            found = self.api.hf_hub_download(pinned.repo_id, path, revision=pinned.revision)
        return Path(str(found))

    def cached(self, pinned: Reference, paths: Iterable[str]) -> dict[str, Path] | None:
        """Return where files are on disk if all of them are in the cache, None otherwise."""
        from huggingface_hub import try_to_load_from_cache

        found = {}
        for path in paths:
            place = try_to_load_from_cache(pinned.repo_id, path, revision=pinned.revision)
            if not isinstance(place, str):
                return None
            found[path] = Path(place)
        return found

    def read(self, pinned: Reference, path: str, offset: int, n_bytes: int) -> bytes:
        """Return a range of a file's bytes; fewer at its end.

        Raises:
            RemoteError: it is not available.
        """
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import (  # type: ignore[attr-defined]
            build_hf_headers,
            hf_raise_for_status,
            http_backoff,
        )

        url = hf_hub_url(pinned.repo_id, path, revision=pinned.revision, endpoint=self.endpoint)
        headers = build_hf_headers(token=self.token, library_name="sparsedelta")
        headers["Range"] = f"bytes={offset}-{offset + n_bytes - 1}"
        headers["Accept-Encoding"] = "identity"
        with told(Reference(pinned.repo_id, pinned.revision, path)):
            response = http_backoff("GET", url, headers=headers, follow_redirects=True)
            hf_raise_for_status(response)
        if response.status_code != 206 or len(response.content) > n_bytes:
            raise RemoteError(
                f"the Hub answered a request for a part of {path!r} in '{pinned.repo_id}' with"
                f" HTTP {response.status_code} and {len(response.content)} bytes; expected 206 and"
                f" at most {n_bytes}"
            )
        return bytes(response.content)

    def source(self, pinned: Reference, file: RemoteFile) -> Ranges:
        """Return a file of a repository; so much of it is fetched as is read."""
        name = str(Reference(pinned.repo_id, pinned.revision, file.path))
        return Ranges(name, file.n_bytes, partial(self.read, pinned, file.path))

    def ask(self, request: Callable[[], T]) -> T:
        """Return what a request gives, tried again while the Hub is busy."""
        from huggingface_hub.errors import HfHubHTTPError, RevisionResolutionError

        for number in range(1, _TRIES):
            try:
                return request()
            except (HfHubHTTPError, RevisionResolutionError) as error:
                cause = error.__cause__ if isinstance(error, RevisionResolutionError) else error
                if not isinstance(cause, HfHubHTTPError):
                    raise
                if cause.response.status_code not in _BUSY:
                    raise
                time.sleep(_wait_seconds(cause.response.headers, number))
        return request()

    def _cached_files(self, pinned: Reference) -> dict[str, RemoteFile]:
        from huggingface_hub import constants
        from huggingface_hub.file_download import repo_folder_name

        name = repo_folder_name(repo_id=pinned.repo_id, repo_type="model")
        folder = Path(constants.HF_HUB_CACHE) / name / "snapshots" / str(pinned.revision)
        return {
            place.relative_to(folder).as_posix(): RemoteFile(
                place.relative_to(folder).as_posix(), place.stat().st_size, None, None
            )
            for place in folder.rglob("*")
            if place.is_file()
        }


def check_remote_path(path: str, pinned: Reference) -> None:
    """Raise Corrupt if a file's name in a repository could lead out of the folder it is put in."""
    problem = path_problem(path)
    if problem:
        raise Corrupt(f"file {path[:200]!r} of repository '{pinned.repo_id}' {problem}")


def _wait_seconds(headers: Mapping[str, str], number: int) -> float:
    stated = headers.get("Retry-After", "")
    wait = float(stated) if stated.isdigit() else 2.0 ** (number - 1)
    return min(wait, _MAX_WAIT_SECONDS)


def _import_client() -> type[HfApi]:
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise RemoteError(
            "the Hub needs the package huggingface_hub; install it with:"
            " pip install 'sparsedelta[hub]'"
        ) from error
    return HfApi


def silence() -> None:
    """Make the Hub's client of this process show neither bars nor warnings of its own."""
    try:
        from huggingface_hub.utils import logging
        from huggingface_hub.utils.tqdm import disable_progress_bars
    except ImportError:
        return  # said once the client is needed
    disable_progress_bars()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
