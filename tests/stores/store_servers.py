"""Servers in this process: the S3 server of moto, and a web server for a folder."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import moto.s3.responses
import pytest
import s3fs
from moto.server import ThreadedMotoServer

_put_object = moto.s3.responses.S3Response.put_object
_lock = threading.Lock()


def _one_at_a_time(self: Any) -> Any:
    # S3 checks the condition and stores the object in one step. This server does it in two, so it needs a lock.
    with _lock:
        return _put_object(self)


@contextmanager
def s3_server() -> Iterator[str]:
    """Run an S3 server without buckets; yield its address. Clients in this process use it as S3."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moto.s3.responses.S3Response, "put_object", _one_at_a_time)
        server.start()
        address = "http://{}:{}".format(*server.get_host_and_port())
        for name, value in {
            "AWS_ENDPOINT_URL": address,
            "AWS_ACCESS_KEY_ID": "AKIAIOSFODNN7EXAMPLE",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_MAX_ATTEMPTS": "1",
        }.items():
            patch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()  # they are of another address
        try:
            yield address
        finally:
            server.stop()
            s3fs.S3FileSystem.clear_instance_cache()


@dataclass
class Web:
    """A web server: its address and its behaviour.

    Attributes:
        folder: the folder that it serves.
        ranges: whether it supports ranges.
        status: status of every answer; None: the correct status.
        cut: number of bytes at the end of each answer that it does not send.
        move_to: address that it redirects to.
        authorizations: the Authorization headers that clients have sent.
    """

    folder: Path
    url: str = ""
    ranges: bool = True
    status: int | None = None
    cut: int = 0
    move_to: str = ""
    authorizations: list[str | None] = field(default_factory=list)


class _Handler(SimpleHTTPRequestHandler):
    def __init__(self, web: Web, *arguments: Any, **options: Any) -> None:
        self.web = web
        super().__init__(*arguments, **options)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Write no log messages."""

    def do_GET(self) -> None:
        """Answer with a file or a range of it."""
        self.web.authorizations.append(self.headers["Authorization"])
        if self.web.move_to:
            self.send_response(302)
            self.send_header("Location", self.web.move_to + self.path)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        place = Path(self.translate_path(self.path))
        if self.web.status or not place.is_file():
            self.send_error(self.web.status or 404)
            return
        content = place.read_bytes()
        wanted = self.headers["Range"]
        if wanted and self.web.ranges:
            begin, end = map(int, wanted.removeprefix("bytes=").split("-"))
            part = content[begin : end + 1]
            self.send_response(206)
            stated = f"bytes {begin}-{begin + len(part) - 1}/{len(content)}"
            self.send_header("Content-Range", stated)
        else:
            part = content
            self.send_response(200)
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part[: len(part) - self.web.cut])


@contextmanager
def web_server(folder: Path) -> Iterator[Web]:
    """Serve a folder on 127.0.0.1."""
    web = Web(folder)
    handler = partial(_Handler, web, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        web.url = f"http://127.0.0.1:{server.server_address[1]}"
        try:
            yield web
        finally:
            server.shutdown()
            thread.join()
