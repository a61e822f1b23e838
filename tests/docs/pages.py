"""The code blocks of a page in Markdown, and a way to run them all, in order, in one folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
_FENCE = re.compile(
    r"(?:^<!-- not run: (?P<reason>.+?) -->\n)?^```(?P<language>\w*)\n(?P<code>.*?)^```$",
    re.DOTALL | re.MULTILINE,
)
_RUN = {"python", "console"}


@dataclass(frozen=True)
class Block:
    """A code block.

    Attributes:
        language: what follows the fence, such as "python".
        code: its text.
        reason: why it is not run; None if it is run.
    """

    language: str
    code: str
    reason: str | None

    @property
    def is_code(self) -> bool:
        return self.language in _RUN


def blocks(text: str) -> list[Block]:
    """Return the code blocks of a page."""
    return [Block(m["language"], m["code"], m["reason"]) for m in _FENCE.finditer(text)]


def commands(code: str) -> list[tuple[str, str]]:
    """Return the commands of a console block, each with the output that the page shows; "" if it shows none."""
    found = []
    for part in re.split(r"^\$ ", code, flags=re.MULTILINE)[1:]:
        lines = part.splitlines()
        n_lines = next(n for n, line in enumerate(lines, 1) if not line.endswith("\\"))
        found.append(("\n".join(lines[:n_lines]), "\n".join(lines[n_lines:]).strip()))
    return found


def matches(shown: str, printed: str) -> bool:
    """Return whether an output is the one that a page shows; … on the page stands for anything."""
    pattern = ".*?".join(map(re.escape, shown.split("…")))
    return re.fullmatch(pattern, printed.strip(), re.DOTALL) is not None


def tools(folder: Path) -> Path:
    """Write the programs that pages call, `sparsedelta` and `python`, into a folder, and return it."""
    folder.mkdir()
    for name, options in (("python", ""), ("sparsedelta", "-m sparsedelta ")):
        path = folder / name
        path.write_text(f'#!/bin/sh\nexec "{sys.executable}" {options}"$@"\n')
        path.chmod(0o755)
    return folder


def run_command(command: str, folder: Path, path: Path) -> str:
    """Run a command line of a page with bash, and return its stdout."""
    environment = {
        **os.environ,
        "PATH": f"{path}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "HOME": str(folder),
    }
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, (command, done.stdout, done.stderr)
    return done.stdout


def run_page(text: str, folder: Path, names: dict[str, object]) -> None:
    """Run the blocks of a page in order; Python blocks share their names.

    Args:
        text: the page, in Markdown.
        folder: the working folder; the caller has changed to it.
        names: names that the Python blocks may use without defining them.
    """
    path = tools(folder / ".tools")
    (folder / "examples").symlink_to(ROOT / "examples")
    for block in blocks(text):
        if not block.is_code or block.reason is not None:
            continue
        if block.language == "python":
            exec(compile(block.code, "page", "exec"), names)
            continue
        for command, shown in commands(block.code):
            printed = run_command(command, folder, path)
            assert not shown or matches(shown, printed), (command, printed)
