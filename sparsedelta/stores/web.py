"""A folder of a web server as a store of objects that can only be read."""

from __future__ import annotations

import base64
import http.client
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import BinaryIO
from urllib.error import HTTPError
from urllib.parse import unquote, urlsplit
from urllib.request import Request, urlopen

from sparsedelta.errors import AccessDenied, LimitExceeded, RemoteError, RemoteNotFound
from sparsedelta.stores.base import ByteSource
from sparsedelta.stores.failures import read_only, remote_errors, unreachable
from sparsedelta.stores.names import check_name
from sparsedelta.stores.objects import Content
from sparsedelta.stores.ranges import READ_AHEAD_BYTES, Ranges
from sparsedelta.stores.stream import Stream

_TIMEOUT_SECONDS = 60
_ABSENT, _DENIED, _BUSY = (404, 410), (401, 403, 407), (408, 425, 429)
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")
_FRESH = {"Cache-Control": "no-cache"}  # caches must ask the server whether the object has changed


class WebStore:
    """The files below an address of a web server; implements ``sparsedelta.stores.objects.ObjectStore``.

    A user and password in the address are sent to the server of that address only, as HTTP Basic authentication.
    A query in the address, such as the signature of a shared folder, is added to the address of each object.
    """

    writable = False
    has_create = False

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        user, _, host = parts.netloc.rpartition("@")
        if not host:
            raise ValueError(f"{url!r} names no server; write {parts.scheme}://server/path")
        self.name = f"{parts.scheme}://{host}{parts.path.rstrip('/')}"
        self._query = f"?{parts.query}" if parts.query else ""
        self._authorization = ""
        if user:
            self._authorization = "Basic " + base64.b64encode(unquote(user).encode()).decode()

    def read(self, name: str, max_bytes: int) -> bytes | None:
        """Return the content of an object, at most ``max_bytes`` bytes; None if it does not exist."""
        with self._get(name, _FRESH) as response:
            if response is None:
                return None
            found = response.read(max_bytes + 1)
            if len(found) > max_bytes:
                raise LimitExceeded(
                    f"object '{self.name}/{name}' has more than {max_bytes} bytes, which is the limit"
                )
            return self._checked(name, response, found)

    def open(self, name: str) -> ByteSource | None:
        """Return an object to read by range; None if it does not exist.

        If the server does not support ranges, the object is downloaded to a temporary file.
        """
        with self._get(name, _range(0, READ_AHEAD_BYTES)) as response:
            if response is None:
                return None
            if response.status == 206:
                block = self._checked(name, response, response.read())
                n_bytes = self._total(response, 0, len(block))
                return Ranges(f"{self.name}/{name}", n_bytes, partial(self._range, name), block)
            return self._downloaded(name, response)

    def create(self, name: str, content: Content) -> bool:
        """Raise AccessDenied."""
        raise self._read_only()

    def write(self, name: str, content: Content) -> None:
        """Raise AccessDenied."""
        raise self._read_only()

    def delete(self, name: str) -> None:
        """Raise AccessDenied."""
        raise self._read_only()

    def list(self, prefix: str) -> list[str]:
        """Raise AccessDenied: web servers have no common way to list files."""
        raise self._read_only()

    def close(self) -> None:
        """Do nothing: no connection is held open."""

    def _read_only(self) -> AccessDenied:
        return read_only(self.name, "it is a web server; write to the folder that it serves")

    @contextmanager
    def _get(
        self, name: str, headers: Mapping[str, str]
    ) -> Iterator[http.client.HTTPResponse | None]:
        address = f"{self.name}/{check_name(name)}{self._query}"
        fixed = {"User-Agent": "sparsedelta", "Accept-Encoding": "identity"}
        request = Request(address, headers={**fixed, **headers})
        if self._authorization:  # not sent to another server after a redirect
            request.add_unredirected_header("Authorization", self._authorization)
        with remote_errors(self.name):
            try:
                response = urlopen(request, timeout=_TIMEOUT_SECONDS)
            except HTTPError as error:
                error.close()
                if error.code not in _ABSENT:
                    raise self._refused(name, error.code) from None
                response = None
            with response or nullcontext():
                yield response

    def _refused(self, name: str, status: int) -> RemoteError:
        if status in _DENIED:
            return AccessDenied(
                f"'{self.name}' does not let you read {name!r} (HTTP {status}); check the address and the"
                " credentials in it"
            )
        if status in _BUSY or status >= 500:
            return unreachable(self.name, f"HTTP {status}")
        return RemoteError(f"'{self.name}' refused a request for {name!r}: HTTP {status}")

    def _range(self, name: str, offset: int, n_bytes: int) -> bytes:
        with self._get(name, _range(offset, n_bytes)) as response:
            if response is None:
                raise RemoteNotFound(f"'{self.name}/{name}' has been removed")
            if response.status != 206:
                raise unreachable(self.name, f"received HTTP {response.status}, expected 206")
            self._total(response, offset, n_bytes)
            return self._checked(name, response, response.read(n_bytes))

    def _total(self, response: http.client.HTTPResponse, offset: int, n_bytes: int) -> int:
        """Return the size of the object, from a response with a part of it."""
        stated = response.headers.get("Content-Range", "")
        found = _CONTENT_RANGE.fullmatch(stated)
        if not found or (int(found[1]), int(found[2])) != (offset, offset + n_bytes - 1):
            raise RemoteError(
                f"'{self.name}' answered a request for bytes {offset}-{offset + n_bytes - 1} with"
                f" {stated[:80]!r}; the server does not support ranges"
            )
        return int(found[3])

    def _checked(self, name: str, response: http.client.HTTPResponse, found: bytes) -> bytes:
        if response.length:  # the bytes that are missing; ``read`` with a size reports no error
            raise unreachable(
                self.name, f"received {len(found)} bytes of {name!r}, {response.length} are missing"
            )
        return found

    def _downloaded(self, name: str, response: http.client.HTTPResponse) -> ByteSource:
        file = tempfile.TemporaryFile()  # noqa: SIM115
        try:
            shutil.copyfileobj(response, file, 1 << 20)
            self._checked(name, response, b"")
            return _Downloaded(f"{self.name}/{name}", file)
        except BaseException:
            file.close()
            raise


class _Downloaded(Stream):
    """A temporary file, which is deleted when it is closed."""

    def __init__(self, name: str, file: BinaryIO) -> None:
        super().__init__(file)
        self.name = name
        self.close = file.close  # type: ignore[method-assign]


def _range(offset: int, n_bytes: int) -> dict[str, str]:
    return {"Range": f"bytes={offset}-{offset + n_bytes - 1}"}
