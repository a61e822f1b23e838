"""Processes that are killed: ``python worker.py publish CHANNEL N`` and ``python worker.py follow CHANNEL OUT``."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from channel.weights import advance, weights

import sparsedelta
from sparsedelta.errors import Behind

torch.set_num_threads(1)


def publish(channel: sparsedelta.Channel, last: int) -> None:
    """Publish steps up to the last, from where the channel is."""
    head = channel.head()
    step = head.step if head and head.step else 0
    state = weights(step)
    publisher = sparsedelta.Publisher(channel, state, anchor_every=5)
    while step < last:
        step += 1
        advance(state, step)
        publisher.publish(step)


def follow(channel: sparsedelta.Channel, out: Path, last: int) -> None:
    """Follow until the head has the last step."""
    follower = sparsedelta.Follower(channel, out)
    while True:
        try:
            report = follower.sync()
        except Behind:
            time.sleep(0.02)
            continue
        if report.step == last:
            return


if __name__ == "__main__":
    kind, place, *rest = sys.argv[1:]
    found = sparsedelta.Channel(place)
    if kind == "publish":
        publish(found, int(rest[0]))
    else:
        follow(found, Path(rest[0]), int(rest[1]))
