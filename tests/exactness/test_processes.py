"""What only another process shows: it is killed, interrupted, or watched while it opens files."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import Raw, assert_same_files, noise, state, tree, write, write_sharded

import sparsedelta
from sparsedelta.system import is_local
from sparsedelta.tensors.compare import BLOCK_BYTES

MIB = 1 << 20

# Applies, and sends itself a signal at a certain point: after a share of the bytes, or just before
# or after the output gets its name.
KILLED = """
import os, signal, sys, threading
from pathlib import Path
import sparsedelta
from sparsedelta.progress import Silent

base, delta, out, at, number = sys.argv[1:]

def end():
    os.kill(os.getpid(), int(number))

class Ending(Silent):
    lock, done, total = threading.Lock(), 0, 1

    def start(self, label, n_bytes):
        self.total = n_bytes

    def advance(self, n_bytes):
        with self.lock:
            self.done += n_bytes
            if at[0].isdigit() and self.done >= float(at) * self.total:
                end()

replace = Path.replace

def replacing(self, target):
    if at == "before rename":
        end()
    replace(self, target)
    if at == "after rename":
        end()

Path.replace = replacing
sparsedelta.apply(base, delta, out, progress=Ending())
"""

REPLACING = """
from sparsedelta import system
exchange = system.exchange

def exchanging(one, other):
    if at == "before rename":
        end()
    done = exchange(one, other)
    if at == "after rename" and done:
        end()
    return done

system.exchange = exchanging
Path.replace = replacing
"""

# The command line's part of KILLED: the signal comes again and again while everything is cleared away.
COMMANDED = """
from sparsedelta.cli import main
real = sparsedelta.apply
sparsedelta.apply = lambda *given, **options: real(*given, **{**options, "progress": Ending()})
main(["apply", base, delta, out])
"""
CALL = "sparsedelta.apply(base, delta, out, progress=Ending())"

# Reports its progress and is killed from outside.
TELLING = """
import sys
import sparsedelta
from sparsedelta.progress import Silent

class Telling(Silent):
    def advance(self, n_bytes):
        sys.stdout.write("x")
        sys.stdout.flush()

sparsedelta.apply(*sys.argv[1:], progress=Telling())
"""

# Uses every verb, and prints all that was opened or changed under one folder.
WATCHED = """
import json, os, sys
root, base, target, delta, out = sys.argv[1:]
seen = []

def watch(event, arguments):
    if event == "open" or event.startswith(("os.", "shutil.")):
        paths = [os.fsdecode(a) for a in arguments if isinstance(a, (str, bytes, os.PathLike))]
        if any(os.path.realpath(p).startswith(root) for p in paths):
            seen.append([event, *(a if isinstance(a, int) else str(a) for a in arguments)])

sys.addaudithook(watch)
import sparsedelta
with sparsedelta.diff(base, target) as made:
    made.save(delta)
sparsedelta.apply(base, delta, out)
sparsedelta.apply(base, delta, out, overwrite=True, verify="touched")
sparsedelta.verify(delta, base=base, target=out)
try:
    sparsedelta.apply(target, delta, out + "2")
except sparsedelta.SparseDeltaError as error:
    seen.append([error.code])
