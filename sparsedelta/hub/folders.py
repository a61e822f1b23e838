"""Downloaded files as a folder that holds just them: the cache's own where it does, else one of links."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from sparsedelta.files.shards import INDEX_SUFFIX
from sparsedelta.format.paths import WEIGHT_SUFFIX
from sparsedelta.hub.client import RemoteFile
from sparsedelta.hub.record import is_content

_SHA256 = re.compile(r"[0-9a-f]{64}")
_GIT_OID = re.compile(r"[0-9a-f]{40}")


@contextmanager
def folder_of(places: Mapping[str, Path], *, only: bool = False) -> Iterator[Path]:
    """Yield a folder that holds files under their paths, and no other weights.

    Args:
        places: where the files are, by path: all in one snapshot of the cache.
        only: whether it may not hold any other files either.
    """
    if places:
        path, place = next(iter(places.items()))
        snapshot = place.parents[path.count("/")]
        if _files_below(snapshot, weights=not only) <= places.keys():
            yield snapshot
            return
    with tempfile.TemporaryDirectory(prefix="sparsedelta-base-") as made:
        for path, place in places.items():
            link = Path(made, path)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(place.resolve())
        yield Path(made)


def remove_damaged(places: Iterable[Path]) -> list[Path]:
    """Remove files of the cache whose content is not that of their names; return which they were.

    The cache names a file's content by what the Hub said of it: its SHA-256, or git's name. From 2.4 on that
    may be a link itself, to content that several repositories share under Xet's name for it.
    """
    damaged = []
    for place in places:
        blob = place.parent / os.readlink(place) if place.is_symlink() else place
        content, name = blob.resolve(), blob.name
        sha256 = name if _SHA256.fullmatch(name) else None
        oid = name if _GIT_OID.fullmatch(name) else None
        if sha256 is None and oid is None:
            continue
        if not is_content(RemoteFile(name, content.stat().st_size, sha256, oid), content):
            for path in (place, blob, content):  # some may be one
                path.unlink(missing_ok=True)
            damaged.append(place)
    return damaged


def _files_below(folder: Path, *, weights: bool) -> set[str]:
    """Return the paths of all files below a folder, or of its weights and their indexes."""
    return {
        place.relative_to(folder).as_posix()
        for place in folder.rglob("*")
        if place.is_file() and (not weights or place.name.endswith((WEIGHT_SUFFIX, INDEX_SUFFIX)))
    }
