"""Every code block of the README and of docs/ is run by a test, or the page says why not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from docs.pages import ROOT, Block, blocks, matches, run_page

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TUTORIALS = [page for page in PAGES if page.name.startswith("tutorial-")]
# Pages whose blocks other tests run: these must exist and name the page.
ELSEWHERE = {
    "README.md": "tests/test_docs.py",
    "algebra.md": "tests/docs/test_guides.py",
    "channel.md": "tests/channel/test_page.py",
    "engines.md": "tests/channel/test_engines_page.py",
    "hub.md": "tests/hub/test_pages.py",
    "interop.md": "tests/interop/test_page.py",
    "training.md": "tests/docs/test_guides.py",
}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_is_run_or_says_why_not(page: Path) -> None:
    left = [b for b in blocks(page.read_text("utf-8")) if b.is_code and b.reason is None]
    test = ELSEWHERE.get(page.name)
    if test is not None:
        assert left
        assert page.name in (ROOT / test).read_text("utf-8")
    elif page not in TUTORIALS:
        assert left == [], f"no test runs these blocks of {page.name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_has_a_language(page: Path) -> None:
    assert {b.language for b in blocks(page.read_text("utf-8"))} <= {
        "python",
        "console",
        "text",
        "typescript",
        "yaml",
    }


@pytest.mark.parametrize("page", TUTORIALS, ids=lambda page: page.stem)
def test_tutorial(page: Path, tmp_path: Path) -> None:
    # In a process of its own: a tutorial may start threads, and loads its own models.
    program = (
        "import sys; from pathlib import Path; from docs.pages import run_page\n"
        "run_page(Path(sys.argv[1]).read_text('utf-8'), Path.cwd(), {})\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(page)],
        cwd=tmp_path,
        env={
            **os.environ,
            "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
            "HF_HUB_OFFLINE": "1",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_block_that_fails_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AssertionError, match="false"):
        run_page("```console\n$ false\n```\n", tmp_path, {})


def test_an_output_that_differs_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AssertionError, match="echo three"):
        run_page("```console\n$ echo one\none\n$ echo three\nfour\n```\n", tmp_path, {})


def test_marks_and_output() -> None:
    text = "<!-- not run: no network -->\n```console\n$ a\n```\n\n```python\nb\n```\n"
    assert blocks(text) == [Block("console", "$ a\n", "no network"), Block("python", "b\n", None)]
    assert matches("one … three", "one two\n2 three\n")
    assert not matches("one", "one two")
