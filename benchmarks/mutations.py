"""Mutates deltas and runs every operation on them; counts escapes, hangs, memory and wrong output.

    python benchmarks/mutations.py --seconds 60
    python benchmarks/mutations.py --seconds 60 --guided

Three of four mutants have valid digests of their manifest, so that they reach the checks behind these. With
``--guided`` mutants that reach new branches of the package are mutated again; this needs atheris. The exit status is 1 if
something was found.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import numpy as np
import torch
import zstandard
from hostile import build
from measuring import options_for, table, work_folder, write_result
from safetensors.numpy import load_file, save_file

import sparsedelta

CPU_SECONDS, MEMORY_KB = 10, 1_000_000
BATCH = 50  # mutants of one process
REFUSED = (ValueError, OSError, sparsedelta.SparseDeltaError)
FOUND = ("accepted", "refused", "escapes", "hangs", "over 1 GB", "wrong output")
Content = dict[str, bytes]


class Hang(BaseException):
    """A call took more than ``CPU_SECONDS``."""


def content(folder: Path) -> Content:
    """Return the files of a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def make_inputs(folder: Path) -> None:
    """Write three checkpoints and the deltas between them."""
    draw = np.random.default_rng(0)
    kinds = (np.float32, np.float16, np.uint8, np.int64)
    tensors = {
        f"layers.{i}.w": draw.integers(0, 99, (40, 30)).astype(k) for i, k in enumerate(kinds)
    }
    for step, name in enumerate(("base", "target", "final")):
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(f'{{"step": {step}}}')
        save_file(tensors, folder / name / "model.safetensors")
        for one in list(tensors.values())[: 4 if step == 0 else 2]:  # merge wants equal integers
            one.reshape(-1)[draw.integers(0, one.size, 40)] += one.dtype.type(1)
    for name, old, new, values, level in (
        ("one", "base", "target", "ulp", "default"),
        ("set", "base", "target", "target", "fast"),
        ("both", "base", "final", "ulp", "default"),
        ("two", "target", "final", "ulp", "default"),
    ):
        pair = folder / old, folder / new
        with sparsedelta.diff(*pair, values=values, level=level, standalone=True) as delta:
            delta.save(folder / f"{name}.sd")


def mutated(data: bytes, n: int) -> bytes:
    """Return bytes with ``n`` random edits."""
    edited = bytearray(data)
    for _ in range(n):
        at = random.randrange(len(edited) + 1)
        edit = random.randrange(5)
        if edit == 0:
            edited[at : at + 1] = random.randbytes(1)
        elif edit == 1:
            edited[at : at + random.randrange(1, 9)] = b""
        elif edit == 2:
            edited[at:at] = random.randbytes(random.randrange(1, 9))
        elif edit == 3 and at < len(edited):
            edited[at] ^= 1 << random.randrange(8)
        else:
            start = random.randrange(len(edited) + 1)
            edited[at : at + 4] = edited[start : start + random.randrange(1, 9)]
    return bytes(edited)


def numbers_changed(text: bytes) -> bytes:
    """Return JSON with one of its numbers replaced."""
    places = [at for at, one in enumerate(text) if chr(one).isdigit()]
    at = random.choice(places)
    new = random.choice((b"0", b"1", b"9", b"-1", b"255", b"4294967296", b"9223372036854775807"))
    return text[:at] + new + text[at + 1 :]


def mutant(data: bytes) -> bytes:
    """Return a mutated delta."""
    kind = random.randrange(4)
    if kind == 0:
        return mutated(data, random.randrange(1, 4))[: random.choice((None, None, len(data) - 9))]
    start = 8 + int.from_bytes(data[:8], "little")
    sizes = [int.from_bytes(data[at : at + 4], "little") for at in range(start, start + 16, 4)]
    parts, at = [], start + 16
    for raw, stored in (sizes[:2], sizes[2:]):
        part = data[at : at + stored]
        parts.append(part if raw == stored else zstandard.ZstdDecompressor().decompress(part))
        at += stored
    end = start + json.loads(data[8:start])["manifest"]["data_offsets"][1]
    digests, payload = data[at:end], data[end:]
    structure, notes = parts
    if kind == 1:
        structure = random.choice((numbers_changed, lambda text: mutated(text, 1)))(structure)
    elif kind == 2:
        payload = mutated(payload, random.randrange(1, 4))
    else:
        digests, notes = random.choice(((mutated(digests, 1), notes), (digests, mutated(notes, 1))))
    return build(structure, digests, notes, payload)


