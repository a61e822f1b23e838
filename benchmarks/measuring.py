"""Shared functions of the benchmarks: timing commands, peak memory, tables of results.

The load of a machine changes within a minute. So the commands to compare run one after the other in
every round, and a comparison is the median over rounds of the ratio within a round.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

# Measure this checkout, even if another version is installed.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import sparsedelta
from sparsedelta.codecs.kernels import in_use

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
WORK = ROOT / "benchmarks" / "work"
PACKAGES = ("numpy", "torch", "zstandard", "blake3")
SAMPLE_SECONDS = 0.02
CLI = (sys.executable, "-m", "sparsedelta")
VERIFY = ("full", "touched", "none")

Command = Sequence[str | Path]


@dataclass(frozen=True, slots=True)
class Run:
    """One run of a command: wall time, CPU time of it and its children, peak anonymous memory."""

    seconds: float
    cpu_seconds: float
    peak_anonymous_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Contender:
    """One of several commands to compare.

    Attributes:
        commands: commands that run one after the other and are timed together.
        output: the file or folder they create; it is removed before and after every run.
    """

    commands: Sequence[Command]
    output: Path


def diff_command(base: Path, target: Path, output: Path) -> Command:
    """Return the command that makes a delta."""
    return [*CLI, "diff", base, target, "-o", output]


def apply_command(base: Path, delta: Path, output: Path, verify: str) -> Command:
    """Return the command that applies a delta."""
    return [*CLI, "apply", base, delta, output, "--verify", verify]


def run(*commands: Command, sample_memory: bool = False) -> Run:
    """Run commands one after the other in the repository's root; return their times and memory.

    Raises:
        subprocess.CalledProcessError: a command failed.
    """
    peak = 0
    cpu_seconds = 0.0
    start = time.perf_counter()
    for command in commands:
        arguments = [str(part) for part in command]
        with tempfile.TemporaryFile() as messages:
            process = subprocess.Popen(arguments, cwd=ROOT, stdout=messages, stderr=messages)
            with memory_sampler(process.pid, enabled=sample_memory) as peaks:
                _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            if process.returncode:
                messages.seek(0)
                sys.stderr.write(messages.read().decode("utf-8", "replace"))
                raise subprocess.CalledProcessError(process.returncode, arguments)
        cpu_seconds += usage.ru_utime + usage.ru_stime
        peak = max([peak, *peaks])
    return Run(time.perf_counter() - start, cpu_seconds, peak if sample_memory else None)


def compare(contenders: Mapping[str, Contender], n_rounds: int) -> dict[str, list[Run]]:
    """Return the runs of each contender, one per round.

    Each round begins with another contender, since the first place may be an advantage. ``sync`` runs
    before each run. A first round, which is not counted, fills the caches.
    """
    runs: dict[str, list[Run]] = {name: [] for name in contenders}
    for number in range(n_rounds + 1):
        shift = number % len(contenders)
        names = [*contenders]
        for name in names[shift:] + names[:shift]:
            result = _run_fresh(contenders[name])
            if number:
                runs[name].append(result)
                print(
                    f"  round {number}/{n_rounds}  {name:<24} {result.seconds:7.2f} s", flush=True
                )
    return runs


def peak_memory(command: Command, output: Path) -> int:
    """Return a command's peak anonymous memory in bytes; its ``output`` is removed."""
    remove(output)
    peak = run(command, sample_memory=True).peak_anonymous_bytes
    remove(output)
    return peak or 0


def median(values: Iterable[float]) -> float:
    """Return the median."""
    return statistics.median(values)


def seconds_and_range(runs: Sequence[Run]) -> str:
    """Return the median wall time with the fastest and the slowest."""
    walls = [r.seconds for r in runs]
    return f"{median(walls):.2f} ({min(walls):.2f}–{max(walls):.2f})"


def ratio_and_range(runs: Sequence[Run], reference: Sequence[Run]) -> str:
    """Return the ratio of wall time to the reference's: median over rounds, lowest, highest."""
    ratios = [a.seconds / b.seconds for a, b in zip(runs, reference, strict=True)]
    return f"{median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})"


