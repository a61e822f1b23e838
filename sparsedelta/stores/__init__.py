"""Sources of bytes (files) and stores of named objects (folders, buckets, repositories)."""

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
        url: one of these. No request is sent to a server until an object is read, written or listed.

            - The path of a folder.
            - ``hf://org/name/path``: a folder of a repository on the Hub.
            - ``hf://buckets/org/name/path``: a folder of a bucket on the Hub.
            - ``https://server/path``: a folder of a web server. It can only be read.
            - An address of fsspec, such as ``s3://bucket/path``.

    Raises:
        ValueError: the kind of store is not known, or the address is incomplete.
        RemoteError: a package that the store needs is not installed.
    """
    scheme, found, rest = os.fspath(url).partition("://")
    if isinstance(url, Path) and re.match("[a-z][a-z0-9]+:/", str(url)) and not url.exists():
        raise ValueError(f"'{url}' looks like an address in a Path object; give it as a string")
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
