"""Settings of all tests: Ctrl-C works as in a terminal, and writing does not wait for the disk."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

# A test run in the background may inherit an ignored SIGINT, and pass it to its subprocesses.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Tests write hundreds of outputs, and need no safety against a loss of power.
UNSYNCED = {Path(__file__).parent / name for name in ("exactness", "property")}


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(request: pytest.FixtureRequest) -> None:
    if not UNSYNCED.isdisjoint(request.path.parents):
        request.getfixturevalue("monkeypatch").setattr(os, "fsync", lambda fd: None)
