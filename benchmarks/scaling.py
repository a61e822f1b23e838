"""Measures the time and memory of ``diff`` and ``apply`` by checkpoint size, beside ``cp -r``.

    python benchmarks/scaling.py [--gb 0.1 0.4 1.6 6.4 16]

The checkpoints of each size are removed before the next size: the disk must hold three times the largest.
Up to a quarter of the machine's memory the files are read from the page cache, above it from the disk.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from measuring import (
    Command,
    Contender,
    apply_command,
    compare,
    diff_command,
    median,
    options_for,
    peak_memory,
    run,
    table,
    tree_bytes,
    warm,
    work_folder,
    write_result,
)
from synthetic import make_pair

SIZES = (0.1, 0.4, 1.6, 6.4, 16.0)


def measure(folder: Path, gigabytes: float, n_rounds: int) -> Iterator[dict[str, Any]]:
    """Yield each command's median seconds and peak memory at one size."""
    base, target = make_pair(folder, round(gigabytes * 1e9))
    delta, out, spare = (folder / name for name in ("delta.sd", "out", "spare.sd"))
    warm(base, target)
    run(diff_command(base, target, delta))
    copy: Command = ["cp", "-r", base, out]
    commands = {
        "diff": (diff_command(base, target, spare), spare),
        "apply": (apply_command(base, delta, out, "full"), out),
        "cp": (copy, out),
    }
    contenders = {name: Contender([command], made) for name, (command, made) in commands.items()}
    for name, runs in compare(contenders, n_rounds).items():
        peak = 0 if name == "cp" else peak_memory(*commands[name])
        yield {
            "gb": tree_bytes(base) / 1e9,
            "what": name,
            "seconds": median(r.seconds for r in runs),
            "cpu_seconds": median(r.cpu_seconds for r in runs),
            "peak_mb": peak / 1e6,
        }


def main() -> int:
    """Run the benchmark."""
    parser = options_for(__doc__, "scaling.md")
    parser.add_argument("--gb", type=float, nargs="+", default=SIZES, help="sizes of the base")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    found: list[dict[str, Any]] = []
    with work_folder(options.work_dir, keep=options.keep) as work:
        for gigabytes in options.gb:
            with work_folder(work / f"{gigabytes:g}", keep=options.keep) as folder:
                found += measure(folder, gigabytes, options.rounds)
        columns = ("command, base", "s", "CPU s", "GB of base a second", "peak MB")
        rows = [
            (
                f"`{row['what']}`, {row['gb']:.2f} GB",
                f"{row['seconds']:.2f}",
                f"{row['cpu_seconds']:.2f}",
                f"{row['gb'] / row['seconds']:.2f}",
                f"{row['peak_mb']:.0f}" if row["peak_mb"] else "",
            )
            for row in sorted(found, key=lambda row: (row["what"], row["gb"]))
        ]
        write_result(options.result, "Time and memory by size", [table(columns, rows)], where=work)
    lines = "".join(json.dumps(row) + "\n" for row in found)
    options.result.with_suffix(".jsonl").write_text(lines, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
