"""``examples/channel_engine.py``: every answer of an engine is that of the version that it names, also after a kill."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from channel.test_killed import environment

import sparsedelta

SCRIPT = Path(__file__).parents[2] / "examples" / "channel_engine.py"
N_STEPS = 12


def example() -> Any:
    spec = importlib.util.spec_from_file_location("channel_engine", SCRIPT)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_answers_are_those_of_the_versions(tmp_path: Path) -> None:
    channel = tmp_path / "channel"
    processes = []

    def start(role: str, *more: str) -> subprocess.Popen[str]:
        command = [sys.executable, str(SCRIPT), role, "--channel", str(channel), *more]
        process = subprocess.Popen(
            command, env=environment(), cwd=tmp_path, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        processes.append(process)
        return process

    def ask(port: str) -> tuple[int | None, list[int]]:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/?prompt=abc", timeout=60) as reply:
            found = json.load(reply)
        return found["version"], found["tokens"]

    def wait(until: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 300
        while not until():
            assert time.monotonic() < deadline
            time.sleep(0.05)

    try:
        engine = start("serve", "--port", "0", "--interval", "0.02")
        assert engine.stdout
        port = engine.stdout.readline().split()[1]
        answers = [ask(port)]
        assert answers[0][0] is None  # it has no version yet
        trainer = start("train", "--steps", str(N_STEPS))
        assert trainer.stdout
        for line in trainer.stdout:
            answers.append(ask(port))
            if line.startswith("step 4 "):
                break
        trainer.kill()
        trainer.wait()
        trainer = start("train", "--steps", str(N_STEPS))
        assert trainer.stdout
        for _ in trainer.stdout:
            answers.append(ask(port))
        assert trainer.wait() == 0
        head = sparsedelta.Channel(channel).head()
        assert head
        assert head.step == N_STEPS
        wait(lambda: ask(port)[0] == head.version)
        answers.append(ask(port))
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    module = example()
    model = module.make_model(2).eval()
    follower = sparsedelta.Follower(sparsedelta.Channel(channel), model)
    answered = {version: tokens for version, tokens in answers if version}
    assert len(answered) > 1
    for version, tokens in answered.items():
        follower.sync(version)
        assert module.answer(model, follower, "abc") == {"version": version, "tokens": tokens}
    assert all(answered[version] == tokens for version, tokens in answers if version)
