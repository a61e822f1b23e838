"""Fixtures with an empty store of every kind, opened once for writing and once for reading."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import pytest
from hub.hub_server import LoopbackHub
from stores.store_servers import s3_server, web_server

from sparsedelta.stores import open_store
from sparsedelta.stores.objects import ObjectStore

KINDS = ("folder", "memory", "s3", "hub")
READING_KINDS = (*KINDS, "web", "web without ranges")
TOKEN = "hf_" + "a" * 34
_number = count()


@pytest.fixture(scope="session")
def s3() -> Iterator[str]:
    """Run S3 with a bucket ``channels``."""
    with s3_server() as address:
        import s3fs

        s3fs.S3FileSystem(use_listings_cache=False).mkdir("channels")
        yield address


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    """Run a Hub with an empty repository ``me/channel``, and log in."""
    with LoopbackHub().running() as running:
        running.state.users[TOKEN] = "me"
        running.state.add_repo("me/channel", {})
        # The client reads these from the environment once, when it is imported.
        template = running.url + "/{repo_id}/resolve/{revision}/{filename}"
        for name, value in {
            "ENDPOINT": running.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": template,
            "HF_HUB_DISABLE_XET": True,
        }.items():
            monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield running


@dataclass
class Pair:
    """One store, opened by the writer and by the reader."""

    writer: ObjectStore
    reader: ObjectStore


def make_url(kind: str, request: pytest.FixtureRequest, folder: Path) -> str:
    """Return the address of a new, empty store."""
    if kind == "s3":
        request.getfixturevalue("s3")
        return f"s3://channels/{folder.name}/{next(_number)}"
    if kind == "hub":
        request.getfixturevalue("hub")
        return "hf://me/channel/runs/one"
    if kind == "memory":
        return f"memory://{folder.name}/{next(_number)}"
    return str(folder / "store")


@pytest.fixture(params=KINDS)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ObjectStore:
    """Return a store of each kind that can be written to."""
    return open_store(make_url(request.param, request, tmp_path))


@pytest.fixture(params=READING_KINDS)
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Pair]:
    """Return a store of each kind, opened for writing and for reading."""
    url = make_url(request.param, request, tmp_path)
    with ExitStack() as stack:
        reader = url
        if request.param.startswith("web"):
            web = stack.enter_context(web_server(tmp_path))
            web.ranges = request.param == "web"
            reader = f"{web.url}/store"
        yield Pair(open_store(url), open_store(reader))
