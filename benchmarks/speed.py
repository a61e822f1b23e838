"""Measures the speed of ``diff`` and ``apply`` on a sharded bf16 checkpoint, beside ``cp -r``.

    python benchmarks/speed.py [--gb 2] [--rounds 5]

The commands are measured as a whole: the times include start-up, digests, writing and syncing.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from measuring import (
    VERIFY,
    Command,
    Contender,
    Run,
    apply_command,
    compare,
    diff_command,
    first_value,
    median,
    options_for,
    ratio_and_range,
    ratio_of_fastest,
    run,
    seconds_and_range,
    table,
    tree_bytes,
    warm,
    work_folder,
    write_result,
)
from synthetic import CHANGED, make_pair

SHARED_MEMORY = Path("/dev/shm")


def measure_diff(base: Path, target: Path, n_rounds: int) -> str:
    """Return a table of the time of ``diff`` on all cores and on one."""
    output = base.parent / "out.sd"
    command = diff_command(base, target, output)
    core = str(min(os.sched_getaffinity(0)))
    runs = compare(
        {
            "all cores": Contender([command], output),
            "one core": Contender([["taskset", "-c", core, *command]], output),
        },
        n_rounds,
    )
    gigabytes = (tree_bytes(base) + tree_bytes(target)) / 1e9
    return table(
        ["diff", "wall s", "CPU s", "cores used", "GB/s", "GB/s per core"],
        [[name, *diff_cells(group, gigabytes)] for name, group in runs.items()],
    )


def diff_cells(runs: Sequence[Run], gigabytes: float) -> list[str]:
    """Return the cells of one row of the table of ``diff``."""
    wall, cpu = median(r.seconds for r in runs), median(r.cpu_seconds for r in runs)
    numbers = (cpu, cpu / wall, gigabytes / wall, gigabytes / cpu)
    return [seconds_and_range(runs), *(f"{number:.2f}" for number in numbers)]


def measure_apply(base: Path, delta: Path, n_rounds: int, *, synced: bool) -> str:
    """Return a table of the time of ``apply`` and of ``cp -r``, each writing a new folder.

    Args:
        base: a checkpoint.
        delta: a delta of this base.
        n_rounds: number of counted rounds.
        synced: also measure ``cp -r`` followed by ``sync``, since ``apply`` syncs its output too.
    """
    out = base.parent / "out"
    names = [path.name for path in sorted(base.iterdir())]
    copy: Command = ["cp", "-r", base, out]
    contenders = {"`cp`": Contender([copy], out)}
    if synced:
        sync: Command = ["sync", *(out / name for name in names)]
        contenders["`cp`, `sync`"] = Contender([copy, sync], out)
    for verify in VERIFY:
        command = apply_command(base, delta, out, verify)
        contenders[f"`apply --verify {verify}`"] = Contender([command], out)
    return apply_table(compare(contenders, n_rounds))


def apply_table(runs: Mapping[str, Sequence[Run]]) -> str:
    """Return the runs as a table, with the ratio to each kind of copy."""
    copies = [name for name in runs if name.startswith("`cp")]
    return table(
        ["", "wall s", "CPU s", *(f"× {name}{of}" for name in copies for of in ("", ", fastest"))],
        [
            [
                name,
                seconds_and_range(group),
                f"{median(r.cpu_seconds for r in group):.2f}",
                *(
                    ratio(group, runs[copy])
                    for copy in copies
                    for ratio in (ratio_and_range, ratio_of_fastest)
                ),
            ]
            for name, group in runs.items()
        ],
    )


def measure_speed(folder: Path, gigabytes: float, n_rounds: int) -> list[str]:
    """Return the sections on speed, for checkpoints made in ``folder``."""
    base, target = make_pair(folder, round(gigabytes * 1e9))
    warm(base, target)
    on_disk = measure_diff(base, target, n_rounds)
    delta = base.parent / "delta.sd"
    run(diff_command(base, target, delta))
    synced = SHARED_MEMORY not in folder.parents
    applied = measure_apply(base, delta, n_rounds, synced=synced)
    n_changed = f"{CHANGED:.0%} of the values changed; delta of {delta.stat().st_size / 1e6:.1f} MB"
    size = f"Base of {tree_bytes(base) / 1e9:.2f} GB, {n_changed}. {n_rounds} rounds."
    return [size, on_disk, applied]


def shared_memory_holds(n_bytes: float) -> bool:
    """Return whether shared memory has room for this many bytes without swapping."""
    if not SHARED_MEMORY.is_dir():
        return False
    available = int(first_value(Path("/proc/meminfo"), "MemAvailable").split()[0]) * 1024
    return min(available, shutil.disk_usage(SHARED_MEMORY).free) >= n_bytes


def main() -> int:
    """Run the benchmark."""
    parser = options_for(__doc__, "speed.md")
    parser.add_argument("--gb", type=float, default=2.0, help="size of the base, in GB")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-shm", action="store_true", help="do not also measure on /dev/shm")
    options = parser.parse_args()
    sections = []
    with work_folder(options.work_dir, keep=options.keep) as work:
        sections += ["## On disk, read from the page cache"]
        with work_folder(work / "disk", keep=options.keep) as folder:
            sections += measure_speed(folder, options.gb, options.rounds)
        if not options.no_shm and shared_memory_holds(5 * options.gb * 1e9):
            sections += [f"## In memory, on {SHARED_MEMORY}"]
            with work_folder(SHARED_MEMORY / "sparsedelta-benchmark", keep=options.keep) as folder:
                sections += measure_speed(folder, options.gb, options.rounds)
        write_result(options.result, "Speed", sections, where=work)
    return 0


if __name__ == "__main__":
    sys.exit(main())
