"""Helpers for the tests of the command line: a folder with two checkpoints, and ways to run commands."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from click.testing import Result

import sparsedelta

Run = Callable[..., Result]
Process = Callable[..., subprocess.CompletedProcess[str]]

SOURCE = Path(sparsedelta.__file__).parents[1]
STRANGE = (
    "new.\x1b[31mred[/]\u202e:warning:"  # characters that a terminal interprets, and markup of rich
)


@dataclass(frozen=True)
class Workplace:
    """A folder that holds the checkpoints ``base`` and ``target``."""

    path: Path

    @property
    def base(self) -> Path:
        return self.path / "base"

    @property
    def target(self) -> Path:
        return self.path / "target"

    @property
    def delta(self) -> Path:
        return self.path / "delta.sd"

    @property
    def out(self) -> Path:
        return self.path / "out"

    def save_delta(self) -> Path:
        """Write the delta from base to target."""
        with sparsedelta.diff(self.base, self.target, base_id="org/model@4f1e2d9") as delta:
            delta.save(self.delta)
        return self.delta


def environment(**variables: str) -> dict[str, str]:
    """Return the environment for a process that runs the command line."""
    kept = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    return {**kept, "PYTHONPATH": str(SOURCE), **variables}


def command(*arguments: str | Path) -> list[str]:
    """Return a command line that runs the package in its own process."""
    return [sys.executable, "-W", "error", "-m", "sparsedelta", *map(str, arguments)]
