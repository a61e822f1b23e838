"""Compares sparsedelta with other tools on real changes: bytes, time, memory and exactness.

    python benchmarks/against.py [--quick] [--pairs pairs.jsonl] [--resume]

Every tool writes a delta of the same pair of checkpoints and rebuilds the target from it. Each of the
two steps runs in its own process on one core. The rebuilt target is compared with the target bit for
bit. The measurements are written to a file of JSON lines, one line per pair; the tables and
``plots.py`` read that file.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from measuring import ROOT, options_for, table, work_folder, write_result

sys.path.insert(0, str(ROOT))
from opponents import OPPONENTS, read

import sparsedelta
from sparsedelta.codecs.values import VALUE_ENCODINGS
from sparsedelta.dtypes import DTYPES

WEIGHTS = "model.safetensors"
COLUMNS = ("tool", "bytes / change", "file, kB", "write, s", "apply, s", "peak MB", "exact")
BOUNDS = (
    "pair", "changed", "density", "positions, uniform", "positions by exponent", "values",
    "sparsedelta's payload", "the rest, bytes / tensor",
)  # fmt: skip

Measured = Mapping[str, Any]


def weights(path: Path) -> Path:
    """Return the weight file of a checkpoint."""
    return path / WEIGHTS if path.is_dir() else path


def run_tool(tool: str, base: Path, target: Path, work: Path) -> dict[str, Any]:
    """Return a tool's results on a pair: delta bytes, costs of both steps, exactness; or the problem."""
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
                lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
                return {"problem": lines[-1][:80]}
            took.append(json.loads(done.stdout.splitlines()[-1]))
        exact = "no"
        if same_bytes(out, target):
            exact = "file"
        elif same_tensors(out, target):
            exact = "tensors"
        found = {"bytes": delta.stat().st_size, "write": took[0], "apply": took[1], "exact": exact}
        if tool == "sparsedelta":
            found |= parts(delta)
        return found
    finally:
        delta.unlink(missing_ok=True)
        out.unlink(missing_ok=True)


def parts(delta: Path) -> dict[str, float]:
    """Return the bytes of a delta's payload, and the bytes of the rest per tensor."""
    with sparsedelta.load(delta) as loaded:
        payload = sum(row.coded_bytes for row in loaded.tensors)
        rest = delta.stat().st_size - payload
        return {"payload_bytes": payload, "rest_per_tensor": rest / len(loaded.tensors)}


def same_bytes(one: Path, other: Path) -> bool:
    """Return whether two files are equal."""
    return subprocess.run(["cmp", "-s", one, other]).returncode == 0


def same_tensors(one: Path, other: Path) -> bool:
    """Return whether two weight files hold the same tensors, bit for bit."""
    found, wanted = read(one), read(other)
    return found.keys() == wanted.keys() and all(
        shape == found[name][0] and np.array_equal(bits, found[name][1])
        for name, (shape, bits) in wanted.items()
    )


def measure(name: str, base: Path, target: Path, work: Path) -> dict[str, Any]:
    """Return the figures of a pair, and the results of every installed tool on it."""
    size = target.stat().st_size
    dtype = dtype_of(target)
    found = bounds(base, target, dtype)  # first, since it reads both files into the page cache
    tools = {}
    for tool, opponent in OPPONENTS.items():
        if (
            opponent.is_there
            and size <= opponent.largest
            and (dtype == "BF16" or opponent.any_dtype)
        ):
            tools[tool] = run_tool(tool, base, target, work)
            shown = tools[tool].get("bytes") or tools[tool]["problem"]
            print(f"  {tool:<28} {shown:>12}", flush=True)
    return {"pair": name, "bytes": size, **found, "tools": tools}


