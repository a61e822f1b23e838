"""The code of other projects, where it is installed: it reads our files, and we read its files."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.nightly
@pytest.mark.skipif(
    find_spec("basilica") is None, reason="the packages of `make interop` are not installed"
)
def test_no_tensor_differs() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "foreign_forms.py", "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for number in (1, 2, 3):
        assert f"| pulsept1 {number} | yes | yes |" in done.stdout
