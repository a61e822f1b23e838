"""Bytes, time, memory and exactness of sparsedelta and of other tools, on changes that training makes.

    python benchmarks/against.py [--quick] [--only NAME …]

Every tool writes a delta of the same pair of checkpoints and makes the target of it again, in
processes of its own, bound to one core; what it makes is compared bit for bit.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from measuring import ROOT, options_for, table, work_folder, write_result

sys.path.insert(0, str(ROOT))
from opponents import OPPONENTS, read

import sparsedelta

WEIGHTS = "model.safetensors"
COLUMNS = ("tool", "bytes / change", "file, kB", "write, s", "apply, s", "peak MB", "exact")
BOUNDS = ("pair", "changed", "density", "positions, uniform", "positions by exponent", "values")


@dataclass(frozen=True, slots=True)
class Result:
    """What one tool did with one pair; ``problem`` is set if it failed."""

    tool: str
    n_bytes: int = 0
    write: dict[str, float] | None = None
    apply: dict[str, float] | None = None
    exact: str = ""
    problem: str = ""


def weights(path: Path) -> Path:
    """Return the weight file of a checkpoint."""
    return path / WEIGHTS if path.is_dir() else path


def run_tool(tool: str, base: Path, target: Path, work: Path) -> Result:
    """Return what a tool makes of a pair."""
    delta, out = work / "delta", work / "out.safetensors"
    took = []
    try:
        for action, place in (("encode", target), ("decode", out)):
            command = [sys.executable, Path(__file__).parent / "opponents.py", tool, action]
            done = subprocess.run(
                ["taskset", "-c", "0", *map(str, [*command, base, place, delta])],
                capture_output=True,
                text=True,
                env=dict(os.environ, PYTHONWARNINGS="ignore"),
            )
            if done.returncode:
                return Result(tool, problem=done.stderr.strip().splitlines()[-1][:80])
            took.append(json.loads(done.stdout.splitlines()[-1]))
        exact = "no"
        if out.read_bytes() == target.read_bytes():
            exact = "file"
        elif same_tensors(out, target):
            exact = "tensors"
        return Result(tool, delta.stat().st_size, took[0], took[1], exact)
    finally:
        delta.unlink(missing_ok=True)
        out.unlink(missing_ok=True)


def same_tensors(one: Path, other: Path) -> bool:
    """Return whether two weight files hold the same tensors, bit for bit."""
    found, wanted = read(one), read(other)
    return found.keys() == wanted.keys() and all(
        shape == found[name][0] and np.array_equal(bits, found[name][1])
        for name, (shape, bits) in wanted.items()
    )


def measure(base: Path, target: Path, work: Path) -> list[Result]:
    """Return what every tool that is there makes of a pair."""
    size = target.stat().st_size
    two_bytes = b'"BF16"' in target.read_bytes()[:100_000]
    results = []
    for name, tool in OPPONENTS.items():
        if tool.is_there and size <= tool.largest and (two_bytes or not tool.two_bytes):
            results.append(run_tool(name, base, target, work))
            print(f"  {name:<28} {results[-1].n_bytes:>12,} {results[-1].problem}", flush=True)
    return results


def rows(results: Iterable[Result], nnz: int) -> Iterable[Sequence[str]]:
    """Return the rows of a pair's table."""
    for r in results:
        if r.write is None or r.apply is None:
            yield [r.tool, f"failed: {r.problem}", "", "", "", "", ""]
            continue
        yield [
            r.tool,
            f"{r.n_bytes / nnz:.3f}",
            f"{r.n_bytes / 1e3:,.0f}",
            f"{r.write['cpu_seconds']:.2f}",
            f"{r.apply['cpu_seconds']:.2f}",
            f"{max(r.write['peak_bytes'], r.apply['peak_bytes']) / 1e6:.0f}",
            r.exact,
        ]


