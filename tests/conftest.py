"""Set-up of all tests: signals work as in a terminal, and tests with many outputs write without fsync."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from rank_helpers import RankPool

# A test run that was started in the background or by nohup may ignore these, and its child processes would, too.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

# Tests run at the same time, one process for each core: threads of OpenMP, which spin while they wait, would compete with
# those of the other tests. Child processes inherit this.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# These tests write hundreds of outputs and need no protection from a power failure.
UNSYNCED = {Path(__file__).parent / name for name in ("exactness", "property")}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--deep",
        action="store_true",
        help="draw 20 times as many examples for property tests, other ones in every run",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--deep"):
        os.environ["SPARSEDELTA_DEEP"] = "1"  # read when the tests are imported, also by workers


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(request: pytest.FixtureRequest) -> None:
    if not UNSYNCED.isdisjoint(request.path.parents):
        request.getfixturevalue("monkeypatch").setattr(os, "fsync", lambda fd: None)


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    """Two ranks for the tests of a module."""
    import torch
    from rank_helpers import RankPool

    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the ranks, since sums depend on it
    made = RankPool(2)
    yield made
    made.close()
    torch.set_num_threads(n_threads)
