"""Saves and restores the state of all random number generators, as plain tensors and numbers."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

State = dict[str, Any]


def generators_of(data: Any) -> list[torch.Generator]:
    """Return the generators that a data loader and its samplers use in place of the global one."""
    batch_sampler = getattr(data, "batch_sampler", None)
    holders = (data, getattr(data, "sampler", None), getattr(batch_sampler, "sampler", None))
    found = [getattr(holder, "generator", None) for holder in holders]
    return [g for g in dict.fromkeys(found) if isinstance(g, torch.Generator)]


def capture_random_state(generators: Iterable[torch.Generator] = ()) -> State:
    """Return the state of the generators of Python, numpy and torch, and of the given ones."""
    version, numbers, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": [version, torch.tensor(numbers, dtype=torch.int64), gauss],
        "numpy": [torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "own": [generator.get_state() for generator in generators],
    }


def restore_random_state(
    state: Mapping[str, Any], generators: Iterable[torch.Generator] = ()
) -> None:
    """Restore a state that ``capture_random_state`` returned."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers.tolist()), gauss))
    keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
    for generator, own in zip(generators, state["own"], strict=False):
        generator.set_state(own)


@contextmanager
def seeded_random_state(*numbers: int) -> Iterator[None]:
    """Seed all global generators by these numbers inside the block, and restore them afterwards."""
    digest = hashlib.sha256(repr(numbers).encode()).digest()
    seed = int.from_bytes(digest[:4], "big")
    with kept_random_state():
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        yield


@contextmanager
def kept_random_state() -> Iterator[None]:
    """Restore the state of all global generators after the block."""
    before = capture_random_state()
    try:
        yield
    finally:
        restore_random_state(before)