def stated(path: Path) -> object:
    """Return the digests that a delta states about its target and base."""
    with sparsedelta.load(path) as delta:
        rows = [(row.file, row.name, row.target, row.base) for row in delta.tensors]
        return delta.target.weight_files, delta.target.side_files, rows


class Calls:
    """The operations on one mutant, each with a check of what it gives."""

    def __init__(self, inputs: Path, work: Path, seed: str) -> None:
        self.inputs, self.work = inputs, work
        self.mutant, self.out, self.made = work / "mutant.sd", work / "out", work / "made.sd"
        self.seed = inputs / f"{seed}.sd"
        self.target = inputs / "target"
        self.expected = content(self.target), content(inputs / "base"), content(inputs / "final")
        self.stated = stated(self.seed)
        with sparsedelta.merge(inputs / "base", self.seed, inputs / "both.sd") as merged:
            merged.save(work / "merged.sd")
        self.merged = self._applied("base", work / "merged.sd")

    def _applied(self, base: str, delta: Path) -> Content:
        sparsedelta.apply(self.inputs / base, delta, self.out, overwrite=True)
        return content(self.out)

    def _is(self, found: Content, expected: Content) -> bool:
        return found == expected or stated(self.mutant) != self.stated

    def load(self) -> bool:
        """Open the mutant."""
        sparsedelta.load(self.mutant).close()
        return True

    def inspect(self) -> bool:
        """Describe it."""
        return bool(sparsedelta.inspect(self.mutant).layers is not None)

    def verify(self) -> bool:
        """Check it with base and target, then apply it."""
        sparsedelta.verify(self.mutant, base=self.inputs / "base", target=self.target)
        return self._is(self._applied("base", self.mutant), self.expected[0])

    def apply(self) -> bool:
        """Rebuild the target."""
        return self._is(self._applied("base", self.mutant), self.expected[0])

    def invert(self) -> bool:
        """Invert it, and apply the inverse to the target."""
        with sparsedelta.invert(self.mutant, base=self.inputs / "base") as made:
            made.save(self.made, overwrite=True)
        return self._is(self._applied(self.target.name, self.made), self.expected[1])

    def stack(self) -> bool:
        """Stack it with the delta that follows, and apply the result."""
        deltas = self.mutant, self.inputs / "two.sd"
        with sparsedelta.stack(*deltas, base=self.inputs / "base") as made:
            made.save(self.made, overwrite=True)
        return self._is(self._applied("base", self.made), self.expected[2])

    def merge(self) -> bool:
        """Merge it with another delta, and apply the result."""
        with sparsedelta.merge(self.inputs / "base", self.mutant, self.inputs / "both.sd") as made:
            made.save(self.made, overwrite=True)
        return self._is(self._applied("base", self.made), self.merged)

    def live(self) -> bool:
        """Apply it to tensors in memory; they must stay as they are if it is refused."""
        before = load_file(self.inputs / "base/model.safetensors")
        after = load_file(self.target / "model.safetensors")
        model = {name: torch.from_numpy(one.copy()) for name, one in before.items()}
        try:
            with sparsedelta.load(self.mutant) as delta:
                delta.apply_(model)
        except REFUSED:
            if not same(model, before):
                raise RuntimeError("refused, and the model changed") from None
            raise
        return same(model, after) or stated(self.mutant) != self.stated


def same(model: dict[str, torch.Tensor], tensors: dict[str, np.ndarray]) -> bool:
    """Return whether a state dict has the bytes of these tensors."""
    return all(model[name].numpy().tobytes() == one.tobytes() for name, one in tensors.items())


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


