"""Work on all cores: results are in order, the first failure is raised, and no worker keeps running."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparsedelta.progress import Silent
from sparsedelta.tensors import parallel
from sparsedelta.tensors.parallel import Pace, run_all


@pytest.fixture(autouse=True, params=[1, 4])
def workers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(parallel, "n_workers", lambda: request.param)
    return int(request.param)


def run(work: Callable[[int], int], items: list[int], pace: Pace | None = None) -> list[int]:
    return run_all(work, items, cost=lambda item: (item + 1) << 20, pace=pace or Pace(Silent()))


def test_results_come_in_the_items_order() -> None:
    def work(item: int) -> int:
        time.sleep(item / 1000)
        return item * item

    assert run(work, [3, 1, 20, 0, 7]) == [9, 1, 400, 0, 49]
    assert run(work, []) == []


def test_costliest_begin_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "n_workers", lambda: 1)
    begun: list[int] = []

    def work(item: int) -> int:
        begun.append(item)
        return item

    assert run(work, [3, 1, 20, 0, 7]) == [3, 1, 20, 0, 7]
    assert begun == [20, 7, 3, 1, 0]


def test_one_worker_does_all_that_costs_little() -> None:
    workers: dict[int, int] = {}

    def work(item: int) -> int:
        workers[item] = threading.get_ident()
        time.sleep(0.001)
        return -item

    items = [5, 1 << 20, 3, 1 << 21, 8, 0]
    found = run_all(work, items, cost=lambda item: item, pace=Pace(Silent()))
    assert found == [-item for item in items]
    assert len({workers[item] for item in (5, 3, 8, 0)}) == 1


def test_failure_is_raised_and_stops_the_others() -> None:
    pace = Pace(Silent())
    begun: list[int] = []
    ended: list[int] = []

    def work(item: int) -> int:
        if item == 9:
            raise OSError("disk")
        begun.append(item)
        try:
            while True:
                pace.advance(1)
                time.sleep(0.001)
        finally:
            ended.append(item)

    before = threading.active_count()
    with pytest.raises(OSError, match="disk"):
        run(work, [1, 9, 2, 3, 4, 5, 6], pace)
    assert threading.active_count() == before
    assert len(ended) == len(begun)


def test_interrupt_stops_the_workers() -> None:
    pace = Pace(Silent())

    def work(item: int) -> int:
        while True:
            pace.advance(1)
            time.sleep(0.001)

    def interrupt() -> None:
        time.sleep(0.1)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    before = threading.active_count()
    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        run(work, [1, 2, 3], pace)
    thread.join()
    assert threading.active_count() == before


@pytest.mark.slow
def test_interrupts_at_random_moments() -> None:
    """The test runs in a separate process, so that it can fail even if a worker never ends."""
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, str(root / "tensors" / "interrupted.py")],
        timeout=120,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_pace_reports_progress_until_stopped() -> None:
    class Counter(Silent):
        total = 0

        def advance(self, n_bytes: int) -> None:
            self.total += n_bytes

    counter = Counter()
    pace = Pace(counter)
    pace.advance(3)
    pace.advance(4)
    pace.stop()
    with pytest.raises(parallel.Stopped):
        pace.advance(5)
    assert counter.total == 7


@pytest.mark.parametrize("progress", [True, print, "bar"])
def test_progress_that_cannot_receive_reports_is_refused(progress: Any) -> None:
    with pytest.raises(TypeError, match=r"^progress is .*, expected None or an object with"):
        Pace(progress)


def test_no_progress() -> None:
    assert isinstance(Pace(None).progress, Silent)


def test_there_is_a_core() -> None:
    assert parallel.n_workers() >= 1
