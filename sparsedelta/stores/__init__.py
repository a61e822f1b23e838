"""Where bytes are: files, and stores of named objects such as folders and buckets."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sparsedelta.stores.objects import ObjectStore


def open_store(url: str | os.PathLike[str]) -> ObjectStore:
    """Return the store of objects that a path or an address names.

    Args:
        url: a folder, or ``file://`` and its path.

    Raises:
        ValueError: there is no such kind of store.
    """
    from sparsedelta.stores.folder import FolderStore

    scheme, found, rest = os.fspath(url).partition("://")
    if not found or os.path.isdir(url):
        return FolderStore(url)
    if scheme == "file":
        return FolderStore(rest)
    raise ValueError(f"{scheme}:// is no kind of store that is known; give a folder")
