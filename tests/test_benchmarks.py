"""The benchmarks run and find what they are to measure; no time or size is asserted."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[1] / "benchmarks"
OPERATIONS = "load inspect verify apply stack invert merge live".split()
OPERATION_ROWS = tuple(f"| {name} |" for name in OPERATIONS)
SPEED_ROWS = ("| all cores |", "| one core |", "| `cp` |", "| `apply --verify full` |")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the benchmarks read /proc")
@pytest.mark.parametrize(
    ("script", "options", "rows"),
    [
        ("speed.py", ["--gb", "0.01", "--rounds", "1", "--no-shm"], SPEED_ROWS),
        ("memory.py", ["--gb", "0.01"], ("| 0.01 | 1% |", "| 0.01 | 100% |")),
        ("mutations.py", ["--seconds", "3"], OPERATION_ROWS),
    ],
)
def test_benchmark_writes_its_tables_and_cleans_up(
    tmp_path: Path, script: str, options: list[str], rows: tuple[str, ...]
) -> None:
    result, work = tmp_path / "result.md", tmp_path / "work"
    done = subprocess.run(
        [sys.executable, SCRIPTS / script, *options, "--work-dir", work, "--result", result],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    tables = result.read_text("utf-8")
    for row in rows:
        assert tables.count("\n" + row) == 1
    assert not work.exists()
