"""docs/json.md: the members that it documents are those that the commands print."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner
from docs.json_page import PAGE, compare

from sparsedelta.cli import COMMANDS, main

SCRIPT = Path(__file__).parents[2] / "examples" / "two_checkpoints.py"
Run = Callable[[str], Any]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command with ``--json`` in a folder with base/ and tuned/; return the object that it prints."""
    monkeypatch.chdir(tmp_path)
    subprocess.run([sys.executable, SCRIPT], check=True, capture_output=True)

    def run(line: str) -> Any:
        result = CliRunner().invoke(main, [*line.split(), "--json"])
        assert result.exit_code == 0, (line, result.output)
        return json.loads(result.stdout)

    return run


def test_every_command_with_json_is_documented() -> None:
    titles = re.findall(r"^## (.+)$", PAGE, re.MULTILINE)
    named = {name for title in titles for name in title.split(", ")}
    context = click.Context(main)
    commands = {name: main.get_command(context, name) for name in COMMANDS}
    options = {n: {o for p in c.params for o in p.opts} for n, c in commands.items() if c}
    assert named == {name for name, found in options.items() if "--json" in found}


def test_deltas(run: Run) -> None:
    compare("diff", run("diff base tuned -o delta.sd"))
    inverse = run("invert delta.sd -o undo.sd")
    compare("invert", inverse)
    stacked = run("stack delta.sd undo.sd -o both.sd")
    compare("stack", stacked)
    assert stacked["target_fingerprint"] == inverse["target_fingerprint"]
    compare("merge", run("merge base delta.sd -o merged.sd"))
    compare("inspect", run("inspect delta.sd"))
    compare("convert", run("convert delta.sd patch.st --base base --to trl-v2 --lossy"))


def test_channel(run: Run) -> None:
    first = run("publish channel base")
    compare("publish", first, run("publish channel tuned --base base --step 2"))
    compare("follow", run("follow channel out --once"))
    log = run("log channel")
    compare("log", log)
    assert log["versions"][1] == {**first, "pruned": False}
    compare("prune", run("prune channel --keep 1"))


def test_help(run: Run) -> None:
    compare("explain", run("explain"))
    compare("doctor", run("doctor"))
