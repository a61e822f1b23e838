"""File systems of fsspec, such as S3, as stores of objects.

Only those are written to whose objects are known to appear whole. docs/stores.md says what each gives.
"""

from __future__ import annotations

import os
import secrets
import threading
import time
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import cached_property, partial
from types import ModuleType
from typing import Any

from sparsedelta.errors import AccessDenied, LimitExceeded, RemoteError, RemoteNotFound
from sparsedelta.redaction import without_password
from sparsedelta.stores.base import ByteSource
from sparsedelta.stores.failures import read_only, remote_errors, translated, unreachable
from sparsedelta.stores.names import check_name, is_name
from sparsedelta.stores.objects import Content
from sparsedelta.stores.ranges import Ranges

# Objects appear whole, and one that exists is not replaced when that is asked for.
CREATE_SCHEMES = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "memory"}
# Objects appear whole. "hf" is a bucket of the Hub here: its repositories have a store of their own.
WHOLE_SCHEMES = CREATE_SCHEMES | {"hf"}

_TAKEN = ("PreconditionFailed", "412")
_BUSY = ("ConditionalRequestConflict", "OperationAborted", "409")
_TRIES = 6
_memory_lock = threading.RLock()  # its create looks, then writes


class RemoteStore:
    """The files below an address of fsspec (``sparsedelta.stores.objects.ObjectStore``).

    Credentials and options are those that fsspec and the file system read from the environment and from
    their files.

    Raises:
        ValueError: there is no such file system, or the address names no bucket.
        RemoteError: the package that it needs is not installed.
    """

    def __init__(self, url: str) -> None:
        self.name = without_password(url).rstrip("/")
        self._scheme = url.partition("://")[0]
        self._fs, path = self._connect(url)
        self._root = path.rstrip("/")
        if not self._root and self._scheme != "memory":
            raise ValueError(f"'{self.name}' names no bucket; write {self._scheme}://bucket/path")
        self.writable = self._scheme in WHOLE_SCHEMES
        in_memory = self._scheme == "memory"
        self._lock: AbstractContextManager[object] = _memory_lock if in_memory else nullcontext()

    def _connect(self, url: str) -> tuple[Any, str]:
        connect = _import_fsspec().core.url_to_fs
        try:
            # Listings that are kept would be taken for what is there now.
            options = {"use_listings_cache": False} if self._scheme in CREATE_SCHEMES else {}
            found: tuple[Any, str] = connect(url, **options)
        except ImportError as error:
            raise RemoteError(
                f"{self._scheme}:// needs a package: {error}; see docs/stores.md"
            ) from error
        except ValueError as error:
            raise ValueError(f"'{self.name}' is no store: {error}") from error
        except Exception as error:
            raise translated(error, self.name) from error
        return found

    @cached_property
    def has_create(self) -> bool:
        """Whether the file system can create, and the server refuses to do it twice.

        Servers that know nothing of conditions ignore them. So one object is created twice, and removed. It is
        also false if nothing may be written.
        """
        if self._scheme not in CREATE_SCHEMES:
            return False
        probe = f"{self._root}/.sparsedelta-probe-{secrets.token_hex(8)}"
        try:
            self._create(probe, b"probe")
            return not self._create(probe, b"probe")
        except AccessDenied:
            return False
        finally:
            with suppress(RemoteError, FileNotFoundError), remote_errors(self.name), self._lock:
                self._fs.rm_file(probe)

    def read(self, name: str, max_bytes: int) -> bytes | None:
        """Return an object of at most ``max_bytes`` bytes; None if there is none of this name."""
        try:
            found = self._fetch(name, 0, max_bytes + 1)
        except FileNotFoundError:
            return None
        except RemoteError:
            if self._size(name) != 0:  # an empty one has no first byte
                raise
            return b""
        if len(found) > max_bytes:
            raise LimitExceeded(
                f"object '{self.name}/{name}' is longer than {max_bytes} bytes; expected at most these"
            )
        return found

    def open(self, name: str) -> ByteSource | None:
        """Return an object that is read by ranges; None if there is none of this name."""
        n_bytes = self._size(name)
        if n_bytes is None:
            return None
        return Ranges(f"{self.name}/{name}", n_bytes, partial(self._range, name))

    def create(self, name: str, content: Content) -> bool:
        """Write an object if there is none of this name; return whether that was done.

        Where ``has_create`` is false, another writer's object may be replaced. False is also the answer if
        the server had done it, and the client lost that answer and asked again.
        """
        self._check_writable()
        path = self._path(name)
        if self._scheme in CREATE_SCHEMES:
            return self._create(path, content)
        if self._size(name) is not None:
            return False
        self._put(path, content)
        return True

    def write(self, name: str, content: Content) -> None:
        """Write an object, in place of one of this name."""
        self._check_writable()
        self._put(self._path(name), content)

    def delete(self, name: str) -> None:
        """Remove an object if it is there."""
        self._check_writable()
        path = self._path(name)
        with suppress(FileNotFoundError), remote_errors(self.name), self._lock:
            self._fs.rm_file(path)

    def list(self, prefix: str) -> list[str]:
        """Return the names of the objects that begin with ``prefix``, sorted."""
        folder = prefix.rpartition("/")[0]
        path = self._path(folder) if folder else self._root
        try:
            with remote_errors(self.name), self._lock:
                self._fs.invalidate_cache()
                found = self._fs.find(path)
        except FileNotFoundError:
            return []
        names = (path.removeprefix(self._root + "/") for path in found)
        return sorted(name for name in names if name.startswith(prefix) and is_name(name))

    def close(self) -> None:
        """Nothing is held open."""

    def _path(self, name: str) -> str:
        return f"{self._root}/{check_name(name)}"

    def _check_writable(self) -> None:
        if not self.writable:
            raise read_only(
                self.name,
                f"it is not known whether files of {self._scheme}:// appear whole; mount it as a folder",
            )

    def _size(self, name: str) -> int | None:
        path = self._path(name)
        try:
            with remote_errors(self.name), self._lock:
                self._fs.invalidate_cache()
                found = self._fs.info(path)
        except FileNotFoundError:
            return None
        return int(found["size"]) if found["type"] == "file" else None

    def _range(self, name: str, offset: int, n_bytes: int) -> bytes:
        try:
            found = self._fetch(name, offset, n_bytes)
        except FileNotFoundError as error:
            raise RemoteNotFound(f"'{self.name}/{name}' has been removed") from error
        if len(found) != n_bytes:
            raise unreachable(self.name, f"{len(found)} bytes of {name!r} came, expected {n_bytes}")
        return found

    def _fetch(self, name: str, offset: int, n_bytes: int) -> bytes:
        path = self._path(name)
        with remote_errors(self.name), self._lock:
            return bytes(self._fs.cat_file(path, start=offset, end=offset + n_bytes))

    def _create(self, path: str, content: Content) -> bool:
        for number in range(_TRIES):
            try:
                self._put(path, content, mode="create")
            except FileExistsError:
                return False
            except RemoteError as error:
                code = _server_code(error)
                if code in _TAKEN:
                    return False
                if code not in _BUSY or number == _TRIES - 1:
                    raise
                time.sleep(0.05 * 2**number)
            else:
                return True
        return False

    def _put(self, path: str, content: Content, **options: str) -> None:
        in_memory = self._scheme == "memory"
        if not isinstance(content, bytes):
            os.stat(content)  # "not found" below is the bucket
        try:
            with remote_errors(self.name), self._lock:
                if isinstance(content, bytes):
                    self._fs.pipe_file(path, content, **options)
                elif in_memory:  # its put_file shows parts
                    with open(content, "rb") as file:
                        self._fs.pipe_file(path, file.read(), **options)
                else:
                    self._fs.put_file(os.fspath(content), path, **options)
        except FileNotFoundError as error:
            raise RemoteNotFound(
                f"there is no place to write to at '{self.name}'; create the bucket first"
            ) from error


def _server_code(error: RemoteError) -> str | None:
    """Return the code of an error of S3 that is the cause of an error."""
    cause: BaseException | None = error
    while cause is not None:
        response = getattr(cause, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code"))
        cause = cause.__cause__
    return None


def _import_fsspec() -> ModuleType:
    try:
        import fsspec.core
    except ImportError as error:
        raise RemoteError(
            "this kind of store needs the package fsspec; install it with:"
            " pip install 'sparsedelta[channel]'"
        ) from error
    module: ModuleType = fsspec
    return module
