"""What the processes do that are killed."""

from __future__ import annotations

import time
from pathlib import Path

from channel.weights import advance, weights

from sparsedelta.channel.channel import Channel
from sparsedelta.channel.follower import Follower
from sparsedelta.channel.publisher import Publisher
from sparsedelta.errors import Behind


def publish(place: Path, last: int) -> None:
    """Publish steps up to the last, from where the channel is."""
    channel = Channel(place)
    head = channel.head()
    step = head.step if head and head.step else 0
    state = weights(step)
    publisher = Publisher(channel, state, anchor_every=5)
    while step < last:
        step += 1
        advance(state, step)
        publisher.publish(step).result()


def follow(place: Path, out: Path, last: int) -> None:
    """Follow until the head has the last step."""
    follower = Follower(Channel(place), out)
    while True:
        try:
            report = follower.sync()
        except Behind:
            time.sleep(0.02)
            continue
        if report.step == last:
            return
