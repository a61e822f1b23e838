"""File systems of fsspec, such as S3, as stores of objects.

A file system can be written to only if its objects are known to appear complete. docs/stores.md lists what each
file system guarantees.
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

# Objects appear complete, and a condition can forbid that an existing object is replaced.
CREATE_SCHEMES = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "memory"}
# Objects appear complete. "hf" is a bucket of the Hub here; ``hub.store`` handles repositories.
WHOLE_SCHEMES = CREATE_SCHEMES | {"hf"}
_PACKAGES = {
    "s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs", "abfss": "adlfs",
}  # fmt: skip

_TAKEN = ("PreconditionFailed", "412")
_BUSY = ("ConditionalRequestConflict", "OperationAborted", "409")
_TRIES = 6
_memory_lock = threading.RLock()  # create of memory:// is two steps: check, then write


class RemoteStore:
    """The files below an address of fsspec; implements ``sparsedelta.stores.objects.ObjectStore``.

    fsspec and the file system read credentials and options from the environment and from their configuration
    files.

    Raises:
        ValueError: the file system is not known, or the address names no bucket.
        RemoteError: the package of the file system is not installed.
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
        connect = _import_fsspec(self._scheme).core.url_to_fs
        try:
            # A cached listing would hide changes by other writers.
            options = {"use_listings_cache": False} if self._scheme in CREATE_SCHEMES else {}
            found: tuple[Any, str] = connect(url, **options)
        except ImportError as error:
            raise RemoteError(
                f"{self._scheme}:// needs a package: {error}; see docs/stores.md"
            ) from error
        except ValueError as error:
            raise ValueError(f"'{self.name}' is not the address of a store: {error}") from error
        except Exception as error:
            raise translated(error, self.name) from error
        return found

    @cached_property
    def has_create(self) -> bool:
        """Whether the server refuses to create an object that exists; false if writing is not allowed.

        Some servers ignore the condition. So this creates one object twice, and removes it.
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
        """Return the content of an object, at most ``max_bytes`` bytes; None if it does not exist."""
        try:
            found = self._fetch(name, 0, max_bytes + 1)
        except FileNotFoundError:
            return None
        except RemoteError:
            if self._size(name) != 0:  # an empty object has no first byte
                raise
            return b""
        if len(found) > max_bytes:
            raise LimitExceeded(
                f"object '{self.name}/{name}' has more than {max_bytes} bytes, which is the limit"
            )
        return found

    def open(self, name: str) -> ByteSource | None:
        """Return an object to read by range; None if it does not exist."""
        n_bytes = self._size(name)
        if n_bytes is None:
            return None
        return Ranges(f"{self.name}/{name}", n_bytes, partial(self._range, name))

    def create(self, name: str, content: Content) -> bool:
        """Write an object if none has this name; return whether it was written.

        If ``has_create`` is false, this may replace an object that another writer creates meanwhile. If the
        network loses the answer to a successful request, this returns False although the object was written.
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
        """Write an object. An object with this name is replaced."""
        self._check_writable()
        self._put(self._path(name), content)

    def delete(self, name: str) -> None:
        """Remove an object if it exists."""
        self._check_writable()
        path = self._path(name)
        with suppress(FileNotFoundError), remote_errors(self.name), self._lock:
            self._fs.rm_file(path)

    def list(self, prefix: str) -> list[str]:
        """Return the names that begin with ``prefix``, sorted."""
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
        """Do nothing: no file is held open."""

    def _path(self, name: str) -> str:
        return f"{self._root}/{check_name(name)}"

    def _check_writable(self) -> None:
        if not self.writable:
            raise read_only(
                self.name,
                f"it is not known whether files of {self._scheme}:// appear complete; mount it as a folder",
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
            raise unreachable(
                self.name, f"received {len(found)} bytes of {name!r}, expected {n_bytes}"
            )
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
            os.stat(content)  # so that "not found" below can only mean the bucket
        try:
            with remote_errors(self.name), self._lock:
                if isinstance(content, bytes):
                    self._fs.pipe_file(path, content, **options)
                elif in_memory:  # its put_file shows incomplete objects
                    with open(content, "rb") as file:
                        self._fs.pipe_file(path, file.read(), **options)
                else:
                    self._fs.put_file(os.fspath(content), path, **options)
        except FileNotFoundError as error:
            raise RemoteNotFound(
                f"'{self.name}' does not exist; create the bucket first"
            ) from error


def _server_code(error: RemoteError) -> str | None:
    """Return the error code of S3, from the error that caused this one."""
    cause: BaseException | None = error
    while cause is not None:
        response = getattr(cause, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code"))
        cause = cause.__cause__
    return None


def _import_fsspec(scheme: str) -> ModuleType:
    try:
        import fsspec.core
    except ImportError as error:
        package = _PACKAGES.get(scheme)
        raise RemoteError(
            f"{scheme}:// needs fsspec{f' and {package}' if package else ''}; install with:"
            f" pip install 'sparsedelta[channel]'{f' {package}' if package else ''}"
        ) from error
    module: ModuleType = fsspec
    return module
