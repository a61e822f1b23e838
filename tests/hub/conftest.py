"""A Hub on the loopback interface that holds a base, and somebody who uses it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hub.hub_helpers import BASE, BASE_CARD, TOKEN, Person, make_checkpoints, publish, save_delta
from hub.hub_server import LoopbackHub


@pytest.fixture
def hub() -> Iterator[LoopbackHub]:
    """Run a Hub that knows one user."""
    with LoopbackHub().running() as running:
        running.state.users[TOKEN] = "me"
        yield running


@pytest.fixture
def base_commit(hub: LoopbackHub, checkpoints: tuple[Path, Path]) -> str:
    """Put the base on the Hub."""
    return publish(hub, BASE, checkpoints[0], BASE_CARD)


@pytest.fixture
def checkpoints(tmp_path: Path) -> tuple[Path, Path]:
    """Write a base and its fine-tune."""
    return make_checkpoints(tmp_path)


@pytest.fixture
def delta(tmp_path: Path, checkpoints: tuple[Path, Path]) -> Path:
    """Write the delta between them, which does not say where the base is."""
    return save_delta(*checkpoints, tmp_path / "delta.sd")


@pytest.fixture
def me(hub: LoopbackHub, tmp_path: Path, base_commit: str) -> Person:
    """Return the user, with an empty cache."""
    return Person(hub, tmp_path)


@pytest.fixture
def other(hub: LoopbackHub, tmp_path: Path) -> Person:
    """Return somebody without a token and with a cache of their own."""
    folder = tmp_path / "other"
    folder.mkdir()
    return Person(hub, folder, token=None)
