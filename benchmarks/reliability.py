"""Tests the commands when they are killed, when a system call fails, and when inputs change.

python benchmarks/reliability.py [--kills 1000] [--changes 100] [--every 1]

Needs Linux and gcc. Every run is a process forked from one that has imported everything, so that a kill hits
the work and not the imports. The exit status is 1 if a wrong outcome was found.
"""

from __future__ import annotations

import ctypes
import errno
import io
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from blake3 import blake3
from measuring import options_for, remove, table, work_folder, write_result
from safetensors.numpy import save_file

import sparsedelta
from sparsedelta.cli import main as command_line

SOURCE = Path(__file__).with_name("fail_once.c")
N_TENSORS, N_ELEMENTS = 8, 1 << 20
ERRORS = ("ENOSPC", "EIO", "EMFILE")
COMMANDS = ("apply", "diff", "stack")
HOW = ("truncated", "rewritten")
LIBRARY = ctypes.CDLL(None)
Content = dict[str, bytes] | None


@dataclass(frozen=True)
class Case:
    """A command that writes one output, with the content of the output before and after."""

    name: str
    arguments: list[str]
    output: Path
    old: Path | None
    new: Content

    def restore(self) -> None:
        """Restore the output's path to its state before the command."""
        remove(self.output)
        if self.old is not None and self.old.is_dir():
            shutil.copytree(self.old, self.output)
        elif self.old is not None:
            shutil.copyfile(self.old, self.output)

    def found(self) -> str:
        """Return the state of the output: ``new``, ``old`` (or missing, as before), or ``broken``."""
        found = content(self.output)
        if found == self.new:
            return "new"
        return "old" if found == (self.old and content(self.old)) else "broken"

    def partials(self) -> list[str]:
        """Return unexpected files beside the output."""
        return [name for name in os.listdir(self.output.parent) if name != self.output.name]


class Process:
    """The command line tool, running in a fork of this process."""

    def __init__(self, arguments: list[str], log: Path, arm: tuple[int, int, Path] | None = None):
        self._log = log
        self._pid = os.fork()
        if self._pid:
            return
        status = 99
        try:
            fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(fd, 1)
            os.dup2(fd, 2)
            if arm:
                LIBRARY.fail_once(arm[0], arm[1], os.fsencode(arm[2]))
            command_line(["-q", *arguments])
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 99
        except BaseException:
            traceback.print_exc()
        finally:
            if arm:
                seen, name = LIBRARY.calls_seen(), LIBRARY.failed_call().decode()
                LIBRARY.fail_once(0, 0, b"")
                log.with_suffix(".calls").write_text(f"{seen} {name}")
            os._exit(status)

    def send(self, number: int) -> None:
        """Send a signal."""
        os.kill(self._pid, number)

    def wait(self) -> int:
        """Return the exit status, negative for a signal."""
        return os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])

    def said(self) -> list[str]:
        """Return the lines it wrote to stdout and stderr."""
        return self._log.read_text("utf-8").splitlines()


def content(path: Path) -> Content:
    """Return the digest of every file at a path, a file or folder; None if it does not exist."""
    if not os.path.lexists(path):
        return None
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return {str(p.relative_to(path)): blake3(p.read_bytes()).digest() for p in files}


def log_of(inputs: Path) -> Path:
    """Return the path for the output of commands; it is outside the folder in which calls fail."""
    return inputs.parent.with_name("log")


