"""The README's commands and Python run as they stand, one after the other."""

from __future__ import annotations

import filecmp
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from train_helpers import bert_batches, make_bert

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
# What is on the Hub is run by tests/hub.
OFFLINE = re.sub(r"(?ms)^## The Hub$.*?(?=^## )", "", README)
PYTHON = re.findall(r"```python\n(.*?)```", OFFLINE, re.DOTALL)
COMMANDS = re.findall(r"^\$ (sparsedelta .*?|diff .*?)(?: +#.*)?$", OFFLINE, re.MULTILINE)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a working folder with base/ and tuned/, two small checkpoints."""
    monkeypatch.chdir(tmp_path)
    base = make_bert(tmp_path / "base", torch.bfloat16)
    tuned: Any = transformers.AutoModelForSequenceClassification.from_pretrained(base)
    with torch.no_grad():
        tuned.bert.encoder.layer[0].output.dense.weight[0] += 1
    tuned.save_pretrained(tmp_path / "tuned")
    return tmp_path


def test_commands_do_what_the_readme_says(folder: Path) -> None:
    assert len(COMMANDS) >= 7
    for command in COMMANDS:
        words = [word.strip("'") for word in command.split()]
        if words[0] == "sparsedelta":
            words[:1] = [sys.executable, "-m", "sparsedelta"]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        assert done.returncode == 0, (command, done.stderr)
        if words[0] == "diff":
            assert done.stdout == ""


def test_python_does_what_the_readme_says(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, object] = {"batches": bert_batches(2)}
    for block in PYTHON:
        exec(block, names)
    assert "values changed" in capsys.readouterr().out
    comparison = filecmp.dircmp(folder / "tuned", folder / "rebuilt")
    assert comparison.diff_files + comparison.left_only + comparison.right_only == []
    assert (folder / "trained.sd").stat().st_size > 0


def test_links_lead_somewhere() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for link in re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), (page.name, link)


def test_no_page_has_marks_of_a_merge() -> None:
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "spec").glob("*.md")]
    marked = re.compile(r"^(<{7}|={7}|>{7})( |$)", re.MULTILINE)
    assert [page.name for page in pages if marked.search(page.read_text("utf-8"))] == []
