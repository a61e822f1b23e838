"""The documentation site: it builds in strict mode, asks no other server for anything, and its notebooks run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest
from docs.pages import ROOT

import sift_train
import sparsedelta
from sparsedelta.cli import COMMANDS, main
from sparsedelta.errors import by_code

SITE = ROOT / "docs" / "site"
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    """Build the site and return its pages."""
    done = subprocess.run(
        [sys.executable, SITE / "build.py"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    built = ROOT / "build" / "site"
    return {
        path.relative_to(built).as_posix(): path.read_text("utf-8")
        for path in built.rglob("*.html")
    }


def test_all_commands_errors_and_names_have_a_place(pages: dict[str, str]) -> None:
    commands = pages["reference/commands.html"]
    assert set(re.findall(r'<h3 id="([a-z]+)"', commands)) == {*COMMANDS}
    for name in COMMANDS:
        command = main.get_command(click.Context(main), name)
        assert command is not None
        options = [o for p in command.params if isinstance(p, click.Option) for o in p.opts]
        for option in {*options} - {"--debug", "-q", "--quiet"}:
            assert option in commands, (name, option)
    assert set(re.findall(r'<h2 id="([a-z_]+)"', pages["reference/errors.html"])) == {*by_code()}
    for package in (sparsedelta, sift_train):
        found = re.findall(r'<h2 id="[\w.]+?\.(\w+)"', pages[f"reference/{package.__name__}.html"])
        assert set(found) == {*package.__all__} - {"__version__"}


def test_a_page_asks_no_other_server(pages: dict[str, str]) -> None:
    loads = re.compile(
        r'<(?:script|img|iframe)[^>]*src="(https?:[^"]+)|<link[^>]*rel="?(?:stylesheet|preconnect)"?[^>]*href="(https?:[^"]+)'
    )
    assert {name: found for name, text in pages.items() if (found := loads.findall(text))} == {}


def test_a_broken_link_fails_the_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SITE))
    import build as site

    pages = tmp_path / "pages"
    pages.mkdir()
    (pages / "index.md").write_text("# One\n\n[two](#two)\n")
    config = tmp_path / "mkdocs.yml"
    config.write_text(
        f"INHERIT: {SITE / 'mkdocs.yml'}\nplugins: []\ndocs_dir: {pages}\nsite_dir: {tmp_path / 'site'}\nnav: [index.md]\n"
    )
    assert site.run_mkdocs(config) != 0
    (pages / "index.md").write_text("# One\n\n[two](#one)\n")
    assert site.run_mkdocs(config) == 0


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook(notebook: Path, tmp_path: Path) -> None:
    cells = json.loads(notebook.read_text("utf-8"))["cells"]
    assert [cell for cell in cells if cell.get("outputs")] == [], "stored without outputs"
    program = (
        "import sys, nbformat; from nbclient import NotebookClient\n"
        "notebook = nbformat.read(sys.argv[1], 4)\n"
        "NotebookClient(notebook, timeout=300, kernel_name='python3').execute()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, notebook],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_there_are_notebooks() -> None:
    assert len(NOTEBOOKS) == 2
