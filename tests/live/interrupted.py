"""A program that sends itself SIGINT during switches and ``applied``, and checks the model afterwards."""

from __future__ import annotations

import random
import signal
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from live.live_helpers import Disk, State, copied, same, tuned

from sparsedelta import DeltaBank

N_TRIES = 60


def is_at(model: State, states: dict[str | None, State]) -> str | None:
    """Return the name of the state that a model has."""
    found = [name for name, state in states.items() if same(model, state)]
    if not found:
        sys.exit("the model has none of the states")
    return found[0]


def interrupt(*_: Any) -> None:
    signal.raise_signal(signal.SIGINT)


def main(disk: Disk) -> None:
    torch.set_num_threads(1)
    random.seed(0)
    base = {f"{n}": torch.randn(50_000).bfloat16() for n in range(20)}
    states: dict[str | None, State] = {
        None: base,
        "a": tuned(base, seed=1),
        "b": tuned(base, seed=2),
    }
    model = copied(base)
    deltas = {name: disk.diff(base, states[name]) for name in ("a", "b")}
    bank = DeltaBank(model)
    for name, delta in deltas.items():
        bank.add(name, delta)
    signal.signal(signal.SIGALRM, interrupt)
    begun = time.perf_counter()
    for key in ("a", "b", None):
        bank.activate(key)
    seconds = (time.perf_counter() - begun) / 3
    n_interrupted = 0
    for _ in range(N_TRIES):
        old, new = random.choice([(None, "a"), ("a", "b"), ("b", None)])
        bank.activate(old)
        try:
            signal.setitimer(signal.ITIMER_REAL, random.uniform(0.01, 1) * seconds)
            bank.activate(new)
            signal.setitimer(signal.ITIMER_REAL, 0)
        except KeyboardInterrupt:
            n_interrupted += 1
        if is_at(model, states) != bank.active:
            sys.exit(f"the model is not {bank.active!r}")
    bank.activate(None)
    for _ in range(N_TRIES):
        try:
            signal.setitimer(signal.ITIMER_REAL, random.uniform(0.5, 10) * seconds)
            with deltas["a"].applied(model, verify="none"):
                pass
            signal.setitimer(signal.ITIMER_REAL, 0)
        except KeyboardInterrupt:
            n_interrupted += 1
        if is_at(model, states) is not None:
            sys.exit("the model is not the base again")
    if not n_interrupted:
        sys.exit("nothing was interrupted")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder, ExitStack() as context:
        main(Disk(Path(folder), context))
