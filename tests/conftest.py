"""What all tests stand on: Ctrl-C reaches the process as in a terminal, and many outputs do not wait for the disk."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

# A test run begun in the background may have inherited SIGINT ignored, and so would what it starts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Hundreds of outputs are written here, and nothing cuts the power.
UNSYNCED = {Path(__file__).parent / name for name in ("exactness", "property")}


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(request: pytest.FixtureRequest) -> None:
    if not UNSYNCED.isdisjoint(request.path.parents):
        request.getfixturevalue("monkeypatch").setattr(os, "fsync", lambda fd: None)
