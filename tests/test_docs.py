"""The README's commands and Python run as they stand, one after the other; links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from docs.pages import run_page
from helpers import assert_same_files

import sparsedelta

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
# What is on the Hub is run by tests/hub.
OFFLINE = re.sub(r"(?ms)^## The Hub$.*?(?=^## )", "", README)


def test_readme_is_one_screen_and_does_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(README.splitlines()) < 120
    monkeypatch.chdir(tmp_path)
    run_page(OFFLINE, tmp_path, {})
    assert "52,775 of 5,246,208 values changed" in capsys.readouterr().out
    assert_same_files(tmp_path / "tuned", tmp_path / "rebuilt")
    assert_same_files(tmp_path / "tuned", tmp_path / "out")
    assert sparsedelta.inspect("both.sd").nnz == 0
    assert Path("delta.sd").stat().st_size // 1000 == 66
    assert Path("trained.sd").stat().st_size > 0


@pytest.mark.parametrize(
    ("result", "figures"),
    [
        ("against.md", ["| sparsedelta | 0.689 | 361 |", "| z4ai model_delta | 1.188 | 623 |"]),
        ("speed.md", ["| all cores | 2.06 (", "| `apply --verify full` | 1.46 ("]),
        ("memory.md", ["| 1.98 | 1% | 94 |"]),
    ],
)
def test_numbers_of_the_readme_are_measured(result: str, figures: list[str]) -> None:
    text = (ROOT / "benchmarks" / "results" / result).read_text("utf-8")
    assert all(figure in text for figure in figures)
    shown = {"against.md": "**0.36 MB**", "speed.md": "`diff` **2.1 s**, `apply` **1.5 s**"}
    assert shown.get(result, "at most 94 MB") in README


def test_links_lead_somewhere() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for link in re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), (page.name, link)


def test_no_page_has_marks_of_a_merge() -> None:
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "spec").glob("*.md")]
    marked = re.compile(r"^(<{7}|={7}|>{7})( |$)", re.MULTILINE)
    assert [page.name for page in pages if marked.search(page.read_text("utf-8"))] == []


def test_citation_names_the_version() -> None:
    assert f"\nversion: {sparsedelta.__version__}\n" in (ROOT / "CITATION.cff").read_text("utf-8")


def test_snippets_for_the_hub_use_public_names() -> None:
    text = (ROOT / "docs" / "hub-library.md").read_text("utf-8")
    names = set(re.findall(r"\bsparsedelta\.(\w+)\(", text))
    assert names == {"load_model", "pull"} <= set(sparsedelta.__all__)
