"""Builds the documentation site: copies the pages, writes the generated ones, and runs mkdocs in strict mode.

    python docs/site/build.py

The pages keep their places relative to one another, so that their links work on the site as in the repository.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import reference

ROOT = Path(__file__).resolve().parents[2]
PAGES = ROOT / "build" / "site-pages"
CONFIG = Path(__file__).with_name("mkdocs.yml")
_LINK = re.compile(r"\]\((?![a-z]+:|#)([^)#\s]+)")


def sources() -> list[Path]:
    """Return the pages of the repository that are on the site, and everything in docs/ that a page may need."""
    found = [*ROOT.glob("*.md"), *ROOT.glob("spec/*.md"), *ROOT.glob("examples/*.md")]
    found += [ROOT / "benchmarks" / "README.md", *ROOT.glob("benchmarks/results/*.md")]
    found += [
        path
        for path in ROOT.glob("docs/**/*")
        if path.is_file() and CONFIG.parent not in path.parents
    ]
    return sorted(found)


def linked(pages: Iterable[Path]) -> set[Path]:
    """Return the files of the repository that pages link to, such as sources and pictures."""
    found = set()
    for page in pages:
        if page.suffix == ".md":
            text = page.read_text(encoding="utf-8")
            found |= {(page.parent / link).resolve() for link in _LINK.findall(text)}
    return {path for path in found if path.is_file() and path.is_relative_to(ROOT)}


def copy(path: Path) -> None:
    """Copy a file to its place on the site. The README is the first page."""
    place = PAGES / path.relative_to(ROOT)
    if path == ROOT / "README.md":
        place = PAGES / "index.md"
    place.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".md":
        place.write_text(_for_site(path.read_text(encoding="utf-8"), path), encoding="utf-8")
    else:
        shutil.copyfile(path, place)


def _for_site(text: str, page: Path) -> str:
    """Return the text of a page without links to folders and hidden files, which the site does not have."""

    def plain_if_absent(match: re.Match[str]) -> str:
        place = (page.parent / match[2]).resolve()
        is_hidden = any(part.startswith(".") for part in place.relative_to(ROOT).parts)
        return match[1] if is_hidden or place.is_dir() else match[0]

    return re.sub(r"\[([^]]+)\]\((?![a-z]+:|#)([^)#\s]+)\)", plain_if_absent, text)


def write_generated() -> None:
    """Write the pages that come from the code."""
    folder = PAGES / "reference"
    folder.mkdir(parents=True)
    pages = {
        "commands": reference.commands_page(),
        "errors": reference.errors_page(),
        "sparsedelta": reference.package_page("sparsedelta"),
        "distributed": reference.package_page("sparsedelta.distributed"),
        "sift_train": reference.package_page("sift_train"),
    }
    for name, text in pages.items():
        (folder / f"{name}.md").write_text(text, encoding="utf-8")


def main() -> int:
    """Build the site into build/site; return the exit code of mkdocs."""
    shutil.rmtree(PAGES, ignore_errors=True)
    pages = sources()
    for path in {*pages, *linked(pages)}:
        copy(path)
    write_generated()
    return run_mkdocs(CONFIG)


def run_mkdocs(config: Path) -> int:
    """Build a site and return the exit code. Warnings, such as of a broken link, are errors.

    ``--quiet`` would hide warnings from the strict mode, too.
    """
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(config)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
