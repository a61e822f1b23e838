"""What a version costs the trainer, the store and the followers of a channel, beside other ways to send weights.

    python benchmarks/channel.py

One process publishes and follows a bf16 model in memory. In each version one element in a hundred has changed by one unit in
the last place. Afterwards the same change is sent as full safetensors and in the layouts of other projects. The exit status is 1 if a
follower holds other bits than the publisher.
"""

from __future__ import annotations

import gc
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from channel_costs import State, run, same, train
from layouts import LAYOUTS
from measuring import SAMPLE_SECONDS, options_for, table, work_folder, write_result
from safetensors.torch import load_file, save_file

from sparsedelta import Channel, Follower, Publisher

SIDE = 4096


def make_state(n_bytes: int) -> State:
    """Return bf16 weights from N(0, 0.02): square tensors, and small ones as of norms."""
    generator = torch.Generator().manual_seed(0)
    n_tensors = max(1, round(n_bytes / 2 / SIDE**2))
    side = SIDE if n_bytes > 2 * SIDE**2 else 512
    state = {}
    for number in range(n_tensors):
        big = torch.randn(side, side, generator=generator) * 0.02
        state[f"layers.{number}.weight"] = big.bfloat16()
        state[f"layers.{number}.norm"] = torch.ones(side, dtype=torch.bfloat16)
    return state


@contextmanager
def growth() -> Iterator[list[int]]:
    """Yield a list that receives the bytes by which the process's anonymous memory grows at most."""
    found: list[int] = []
    done = threading.Event()
    gc.collect()
    before = peak = _anonymous()

    def sample() -> None:
        nonlocal peak
        while not done.wait(SAMPLE_SECONDS / 10):
            peak = max(peak, _anonymous())

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()
        found.append(max(peak, _anonymous()) - before)


def _anonymous() -> int:
    lines = Path("/proc/self/status").read_text("ascii").splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


def memory(state: State, place: Path) -> list[list[str]]:
    """Return rows: by how much publisher and follower grow."""
    total = sum(tensor.nbytes for tensor in state.values())
    channel = Channel(place)
    with growth() as snapshot:
        publisher = Publisher(channel, state, anchor_ratio=None)
    with growth() as anchor:
        publisher.publish(0).result()
    engine = {name: tensor.clone() for name, tensor in state.items()}
    follower = Follower(channel, engine)
    follower.sync()
    train(state, 1)
    with growth() as version:
        publisher.publish(1).result()
    with growth() as followed:
        follower.sync()
    publisher.close()
    if not same(state, engine):
        raise ValueError("the follower does not hold the publisher's bits")
    n_changed = sum(tensor.numel() for tensor in state.values()) / 100
    return [
        [what, f"{found[0] / 1e6:,.0f}", f"{found[0] / total:.2f}", note]
        for what, found, note in (
            ("a publisher is made", snapshot, "its copy of the weights"),
            ("it publishes an anchor", anchor, "blocks of the tensors"),
            ("it publishes a version", version, "the changed elements, and blocks"),
            (
                "a follower moves on",
                followed,
                f"{followed[0] / n_changed:.0f} bytes for a changed element",
            ),
        )
    ]


def median_of(work: Callable[[], Any], n: int) -> tuple[float, Any]:
    """Return the median of the seconds of n calls, and what the last returned."""
    seconds = []
    for _ in range(n):
        started = time.perf_counter()
        found = work()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds), found


def others(state: State, work: Path, n_rounds: int) -> list[list[str]]:
    """Return rows: the same change as full safetensors and in the layouts of other projects."""
    base = {name: tensor.clone() for name, tensor in state.items()}
    train(state, 1)
    engine, rows, path = {n: t.clone() for n, t in base.items()}, [], work / "sent"

    def send(data: bytes) -> None:
        with open(path, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    def save() -> None:
        save_file(state, path)
        with open(path, "rb+") as file:
            os.fsync(file.fileno())

    def load() -> None:
        for name, tensor in load_file(path).items():
            engine[name].copy_(tensor)

    made, _ = median_of(save, n_rounds)
    n_bytes = path.stat().st_size
    paused, _ = median_of(load, n_rounds)
    rows.append(_row("full safetensors", n_bytes, made, paused, same(engine, state)))
    before, after = (
        {n: (tuple(t.shape), t.view(-1).view(torch.int16).numpy().view("u2")) for n, t in s.items()}
        for s in (base, state)
    )
    for name, layout in LAYOUTS.items():
        made, data = median_of(lambda layout=layout: _sent(layout, before, after, send), n_rounds)  # type: ignore[misc] # a default
        paused, found = median_of(lambda layout=layout: layout.decode(before, path.read_bytes()), 1)  # type: ignore[misc] # a default
        exact = all((found[n][1] == bits).all() for n, (_, bits) in after.items())
        rows.append(_row(name, len(data), made, paused, exact))
    return rows


def _sent(layout: Any, before: Any, after: Any, send: Callable[[bytes], None]) -> bytes:
    data: bytes = layout.encode(before, after)
    send(data)
    return data


def _row(name: str, n_bytes: int, made: float, paused: float, exact: bool) -> list[str]:
    return [
        name, f"{n_bytes / 1e6:,.1f}", f"{made:.2f}", f"{paused:.2f}", "yes" if exact else "NO"
    ]  # fmt: skip


def main() -> int:
    """Run the benchmark."""
    parser = options_for(__doc__, "channel.md")
    parser.add_argument("--gb", type=float, default=1.0, help="size of the model in bf16, in GB")
    parser.add_argument("--versions", type=int, default=6, help="versions that are timed")
    options = parser.parse_args()
    rows: list[list[str]] = []
    figures: dict[str, float] = {}

    def record(what: str, value: float | str, unit: str = "", note: str = "") -> None:
        shown = f"{value:,.3g}" if isinstance(value, float) else value
        if isinstance(value, float):
            figures[what] = value
        rows.append([what, f"{shown} {unit}".strip(), note])
        print(f"  {what}: {shown} {unit} {note}", flush=True)

    with work_folder(options.work_dir, keep=options.keep) as work:
        state = make_state(round(options.gb * 1e9))
        total = sum(tensor.nbytes for tensor in state.values())
        run(state, work / "channel", record, wait=lambda: None, n_versions=options.versions)
        rows[0][2] += f"; {total / 1e9:.2f} GB in {len(state)} tensors"
        grown = memory(state, work / "memory")
        own = _row(
            "this channel",
            round(figures["bytes of a version"] * 1e6),
            figures["trainer blocked, per version"],
            figures["follower's pause"],
            True,
        )
        beside = [own, *others(state, work, 2)]
        sections = [
            table(["", "value", ""], rows),
            "## Memory\n\nBy how much the process grows, at most.",
            table(["", "MB", "× the weights", ""], grown),
            "## Beside other ways to send the same change\n\nThe layouts of other projects are written again from their"
            " descriptions ([layouts.py](../layouts.py)); their own code may be faster. Trainer blocked: compare, encode and write with"
            " fsync; this channel does all but the comparison behind the training. Follower blocked: read, decode and"
            " write; this channel writes only.",
            table(["", "MB", "trainer blocked, s", "follower blocked, s", "exact"], beside),
        ]
        write_result(options.result, "What a channel costs", sections, where=work)
    return 0


if __name__ == "__main__":
    sys.exit(main())