print(json.dumps(seen))
"""


def run(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )


def make(root: Path, n_bytes: int, n_tensors: int) -> tuple[Path, Path, Path]:
    """Return base, target and their delta; one element in a thousand changes."""
    draw = np.random.default_rng(0)
    old, new = {}, {}
    for i in range(n_tensors):
        n = n_bytes // n_tensors // 2
        values = draw.integers(0, 1 << 16, n, np.uint16)
        old[f"t{i}"] = Raw("BF16", (n,), values.tobytes())
        values[draw.integers(0, n, n // 1000)] ^= 1
        new[f"t{i}"] = Raw("BF16", (n,), values.tobytes())
    for name, tensors in (("base", old), ("target", new)):
        items = list(tensors.items())
        write_sharded(root / name, [dict(items[::2]), dict(items[1::2])])
        write(root / name / "sub/config.json", name)
    with sparsedelta.diff(root / "base", root / "target") as delta:
        delta.save(root / "delta.sd")
    return root / "base", root / "target", root / "delta.sd"


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    return make(tmp_path_factory.mktemp("killed"), 8 * MIB, 9)


POINTS = ["0", "0.4", "0.99", "before rename", "after rename"]


@pytest.mark.parametrize("at", POINTS)
def test_killed(at: str, case: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, target, delta = case
    before, out = state(base), tmp_path / "out"
    assert run(KILLED, base, delta, out, at, signal.SIGKILL.value).returncode == -signal.SIGKILL
    assert out.exists() == (at == "after rename")
    if out.exists():
        assert_same_files(target, out)
    assert all(name == "out" or name.endswith(".partial") for name in os.listdir(tmp_path))
    assert state(base) == before
    sparsedelta.apply(base, delta, out, overwrite=out.exists())
    assert_same_files(target, out)
    if is_local(tmp_path):
        assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("at", POINTS[:-1])
def test_interrupted(at: str, case: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, _, delta = case
    before = state(base)
    done = run(KILLED, base, delta, tmp_path / "out", at, signal.SIGINT.value)
    assert done.returncode == -signal.SIGINT
    assert "KeyboardInterrupt" in done.stderr.splitlines()[-1]
    assert os.listdir(tmp_path) == []
    assert state(base) == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("at", ["0", "0.4", "before rename"])
def test_command_line_ended_by_a_signal(
    number: signal.Signals, at: str, case: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    base, _, delta = case
    script = KILLED.replace(CALL, COMMANDED)
    done = run(script, base, delta, tmp_path / "out", at, number.value)
    assert done.returncode == 128 + number
    told = "interrupted" if number == signal.SIGINT else f"ended by {number.name}"
    assert (done.stdout, done.stderr) == ("", f"{told}\n")
    assert os.listdir(tmp_path) == []


def test_signal_that_is_ignored_stays_so(case: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, target, delta = case
    script = "import signal\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
    script += KILLED.replace(CALL, COMMANDED)
    done = run(script, base, delta, tmp_path / "out", "0.4", signal.SIGHUP.value)
    assert (done.returncode, done.stderr) == (0, f"wrote {tmp_path / 'out'}\n")
    assert_same_files(target, tmp_path / "out")


@pytest.mark.parametrize("at", ["before rename", "after rename"])
def test_killed_while_it_replaces(at: str, case: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, target, delta = case
    out = tmp_path / "out"
    write(out / "old.safetensors", b"old")
    before = tree(out)
    script = KILLED.replace("Path.replace = replacing", REPLACING)
    script = script.replace(CALL, CALL.replace("out, ", "out, overwrite=True, "))
    assert run(script, base, delta, out, at, signal.SIGKILL.value).returncode == -signal.SIGKILL
    if at == "before rename":
        assert tree(out) == before
    else:
        assert_same_files(target, out)


@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("gcc"), reason="preloads a library")
def test_kills_failing_calls_and_changed_inputs(tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "benchmarks/reliability.py"
    options = "--kills 3 --changes 1 --every 19 --commands apply".split()
    places = ["--work-dir", str(tmp_path / "work"), "--result", str(tmp_path / "result.md")]
    done = subprocess.run(
        [sys.executable, str(script), *options, *places],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "result.md").read_text("utf-8").count("\n| apply") == 14
    assert sorted(os.listdir(tmp_path)) == ["result.md"]


@pytest.mark.slow
def test_killed_from_outside_in_the_middle(tmp_path: Path) -> None:
    base, target, delta = make(tmp_path, 64 * MIB, 24)
    n_blocks, n_reports = 64 * MIB // BLOCK_BYTES, 0
    for share in (0.2, 0.7, 2):
        out = tmp_path / f"out{share}"
        command = [sys.executable, "-c", TELLING, str(base), str(delta), str(out)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            if share < 1:
                process.stdout.read(int(share * n_blocks))
                process.kill()
            else:  # once all is reported: while it syncs and renames
                n_reports = len(process.stdout.read(n_blocks))
                time.sleep(0.01)
                process.kill()
        if out.exists():
            assert_same_files(target, out)
        else:
            assert process.returncode == -signal.SIGKILL
    assert n_reports == n_blocks


def test_base_and_target_are_only_read(tmp_path: Path) -> None:
    root = tmp_path / "read only"
    base, target, delta = make(root, 1 * MIB, 4)
    delta.unlink()
    write(root / "blob", noise("U8", 9).data)
    (base / "link").symlink_to("../blob")
    paths = [root, *root.rglob("*")]
    for path in paths:
        if not path.is_symlink():
            path.chmod(0o555 if path.is_dir() else 0o444)
    before, content = state(root), tree(root)
    try:
        done = run(WATCHED, root, base, target, tmp_path / "delta.sd", tmp_path / "out")
        assert state(root) == before
        assert tree(root) == content
    finally:
        for path in paths:
            if path.is_dir():
                path.chmod(0o755)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen.pop() == ["already_applied"]
    opened = [event for event in seen if event[0] == "open"]
    shards = {str(path) for path in root.rglob("*.safetensors")}
    assert shards <= {event[1] for event in opened}
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    assert [event for event in opened if event[3] & writing] == []
    others = {event[0] for event in seen} - {"open"}
    assert others <= {"os.listdir", "os.scandir", "os.walk"}