def bounds(name: str, base: Path, target: Path) -> tuple[list[str], int]:
    """Return the row of what information theory says of a pair of two-byte floats, and its changes."""
    old, new = read(base), read(target)
    numel = nnz = 0
    uniform = by_exponent = values = 0.0
    for tensor, (_, bits) in new.items():
        before = old[tensor][1]
        index = np.flatnonzero(before != bits)
        numel, nnz = numel + len(bits), nnz + len(index)
        uniform += choice_bits(len(bits), len(index))
        keys = before >> 7 & 255
        totals, touched = (np.bincount(k, minlength=256) for k in (keys, keys[index]))
        by_exponent += sum(map(choice_bits, totals.tolist(), touched.tolist()))
        codes = ulp_codes(before[index], bits[index])
        for key in np.flatnonzero(touched):
            values += entropy(codes[keys[index] == key])
    shown = [f"{bits / 8 / nnz:.3f}" for bits in (uniform, by_exponent, values)]
    return [name, f"{nnz:,}", f"{nnz / numel:.2%}", *shown], nnz


def ulp_codes(before: npt.NDArray[Any], after: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return the codes of FORMAT §7.2 for two-byte floats."""
    from sparsedelta.codecs.values import VALUE_ENCODINGS
    from sparsedelta.dtypes import DTYPES

    return VALUE_ENCODINGS["ulp"].encode(DTYPES["BF16"], before, after)


def choice_bits(n: int, k: int) -> float:
    """Return log2 of the number of ways to choose ``k`` of ``n``."""
    return (math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)) / math.log(2)


def entropy(codes: npt.NDArray[Any]) -> float:
    """Return the bits of codes, each as long as its own frequency says."""
    counts = np.unique(codes, return_counts=True)[1]
    return float((counts * np.log2(len(codes) / counts)).sum())


def n_changed(base: Path, target: Path) -> int:
    """Return how many elements a pair differs in."""
    with sparsedelta.diff(base, target, level="fast") as delta:
        return delta.nnz


def main() -> int:
    """Run the benchmark."""
    parser = options_for(__doc__, "against.md")
    parser.add_argument("--quick", action="store_true", help="less training, fewer pairs")
    parser.add_argument("--pairs", type=Path, help="checkpoints made before: name, base, target")
    options = parser.parse_args()
    with work_folder(options.work_dir, keep=options.keep) as work:
        sections, bound_rows, best = [], [], []
        for name, base_path, target_path in pairs(options.pairs, work, quick=options.quick):
            base, target = weights(base_path), weights(target_path)
            print(name, flush=True)
            nnz = n_changed(base, target)
            if b'"BF16"' in target.read_bytes()[:100_000]:
                bound_rows.append(bounds(name, base, target)[0])
            results = measure(base, target, work)
            sections.append(f"## {name}\n\n" + table(COLUMNS, rows(results, nnz)))
            best.append(summary(name, results, nnz))
        first = "## Bytes per changed value\n\n" + table(
            tuple(best[0]), [list(b.values()) for b in best]
        )
        second = "## Bounds, bytes per changed value\n\n" + table(BOUNDS, bound_rows)
        write_result(
            options.result,
            "Size and time beside other tools",
            [first, second, *sections],
            where=work,
        )
    return 0


def summary(name: str, results: Iterable[Result], nnz: int) -> dict[str, str]:
    """Return bytes per changed value of every tool; those that are not exact in brackets."""
    shown = {"pair": name}
    for tool in OPPONENTS:
        found = next((r for r in results if r.tool == tool and r.write), None)
        text = f"{found.n_bytes / nnz:.2f}" if found else "–"
        shown[tool] = text if found is None or found.exact != "no" else f"({text})"
    return shown


def pairs(listed: Path | None, work: Path, *, quick: bool) -> Iterable[tuple[str, Path, Path]]:
    """Yield names and paths of pairs: those listed in a file, or made now."""
    if listed:
        for line in listed.read_text("utf-8").splitlines():
            name, base, target = json.loads(line)
            yield name, Path(base), Path(target)
        return
    from workloads import FULL, QUICK, make_pairs

    for pair in make_pairs(work / "pairs", QUICK if quick else FULL):
        yield pair.name, pair.base, pair.target


if __name__ == "__main__":
    sys.exit(main())
