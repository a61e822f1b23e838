"""Failures of stores on a network: the error has the right class, one sentence, and no credentials."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import moto.s3.responses
import pytest
from hub.hub_server import LoopbackHub
from stores.conftest import TOKEN, make_url
from stores.store_servers import Web, s3_server, web_server
from werkzeug.datastructures import Headers

from sparsedelta.errors import (
    AccessDenied,
    RemoteConflict,
    RemoteError,
    RemoteNotFound,
    Unreachable,
)
from sparsedelta.stores import open_store
from sparsedelta.stores.ranges import READ_AHEAD_BYTES


@pytest.fixture
def web(tmp_path: Path) -> Iterator[Web]:
    """Serve a folder with one object."""
    (tmp_path / "a").write_bytes(b"0123456789" * READ_AHEAD_BYTES)
    with web_server(tmp_path) as running:
        yield running


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (401, AccessDenied),
        (403, AccessDenied),
        (429, Unreachable),
        (500, Unreachable),
        (503, Unreachable),
        (418, RemoteError),
    ],
)
def test_web_answers(status: int, kind: type[RemoteError], web: Web) -> None:
    store = open_store(web.url)
    web.status = status
    for call in (lambda: store.read("a", 9), lambda: store.open("a")):
        with pytest.raises(RemoteError, match=f"HTTP {status}") as caught:
            call()
        assert type(caught.value) is kind


def test_web_410_is_absent(web: Web) -> None:
    web.status = 410
    assert open_store(web.url).read("a", 9) is None


def test_web_transfer_breaks_off(web: Web) -> None:
    store = open_store(web.url)
    source = store.open("a")
    assert source is not None
    web.cut = 5
    for call in (
        lambda: store.read("a", 10**7),
        lambda: store.open("a"),
        lambda: source.read(READ_AHEAD_BYTES + 9, 10),
        lambda: source.read(9, 2 * READ_AHEAD_BYTES),
    ):
        with pytest.raises(Unreachable, match="was interrupted"):
            call()
    web.cut, web.ranges = 0, False
    with pytest.raises(Unreachable, match="HTTP 200"):
        source.read(9, 2 * READ_AHEAD_BYTES)
    (web.folder / "a").unlink()
    with pytest.raises(RemoteNotFound, match="has been removed"):
        source.read(9, 2 * READ_AHEAD_BYTES)


def test_web_nobody_there(web: Web) -> None:
    store = open_store("http://127.0.0.1:1/x")
    with pytest.raises(Unreachable, match=r"'http://127\.0\.0\.1:1/x' cannot be reached"):
        store.read("a", 9)


def test_web_is_read_only(web: Web) -> None:
    store = open_store(web.url)
    assert (store.writable, store.has_create) == (False, False)
    for call in (
        lambda: store.create("a", b""),
        lambda: store.write("a", b""),
        lambda: store.delete("a"),
        lambda: store.list(""),
    ):
        with pytest.raises(AccessDenied, match="can only be read"):
            call()


def test_password_goes_to_its_server_alone(web: Web, tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "a").write_bytes(b"moved")
    with web_server(tmp_path / "b") as other:
        address = web.url.replace("://", "://user:p%40ss@")
        store = open_store(f"{address}/?sig=secret")
        assert store.name == web.url
        assert store.read("a", 10**7) is not None
        assert web.authorizations == ["Basic dXNlcjpwQHNz"]
        web.move_to = other.url
        assert store.read("a", 9) == b"moved"
        assert other.authorizations == [None]
        web.move_to, web.status = "", 403
        with pytest.raises(AccessDenied) as caught:
            store.read("a", 9)
        assert not any(word in str(caught.value) for word in ("p%40ss", "p@ss", "secret"))


def test_s3_goes_away(tmp_path: Path) -> None:
    with s3_server():
        import s3fs

        s3fs.S3FileSystem(use_listings_cache=False).mkdir("bucket")
        store = open_store("s3://bucket/x")
        store.write("a", b"1")
        gone = open_store("s3://none/x")
        assert gone.read("a", 9) is None
        for write in (gone.write, gone.create):
            with pytest.raises(RemoteNotFound, match="create the bucket first"):
                write("a", b"1")
        with pytest.raises(FileNotFoundError, match="nothing"):
            store.write("a", tmp_path / "nothing")
    for call in (
        lambda: store.read("a", 9),
        lambda: store.write("a", b"2"),
        lambda: store.list(""),
    ):
        with pytest.raises(Unreachable, match="'s3://bucket/x' cannot be reached"):
            call()


class S3Says:
    """Makes the S3 server answer the next PUT requests with an error."""

    def __init__(self, status: int, code: str, times: int, *, done: bool = False) -> None:
        self.left = times
        self.put = moto.s3.responses.S3Response.put_object
        self.status, self.code, self.done = status, code, done

    def __call__(self, response: Any) -> Any:
        if not self.left:
            return self.put(response)
        self.left -= 1
        if self.done:
            self.put(response)
        body = f"<Error><Code>{self.code}</Code><Message>said</Message></Error>"
        return self.status, {}, body


def say(patch: pytest.MonkeyPatch, *what: Any, **options: Any) -> S3Says:
    says = S3Says(*what, **options)
    patch.setattr(moto.s3.responses.S3Response, "put_object", lambda response: says(response))
    return says


def test_s3_conflicts_are_tried_again(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(make_url("s3", request, tmp_path))
    says = say(monkeypatch, 409, "ConditionalRequestConflict", 2)
    assert store.create("a", b"1")
    assert says.left == 0
    # Servers other than Amazon's do not report which condition failed.
    say(monkeypatch, 412, "PreconditionFailed", 1)
    assert not store.create("b", b"1")


def test_s3_refusals(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(make_url("s3", request, tmp_path))
    say(monkeypatch, 403, "AccessDenied", 1)
    with pytest.raises(AccessDenied, match="does not let you do this: said; check the credentials"):
        store.create("a", b"1")
    say(monkeypatch, 403, "AccessDenied", 1)
    assert not store.has_create
    say(monkeypatch, 501, "NotImplemented", 1)
    with pytest.raises(RemoteError, match="refused a request: said"):
        store.create("a", b"1")


def test_s3_without_conditions(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = moto.s3.responses.S3Response.put_object

    def put_always(response: Any) -> Any:
        response.headers = Headers(response.headers)
        response.headers.pop("If-None-Match", None)
        return put(response)

    store = open_store(make_url("s3", request, tmp_path))
    monkeypatch.setattr(moto.s3.responses.S3Response, "put_object", put_always)
    assert not store.has_create
    monkeypatch.undo()
    assert not store.has_create
    assert store.list("") == []


def test_hub_conflict_is_tried_again(
    hub: LoopbackHub, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    store = open_store(make_url("hub", request, tmp_path))
    path = "/api/models/me/channel/preupload"
    hub.fail("POST", path, action=lambda: hub.state.add_commit("me/channel", {"other": b"1"}))
    assert store.create("a", b"1")
    assert hub.count("POST", "/commit/main") == 2
    hub.fail("POST", path, action=lambda: hub.state.add_commit("me/channel", {"runs/one/b": b"2"}))
    assert not store.create("b", b"1")
    assert store.read("b", 9) == b"2"


def test_hub_may_send_short_files_whole(hub: LoopbackHub) -> None:
    store = open_store("hf://me/channel/x")
    hub.fail("GET", "/resolve/main/x/a", status=200)
    assert store.read("a", 9) == b""


def test_hub_gives_up(
    hub: LoopbackHub,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sparsedelta.hub.store._TRIES", 2)
    store = open_store(make_url("hub", request, tmp_path))
    hub.fail("POST", "/commit/main", status=412, times=2)
    with pytest.raises(
        RemoteConflict, match="changed by others during each of 2 tries to write 'a'"
    ):
        store.write("a", b"1")


def test_hub_refusals(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    for url in ("hf://me/none/x", "hf://me/channel/x@nobranch"):
        store = open_store(url)
        with pytest.raises(RemoteNotFound):
            store.read("a", 9)
        with pytest.raises(RemoteNotFound):
            store.create("a", b"1")
    hub.state.add_repo("else/theirs", {})
    with pytest.raises(AccessDenied):
        open_store("hf://else/theirs/x").write("a", b"1")
    pinned = open_store(f"hf://me/channel/x@{hub.state.head('me/channel').oid}")
    assert not pinned.writable
    assert pinned.read("a", 9) is None
    with pytest.raises(AccessDenied, match="can only be read: it is a commit, which never changes"):
        pinned.write("a", b"1")
    monkeypatch.delenv("HF_TOKEN")
    anybody = open_store("hf://me/channel/x")
    assert not anybody.writable
    assert anybody.read("a", 9) is None
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.fail("POST", "/commit/main", status=503)
    with pytest.raises(Unreachable):
        open_store("hf://me/channel/x").write("a", b"1")


def test_addresses() -> None:
    with pytest.raises(ValueError, match="nosuch"):
        open_store("nosuch://x")
    with pytest.raises(ValueError, match="'s3:/b/x' looks like an address in a Path object"):
        open_store(Path("s3://b/x"))
    with pytest.raises(ValueError, match="names no bucket"):
        open_store("s3://")
    with pytest.raises(ValueError, match="names no server"):
        open_store("http:///x")
    with pytest.raises(ValueError, match="is not a model repository"):
        open_store("hf://x")
    with pytest.raises(RemoteError, match=r"gs:// needs a package: .*gcsfs"):
        open_store("gs://b/x")
