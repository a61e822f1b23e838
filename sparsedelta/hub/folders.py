"""Downloaded files as one folder: the folder in the cache if it is suitable, else a folder of links."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from sparsedelta.errors import RemoteError
from sparsedelta.files.shards import INDEX_SUFFIX
from sparsedelta.format.paths import WEIGHT_SUFFIX
from sparsedelta.fs import temporary_folder
from sparsedelta.hub.client import RemoteFile
from sparsedelta.hub.record import is_content

_SHA256 = re.compile(r"[0-9a-f]{64}")
_GIT_OID = re.compile(r"[0-9a-f]{40}")


@contextmanager
def folder_of(downloads: Mapping[str, Path], *, exact: bool = False) -> Iterator[Path]:
    """Yield a folder that holds downloaded files and no other weights.

    Args:
        downloads: the local path of each file, by its path in the repository. All of them lie in one
            snapshot of the cache.
        exact: whether the folder must hold no other files at all.
    """
    if downloads:
        path, local_path = next(iter(downloads.items()))
        snapshot = local_path.parents[path.count("/")]
        if _files_below(snapshot, weights=not exact) <= downloads.keys():
            yield snapshot
            return
    with temporary_folder("base") as folder:
        for path, local_path in downloads.items():
            link = folder / path
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(local_path.resolve())
        yield folder


def rename_in(error: Exception, folder: Path, name: str) -> None:
    """Put the name of a repository in place of the folder with its files in the message of an error."""
    error.args = tuple(str(text).replace(str(folder), name) for text in error.args)


def remove_damaged(local_paths: Iterable[Path]) -> list[Path]:
    """Remove damaged files from the cache and return their paths.

    A file in the cache is a link to a blob. The name of the blob is the SHA-256 or the git object id that
    the Hub stated, so a damaged blob does not match its name. From huggingface_hub 2.4 on, the blob may
    itself be a link to content that several repositories share; the name of that content is not its SHA-256.
    """
    damaged = []
    for local_path in local_paths:
        blob = (
            local_path.parent / os.readlink(local_path) if local_path.is_symlink() else local_path
        )
        content, name = blob.resolve(), blob.name
        if not content.exists():  # another path with the same content was removed
            local_path.unlink(missing_ok=True)
            continue
        sha256 = name if _SHA256.fullmatch(name) else None
        oid = name if _GIT_OID.fullmatch(name) else None
        if sha256 is None and oid is None:
            continue
        if not is_content(RemoteFile(name, content.stat().st_size, sha256, oid), content):
            for path in (local_path, blob, content):  # two of these paths may be equal
                path.unlink(missing_ok=True)
            damaged.append(local_path)
    return damaged


def raise_if_damaged(paths: Iterable[Path], cause: Exception | None = None) -> None:
    """Remove damaged files from the cache; raise a RemoteError if there was one.

    Args:
        paths: the files to check.
        cause: the error that a damaged file may have caused; the new error is raised from it.
    """
    damaged = remove_damaged(paths)
    if damaged:
        raise RemoteError(
            f"the downloaded copy '{damaged[0]}' was damaged and has been removed; run this again to"
            " download it again"
        ) from cause


def _files_below(folder: Path, *, weights: bool) -> set[str]:
    """Return the relative paths of the files below a folder; only weights and their indexes if ``weights``."""
    return {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and (not weights or path.name.endswith((WEIGHT_SUFFIX, INDEX_SUFFIX)))
    }
