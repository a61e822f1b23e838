"""A channel of many versions while its publisher, followers and pruner are killed and the store fails.

    python benchmarks/channel_kills.py --versions 1000

One call of the store in fifty fails, half of them after they took effect. A trainer restarts from a checkpoint that is
some steps old. Followers keep a model in memory or a folder; new ones join all the time; a pruner keeps few versions. Each
follower compares the digests of all tensors with the entry after every move. The exit status is 1 if one is wrong.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from measuring import options_for, table, work_folder, write_result

from sparsedelta import Channel, Follower, Publisher
from sparsedelta.channel import following, leases
from sparsedelta.channel.entry import Entry
from sparsedelta.errors import Behind, RemoteError
from sparsedelta.files.checkpoint import Checkpoint
from sparsedelta.live.sides import held_checkpoint
from sparsedelta.ops.identity import checkpoint_fingerprint
from sparsedelta.stores.folder import FolderStore
from sparsedelta.stores.objects import Content

State = dict[str, torch.Tensor]
FAILURES = 50  # one call in so many
SAVE_EVERY = 7  # steps between two checkpoints of the trainer
KEEP = 25
CHANGED = 100  # one element in so many


class FailingStore(FolderStore):
    """A folder of which some calls fail, before or after they took effect."""

    def read(self, name: str, max_bytes: int) -> bytes | None:
        """Read an object."""
        with _failing():
            return super().read(name, max_bytes)

    def create(self, name: str, content: Content) -> bool:
        """Create an object."""
        with _failing():
            return super().create(name, content)

    def write(self, name: str, content: Content) -> None:
        """Write an object."""
        with _failing():
            super().write(name, content)

    def delete(self, name: str) -> None:
        """Delete an object."""
        with _failing():
            super().delete(name)


@contextmanager
def _failing() -> Iterator[None]:
    chosen = random.randrange(2 * FAILURES)
    if chosen == 0:
        raise OSError("the store failed before the call")
    yield
    if chosen == 1:
        raise OSError("the store failed after the call")


def start_state(shape: tuple[int, int], n_tensors: int) -> State:
    """Return the weights before the first step."""
    generator = torch.Generator().manual_seed(0)
    return {
        f"layer.{number}.weight": (torch.randn(shape, generator=generator) * 0.02).bfloat16()
        for number in range(n_tensors)
    }


def train(state: State, step: int) -> None:
    """Change weights as a step does; the same step changes the same elements."""
    generator = torch.Generator().manual_seed(step)
    for tensor in state.values():
        flat = tensor.view(-1).view(torch.int16)
        index = torch.randint(len(flat), (len(flat) // CHANGED,), generator=generator)
        flat[index] += 1 + step % 3


def channel_at(place: Path) -> Channel:
    """Return the channel through a store that fails."""
    random.seed(os.urandom(8))
    torch.set_num_threads(1)
    shorter = {"LEASE_SECONDS": 6, "CLOCK_SECONDS": 1, "_RENEW_SECONDS": 2}
    for module in (leases, following):
        vars(module).update({name: shorter[name] for name in shorter.keys() & vars(module).keys()})
    return Channel(FailingStore(place))


def again(call: Callable[[], Any]) -> Any:
    """Return what a call returns that is made again while the store fails."""
    while True:
        try:
            return call()
        except (OSError, RemoteError):
            time.sleep(0.01)


def note(log: Path, **fields: Any) -> None:
    """Append a line to a log in one write."""
    with open(log, "ab", buffering=0) as file:
        file.write(json.dumps(fields).encode() + b"\n")


def publish(publisher: Publisher, step: int) -> Entry:
    """Publish, and wait until the version is durable."""
    return publisher.publish(step).result()


def trainer(work: Path, last: int, shape: tuple[int, int], n_tensors: int) -> None:
    """Train from the last checkpoint, and publish every step."""
    channel, saved = channel_at(work / "channel"), work / "saved.pt"
    step, state = 0, start_state(shape, n_tensors)
    if saved.exists():
        step, state = torch.load(saved)
    publisher = again(lambda: Publisher(channel, state, anchor_every=10))
    while step < last:
        step += 1
        train(state, step)
        entry = again(partial(publish, publisher, step))
        note(work / "published", version=entry.version, step=step, target=entry.target.hex())
        if step % SAVE_EVERY == 0:
            torch.save((step, state), saved.with_suffix(".new"))
            saved.with_suffix(".new").replace(saved)


def follower(work: Path, name: str, last: int, shape: tuple[int, int], n_tensors: int) -> None:
    """Follow until the last step, or once if the name begins with "late"."""
    channel = channel_at(work / "channel")
    is_model = name.endswith("model")
    held: Any = start_state(shape, n_tensors) if is_model else work / f"{name}.safetensors"
    one = Follower(channel, held)
    while True:
        try:
            report = one.sync()
        except (Behind, OSError, RemoteError):
            time.sleep(0.02)
            continue
        except Exception as error:
            note(work / "followed", name=name, wrong=f"{type(error).__name__}: {error}")
            raise
        with held_checkpoint(held) if is_model else Checkpoint(held) as now:
            found = checkpoint_fingerprint(now)
        entry = again(partial(channel.entry, report.version))
        note(
            work / "followed", name=name, version=report.version, moved=report.n_versions,
            anchor=report.anchor, right=found == entry.target,
        )  # fmt: skip
        if report.step == last or name.startswith("late"):
            return
        time.sleep(random.random() * 0.05)


def pruner(work: Path, last: int, shape: tuple[int, int], n_tensors: int) -> None:
    """Prune all the time."""
    channel = channel_at(work / "channel")
    while True:
        time.sleep(0.5)
        report = again(lambda: channel.prune(keep=KEEP))
        note(work / "pruned", closed=report.n_closed, deleted=report.n_deleted)


def disturb(work: Path, versions: int, arguments: tuple[Any, ...], seconds: float) -> Counter[str]:
    """Run all parties, kill them at random moments, and count what was done."""
    counts: Counter[str] = Counter()
    processes_of = multiprocessing.get_context("forkserver")
    processes_of.set_forkserver_preload(["channel_kills"])
    names = ["model", "second model", "folder", "second folder"]
    parties: dict[str, tuple[Callable[..., None], tuple[Any, ...]]] = {
        "trainer": (trainer, (work, *arguments)),
        "pruner": (pruner, (work, *arguments)),
    } | {name: (follower, (work, name, *arguments)) for name in names}

    def start(name: str) -> BaseProcess:
        what, given = parties[name]
        process = processes_of.Process(target=what, args=given, daemon=True)
        process.start()
        return process

    running = {name: start(name) for name in parties}
    late: list[BaseProcess] = []
    last_words = time.monotonic()
    while any(running[name].is_alive() for name in ("trainer", *names)):
        time.sleep(random.random() * 2 * seconds)
        victim = random.choice([*parties])
        if running[victim].is_alive():
            running[victim].kill()
            counts[f"kills of {victim.removeprefix('second ')}"] += 1
        for name, process in running.items():
            process.join(0)
            if process.exitcode not in (None, 0):
                counts["ended by an error"] += process.exitcode not in (-9,)
                running[name] = start(name)
        late = [process for process in late if process.is_alive()]
        if len(late) < 2:
            kind = random.choice(["model", "folder"])
            counts["late"] += 1
            parties[f"late {counts['late']} {kind}"] = (
                follower,
                (work, f"late {counts['late']} {kind}", *arguments),
            )
            late.append(start(f"late {counts['late']} {kind}"))
            del parties[f"late {counts['late']} {kind}"]
        if time.monotonic() - last_words > 20:
            last_words = time.monotonic()
            print(
                f"  {len([*work.glob('channel/versions/*')])} versions, {dict(counts)}", flush=True
            )
    for process in [*running.values(), *late]:
        process.kill()
        process.join()
    return counts


def lines(log: Path) -> list[dict[str, Any]]:
    """Return what a log holds; a line that a kill has cut off is left out."""
    found = []
    for line in log.read_bytes().splitlines() if log.exists() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def main() -> int:
    """Run the benchmark."""
    parser = options_for(__doc__, "channel_kills.md")
    parser.add_argument("--versions", type=int, default=1000)
    parser.add_argument("--mb", type=float, default=4, help="size of the model")
    parser.add_argument(
        "--kill-seconds", type=float, default=1.0, help="between two kills, on average"
    )
    options = parser.parse_args()
    n_tensors, side = 8, 512
    shape = (max(1, round(options.mb * 1e6 / 2 / n_tensors / side)), side)
    arguments = (options.versions, shape, n_tensors)
    started = time.monotonic()
    with work_folder(options.work_dir, keep=options.keep) as work:
        counts = disturb(work, options.versions, arguments, options.kill_seconds)
        entries = {entry.version: entry for entry in Channel(work / "channel").log()}
        published, followed = lines(work / "published"), lines(work / "followed")
        lost = [one for one in published if entries[one["version"]].target.hex() != one["target"]]
        wrong = [one for one in followed if not one.get("right")]
        at_end = {one["name"] for one in followed if one.get("version") == max(entries)}
        state = start_state(shape, n_tensors)
        for step in range(1, options.versions + 1):
            train(state, step)
        with held_checkpoint(state) as now:
            is_same = checkpoint_fingerprint(now) == entries[max(entries)].target
        late = {one["name"] for one in followed if one["name"].startswith("late")}
        steady = {one["name"] for one in followed} - late
        figures = {
            "versions in the channel": len(entries),
            "steps of the training": options.versions,
            "runs of the publisher": len({entry.run for entry in entries.values()}),
            **{key: value for key, value in sorted(counts.items()) if key.startswith("kills")},
            "objects pruned": sum(one["deleted"] for one in lines(work / "pruned")),
            "moves of followers": sum(bool(one.get("moved")) for one in followed),
            "of these by an anchor": sum(bool(one.get("anchor")) for one in followed),
            "versions in the longest move": max(one.get("moved", 0) for one in followed),
            "late followers that joined": len(late),
            "steady followers at the head": f"{len(steady & at_end)} of {len(steady)}",
            "head is what was trained": "yes" if is_same else "NO",
            "versions lost": len(lost),
            "moves to wrong bits": len(wrong),
            "processes that ended by an error": counts["ended by an error"],
            "minutes": f"{(time.monotonic() - started) / 60:.1f}",
        }
        for one in [*lost, *wrong][:20]:
            print(one, file=sys.stderr)
        rows = [[name, str(value)] for name, value in figures.items()]
        write_result(options.result, "A channel under kills", [table(["", ""], rows)], where=work)
    is_right = is_same and not lost and not wrong and steady <= at_end
    return int(not is_right or bool(counts["ended by an error"]))


if __name__ == "__main__":
    sys.exit(main())
