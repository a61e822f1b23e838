"""Requests to the Hub through huggingface_hub. Every failure is raised as an error of this package.

Requests that only read are repeated while the Hub is busy. A commit is sent once.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from sparsedelta.errors import AccessDenied, Corrupt, RemoteError, RemoteNotFound, Unreachable
from sparsedelta.format.paths import path_problem
from sparsedelta.hub.errors import not_cached, remote_errors
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
        path: its path in the repository.
        n_bytes: its size.
        sha256: hex digest of its content, if the Hub stores it as a large file (LFS or Xet).
        git_oid: git's object id, hex, if the Hub stores it as a regular file.
    """

    path: str
    n_bytes: int
    sha256: str | None
    git_oid: str | None


@dataclass(frozen=True, slots=True)
class Refs:
    """The branches and tags of a repository, each with its commit."""

    branches: Mapping[str, str]
    tags: Mapping[str, str]


class Hub:
    """A connection to the Hub.

    Args:
        token: access token; None: that of `hf auth login`; False: none.
        cached_listing: whether to use the files in the cache as the list of a repository's files if the
            Hub cannot be reached. That list may be incomplete, so a caller that pushes must not use it.

    Attributes:
        unlisted: why the list of a repository's files is that of the cache, by the pinned reference.
    """

    def __init__(self, token: Token = None, *, cached_listing: bool = True) -> None:
        import sparsedelta

        self.token = token
        self._cached_listing = cached_listing
        self.unlisted: dict[Reference, RemoteError] = {}
        self.api: HfApi = _import_client()(
            token=token, library_name="sparsedelta", library_version=sparsedelta.__version__
        )

    @property
    def endpoint(self) -> str:
        """Address of the Hub."""
        return str(self.api.endpoint)

    @property
    def has_token(self) -> bool:
        """Whether requests are made in somebody's name."""
        from huggingface_hub import get_token

        return self.token is not False and bool(self.token or get_token())

    def pin(self, reference: Reference) -> Reference:
        """Return the reference pinned to the current commit of its revision.

        Offline, this is the commit that the cache has for the revision.

        Raises:
            RemoteError: the repository or revision does not exist, or the Hub cannot be reached.
        """
        with remote_errors(reference):
            found = self.ask(
                lambda: self.api.resolve_revision(reference.repo_id, revision=reference.revision)
            )
            return reference.at(found.resolved)

    def files(self, pinned: Reference) -> dict[str, RemoteFile]:
        """Return the files of a repository at a commit by path.

        Offline, or if the commit is gone, these are the files in the cache, without their hashes (see
        ``cached_listing``).

        Raises:
            RemoteError: the repository or commit does not exist, or the Hub cannot be reached.
        """
        try:
            with remote_errors(pinned):
                # list_repo_tree is not used: without a connection, the client repeats it for half a minute.
                info = self.ask(
                    lambda: self.api.model_info(
                        pinned.repo_id, revision=pinned.revision, files_metadata=True
                    )
                )
        except (Unreachable, RemoteNotFound, AccessDenied) as error:
            cached = self._cached_files(pinned) if self._cached_listing else {}
            if not cached:
                raise
            self.unlisted[pinned] = error
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
        """Return the branches and tags of a repository; None if it does not exist or is not accessible."""
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

        with remote_errors(Reference(repo_id)):
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
        """Return the metadata of a repository's card; empty if it has none."""
        with remote_errors(pinned):
            info = self.ask(lambda: self.api.model_info(pinned.repo_id, revision=pinned.revision))
        return {} if info.card_data is None else dict(vars(info.card_data))

    def download(self, pinned: Reference, paths: Iterable[str]) -> dict[str, Path]:
        """Download the files that are not in the cache; return the local path of each file.

        Raises:
            RemoteError: a file is not available.
            Corrupt: a path leads out of the folder of the download.
        """
        wanted = sorted(set(paths))
        for path in wanted:
            check_remote_path(path, pinned)
        if not wanted:
            return {}
        with remote_errors(pinned):
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
        for path, local_path in found.items():
            if not local_path.is_file():
                raise not_cached(Reference(pinned.repo_id, pinned.revision, path))
        return found

    def _download_one(self, pinned: Reference, path: str) -> Path:
        with remote_errors(Reference(pinned.repo_id, pinned.revision, path)):
            found = self.api.hf_hub_download(pinned.repo_id, path, revision=pinned.revision)
        return Path(str(found))

    def cached(self, pinned: Reference, paths: Iterable[str]) -> dict[str, Path] | None:
        """Return the local paths of files, or None if one of them is not in the cache."""
        from huggingface_hub import try_to_load_from_cache

        found = {}
        for path in paths:
            cached = try_to_load_from_cache(pinned.repo_id, path, revision=pinned.revision)
            if not isinstance(cached, str):
                return None
            found[path] = Path(cached)
        return found

    def read(self, pinned: Reference, path: str, offset: int, n_bytes: int) -> bytes:
        """Return up to ``n_bytes`` bytes of a file from ``offset``; fewer at the end of the file.

        Raises:
            RemoteError: the file is not available.
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
        with remote_errors(Reference(pinned.repo_id, pinned.revision, path)):
            response = http_backoff("GET", url, headers=headers, follow_redirects=True)
            hf_raise_for_status(response)
        is_whole = (
            response.status_code == 200 and offset == 0
        )  # a server may do so if the file is shorter
        if not (response.status_code == 206 or is_whole) or len(response.content) > n_bytes:
            raise RemoteError(
                f"the Hub answered a request for a part of {path!r} in '{pinned.repo_id}' with"
                f" HTTP {response.status_code} and {len(response.content)} bytes; expected 206 and"
                f" at most {n_bytes}"
            )
        return bytes(response.content)

    def source(self, pinned: Reference, file: RemoteFile) -> Ranges:
        """Return a file of a repository. Only the ranges that are read are downloaded."""
        name = str(Reference(pinned.repo_id, pinned.revision, file.path))
        return Ranges(name, file.n_bytes, partial(self.read, pinned, file.path))

    def ask(self, request: Callable[[], T]) -> T:
        """Return the result of a request, which is repeated while the Hub is busy."""
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
            found.relative_to(folder).as_posix(): RemoteFile(
                found.relative_to(folder).as_posix(), found.stat().st_size, None, None
            )
            for found in folder.rglob("*")
            if found.is_file()
        }


def check_remote_path(path: str, pinned: Reference) -> None:
    """Raise Corrupt if the path of a file in a repository could lead out of the folder of the download."""
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
            "access to the Hub needs the package huggingface_hub; install it with:"
            " pip install 'sparsedelta[hub]'"
        ) from error
    return HfApi


def silence() -> None:
    """Turn off the progress bars and warnings of huggingface_hub in this process."""
    try:
        from huggingface_hub.utils import logging
        from huggingface_hub.utils.tqdm import disable_progress_bars
    except ImportError:
        return  # the first request reports it
    disable_progress_bars()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
