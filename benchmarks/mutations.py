"""Mutates deltas and runs every operation on them; counts escapes, hangs, memory and wrong output.

    python benchmarks/mutations.py --seconds 60
    python benchmarks/mutations.py --seconds 60 --guided --processes 2

``mutants.py`` makes the mutants. A mutant that ``load`` refuses is given to the other operations one time in 64, because
they load it first. Work that the package gives to threads runs in the main thread here, because starting a thread takes
longer than the work. With ``--guided`` mutants that reach new branches of the package are mutated again; this needs
atheris. The result is written each minute. The exit status is 1 if something was found.
"""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import FrameType, SimpleNamespace

import torch
from blake3 import blake3
from measuring import ROOT, options_for, table, work_folder, write_result
from mutant_inputs import DELTAS, FAMILIES, make_inputs, open_tensors
from mutants import mutant

sys.path.insert(0, str(ROOT / "spec"))
import reference_decoder

import sparsedelta
from sparsedelta import fs
from sparsedelta.errors import BaseMismatch
from sparsedelta.format.delta import opened
from sparsedelta.tensors import parallel

CPU_SECONDS = 10
MEMORY_BYTES = 1 << 30
ROOM_BYTES = 3 << 30  # a call that reserves so much raises MemoryError
BATCH = 200  # mutants of one process
RUN_ANYWAY = 64  # of so many mutants that load refuses, one is given to the other operations
REPORT_SECONDS = 60
REFUSED = (ValueError, OSError, sparsedelta.SparseDeltaError)
FOUND = ("accepted", "refused", "escapes", "hangs", "over 1 GB", "wrong output")
Content = dict[str, bytes]
Counts = Counter[tuple[str, str]]


class Inline:
    """A thread that runs when it is started. One of ``fs.synced`` does not run, because it waits for the main thread."""

    def __init__(self, target: Callable[[], object]) -> None:
        self.start = (lambda: None) if target.__module__ == fs.__name__ else target

    def join(self) -> None:
        """Return; the thread has ended."""


class Hang(BaseException):
    """A call took more than ``CPU_SECONDS``."""


def content(folder: Path) -> Content:
    """Return the files of a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def stated(delta: sparsedelta.Delta) -> object:
    """Return the digests that a delta states about its target and base."""
    rows = [(row.file, row.name, row.target, row.base) for row in delta.tensors]
    return delta.target.weight_files, delta.target.side_files, rows


class Calls:
    """The operations on the mutants of a family of deltas, each with a check of what it gives."""

    def __init__(self, inputs: Path, work: Path) -> None:
        work.mkdir()
        for module in (fs, parallel):
            vars(module)["threading"] = SimpleNamespace(Thread=Inline)
        self.base, self.target = inputs / "base", inputs / "target"
        self.file, self.out = work / "mutant.sd", work / "out"
        self.expected = content(self.target), content(self.base), content(inputs / "final")
        self.right: set[bytes] = (
            set()
        )  # digests of deltas that were applied and gave what they should
        self.verified = False
        self.both, self.two = (sparsedelta.load(inputs / f"{name}.sd") for name in ("both", "two"))
        self.before, self.after = open_tensors(self.base), open_tensors(self.target)
        self.seeds = [(inputs / f"{name}.sd").read_bytes() for name in DELTAS]
        self.mutant: sparsedelta.Delta | Path = self.file
        with sparsedelta.load(inputs / "one.sd") as delta:
            self.stated = stated(delta)
            self.marks = [row.base.spec.digest or b"" for row in delta.tensors if row.base]
            self.merged: Content | None
            try:
                with sparsedelta.merge(self.base, delta, self.both) as merged:
                    self.merged = self._applied(self.base, merged)
            except REFUSED:
                self.merged = None  # ``merge`` does not accept such deltas

    def is_of(self, data: bytes) -> bool:
        """Return whether a mutant is of this family."""
        return any(mark in data for mark in self.marks)

    def _applied(self, base: Path, delta: sparsedelta.Delta | Path) -> Content:
        sparsedelta.apply(base, delta, self.out, overwrite=True)
        return content(self.out)

    def _gives(self, base: Path, made: sparsedelta.Delta, expected: Content | None) -> bool:
        """Return whether a delta that was made rebuilds what is expected."""
        digest = blake3(made.to_bytes()).digest()
        is_right = digest in self.right or self._applied(base, made) == expected
        if is_right:
            self.right.add(digest)
        return is_right or not self._is_stated()

    def _is_stated(self) -> bool:
        """Return whether the mutant states what its delta did; one that ``load`` refuses states nothing else."""
        return not isinstance(self.mutant, sparsedelta.Delta) or stated(self.mutant) == self.stated

    def load(self) -> bool:
        """Open the mutant."""
        self.mutant = sparsedelta.load(self.file)
        return True

    def inspect(self) -> bool:
        """Describe it."""
        return bool(sparsedelta.inspect(self.mutant).layers is not None)

    def verify(self) -> bool:
        """Check it with base and target."""
        self.verified = False
        sparsedelta.verify(self.mutant, base=self.base, target=self.target)
        self.verified = True
        return True

    def apply(self) -> bool:
        """Rebuild the target, which must be possible if ``verify`` found nothing; the decoder of the format's text agrees."""
        try:
            found = self._applied(self.base, self.mutant)
        except REFUSED:
            if self.verified:
                raise RuntimeError("verified, and refused") from None
            raise
        if found == self.expected[0] or self.verified or self._is_stated():
            return found == self.expected[0]
        shutil.rmtree(self.out)
        try:
            reference_decoder.apply(self.base, self.file, self.out)
        except reference_decoder.Refused as refused:
            # ``apply`` may skip a base digest that the target's digest proves (FORMAT §10), and ``verify`` may not.
            if refused.code != "base_mismatch" or not self._has_other_base():
                raise
            return True
        return found == content(self.out)

    def _has_other_base(self) -> bool:
        """Return whether ``verify``, which compares every base digest, refuses the base."""
        try:
            sparsedelta.verify(self.mutant, base=self.base)
        except BaseMismatch:
            return True
        return False

    def invert(self) -> bool:
        """Invert it, and apply the inverse to the target."""
        with sparsedelta.invert(self.mutant, base=self.base) as made:
            return self._gives(self.target, made, self.expected[1])

    def stack(self) -> bool:
        """Stack it with the delta that follows, and apply the result."""
        with sparsedelta.stack(self.mutant, self.two, base=self.base) as made:
            return self._gives(self.base, made, self.expected[2])

    def merge(self) -> bool:
        """Merge it with another delta, and apply the result."""
        with sparsedelta.merge(self.base, self.mutant, self.both) as made:
            return self._gives(self.base, made, self.merged)

    def live(self) -> bool:
        """Apply it to tensors in memory; they must stay as they are if it is refused."""
        model = {name: one.clone() for name, one in self.before.items()}
        try:
            with opened(self.mutant) as delta:
                delta.apply_(model)
        except REFUSED:
            if not same(model, self.before):
                raise RuntimeError("refused, and the model changed") from None
            raise
        return same(model, self.after) or not self._is_stated()