def make_inputs(folder: Path) -> None:
    """Write three checkpoints, each a change of 1 % of the one before it, and their deltas."""
    draw = np.random.default_rng(0)
    values = [draw.integers(0, 1 << 16, N_ELEMENTS, np.uint16) for _ in range(N_TENSORS)]
    for step, name in enumerate(("base", "middle", "target")):
        (folder / name / "sub").mkdir(parents=True)
        (folder / name / "sub/config.json").write_text(str(step))
        (folder / name / "LICENSE").write_text("free")
        for half in (0, 1):
            shard = {f"t{i}": values[i] for i in range(half, N_TENSORS, 2)}
            save_file(shard, folder / name / f"model-{half}.safetensors")
        for one in values:
            one[draw.integers(0, N_ELEMENTS, N_ELEMENTS // 100)] ^= 1
    for old, new in (("base", "middle"), ("middle", "target"), ("base", "target")):
        with sparsedelta.diff(folder / old, folder / new) as delta:
            delta.save(folder / f"{old}-{new}.sd")


def make_cases(inputs: Path, place: Path, names: Sequence[str]) -> list[Case]:
    """Return the commands, each with a folder for its output, with and without an output to replace."""
    one, two, both = (
        str(inputs / f"{n}.sd") for n in ("base-middle", "middle-target", "base-target")
    )
    base, target = str(inputs / "base"), str(inputs / "target")
    with sparsedelta.stack(one, two) as stacked:
        stacked.save(inputs / "stacked.sd")
    commands = {
        "apply": ([base, both], inputs / "middle", inputs / "target"),
        "diff": ([base, target, "-o"], Path(one), Path(both)),
        "stack": ([one, two, "-o"], Path(one), inputs / "stacked.sd"),
    }
    cases = []
    for name in names:
        arguments, old, new = commands[name]
        for option in ([], ["--overwrite"]):
            output = place / " ".join([name, *option]) / "out"
            output.parent.mkdir(parents=True)
            line = [name, *arguments, str(output), *option]
            cases.append(
                Case(output.parent.name, line, output, old if option else None, content(new))
            )
            cases[-1].restore()
            with redirect_stdout(io.StringIO()):  # imports everything that the forks need
                command_line(["-q", *line], standalone_mode=False)
    return cases


def seconds_of(case: Case, log: Path) -> float:
    """Return the longest of three run times of a command, after checking that it works."""
    longest = 0.0
    for _ in range(3):
        case.restore()
        start = time.perf_counter()
        process = Process(case.arguments, log)
        status = process.wait()
        longest = max(longest, time.perf_counter() - start)
        if status or case.found() != "new":
            raise RuntimeError(f"{case.name}: {status}, {case.found()}, {process.said()}")
    return longest


def next_run(case: Case, inputs: Path) -> None:
    """Run another command that writes to the same folder."""
    path = case.output.with_name("next.sd")
    with sparsedelta.load(inputs / "base-middle.sd") as delta:
        delta.save(path)
    path.unlink()


def kill(case: Case, number: int, n_kills: int, inputs: Path) -> Counter[str]:
    """Send a signal at random moments; count the states of the output."""
    log = log_of(inputs)
    seconds, counts = seconds_of(case, log), Counter[str]()
    for _ in range(n_kills):
        case.restore()
        process = Process(case.arguments, log)
        time.sleep(random.random() * seconds)
        process.send(number)
        counts["ended before"] += process.wait() == 0
        counts[case.found()] += 1
        counts["partial"] += bool(case.partials())
        next_run(case, inputs)
        counts["left"] += bool(case.partials())
    case.restore()
    return counts


def outcome(case: Case, status: int, said: list[str]) -> str:
    """Return how a command ended: ``right``, ``refused``, ``refused, whole`` or ``wrong``."""
    found = case.found()
    if status == 0:
        return "right" if found == "new" else "wrong"
    in_one_line = status == 1 and len(said) == 1 and said[0].startswith("error: ")
    if not in_one_line or found == "broken":
        return "wrong"
    return "refused" if found == "old" else "refused, whole"


def fail(case: Case, error: str, every: int, inputs: Path) -> Counter[str]:
    """Make each system call, or every n-th, fail once; count the outcomes."""
    log, counts = log_of(inputs), Counter[str]()
    at, n_calls = 0, 1
    while at <= n_calls:
        case.restore()
        process = Process(case.arguments, log, (at, getattr(errno, error), inputs.parent))
        status, said = process.wait(), process.said()
        seen, _, name = log.with_suffix(".calls").read_text().partition(" ")
        if at == 0:
            n_calls = int(seen)
        elif name:
            found = outcome(case, status, said)
            counts[found] += 1
            next_run(case, inputs)
            counts["left"] += bool(case.partials())
            if found not in ("right", "refused"):
                print(f"{case.name}: {error} of call {at}, {name}: {found}, {status}, {said}")
        at += 1 if at == 0 else every
    case.restore()
    return counts


@contextmanager
def changed(path: Path, how: str) -> Iterator[Callable[[], None]]:
    """Yield a function that truncates or rewrites a file; the file is restored at the end."""
    before = path.read_bytes()

    def change() -> None:
        if how == "truncated":
            os.truncate(path, random.randrange(len(before)))
        else:
            with open(path, "r+b") as file:
                file.seek(random.randrange(len(before)))
                file.write(random.randbytes(4096))

    try:
        yield change
    finally:
        path.write_bytes(before)


def alter(case: Case, path: Path, how: str, n_changes: int, inputs: Path) -> Counter[str]:
    """Change an input at random moments; count the outcomes."""
    log = log_of(inputs)
    seconds, counts = seconds_of(case, log), Counter[str]()
    for _ in range(n_changes):
        case.restore()
        with changed(path, how) as change:
            process = Process(case.arguments, log)
            time.sleep(random.random() * seconds)
            change()
            status = process.wait()
        found = outcome(case, status, process.said())
        counts[found] += 1
        counts["left"] += bool(case.partials())
        if found == "wrong":
            print(f"{case.name}: {path.name} {how}: {status}, {process.said()}")
    case.restore()
    return counts


def cells(counts: Counter[str], *names: str) -> list[str]:
    """Return counts as cells of a table."""
    return [str(counts[name]) for name in names]


HEADS = (
    ["command", "signal", "sent", "ended before", "new output", "old or none", "neither", "partial left", "after the next run"],
    ["command", "input", "right", "refused", "wrong", "partial left"],
    ["command", "error", "right", "refused", "refused, output whole", "wrong", "left after next run"],
)  # fmt: skip


def measure(
    inputs: Path, cases: list[Case], n_kills: int, n_changes: int, every: int
) -> Iterator[tuple[int, list[str], int]]:
    """Yield the number of a table, a row of it, and the number of wrong outcomes in the row."""
    for case in cases:
        for number, n in ((signal.SIGKILL, n_kills), (signal.SIGTERM, max(1, n_kills // 5))):
            counts = kill(case, number, n, inputs)
            named = [case.name, signal.Signals(number).name, str(n)]
            found = cells(counts, "ended before", "new", "old", "broken", "partial", "left")
            yield 0, [*named, *found], counts["broken"] + counts["left"]
    shard = inputs / "base/model-0.safetensors"
    delta = inputs / "base-target.sd"
    altered = {
        "apply": [(path, how) for path in (shard, delta) for how in HOW],
        "diff": [(shard, "truncated")],
    }
    for case in cases:
        for path, how in altered.get(case.name, []):
            counts = alter(case, path, how, n_changes, inputs)
            what = f"{'base' if path == shard else 'delta'} {how}"
            found = cells(counts, "right", "refused", "wrong", "left")
            yield 1, [case.name, what, *found], counts["wrong"] + counts["left"]
    for case in cases:
        for error in ERRORS:
            counts = fail(case, error, every, inputs)
            found = cells(counts, "right", "refused", "refused, whole", "wrong", "left")
            yield 2, [case.name, error, *found], counts["wrong"] + counts["left"]


def main() -> int:
    """Run the benchmark."""
    parser = options_for(__doc__, "reliability.md")
    parser.add_argument("--kills", type=int, default=20, help="SIGKILLs of each command")
    parser.add_argument("--changes", type=int, default=20, help="changes of each input")
    parser.add_argument("--every", type=int, default=1, help="make only every n-th call fail")
    parser.add_argument("--commands", nargs="+", choices=COMMANDS, default=COMMANDS)
    options = parser.parse_args()
    if not hasattr(LIBRARY, "fail_once"):
        return run_preloaded()
    LIBRARY.failed_call.restype = ctypes.c_char_p
    random.seed(0)
    with work_folder(options.work_dir, keep=options.keep) as work:
        inputs = work / "files/inputs"
        make_inputs(inputs)
        cases = make_cases(inputs, work / "files/place", options.commands)
        rows: tuple[list[list[str]], ...] = ([], [], [])
        n_wrong = 0
        for number, row, wrong in measure(
            inputs, cases, options.kills, options.changes, options.every
        ):
            rows[number].append(row)
            n_wrong += wrong
            # After each row, so that a run that is stopped leaves what it measured.
            tables = [table(*pair) for pair in zip(HEADS, rows, strict=True)]
            write_result(options.result, "Kills, failures and changed inputs", tables, where=work)
    return int(n_wrong > 0)


def run_preloaded() -> int:
    """Run this program again with the library that makes calls fail; return its exit code."""
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder, "fail_once.so")
        subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-o", built, SOURCE, "-ldl"], check=True)
        environment = {**os.environ, "LD_PRELOAD": str(built)}
        return subprocess.run([sys.executable, *sys.argv], env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