def ratio_of_fastest(runs: Sequence[Run], reference: Sequence[Run]) -> str:
    """Return the ratio of the least wall times, which are the least disturbed runs."""
    return f"{min(r.seconds for r in runs) / min(r.seconds for r in reference):.2f}"


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a markdown table; all columns except the first are right-aligned."""
    marks = ["---"] + ["---:"] * (len(columns) - 1)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (columns, marks, *rows))


def write_result(path: Path, title: str, sections: Sequence[str], *, where: Path) -> None:
    """Write and print a result: command, date, machine and versions, then the sections.

    Args:
        path: the markdown file to write.
        title: its heading.
        sections: texts in markdown.
        where: a folder on the measured file system.
    """
    text = "\n\n".join([f"# {title}", _circumstances(where), *sections]) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, "utf-8")
    print(f"\n{text}\nwritten to {path}")


def beside(recorded: Path, now: Path) -> str:
    """Return a table of the rows that two results share, each cell as "recorded → now"."""
    rows: list[dict[str, list[str]]] = []
    for path in (recorded, now):
        lines = [line for line in path.read_text("utf-8").splitlines() if line.startswith("| ")]
        cells = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
        rows.append({label: values for label, *values in cells})
    before, after = rows
    both = [label for label in before if label in after and not before[label][0].startswith("-")]
    return "\n".join(
        f"{label:50} " + "   ".join(map(" → ".join, zip(before[label], after[label], strict=False)))
        for label in both
    )


def options_for(description: str | None, result: str) -> argparse.ArgumentParser:
    """Return a parser with the options of all benchmarks."""
    parser = argparse.ArgumentParser(description=(description or "").split("\n")[0])
    work = WORK / Path(result).stem
    parser.add_argument(
        "--work-dir", type=Path, default=work, help="created, and removed at the end"
    )
    parser.add_argument("--keep", action="store_true", help="keep the work folder")
    parser.add_argument("--result", type=Path, default=RESULTS / result)
    return parser


def first_value(path: Path, key: str) -> str:
    """Return the value of the first ``key: value`` line."""
    pairs = (line.partition(":") for line in path.read_text("utf-8").splitlines())
    return next((value.strip() for name, _, value in pairs if name.strip() == key), "unknown")


@contextmanager
def work_folder(path: Path, *, keep: bool) -> Iterator[Path]:
    """Yield a new, empty folder ``path``; it is removed at the end unless ``keep`` is set.

    Raises:
        FileExistsError: the folder exists.
    """
    path = path.resolve()
    path.mkdir(parents=True)
    try:
        yield path
    finally:
        if not keep:
            remove(path)


def remove(path: Path) -> None:
    """Remove a file or folder if it exists."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def warm(*folders: Path) -> None:
    """Read all files below folders, so that they are in the page cache."""
    for folder in folders:
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            with open(path, "rb", buffering=0) as file:
                while file.read(1 << 24):
                    pass


def tree_bytes(path: Path) -> int:
    """Return the size of all files below a folder."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def _run_fresh(contender: Contender) -> Run:
    remove(contender.output)
    os.sync()
    result = run(*contender.commands)
    remove(contender.output)
    return result


@contextmanager
def memory_sampler(pid: int, *, enabled: bool) -> Iterator[list[int]]:
    """Yield a list to which a process tree's anonymous bytes are appended periodically."""
    samples: list[int] = []
    done = threading.Event()

    def sample() -> None:
        while not done.wait(SAMPLE_SECONDS):
            samples.append(_anonymous_bytes(pid))

    thread = threading.Thread(target=sample)
    if enabled:
        thread.start()
    try:
        yield samples
    finally:
        done.set()
        if enabled:
            thread.join()


def _anonymous_bytes(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text("ascii")
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        children = [child for task in tasks for child in _words(task / "children")]
    except (FileNotFoundError, ProcessLookupError):
        return 0  # the process has ended
    own = sum(
        int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon:")
    )
    return own + sum(_anonymous_bytes(int(child)) for child in children)


def _words(path: Path) -> list[str]:
    try:
        return path.read_text("ascii").split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def _circumstances(where: Path) -> str:
    memory = first_value(Path("/proc/meminfo"), "MemTotal")
    versions = ", ".join(f"{name} {_version(name)}" for name in PACKAGES)
    lines = {
        "command": f"`python {' '.join([_shown(sys.argv[0]), *sys.argv[1:]])}`",
        "date": date.today().isoformat(),
        "machine": f"{first_value(Path('/proc/cpuinfo'), 'model name')}, {os.cpu_count()} cores,"
        f" {int(memory.split()[0]) / 2**20:.0f} GiB, Linux {platform.release()},"
        f" {_file_system(where)}",
        "versions": f"sparsedelta {sparsedelta.__version__} ({in_use()} kernels), Python {platform.python_version()}, {versions}",
        "load": "average over the 5 minutes before the end:"
        f" {os.getloadavg()[1]:.1f}, including this benchmark",
    }
    return "\n".join(f"- {name}: {value}" for name, value in lines.items())


def _shown(path: str) -> str:
    full = Path(path).resolve()
    return str(full.relative_to(ROOT)) if full.is_relative_to(ROOT) else full.name


def _file_system(where: Path) -> str:
    mounts = [line.split()[1:3] for line in Path("/proc/self/mounts").read_text().splitlines()]
    holding = [(point, kind) for point, kind in mounts if where.resolve().is_relative_to(point)]
    return max(holding, key=lambda mount: len(mount[0]), default=("", "unknown file system"))[1]


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
