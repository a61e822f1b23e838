"""docs/channel.md: its Python and its commands run as they stand, one after the other."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from channel.weights import is_at, save
from click.testing import CliRunner

from sparsedelta.cli import main

PAGE = (Path(__file__).parents[2] / "docs" / "channel.md").read_text(encoding="utf-8")


def test_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        exec(block, names)
    assert capsys.readouterr().out == "3 2\n"


def test_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for step in (1, 2):
        save(tmp_path / f"step-{step}", step)
    commands = re.findall(r"^\$ sparsedelta (.*)$", PAGE, re.MULTILINE)
    assert len(commands) == 5
    for command in commands:
        found = CliRunner().invoke(main, command.split())
        assert found.exit_code == 0, (command, found.output)
    assert is_at(tmp_path / "out", 2)
