"""Compares ``sparsedelta merge`` with mergekit: time, peak memory and results.

    python benchmarks/merge.py --mergekit-python /path/to/python [--gb 1] [--rounds 3]

mergekit reads the full checkpoints, sparsedelta the base and the deltas. The times of writing these deltas
and of applying the merged delta are shown too. mergekit computes in float32 (``dtype: float32``) and
writes bf16, as sparsedelta does. It needs its own environment.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from measuring import (
    CLI,
    Command,
    Run,
    options_for,
    ratio_and_range,
    remove,
    run,
    seconds_and_range,
    table,
    tree_bytes,
    warm,
    work_folder,
    write_result,
)
from variants import make_base, make_variant

from sparsedelta.files.checkpoint import Checkpoint, Tensor

WEIGHTS = (0.7, 0.3)
ONE_CORE = (
    "taskset",
    "-c",
    "0",
)  # one thread, since several would wait for each other under other load
# By name: mergekit's method and parameters, and the options of sparsedelta.
METHODS = {
    "linear": ("linear", {}, []),
    "task arithmetic": ("task_arithmetic", {}, ["--method", "task-arithmetic"]),
    "TIES, density 0.5": ("ties", {"density": 0.5}, ["--method", "ties", "--density", "0.5"]),
    "TIES, density 0.005": ("ties", {"density": 0.005}, ["--method", "ties", "--density", "0.005"]),
    "DARE, density 0.5": ("dare_linear", {"density": 0.5}, ["--method", "dare", "--density", "0.5"]),
    "DARE-TIES, density 0.5": (
        "dare_ties", {"density": 0.5}, ["--method", "dare-ties", "--density", "0.5"],
    ),
}  # fmt: skip


def mergekit_command(
    python: Path,
    method: str,
    parameters: dict[str, float],
    base: Path,
    targets: list[Path],
    out: Path,
) -> Command:
    """Write mergekit's configuration, and return the command that merges full checkpoints."""
    models = [
        {"model": str(target), "parameters": {"weight": weight, **parameters}}
        for target, weight in zip(targets, WEIGHTS, strict=True)
    ]
    config = {
        "merge_method": method,
        "models": models,
        "dtype": "float32",
        "out_dtype": "bfloat16",
        **({} if method == "linear" else {"base_model": str(base)}),
    }
    path = out.with_suffix(".yml")
    path.write_text(json.dumps(config))
    return [*ONE_CORE, python, "-m", "mergekit.scripts.run_yaml", path, out]


def differences(base: Path, left: Path, right: Path) -> list[str]:
    """Return cells: the number of values that a result changes, and of those that differ."""
    n_changed = n_differ = n_far = total = 0
    sums = [0.0, 0.0]
    with Checkpoint(base) as old, Checkpoint(left) as one, Checkpoint(right) as other:
        others = [{t.name: t for t in c.tensors.values()} for c in (one, other)]
        for tensor in old.tensors.values():
            before = _places(tensor)
            a, b = (_places(tensors[tensor.name]) for tensors in others)
            total += tensor.spec.n_elements
            n_changed += int(np.count_nonzero((a != before) | (b != before)))
            n_differ += int(np.count_nonzero(a != b))
            n_far += int(np.count_nonzero(np.abs(a - b) > 1))
            for number, made in enumerate((a, b)):
                sums[number] += float(np.abs(_values(made) - _values(before)).sum(dtype=np.float64))
    ratio = sums[0] / sums[1]
    return [f"{total:,}", f"{n_changed:,}", f"{n_differ:,}", f"{n_far:,}", f"{ratio:.5f}"]


def _places(tensor: Tensor) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    """Return the rank of bf16 values in the order of all values; -0.0 and 0.0 have one rank."""
    bits = np.empty(tensor.spec.n_elements, np.uint16)
    tensor.read_into(bits.view(np.uint8).data, 0)
    size = (bits & 0x7FFF).astype(np.int32)
    return np.where(bits & 0x8000, -size, size)