def dtype_of(path: Path) -> str:
    """Return the dtype of most of the elements of a weight file."""
    with open(path, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    header.pop("__metadata__", None)
    largest = max(header.values(), key=lambda entry: int(np.diff(entry["data_offsets"])[0]))
    return str(largest["dtype"])


def rows(measured: Measured) -> Iterable[Sequence[str]]:
    """Return the rows of a pair's table."""
    for tool, found in measured["tools"].items():
        if "problem" in found:
            yield [tool, f"failed: {found['problem']}", "", "", "", "", ""]
            continue
        yield [
            tool,
            f"{found['bytes'] / measured['nnz']:.3f}",
            f"{found['bytes'] / 1e3:,.0f}",
            f"{found['write']['cpu_seconds']:.2f}",
            f"{found['apply']['cpu_seconds']:.2f}",
            f"{max(found[way]['peak_bytes'] for way in ('write', 'apply')) / 1e6:.0f}",
            found["exact"],
        ]


def bounds(base: Path, target: Path, dtype: str) -> dict[str, float]:
    """Return the number of changes and their information-theoretic bounds, in bits."""
    old, new = read(base), read(target)
    numel = nnz = 0
    uniform = by_exponent = values = 0.0
    for tensor, (_, bits) in new.items():
        before = old[tensor][1]
        index = np.flatnonzero(before != bits)
        numel, nnz = numel + len(bits), nnz + len(index)
        uniform += choice_bits(len(bits), len(index))
        if bits.itemsize == 2 and dtype == "BF16":
            keys = before >> 7 & 255
            totals, touched = (np.bincount(k, minlength=256) for k in (keys, keys[index]))
            by_exponent += sum(map(choice_bits, totals.tolist(), touched.tolist()))
            codes = ulp_codes(before[index], bits[index])
            for key in np.flatnonzero(touched):
                values += entropy(codes[keys[index] == key])
    found = {"numel": numel, "nnz": nnz, "uniform_bits": uniform}
    return found | ({"exponent_bits": by_exponent, "value_bits": values} if dtype == "BF16" else {})


def bound_row(measured: Measured) -> list[str]:
    """Return a pair's row in the table of bounds."""
    nnz, own = measured["nnz"], measured["tools"]["sparsedelta"]
    keys = ("uniform_bits", "exponent_bits", "value_bits")
    return [
        measured["pair"],
        f"{nnz:,}",
        f"{nnz / measured['numel']:.2%}",
        *(f"{measured[key] / 8 / nnz:.3f}" if key in measured else "" for key in keys),
        f"**{own['payload_bytes'] / nnz:.3f}**",
        f"{own['rest_per_tensor']:.0f}",
    ]


def ulp_codes(before: npt.NDArray[Any], after: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return the codes of FORMAT §7.2 for two-byte floats."""
    return VALUE_ENCODINGS["ulp"].encode(DTYPES["BF16"], before, after)


def choice_bits(n: int, k: int) -> float:
    """Return log2 of the number of ways to choose ``k`` of ``n``."""
    return (math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)) / math.log(2)


def entropy(codes: npt.NDArray[Any]) -> float:
    """Return the entropy of codes under their own frequencies, in bits for all codes together."""
    counts = np.unique(codes, return_counts=True)[1]
    return float((counts * np.log2(len(codes) / counts)).sum())


def speed_row(measured: Measured) -> list[str]:
    """Return a pair's row of the speed table: the others' CPU time over sparsedelta's at two levels.

    The others are z4ai (the tool with the smallest deltas), the fastest other tool and the fastest
    layout.
    """
    cells = [measured["pair"], f"{measured['bytes'] / 1e6:,.0f}"]
    for way in ("write", "apply"):
        for level in ("sparsedelta", "sparsedelta --level fast"):
            own = measured["tools"][level][way]["cpu_seconds"]
            others = {
                tool: found[way]["cpu_seconds"] / own
                for tool, found in measured["tools"].items()
                if not tool.startswith("sparsedelta") and "problem" not in found
            }
            tools, layouts = (
                [ratio for tool, ratio in others.items() if tool.endswith("layout") is is_layout]
                for is_layout in (False, True)
            )
            smallest = [others[tool] for tool in ("z4ai model_delta",) if tool in others]
            shown = (smallest, tools, layouts)
            cells.append(" / ".join(f"{min(ratios):.1f}" if ratios else "–" for ratios in shown))
    return cells


def summary(measured: Measured) -> list[str]:
    """Return each tool's bytes per changed value, in brackets if its target is not exact."""
    cells = [measured["pair"]]
    for tool in OPPONENTS:
        found = measured["tools"].get(tool, {})
        text = f"{found['bytes'] / measured['nnz']:.2f}" if "bytes" in found else "–"
        cells.append(f"({text})" if found.get("exact") == "no" else text)
    return cells


def sections(record: Sequence[Measured]) -> Iterator[str]:
    """Yield the parts of the result."""
    yield "## Bytes per changed value"
    yield table(("pair", *OPPONENTS), map(summary, record))
    yield "## Bounds, bytes per changed value"
    yield table(BOUNDS, map(bound_row, record))
    yield (
        "## Speed\n\nCPU time of z4ai / of the fastest other tool / of the fastest layout, each divided by"
        " sparsedelta's. Above 1, sparsedelta is faster. The layouts have no digests and no checks."
    )
    columns = ("pair", "MB", "write", "write, fast", "apply", "apply, of fast")
    yield table(columns, map(speed_row, record))
    for measured in record:
        yield f"## {measured['pair']}"
        yield table(COLUMNS, rows(measured))


def pairs(listed: Path | None, work: Path, *, quick: bool) -> Iterator[tuple[str, Path, Path]]:
    """Yield names and paths of pairs, read from a list or created now and written to a list."""
    if listed:
        for line in listed.read_text("utf-8").splitlines():
            name, base, target = json.loads(line)
            yield name, Path(base), Path(target)
        return
    from workloads import FULL, QUICK, make_pairs

    with open(work / "pairs.jsonl", "x", encoding="utf-8") as file:
        for pair in make_pairs(work / "pairs", QUICK if quick else FULL):
            file.write(json.dumps([pair.name, str(pair.base), str(pair.target)]) + "\n")
            file.flush()
            yield pair.name, pair.base, pair.target


def main() -> int:
    """Run the benchmark."""
    parser = options_for(__doc__, "against.md")
    parser.add_argument("--quick", action="store_true", help="less training and smaller pairs")
    parser.add_argument(
        "--pairs", type=Path, help="list of existing pairs; a run with --keep leaves pairs.jsonl"
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="keep the measurements in the record and measure only the missing pairs",
    )
    parser.add_argument(
        "--make-only", action="store_true", help="create the pairs without measuring them"
    )
    options = parser.parse_args()
    path = options.result.with_suffix(".jsonl")
    record: dict[str, Any] = {}
    if options.resume and path.exists():
        lines = map(json.loads, path.read_text("utf-8").splitlines())
        record = {measured["pair"]: measured for measured in lines}
    with work_folder(options.work_dir, keep=options.keep) as work:
        for name, base, target in pairs(options.pairs, work, quick=options.quick):
            print(name, flush=True)
            if options.make_only or name in record:
                continue
            record[name] = measure(name, weights(base), weights(target), work)
            text = "".join(json.dumps(measured) + "\n" for measured in record.values())
            path.write_text(text, "utf-8")
        if not options.make_only:
            title = "Size and time beside other tools"
            write_result(options.result, title, list(sections([*record.values()])), where=work)
    return 0


if __name__ == "__main__":
    sys.exit(main())
