"""Fixtures: a Hub on the loopback interface that holds a base, and people who use it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hub.hub_helpers import (
    BASE,
    BASE_CARD,
    TOKEN,
    TUNED,
    Person,
    Shell,
    make_checkpoints,
    publish,
    save_delta,
)
from hub.hub_server import LoopbackHub


@pytest.fixture(scope="session")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    """Return the process that runs command lines."""
    shell = Shell(tmp_path_factory.mktemp("shell"))
    yield shell
    shell.close()


@pytest.fixture
def hub() -> Iterator[LoopbackHub]:
    """Run a Hub that has one user."""
    with LoopbackHub().running() as running:
        running.state.users[TOKEN] = "me"
        yield running


@pytest.fixture
def base_commit(hub: LoopbackHub, checkpoints: tuple[Path, Path]) -> str:
    """Upload the base to the Hub; return its commit."""
    return publish(hub, BASE, checkpoints[0], BASE_CARD)


@pytest.fixture
def checkpoints(tmp_path: Path) -> tuple[Path, Path]:
    """Write a base and a fine-tune of it; return both."""
    return make_checkpoints(tmp_path)


@pytest.fixture
def delta(tmp_path: Path, checkpoints: tuple[Path, Path]) -> Path:
    """Write the delta between them, which does not name the repository of the base."""
    return save_delta(*checkpoints, tmp_path / "delta.sd")


@pytest.fixture(scope="session")
def pushed_files() -> dict[str, bytes]:
    """Return the files that a push of the delta uploads; empty until a test has pushed it."""
    return {}


@pytest.fixture
def pushed(
    me: Person, hub: LoopbackHub, shell: Shell, delta: Path, pushed_files: dict[str, bytes]
) -> str:
    """Upload the files of a push of the delta, recorded from the first push; return the commit."""
    if not pushed_files:
        pusher = Person(hub, me.folder / "pusher", shell)
        pusher.folder.mkdir()
        pusher.good("push", delta, TUNED, "--base-id", BASE)
        files = hub.state.head(TUNED).files
        pushed_files.update({path: blob.data for path, blob in files.items()})
    hub.state.add_repo(TUNED, pushed_files)
    hub.requests.clear()
    return hub.state.head(TUNED).oid


@pytest.fixture
def me(hub: LoopbackHub, shell: Shell, tmp_path: Path, base_commit: str) -> Person:
    """Return the user, with an empty cache."""
    return Person(hub, tmp_path, shell)


@pytest.fixture
def other(hub: LoopbackHub, shell: Shell, tmp_path: Path) -> Person:
    """Return another person, with no token and an empty cache."""
    folder = tmp_path / "other"
    folder.mkdir()
    return Person(hub, folder, shell, token=None)
