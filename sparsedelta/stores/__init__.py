"""Where bytes are: files, and stores of named objects such as folders and buckets."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sparsedelta.stores.objects import ObjectStore

_BUCKETS = "hf://buckets/"


def open_store(url: str | os.PathLike[str]) -> ObjectStore:
    """Return the store of objects that a path or an address names.

    Args:
        url: a folder; ``hf://org/name/path`` of a repository on the Hub, ``hf://buckets/org/name/path`` of a
            bucket there; ``https://server/path``, which can only be read; or an address of fsspec such as
            ``s3://bucket/path``. Nothing is asked of a server before an object is.

    Raises:
        ValueError: there is no such kind of store, or the address lacks something.
        RemoteError: a package that it needs is not installed.
    """
    scheme, found, rest = os.fspath(url).partition("://")
    if isinstance(url, Path) and re.match("[a-z][a-z0-9]+:/", str(url)) and not url.exists():
        raise ValueError(f"'{url}' looks like an address that was made a Path; give it as text")
    if not found or os.path.isdir(url):
        from sparsedelta.stores.folder import FolderStore

        return FolderStore(url)
    url = os.fspath(url)
    if scheme in ("file", "local"):
        return open_store(rest)
    if scheme in ("http", "https"):
        from sparsedelta.stores.web import WebStore

        return WebStore(url)
    if scheme == "hf" and not url.startswith(_BUCKETS):
        from sparsedelta.hub.store import HubStore

        return HubStore(url)
    from sparsedelta.stores.remote import RemoteStore

    return RemoteStore(url)
