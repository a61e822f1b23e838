"""``OpenFile``: the file is closed exactly once, by ``close`` or when the interpreter ends."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from helpers import noise, write, write_file

import sparsedelta
from sparsedelta.stores.local import OpenFile


def test_reads_ranges_until_closed(tmp_path: Path) -> None:
    file = OpenFile(write(tmp_path / "f", b"abcdef"))
    assert (file.n_bytes, file.read(2, 3), file.read(4, 9), file.read(6, 1)) == (
        6,
        b"cde",
        b"ef",
        b"",
    )
    file.close()
    file.close()
    with pytest.raises(ValueError, match="is closed; load the delta again"):
        file.read(0, 1)


@pytest.mark.parametrize("made", ["sparsedelta.load('d.sd')", "sparsedelta.diff('base', 'target')"])
@pytest.mark.parametrize("first", ["", "import torch"])
def test_delta_left_open_ends_without_a_word(made: str, first: str, tmp_path: Path) -> None:
    tensor = noise("BF16", 20, 20)
    write_file(tmp_path / "base", {"w": tensor})
    write_file(tmp_path / "target", {"w": tensor.changed(1, 2)})
    with sparsedelta.diff(tmp_path / "base", tmp_path / "target") as delta:
        delta.save(tmp_path / "d.sd")
    script = f"{first}\nimport sparsedelta\ndelta = {made}\nprint(delta.nnz)"
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], cwd=tmp_path, capture_output=True, text=True
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "2\n", "")
