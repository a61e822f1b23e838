"""docs/interop.md: its table is the one that the code gives, and its commands run."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from interop.interop_helpers import plain_pair

import sparsedelta

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "interop.md").read_text(encoding="utf-8")


def test_table_is_that_of_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import foreign_forms as benchmark

    begin, end = "<!-- abilities -->\n", "\n<!-- end of abilities -->"
    found = PAGE[PAGE.index(begin) + len(begin) : PAGE.index(end)]
    assert found == "\n".join(benchmark.abilities())


def test_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = plain_pair(tmp_path)
    monkeypatch.chdir(tmp_path)
    sparsedelta.convert(given.delta, "patch.safetensors", base="base", write_as="trl-v1")
    sparsedelta.convert(given.delta, "adapter", base="base", write_as="shira")
    given.delta.unlink()
    for step, value in ((100, 0.0), (200, 1.0)):
        Path(f"step-{step}").mkdir()
        for name in (f"step-{step}.pt", f"step-{step}/model.pt"):
            torch.save({"w": torch.full((100,), value)}, name)
    commands = re.findall(r"^\$ (sparsedelta .*?)(?: {2,}#.*)?$", PAGE, re.MULTILINE)
    elsewhere = ("org/model", ".gguf", ".yml")
    local = [one for one in commands if not any(part in one for part in elsewhere)]
    assert len(local) == 11
    for command in local:
        words = shlex.split(command)[1:]
        if words[0] == "convert" and Path(words[2]).is_file():
            Path(words[2]).unlink()
        done = subprocess.run(
            [sys.executable, "-m", "sparsedelta", *words],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, (command, done.stderr)