def run_batch(inputs: Path, work: Path, kept: Path, seed: int, report: int) -> None:
    """Run all operations on mutants; write their outcomes, one a line, to a descriptor."""
    random.seed(seed)
    calls = Calls(inputs, work, random.choice(("one", "set")))
    data = calls.seed.read_bytes()
    for number in range(BATCH):
        calls.mutant.write_bytes(mutant(data))
        run_all(calls, kept / f"{calls.seed.stem}-{seed}-{number}", report)
    if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > MEMORY_KB:
        os.write(report, b"load,over 1 GB\n")


def run_all(calls: Calls, kept: Path, report: int) -> None:
    """Run all operations on a mutant; keep it under a name that begins with ``kept`` if something was found."""
    for name in OPERATIONS:
        found = outcome(getattr(calls, name))
        if found not in ("accepted", "refused"):
            shutil.copyfile(calls.mutant, f"{kept}-{name}.sd")
        os.write(report, f"{name},{found}\n".encode())


def guided(
    inputs: Path, work: Path, kept: Path, seconds: float, seed: int
) -> tuple[Counter[tuple[str, str]], str]:
    """Run ``guided.py`` in a process of its own; return how each operation ended, and what it covered."""
    receive, send = os.pipe()
    script = Path(__file__).with_name("guided.py")
    words = [inputs, work, kept, send, seconds, seed]
    with open(work / "log", "w+") as log, open(receive) as lines:
        process = subprocess.Popen(
            [sys.executable, script, *map(str, words)], pass_fds=[send], stderr=log, stdout=log
        )
        os.close(send)
        found = Counter(pair(line) for line in lines)
        code = process.wait()
        log.seek(0)
        shown = log.read()
    if code:
        print(shown[-4000:], file=sys.stderr)
        found["load", "escapes"] += 1  # the process died
    return found, ([line for line in shown.splitlines() if " cov: " in line] or ["no coverage"])[-1]


def batch(inputs: Path, work: Path, kept: Path, seed: int) -> Counter[tuple[str, str]]:
    """Run a batch in a process of its own; return how often each operation ended how."""
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
        found = Counter(pair(line) for line in lines)
    if os.waitpid(pid, 0)[1]:
        found["load", "escapes"] += 1  # the process died
    return found


def pair(line: str) -> tuple[str, str]:
    """Return an operation and its outcome."""
    name, how = line.strip().split(",")
    return name, how


def main() -> int:
    """Run the benchmark."""
    parser = options_for(__doc__, "mutations.md")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0, help="of the first batch")
    parser.add_argument("--guided", action="store_true", help="by coverage; needs atheris")
    parser.add_argument(
        "--kept", type=Path, help="folder for the mutants with which something was found"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    total: Counter[tuple[str, str]] = Counter()
    with work_folder(options.work_dir, keep=options.keep) as work:
        inputs, place = work / "inputs", work / "place"
        kept = options.kept or work / "kept"
        make_inputs(inputs)
        kept.mkdir(exist_ok=True, parents=True)
        end, seed = time.monotonic() + options.seconds, options.seed
        place.mkdir()
        covered = ""
        if options.guided:
            total, covered = guided(inputs, place, kept, options.seconds, options.seed)
        while not options.guided and time.monotonic() < end:
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir()
            total += batch(inputs, place, kept, seed)
            seed += 1
        rows = [[name, *(f"{total[name, how]:,}" for how in FOUND)] for name in OPERATIONS]
        n_mutants = sum(total["load", how] for how in FOUND[:4])
        text = f"{n_mutants:,} mutants in {options.seconds:.0f} seconds."
        if covered:
            text += f" Guided by coverage; at the end: `{covered}`."
        sections = [text, table(["operation", *FOUND], rows)]
        write_result(options.result, "Mutated deltas", sections, where=work)
    return int(any(total[name, how] for name in OPERATIONS for how in FOUND[2:]))


if __name__ == "__main__":
    sys.exit(main())
