"""Real processes that are killed with -9 at random moments: publisher and follower go on from where they were."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from channel import worker
from channel.weights import is_at, save, weights

import sparsedelta
from sparsedelta.channel.publisher import publish_checkpoint

LAST = 24
ROOT = Path(__file__).parents[2]


def environment() -> dict[str, str]:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    return os.environ | {"PYTHONPATH": paths}


def test_killed_at_random_moments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", environment()["PYTHONPATH"])
    processes_of = multiprocessing.get_context("forkserver")  # torch is imported once
    processes_of.set_forkserver_preload(["channel.worker"])
    choose = random.Random(1)
    place, out = tmp_path / "channel", tmp_path / "out.safetensors"
    starts: list[Callable[[], BaseProcess]] = [
        lambda: processes_of.Process(target=worker.publish, args=(place, LAST)),
        lambda: processes_of.Process(target=worker.follow, args=(place, out, LAST)),
    ]
    processes = [start() for start in starts]
    for process in processes:
        process.start()
    limits = [[3, 9, 16], [5, 12]]  # each is killed a moment after so many versions are there
    deadline = time.monotonic() + 120
    try:
        while any(process.is_alive() for process in processes):
            assert time.monotonic() < deadline
            time.sleep(0.002)
            n_versions = len([*place.glob("versions/*")])
            for index, left in enumerate(limits):
                if left and n_versions >= left[0] and processes[index].is_alive():
                    time.sleep(choose.random() * 0.02)
                    processes[index].kill()
                    processes[index].join()
                    processes[index] = starts[index]()
                    processes[index].start()
                    del left[0]
    finally:
        for process in processes:
            process.kill()
            process.join()
    assert limits == [[], []]
    assert [process.exitcode for process in processes] == [0, 0]
    entries = sparsedelta.Channel(place).log()
    assert [entry.step for entry in entries] == list(range(LAST, 0, -1))  # none lost, none twice
    assert is_at(out, LAST)
    held = weights(0)
    follower = sparsedelta.Follower(sparsedelta.Channel(place), held)
    for entry in entries:  # every version can still be read
        follower.sync(entry.version)
        assert is_at(held, entry.step or 0)


def test_follow_keeps_up_until_it_is_ended(tmp_path: Path) -> None:
    channel = sparsedelta.Channel(tmp_path / "channel")
    one, two = save(tmp_path / "one", 1), save(tmp_path / "two", 2)
    publish_checkpoint(channel, one)
    out = tmp_path / "out"
    words = ["follow", str(tmp_path / "channel"), str(out), "--interval", "0.05", "--json"]
    process = subprocess.Popen(
        [sys.executable, "-m", "sparsedelta", *words], stdout=subprocess.PIPE, env=environment()
    )
    assert process.stdout
    try:
        assert json.loads(process.stdout.readline())["version"] == 1
        publish_checkpoint(channel, two, base=one)
        report = json.loads(process.stdout.readline())
        assert (report["before"], report["version"]) == (1, 2)
        assert is_at(out, 2)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
