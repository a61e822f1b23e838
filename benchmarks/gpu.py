"""Measures training and live deltas on a GPU, on any machine with CUDA and PyTorch.

    python benchmarks/gpu.py                       # 8 minutes, one GPU, 8 GB of disk; no network
    python benchmarks/gpu.py --parts memory waits
    python benchmarks/gpu.py --rehearse            # everything at toy size on a CPU

The script first lists missing requirements. Then it runs the parts, the most important first, each in
its own process, which is killed at its time limit. Every result is appended to a file of JSON lines
at once, and the table is rebuilt from that file after each part. An interrupted run loses only the
measurement in progress.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
GB = 10**9


@dataclass(frozen=True)
class Part:
    """One part of the benchmark.

    Attributes:
        title: its heading in the table.
        share: its weight when the remaining time is divided among it and the parts after it.
        needs: packages it needs beside torch.
        disk_gb: disk space it needs temporarily.
    """

    title: str
    share: float
    needs: Sequence[str] = ()
    disk_gb: float = 0.0


BASIC = ("blake3", "numpy", "zstandard", "safetensors")
FIT = ("accelerate", "rich")
TESTING = ("click", "transformers", "pytest", "hypothesis")
PARTS: Mapping[str, Part] = {
    "tests": Part("Tests that need a GPU", 1.5, (*BASIC, *FIT, *TESTING)),
    "memory": Part("Training in 24 GiB", 2.5, BASIC),
    "waits": Part("Steps that wait for the device", 0.7, (*BASIC, *FIT)),
    "export": Part("Export of what was trained", 1.0, BASIC, 8.0),
    "live": Part("Deltas on a model in memory", 4.0, BASIC),
    "channel": Part("The channel", 2.5, BASIC, 8.0),
}


def missing(names: Sequence[str], work: Path, *, is_rehearsal: bool) -> dict[str, list[str]]:
    """Return the missing requirements of each part; those of all parts have the key ``""``."""
    lacks: dict[str, list[str]] = {"": []}
    if find_spec("torch") is None:
        lacks[""].append("the package torch")
    elif not is_rehearsal:
        import torch

        if not torch.cuda.is_available():
            lacks[""].append("a CUDA device that torch can use")
    free = shutil.disk_usage(work).free / GB
    for name in names:
        part = PARTS[name]
        lacks[name] = [f"the package {need}" for need in part.needs if find_spec(need) is None]
        if not is_rehearsal and free < part.disk_gb:
            lacks[name].append(
                f"{part.disk_gb:g} GB of disk at '{work}', where {free:.0f} are free"
            )
    return {name: found for name, found in lacks.items() if found}


def run_part(name: str, results: Path, work: Path, seconds: float, *, is_rehearsal: bool) -> None:
    """Run a part in its own process with a time limit; record a failure in the results."""
    command = [
        *(sys.executable, str(ROOT / "benchmarks" / "gpu_parts.py"), name),
        *("--results", str(results), "--work", str(work / name)),
        *(["--rehearse"] if is_rehearsal else []),
    ]
    # Avoids fragmentation, since the memory limit is a hard one.
    own = {**os.environ, "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    with subprocess.Popen(command, start_new_session=True, env=own) as process:
        try:
            status: int | None = process.wait(seconds)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            status = None
    shutil.rmtree(work / name, ignore_errors=True)
    if status is None:
        append(results, name, "not finished", f"ended after {seconds:.0f} s")
    elif status:
        append(results, name, "failed", f"exit status {status}")


def append(results: Path, part: str, value: str, note: str) -> None:
    """Append a result about a whole part, such as its failure."""
    row = {"part": part, "what": "the part", "value": value, "unit": "", "note": note}
    with results.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    print(f"  {part}: {value}, {note}", flush=True)


def rows_of(results: Path) -> list[dict[str, Any]]:
    """Return the results so far."""
    return [json.loads(line) for line in results.read_text("utf-8").splitlines()]


def write_table(results: Path, place: Path, circumstances: Sequence[str]) -> None:
    """Write all results so far as a page of tables."""
    rows = rows_of(results)
    text = ["# On a GPU", "\n".join(f"- {line}" for line in circumstances)]
    for name, part in PARTS.items():
        own = [row for row in rows if row["part"] == name]
        if own:
            cells = [["", "value", "note"], ["---", "---:", "---"]]
            cells += [
                [row["what"], f"{_shown(row['value'])} {row['unit']}".strip(), row["note"]]
                for row in own
            ]
            lines = ["| " + " | ".join(c.replace("|", "/") for c in line) + " |" for line in cells]
            text += [f"## {part.title}", "\n".join(lines)]
    place.write_text("\n\n".join(text) + "\n", "utf-8")


def circumstances_of(*, is_rehearsal: bool) -> list[str]:
    """Return the command, the date, the versions and the device."""
    import torch

    lines = [
        f"command: `{' '.join(['python benchmarks/gpu.py', *sys.argv[1:]])}`",
        f"date: {time.strftime('%Y-%m-%d')}",
        f"versions: Python {platform.python_version()}, torch {torch.__version__}",
    ]
    if is_rehearsal:
        return [*lines, "a rehearsal at toy size on a CPU: the figures have no meaning"]
    device = torch.cuda.get_device_properties(0)
    return [*lines, f"device: {device.name}, {device.total_memory / 2**30:.1f} GiB"]


def read_options() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rehearse", action="store_true", help="run at toy size on a CPU")
    parser.add_argument(
        "--results", type=Path, help="file of JSON lines; a table is written beside it"
    )
    parser.add_argument("--work-dir", type=Path, help="folder for temporary checkpoints")
    return parser.parse_args()


def main() -> int:
    """Run the parts; return 1 if a part failed or was skipped."""
    options = read_options()
    end = time.monotonic() + 60 * options.minutes
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # also ends the running part
    with tempfile.TemporaryDirectory(prefix="sift-gpu-", dir=options.work_dir) as folder:
        work = Path(folder)
        lacks = missing(options.parts, work, is_rehearsal=options.rehearse)
        for name, found in lacks.items():
            print(f"missing for {name or 'everything'}: {', '.join(found)}", flush=True)
        if "" in lacks:
            return 1
        default = work / "gpu.jsonl" if options.rehearse else RESULTS / "gpu.jsonl"
        results = (options.results or default).resolve()
        rows = rows_of(results) if results.exists() else []
        kept = [json.dumps(row) + "\n" for row in rows if row["part"] not in options.parts]
        results.write_text("".join(kept), "utf-8")  # of parts that are not run now
        about = circumstances_of(is_rehearsal=options.rehearse)
        for number, name in enumerate(options.parts):
            if name in lacks:
                append(results, name, "left out", f"lacks {', '.join(lacks[name])}")
                continue
            shares = [PARTS[each].share for each in options.parts[number:]]
            left = max(end - time.monotonic(), 0.0)
            seconds = left * shares[0] / sum(shares)
            print(f"{name}, for {seconds:.0f} s at most", flush=True)
            try:
                run_part(name, results, work, seconds, is_rehearsal=options.rehearse)
            finally:
                write_table(results, results.with_suffix(".md"), about)
        bad = [row for row in rows_of(results) if row["value"] in _BAD]
    return 1 if bad else 0


_BAD = ("failed", "left out", "not finished")


def _shown(value: float | str) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else value


if __name__ == "__main__":
    sys.exit(main())
