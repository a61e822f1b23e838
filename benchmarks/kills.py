"""Kills ``push`` and ``fit`` at random moments, runs them again, and checks what they leave.

    python benchmarks/kills.py --kills 1000 --minutes 8

``push`` uploads to a Hub on the loopback interface, that of ``tests/hub``. ``fit`` resumes from its checkpoints. The
exit status is 1 if a wrong outcome was found. *In TMPDIR* counts the pushes after which TMPDIR was not empty, although
the next push removes what a killed one left. Half of ``--minutes`` is for each command; the table holds the kills that
were reached.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from measuring import ROOT, options_for, table, work_folder, write_result

sys.path.insert(0, str(ROOT / "tests"))
sys.path.insert(0, str(ROOT / "tests" / "train"))

from hub.hub_helpers import BASE, TOKEN, TUNED, make_checkpoints, publish, save_delta
from hub.hub_server import LoopbackHub

OUTCOMES = (
    "ended before",
    "whole",
    "none",
    "broken",
    "next run right",
    "left after it",
    "in TMPDIR",
)
MAX_KILLS_IN_A_ROW = 5


def run(work: Callable[[], object], log: Path, seconds: float | None = None) -> bool:
    """Run a function in a fork, killed after some seconds if they are given; return whether it succeeded."""
    pid = os.fork()
    if not pid:
        status = 1
        try:
            fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(fd, 1)
            os.dup2(fd, 2)
            work()
            status = 0
        except SystemExit as end:
            status = int(bool(end.code))
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)
    return os.waitpid(pid, 0)[1] == 0


def longest(work: Callable[[], object], log: Path, reset: Callable[[], object]) -> float:
    """Return the longest of three run times.

    Raises:
        RuntimeError: a run failed.
    """
    times = []
    for _ in range(3):
        reset()
        start = time.perf_counter()
        if not run(work, log):
            raise RuntimeError(log.read_text("utf-8"))
        times.append(time.perf_counter() - start)
    return max(times)


def kill_push(folder: Path, n_kills: int, end: float) -> Counter[str]:
    """Kill pushes; count the states of the repository, and the pushes that follow."""
    counts: Counter[str] = Counter()
    scratch = folder / "tmp"
    scratch.mkdir(parents=True)
    checkpoints = make_checkpoints(folder)
    delta, log = save_delta(*checkpoints, folder / "delta.sd"), folder / "log"
    hub = LoopbackHub()
    hub.state.users[TOKEN] = "me"
    os.environ |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "home"), "HF_TOKEN": TOKEN}
    os.environ |= {"HF_HUB_DISABLE_XET": "1", "TMPDIR": str(scratch)}
    tempfile.tempdir = None  # read TMPDIR again
    from sparsedelta.cli import main as command_line
    from sparsedelta.hub import push as _  # imported before the forks  # noqa: F401

    def push() -> None:
        command_line(["-q", "push", str(delta), TUNED, "--base-id", BASE])

    def reset() -> None:
        hub.state.repos.pop(TUNED, None)
        shutil.rmtree(folder / "home", ignore_errors=True)
        for left in scratch.iterdir():
            shutil.rmtree(left) if left.is_dir() else left.unlink()

    def files() -> dict[str, bytes]:
        repo = hub.state.repos.get(TUNED)
        return {} if repo is None else {p: b.data for p, b in hub.state.head(TUNED).files.items()}

    with hub.running():
        publish(hub, BASE, checkpoints[0])
        seconds = longest(push, log, reset)
        whole = files()
        while counts["kills"] < n_kills and time.monotonic() < end:
            reset()
            counts["kills"] += 1
            counts["ended before"] += run(push, log, random.random() * seconds)
            found = files()
            is_none = not found.keys() - {".gitattributes"}
            counts["whole" if found == whole else "none" if is_none else "broken"] += 1
            counts["next run right"] += run(push, log) and files() == whole
            counts["in TMPDIR"] += any(scratch.iterdir())
    return counts


def kill_fit(folder: Path, n_kills: int, end: float) -> Counter[str]:
    """Kill trainings that resume; count the states of the delta, and compare the last delta's bytes."""
    import torch
    from train_helpers import make_inputs, make_net, square_loss

    from sift_train import FitConfig, fit

    torch.set_num_threads(1)
    folder.mkdir()
    counts: Counter[str] = Counter()
    delta, runs, log = folder / "place/delta.sd", folder / "run", folder / "log"
    config = FitConfig(
        sparse_rate=0.2, epochs=10, save_every=4, lr=1e-2, selection="gradient", lr_transfer=False
    )

    def train() -> None:
        torch.manual_seed(0)
        data = make_inputs(12)
        fit(
            make_net(), data, output=delta, config=config, loss=square_loss, run_dir=runs,
            resume=True, overwrite=True,
        )  # fmt: skip

    def reset() -> None:
        for path in (runs, delta.parent):
            shutil.rmtree(path, ignore_errors=True)
        delta.parent.mkdir()

    seconds = longest(train, log, reset)
    whole = delta.read_bytes()
    kept = sorted(str(path.relative_to(runs)) for path in runs.rglob("*"))
    while counts["kills"] < n_kills and time.monotonic() < end:
        reset()
        for _ in range(min(n_kills - counts["kills"], random.randint(1, MAX_KILLS_IN_A_ROW))):
            counts["kills"] += 1
            counts["ended before"] += run(train, log, random.random() * seconds)
            found = delta.read_bytes() if delta.exists() else None
            counts["none" if found is None else "whole" if found == whole else "broken"] += 1
        counts["last runs"] += 1
        counts["next run right"] += run(train, log) and delta.read_bytes() == whole
        left = sorted(str(path.relative_to(runs)) for path in runs.rglob("*"))
        counts["left after it"] += left != kept or os.listdir(delta.parent) != [delta.name]
    return counts


def main() -> int:
    """Run the benchmark."""
    parser = options_for(__doc__, "kills.md")
    parser.add_argument("--kills", type=int, default=100, help="of each command, at most")
    parser.add_argument("--minutes", type=float, default=60.0, help="in all, at most")
    options = parser.parse_args()
    random.seed(0)
    with work_folder(options.work_dir, keep=options.keep) as work:
        start, half = time.monotonic(), 30 * options.minutes
        found = {"push": kill_push(work / "push", options.kills, start + half)}
        found["fit"] = kill_fit(work / "fit", options.kills, start + 2 * half)
        rows = []
        for name, counts in found.items():
            next_runs = counts["last runs"] or counts["kills"]
            rows.append([name, str(counts["kills"]), str(next_runs)])
            rows[-1] += [str(counts[outcome]) for outcome in OUTCOMES]
            counts["wrong"] = counts["broken"] + counts["left after it"]
            counts["wrong"] += next_runs - counts["next run right"]
        head = ["command", "SIGKILL", "next runs", *OUTCOMES]
        write_result(options.result, "Kills of push and fit", [table(head, rows)], where=work)
    return int(any(counts["wrong"] for counts in found.values()))


if __name__ == "__main__":
    sys.exit(main())
