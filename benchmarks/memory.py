"""Measures the peak anonymous memory of ``diff`` and ``apply``, by size and share of changes.

python benchmarks/memory.py [--gb 2 8]
"""

from __future__ import annotations

import sys
from pathlib import Path

from measuring import (
    VERIFY,
    apply_command,
    diff_command,
    options_for,
    peak_memory,
    run,
    table,
    tree_bytes,
    work_folder,
    write_result,
)
from synthetic import CHANGED, make_pair


def measure(base: Path, target: Path) -> list[str]:
    """Return the peaks of ``diff`` and each ``apply`` in MB, as cells."""
    delta, out = base.parent / "delta.sd", base.parent / "out"
    peaks = [peak_memory(diff_command(base, target, delta), delta)]
    run(diff_command(base, target, delta))
    peaks += [peak_memory(apply_command(base, delta, out, v), out) for v in VERIFY]
    return [f"{peak / 1e6:.0f}" for peak in peaks]


def main() -> int:
    """Run the benchmark."""
    parser = options_for(__doc__, "memory.md")
    parser.add_argument("--gb", type=float, nargs="+", default=[2.0, 8.0], help="sizes of the base")
    options = parser.parse_args()
    rows = []
    with work_folder(options.work_dir, keep=options.keep) as work:
        cases = [(gigabytes, CHANGED) for gigabytes in options.gb] + [(min(options.gb), 1.0)]
        for gigabytes, changed in cases:
            with work_folder(work / f"{gigabytes:g}-{changed:g}", keep=options.keep) as folder:
                pair = make_pair(folder, round(gigabytes * 1e9), changed)
                rows.append([f"{tree_bytes(pair[0]) / 1e9:.2f}", f"{changed:.0%}", *measure(*pair)])
        columns = ["base, GB", "changed", "`diff`", *(f"`apply --verify {v}`" for v in VERIFY)]
        write_result(
            options.result, "Peak anonymous memory, MB", [table(columns, rows)], where=work
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
