"""Xet storage: the client's own code, with a store in a folder instead of a server.

The test Hub returns the address of that folder instead of a server's address, and the Xet hashes of files.
The network between the client and a Xet server is not tested.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from helpers import assert_same_files
from hub.hub_helpers import BASE, Person
from hub.hub_server import LoopbackHub, Xet

hf_xet = pytest.importorskip("hf_xet")

WITH_XET = {"HF_HUB_DISABLE_XET": "0"}


@pytest.fixture
def store(hub: LoopbackHub, pushed: str, tmp_path: Path) -> Path:
    """Make the Hub keep large files in Xet storage, empty at first; return the folder of the storage."""
    hashes = {}
    for sha256, content in hub.state.stored.items():
        place = tmp_path / "to-hash"
        place.write_bytes(content)
        hashes[sha256] = hf_xet.hash_files([str(place)])[0].hash
    store = tmp_path / "xet-store"
    hub.xet = Xet(f"local://{store}", hashes)
    return store


def test_push_and_pull(
    me: Person,
    other: Person,
    hub: LoopbackHub,
    delta: Path,
    store: Path,
    checkpoints: tuple[Path, Path],
) -> None:
    me.good("push", delta, "me/xet", "--base-id", BASE, "--base", checkpoints[0], **WITH_XET)
    assert any(place.is_file() for place in store.rglob("xorbs/default.*"))
    assert hub.count("PUT", "/cdn/") == 0
    assert hub.state.head("me/xet").files.keys() == hub.state.head("me/tuned").files.keys()
    hub.requests.clear()
    other.good("pull", "me/xet", "out", "--base", checkpoints[0], **WITH_XET)
    assert_same_files(checkpoints[1], other.folder / "out")
    assert hub.count("GET", "/xet-read-token/") == 1
    assert hub.count("GET", "/cdn/") == 0


def test_storage_that_cannot_be_reached(
    me: Person, hub: LoopbackHub, delta: Path, checkpoints: tuple[Path, Path]
) -> None:
    """As behind a proxy that lets only the Hub through."""
    error = me.bad("push", delta, "me/xet", "--base-id", BASE, "--base", checkpoints[0], **WITH_XET)
    assert "the transfer from or to repository 'me/xet' broke off" in error
    assert "if it fails again, set HF_HUB_DISABLE_XET=1" in error
    assert hub.state.head("me/xet").files.keys() <= {".gitattributes"}


def test_storage_that_has_lost_a_file(
    other: Person, store: Path, checkpoints: tuple[Path, Path]
) -> None:
    error = other.bad("pull", "me/tuned", "out", "--base", checkpoints[0], **WITH_XET)
    assert "the transfer from or to repository 'me/tuned' broke off" in error
    assert not (other.folder / "out").exists()
    shutil.rmtree(store, ignore_errors=True)
    other.good("pull", "me/tuned", "out", "--base", checkpoints[0])  # by HTTP