def same(model: dict[str, torch.Tensor], tensors: dict[str, torch.Tensor]) -> bool:
    """Return whether a state dict has the bytes of these tensors."""
    return all(
        bytes(model[name].view(torch.uint8).numpy()) == bytes(one.view(torch.uint8).numpy())
        for name, one in tensors.items()
    )


OPERATIONS = ("load", "inspect", "verify", "apply", "stack", "invert", "merge", "live")


@contextmanager
def limited() -> Iterator[None]:
    """Raise Hang in the block after ``CPU_SECONDS`` of CPU time."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Hang

    signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def outcome(call: Callable[[], bool]) -> str:
    """Return how a call ended, one of ``FOUND``."""
    try:
        with limited():
            return "accepted" if call() else "wrong output"
    except REFUSED:
        return "refused"
    except Hang:
        return "hangs"
    except BaseException:
        traceback.print_exc()
        return "escapes"


def held_bytes() -> int:
    """Return the memory of this process."""
    return int(Path("/proc/self/statm").read_text("ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak_bytes() -> int:
    """Return the highest ``held_bytes`` of this process."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def limit_memory() -> None:
    """Let calls fail that reserve ``ROOM_BYTES`` or more."""
    now = int(Path("/proc/self/statm").read_text("ascii").split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (now + ROOM_BYTES, now + ROOM_BYTES))


def run_all(families: list[Calls], data: bytes, kept: Path, report: int) -> None:
    """Run all operations on a mutant; keep it under a name that begins with ``kept`` if something was found."""
    calls = next((one for one in families if one.is_of(data)), families[0])
    calls.file.write_bytes(data)
    held, peak, lines = held_bytes(), peak_bytes(), []
    for name in OPERATIONS:
        if name == "merge" and calls.merged is None:
            continue
        found = outcome(getattr(calls, name))
        if peak_bytes() > max(peak, held + MEMORY_BYTES):
            found, peak = "over 1 GB", peak_bytes()
        lines.append(f"{name},{found}\n")
        if found not in ("accepted", "refused"):
            shutil.copyfile(calls.file, f"{kept}-{name}-{found.split()[0]}.sd")
        if name == "load" and found != "accepted":
            if random.randrange(RUN_ANYWAY):
                break
            calls.mutant = calls.file
    if isinstance(calls.mutant, sparsedelta.Delta):
        calls.mutant.close()
    os.write(report, "".join(lines).encode())


