"""Set-up of all tests: SIGINT works as in a terminal, and tests with many outputs write without fsync."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

# A test run that was started in the background may ignore SIGINT, and its child processes would, too.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# These tests write hundreds of outputs and need no protection from a power failure.
UNSYNCED = {Path(__file__).parent / name for name in ("exactness", "property")}


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(request: pytest.FixtureRequest) -> None:
    if not UNSYNCED.isdisjoint(request.path.parents):
        request.getfixturevalue("monkeypatch").setattr(os, "fsync", lambda fd: None)
