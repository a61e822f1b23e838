"""``publish``, ``follow``, ``log`` and ``prune`` on the command line."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from channel.weights import is_at, save
from click.testing import CliRunner, Result

from sparsedelta.cli import main

Run = Callable[..., Result]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return a function that runs a command in a folder with the checkpoints 1, 2 and 3."""
    monkeypatch.chdir(tmp_path)
    for step in (1, 2, 3):
        save(tmp_path / str(step), step)

    def call(*words: str, code: int = 0) -> Result:
        found = CliRunner().invoke(main, [*words])
        assert found.exit_code == code, (words, found.output, found.stderr)
        return found

    return call


def answer(found: Result) -> Any:
    return json.loads(found.stdout)


def test_publish_follow_log_and_prune(run: Run, tmp_path: Path) -> None:
    assert "version 1" in run("publish", "c", "1").stdout
    entry = answer(run("publish", "c", "2", "--base", "1", "--step", "20", "--json"))
    assert (entry["version"], entry["step"], entry["anchor"]) == (2, 20, None)
    report = answer(run("follow", "c", "out", "--once", "--json"))
    assert (report["version"], report["step"], report["before"]) == (2, 20, None)
    assert is_at(tmp_path / "out", 2)
    assert "there already" in run("follow", "c", "out", "--once").stdout
    run("publish", "c", "3", "--base", "2", "--anchor-every", "1")
    assert "version 3" in run("follow", "c", "out", "--once").stdout
    assert is_at(tmp_path / "out", 3)
    versions = answer(run("log", "c", "--json"))["versions"]
    assert [one["version"] for one in versions] == [3, 2, 1]
    assert len(run("log", "c", "-n", "2").stdout.splitlines()) == 2
    assert answer(run("prune", "c", "--keep", "1", "--json"))["leased"] == 1  # follow took a lease
    assert "deleted 0 objects" in run("prune", "c", "--keep", "3").stdout


def test_publish_of_the_same_is_a_note(run: Run) -> None:
    run("publish", "c", "1")
    assert "nothing was published" in run("publish", "c", "1").stderr
    assert len(answer(run("log", "c", "--json"))["versions"]) == 1


def test_follow_goes_to_a_version_and_runs_a_command(run: Run, tmp_path: Path) -> None:
    run("publish", "c", "1")
    run("publish", "c", "2", "--base", "1")
    command = 'echo "$SPARSEDELTA_VERSION $SPARSEDELTA_OUT" > seen'
    run("follow", "c", "out", "--version", "1", "--run", command)
    assert (tmp_path / "seen").read_text() == f"1 {tmp_path / 'out'}\n"
    assert is_at(tmp_path / "out", 1)
    assert "exit code 3" in run("follow", "c", "out", "--once", "--run", "exit 3", code=1).stderr


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("follow", "c", "out", "--once"), "no version"),
        (("publish", "c", "2", "--base", "1"), "not the head"),
        (("prune", "c",), "--keep"),
        (("publish", "https://127.0.0.1:1/c", "1"), "127.0.0.1"),
    ],
)  # fmt: skip
def test_errors_are_one_sentence(run: Run, words: tuple[str, ...], says: str) -> None:
    found = run(*words, code=2 if words[0] == "prune" else 1)
    assert says in found.stderr
    assert "Traceback" not in found.stderr


@pytest.mark.parametrize("name", ["publish", "follow", "log", "prune"])
def test_help_has_an_example(run: Run, name: str) -> None:
    assert re.search(rf"sparsedelta {name} channel/", run(name, "--help").stdout)