def run_batch(inputs: Path, work: Path, kept: Path, seed: int, report: int) -> None:
    """Run all operations on mutants; write their outcomes, one a line, to a descriptor."""
    random.seed(seed)
    families = [Calls(inputs / name, work / name) for name in FAMILIES]
    limit_memory()
    for number in range(BATCH):
        data = random.choice(random.choice(families).seeds)
        run_all(families, mutant(data), kept / f"{seed}-{number}", report)


def batch(
    inputs: Path, work: Path, kept: Path, seed: int, count: Callable[[Iterable[str]], None]
) -> None:
    """Run a batch in a process of its own; count how each operation ended."""
    receive, send = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            run_batch(inputs, work, kept, seed, send)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        os._exit(1)
    os.close(send)
    with open(receive) as lines:
        count(lines)
    if os.waitpid(pid, 0)[1]:
        count(["load,escapes"])  # the process died


def guided(
    inputs: Path,
    work: Path,
    kept: Path,
    seconds: float,
    seed: int,
    count: Callable[[Iterable[str]], None],
) -> str:
    """Run ``guided.py`` in a process of its own; count how each operation ended, and return what it covered."""
    receive, send = os.pipe()
    script = Path(__file__).with_name("guided.py")
    words = [inputs, work, kept, send, seconds, seed]
    with open(work / "log", "w+") as log, open(receive) as lines:
        process = subprocess.Popen(
            [sys.executable, script, *map(str, words)], pass_fds=[send], stderr=log, stdout=log
        )
        os.close(send)
        count(lines)
        code = process.wait()
        log.seek(0)
        shown = log.read()
    if code:
        print(shown[-4000:], file=sys.stderr)
        count(["load,escapes"])  # the process died
    return ([line for line in shown.splitlines() if " cov: " in line] or ["no coverage"])[-1]


class Run:
    """Counts outcomes, in several threads, and writes them as the result."""

    def __init__(self, inputs: Path, work: Path, kept: Path, result: Path) -> None:
        self.inputs, self.work, self.kept, self.result = inputs, work, kept, result
        self.counts: Counts = Counter()
        self.covered: list[str] = []
        self._start = time.monotonic()

    def count(self, lines: Iterable[str]) -> None:
        """Count outcomes, one a line."""
        for line in lines:
            name, how = line.strip().split(",")
            self.counts[name, how] += 1

    def mutate(self, number: int, seconds: float, seed: int, *, is_guided: bool) -> None:
        """Run mutants for some seconds; the next process begins where one died."""
        end = self._start + seconds
        while (left := end - time.monotonic()) > 0:
            place = self.work / f"{number}-{seed}"
            place.mkdir()
            if is_guided:
                self.covered.append(guided(self.inputs, place, self.kept, left, seed, self.count))
            else:
                batch(self.inputs, place, self.kept, seed, self.count)
            shutil.rmtree(place)
            seed += 1

    def write(self) -> None:
        """Write the result."""
        total = self.counts.copy()
        rows = [[name, *(f"{total[name, how]:,}" for how in FOUND)] for name in OPERATIONS]
        n_mutants = sum(total["load", how] for how in FOUND)
        seconds = time.monotonic() - self._start
        sections = [
            f"{n_mutants:,} mutants in {seconds:,.0f} seconds.",
            table(["operation", *FOUND], rows),
        ]
        if self.covered:
            listed = "; ".join(f"`{one.strip()}`" for one in self.covered)
            sections.append(f"Guided by coverage; at the end of each process: {listed}.")
        write_result(self.result, "Mutated deltas", sections, where=self.work)


def main() -> int:
    """Run the benchmark."""
    parser = options_for(__doc__, "mutations.md")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0, help="of the first process")
    parser.add_argument("--processes", type=int, default=1, help="at the same time")
    parser.add_argument("--guided", action="store_true", help="by coverage; needs atheris")
    parser.add_argument(
        "--kept", type=Path, help="folder for the mutants with which something was found"
    )
    options = parser.parse_args()
    if options.guided and find_spec("atheris") is None:
        parser.error("--guided needs atheris, which `make fuzz` installs")
    torch.set_num_threads(1)
    with work_folder(options.work_dir, keep=options.keep) as work:
        kept = options.kept or work / "kept"
        make_inputs(work / "inputs")
        kept.mkdir(exist_ok=True, parents=True)
        run = Run(work / "inputs", work, kept, options.result)
        threads = [
            threading.Thread(
                target=run.mutate,
                args=(number, options.seconds, options.seed + 1_000_000 * number),
                kwargs={"is_guided": options.guided},
            )
            for number in range(options.processes)
        ]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            threads[0].join(REPORT_SECONDS) if threads[0].is_alive() else time.sleep(1)
            run.write()
    return int(any(run.counts[name, how] for name in OPERATIONS for how in FOUND[2:]))


if __name__ == "__main__":
    sys.exit(main())
