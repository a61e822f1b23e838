"""Deltas that a program leaves open cost no warning and no traceback when it ends."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from helpers import noise, write_file

MAKE = {
    "load": "sparsedelta.load('one.sd')",
    "diff": "sparsedelta.diff('base', 'target')",
    "invert": "sparsedelta.invert('one.sd')",
    "stack": "sparsedelta.stack('one.sd', 'two.sd')",
    "merge": "sparsedelta.merge('base', 'one.sd', 'both.sd')",
}


@pytest.mark.parametrize("libraries", ["sparsedelta", "torch, sparsedelta", "sparsedelta, torch"])
def test_deltas_left_open(libraries: str, tmp_path: Path) -> None:
    tensor = noise("F32", 4000)
    for name, positions in (("base", ()), ("target", (1, 9)), ("final", (1, 9, 30))):
        write_file(tmp_path / name / "model.safetensors", {"w": tensor.changed(*positions)})
    lines = [f"import {libraries}"]
    for name, old, new in (
        ("one", "base", "target"),
        ("two", "target", "final"),
        ("both", "base", "final"),
    ):
        lines.append(f"sparsedelta.diff({old!r}, {new!r}).save('{name}.sd')")
    lines += [f"{name} = {call}" for name, call in MAKE.items()]
    lines += [
        "held = [load, diff, invert, stack, merge]; held.append(held)  # a cycle, too",
        "print('end')",
    ]
    command = [
        sys.executable,
        "-X",
        "dev",
        "-W",
        "ignore::DeprecationWarning",
        "-c",
        "\n".join(lines),
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "end\n"), done.stderr
    assert "Exception ignored" not in done.stderr
    assert "Traceback" not in done.stderr
