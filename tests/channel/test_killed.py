"""Real processes that are killed with -9 at random moments: publisher and follower go on from where they were."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

from channel.weights import is_at, weights

import sparsedelta

LAST = 24
ROOT = Path(__file__).parents[2]


def start(*words: str) -> subprocess.Popen[bytes]:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("worker.py")), *words],
        env=os.environ | {"PYTHONPATH": paths},
        stdout=subprocess.DEVNULL,
    )


def test_killed_at_random_moments(tmp_path: Path) -> None:
    choose = random.Random(1)
    place, out = tmp_path / "channel", tmp_path / "out.safetensors"
    commands = [
        ("publish", str(place), str(LAST)),
        ("follow", str(place), str(out), str(LAST)),
    ]
    processes = [start(*words) for words in commands]
    limits = [[3, 9, 16], [5, 12]]  # each is killed a moment after so many versions are there
    deadline = time.monotonic() + 120
    try:
        while any(process.poll() is None for process in processes):
            assert time.monotonic() < deadline
            time.sleep(0.002)
            n_versions = len([*place.glob("versions/*")])
            for index, left in enumerate(limits):
                if left and n_versions >= left[0] and processes[index].poll() is None:
                    time.sleep(choose.random() * 0.02)
                    processes[index].kill()
                    processes[index].wait()
                    processes[index] = start(*commands[index])
                    del left[0]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert limits == [[], []]
    assert [process.returncode for process in processes] == [0, 0]
    entries = sparsedelta.Channel(place).log()
    assert [entry.step for entry in entries] == list(range(LAST, 0, -1))  # none lost, none twice
    assert is_at(out, LAST)
    held = weights(0)
    follower = sparsedelta.Follower(sparsedelta.Channel(place), held)
    for entry in entries:  # every version can still be read
        follower.sync(entry.version)
        assert is_at(held, entry.step or 0)
