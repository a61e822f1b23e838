"""What publishing and following cost, on the device of a model: used by ``channel.py`` and ``gpu_parts.py``."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from sparsedelta import Channel, Follower, Publisher

CHANGED = 100  # one element in so many
N_COPIES = 5
State = dict[str, Tensor]


class Record(Protocol):
    """Receives figures."""

    def __call__(self, what: str, value: float | str, unit: str = "", note: str = "") -> None:
        """Record a figure."""


class Memory(Protocol):
    """Returns a context; its value receives the bytes by which a process grew in it."""

    def __call__(self) -> Any:
        """Return the context."""


@dataclass(slots=True)
class Times:
    """Seconds of each version, in order."""

    copied: list[float] = field(default_factory=list)
    blocked: list[float] = field(default_factory=list)
    visible: list[float] = field(default_factory=list)
    synced: list[float] = field(default_factory=list)
    paused: list[float] = field(default_factory=list)
    floor: list[float] = field(default_factory=list)
    scattered: list[float] = field(default_factory=list)
    n_bytes: list[int] = field(default_factory=list)


def train(state: State, step: int) -> None:
    """Change one element in a hundred by one unit in the last place, as a small step does."""
    generator = torch.Generator(next(iter(state.values())).device).manual_seed(step)
    for tensor in state.values():
        flat = tensor.view(-1).view(torch.int16)
        shape = (max(1, len(flat) // CHANGED),)
        index = torch.randint(len(flat), shape, generator=generator, device=flat.device)
        flat[index] = flat[index] ^ 1


def same(one: State, other: State) -> bool:
    """Return whether two states have the same bits."""
    return one.keys() == other.keys() and all(
        torch.equal(tensor.view(torch.int16), other[name].view(torch.int16))
        for name, tensor in one.items()
    )


def run(
    state: State,
    place: Path,
    record: Record,
    *,
    wait: Callable[[], None],
    keep_on: Literal["cpu", "model", "both"] = "cpu",
    n_versions: int = 6,
    n_behind: int = 10,
) -> None:
    """Publish and follow versions of a state in one process, and record what each costs.

    Args:
        state: bf16 tensors on one device; they are changed.
        place: a new folder for the channel.
        record: receives the figures.
        wait: waits until the device has done its work.
        keep_on: see ``Publisher``.
        n_versions: how many versions are timed.
        n_behind: how many versions a follower catches up with.

    Raises:
        ValueError: a follower does not hold the publisher's bits.
    """
    total = sum(tensor.nbytes for tensor in state.values())
    spare = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    channel = Channel(place)
    # The files of one version, as many anchors as are needed for the first.
    with Publisher(channel, state, keep_on=keep_on, anchor_ratio=None) as publisher:
        seconds, entry = _timed(lambda: publisher.publish(0).result(), wait)
        anchor_bytes = entry.anchor.n_bytes if entry.anchor else 0
        record("anchor, durable after", seconds, "s", f"{anchor_bytes / total:.0%} of the weights")
        engine = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
        follower = Follower(channel, engine)
        record("join by the anchor alone", _timed(follower.sync, wait)[0], "s")
        times = Times()
        for step in range(1, n_versions + 1):
            train(state, step)
            _version(publisher, follower, state, engine, spare, step, place, times, wait)
        _record_copies(state, times, record, wait)
        _versions(record, times, total)
        for step in range(n_versions + 1, n_versions + n_behind + 1):
            train(state, step)
            publisher.publish(step).result()
        seconds, report = _timed(follower.sync, wait)
        _check(state, engine)
        alone = statistics.median(times.synced)
        record(
            f"catch up with {report.n_versions} versions", seconds, "s",
            f"one write; {seconds / alone / report.n_versions:.2f} × as many single versions",
        )  # fmt: skip
        late = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
        seconds, report = _timed(Follower(channel, late).sync, wait)
        _check(state, late)
        record("join late", seconds, "s", f"an anchor and {report.n_versions - 1} deltas")
    record("bits of the followers", "equal", note="to the publisher's, after every version")


def _record_copies(state: State, times: Times, record: Record, wait: Callable[[], None]) -> None:
    """Record how long copies of the weights take."""
    device = next(iter(state.values())).device
    middle = statistics.median(times.copied)
    record("a copy of the weights", middle, "s", f"on {device.type}, before each version")
    if device.type == "cuda":
        on_host = {
            n: torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for n, t in state.items()
        }
        _copy(state, on_host)
        seconds = [_timed(lambda: _copy(state, on_host), wait)[0] for _ in range(N_COPIES)]
        record("a copy to the host", statistics.median(seconds), "s", "pinned")


def _copy(state: State, to: State) -> None:
    for name, tensor in state.items():
        to[name].copy_(tensor, non_blocking=True)


def _version(
    publisher: Publisher,
    follower: Follower,
    state: State,
    engine: State,
    spare: State,
    step: int,
    place: Path,
    times: Times,
    wait: Callable[[], None],
) -> None:
    """Publish and follow one version, and time its parts alone."""
    snapshot: Any = publisher._run._source._snapshot  # type: ignore[attr-defined]
    floor, capture = _timed(snapshot.capture, wait)
    made, delta = _timed(capture.diff, wait)
    with delta:
        written, n_bytes = _timed(lambda: _write(delta.blocks(), place.with_name("floor")), wait)
    times.floor.append(floor + made + written)
    times.n_bytes.append(n_bytes)
    times.copied.append(_timed(lambda: _copy(state, spare), wait)[0])
    started = time.perf_counter()
    publication = publisher.publish(step)
    times.blocked.append(time.perf_counter() - started)
    publication.result()
    times.visible.append(time.perf_counter() - started)
    with _pauses(follower, wait) as pauses:
        times.synced.append(_timed(follower.sync, wait)[0])
    times.paused.append(sum(pauses))
    _check(state, engine)
    pairs = [
        (
            engine[tensor.name].view(-1).view(torch.int16),
            torch.from_numpy(tensor.changes.index.astype("int64")).to(engine[tensor.name].device),
            torch.from_numpy(tensor.changes.bits.view("int16")).to(engine[tensor.name].device),
        )
        for tensor in capture.tensors.values()
        if tensor.changes
    ]
    times.scattered.append(_timed(lambda: [f.index_copy_(0, i, v) for f, i, v in pairs], wait)[0])


def _versions(record: Record, times: Times, total: int) -> None:
    middle = statistics.median
    n, n_bytes = len(times.blocked), middle(times.n_bytes)
    against = _ratio(times.visible, times.floor), _ratio(times.paused, times.scattered)
    blocked = _ratio(times.blocked, times.copied)
    record("trainer blocked, per version", middle(times.blocked), "s", f"median of {n}")
    record("trainer blocked / a copy", blocked, "", "must be 1.3 at most")
    record("durable after", middle(times.visible), "s", "from the call of publish")
    record("the same work alone", middle(times.floor), "s", "compare, encode, write, fsync")
    record("durable after / alone", against[0], "", "must be 2 at most")
    record("sync of one version", middle(times.synced), "s", "read, decode, check, write, check")
    both = [a + b for a, b in zip(times.visible, times.synced, strict=True)]
    record("staleness", middle(both), "s", "from publish until the follower holds it, no polling")
    record("follower's pause", middle(times.paused), "s")
    record("a plain scatter", middle(times.scattered), "s", "of the same values")
    record("pause / scatter", against[1], "", "must be 1.5 at most")
    record("bytes of a version", n_bytes / 1e6, "MB", f"{n_bytes / total:.2%} of the weights")


def _ratio(times: Sequence[float], floors: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(times, floors, strict=True))


def _check(state: State, engine: State) -> None:
    if not same(state, engine):
        raise ValueError("the follower does not hold the publisher's bits")


def _timed(work: Callable[[], Any], wait: Callable[[], None]) -> tuple[float, Any]:
    wait()
    started = time.perf_counter()
    found = work()
    wait()
    return time.perf_counter() - started, found


def _write(blocks: Iterator[bytes], path: Path) -> int:
    n_bytes = 0
    with open(path, "wb") as file:
        for block in blocks:
            n_bytes += file.write(block)
        file.flush()
        os.fsync(file.fileno())
    path.unlink()
    return n_bytes


@contextmanager
def _pauses(follower: Follower, wait: Callable[[], None]) -> Iterator[list[float]]:
    """Yield a list that receives the seconds of each time in which the follower keeps readers out."""
    lock: Any = follower._lock
    writing, pauses = lock.writing, list[float]()

    @contextmanager
    def timed() -> Iterator[None]:
        wait()
        with writing():
            started = time.perf_counter()
            yield
            wait()
            pauses.append(time.perf_counter() - started)

    lock.writing = timed
    try:
        yield pauses
    finally:
        del lock.writing