def _values(
    places: np.ndarray[tuple[int], np.dtype[np.int32]],
) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    size = (np.abs(places).astype(np.uint32) << np.uint32(16)).view(np.float32)
    return np.where(places < 0, -size, size).astype(np.float32)


def time_cells(name: str, runs: list[tuple[Run, Run]]) -> list[str]:
    """Return a row of the table of time and memory."""
    theirs, ours = zip(*runs, strict=True)
    peaks = [max(r.peak_anonymous_bytes or 0 for r in group) / 1e6 for group in (theirs, ours)]
    return [
        name,
        seconds_and_range(theirs),
        seconds_and_range(ours),
        ratio_and_range(theirs, ours),
        *(f"{peak:.0f}" for peak in peaks),
    ]


def main() -> int:
    """Run the benchmark."""
    parser = options_for(__doc__, "merge.md")
    parser.add_argument("--mergekit-python", type=Path, required=True)
    parser.add_argument("--gb", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    version = subprocess.run(
        [options.mergekit_python, "-c", "import importlib.metadata as m; print(m.version('mergekit'))"],
        capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    times: list[list[str]] = []
    results: list[list[str]] = []
    empty: Command = [*ONE_CORE, options.mergekit_python, "-c", "import mergekit.scripts.run_yaml"]
    with work_folder(options.work_dir, keep=options.keep) as work:
        base = make_base(work, round(options.gb * 1e9))
        targets = [make_variant(base, work / f"target-{n}", n) for n in range(len(WEIGHTS))]
        deltas = [work / f"{n}.sd" for n in range(len(WEIGHTS))]
        warm(base, *targets)
        for target, delta in zip(targets, deltas, strict=True):
            run([*CLI, "diff", base, target, "-o", delta])
        weights = ",".join(map(str, WEIGHTS))
        for name, (method, parameters, own) in METHODS.items():
            out, merged, applied = work / "mergekit", work / "merged.sd", work / "applied"
            theirs = mergekit_command(
                options.mergekit_python, method, parameters, base, targets, out
            )
            ours: Command = [
                *ONE_CORE,
                *CLI,
                "merge",
                base,
                *deltas,
                "-o",
                merged,
                "--weights",
                weights,
                *own,
            ]
            apply: Command = [*CLI, "apply", base, merged, applied]
            runs: list[tuple[Run, Run]] = []
            for number in range(options.rounds):
                for path in (out, merged):
                    remove(path)
                runs.append((run(theirs, sample_memory=True), run(ours, sample_memory=True)))
                shown = " and ".join(f"{r.seconds:.1f} s" for r in runs[-1])
                print(f"  {name}, round {number + 1}/{options.rounds}: {shown}", flush=True)
            times.append(time_cells(name, runs))
            run(apply)
            results.append([name, *differences(base, out, applied)])
            for path in (out, merged, applied):
                remove(path)
        start_up = [run(empty).seconds, run([*ONE_CORE, *CLI, "--version"]).seconds]
        sections = [
            f"mergekit {version}, `dtype: float32`, `out_dtype: bfloat16`. Base of"
            f" {tree_bytes(base) / 1e9:.2f} GB in bf16, {len(WEIGHTS)} targets with 1 % of the values"
            f" changed, weights {weights}; {options.rounds} rounds. Both run on one core.",
            "## Time and memory",
            table(
                [
                    "",
                    "mergekit, s",
                    "sparsedelta, s",
                    "ratio",
                    "mergekit, peak MB",
                    "sparsedelta, peak MB",
                ],
                times,
            ),
            "mergekit's output is a full checkpoint, sparsedelta's a delta; the peak is of anonymous memory."
            f" The times include the start-up, {start_up[0]:.1f} s and {start_up[1]:.1f} s.",
            "## Differences between the results",
            table(
                [
                    "",
                    "values",
                    "changed by either",
                    "not equal",
                    "further than 1 ulp",
                    "Σ|change| ratio",
                ],
                results,
            ),
        ]
        write_result(options.result, "Merging beside mergekit", sections, where=work)
    return 0


if __name__ == "__main__":
    sys.exit(main())
