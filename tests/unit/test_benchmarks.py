"""The benchmarks run and find what they are to measure; no time or size is asserted."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the benchmarks read /proc")
def test_speed_benchmark_writes_its_tables_and_cleans_up(tmp_path: Path) -> None:
    result = tmp_path / "speed.md"
    work = tmp_path / "work"
    options = ["--gb", "0.01", "--rounds", "1", "--memory-gb", "0.01", "--no-shm"]
    script = ROOT / "benchmarks" / "speed.py"
    done = subprocess.run(
        [sys.executable, script, *options, "--work-dir", work, "--result", result],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    tables = result.read_text("utf-8")
    for row in ("| all cores |", "| one core |", "| `cp` |", "| `apply --verify full` |"):
        assert tables.count("\n" + row) == 1
    assert "## Peak anonymous memory" in tables
    assert not work.exists()
