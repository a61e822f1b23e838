"""A custom weight loader of SGLang that follows a channel: ``--custom-weight-loader sparsedelta.channel.receivers.sglang.load``.

The request carries the channel as the name of a tensor, and the version as its value.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sparsedelta._typing import AnyPath
from sparsedelta.channel.channel import Channel
from sparsedelta.channel.receivers.mirror import Changed, Mirror, find_wrong

if TYPE_CHECKING:
    import torch

LOADER = "sparsedelta.channel.receivers.sglang.load"
_ATTRIBUTE = "_sparsedelta_state"
_MEMBERS = {"channel", "checkpoint", "base", "whole"}


@dataclass(frozen=True, slots=True)
class _State:
    """What is kept on a model: the text of the request without the version, and the mirror."""

    name: str
    channel: Channel
    mirror: Mirror


def request(
    channel: str,
    version: int,
    *,
    checkpoint: AnyPath,
    base: AnyPath | None = None,
    whole: bool = False,
) -> tuple[str, int]:
    """Return the name and the value of the tensor that asks an engine for a version.

    SGLang ends if a loader raises, so the version is looked up here first.

    Args:
        channel: path or URL of the channel.
        version: number of the version.
        checkpoint: a checkpoint with the model's tensors, on the engine's machine.
        base: the checkpoint that the anchors are deltas on, if the publisher uses one.
        whole: load all tensors each time. A model that SGLang quantizes when it loads it needs this.

    Raises:
        Behind: the channel does not have the version.
        BadVersion: its entry is damaged.
    """
    with Channel(channel) as opened:
        opened.entry(version)
    members = {
        "channel": channel,
        "checkpoint": str(checkpoint),
        "base": None if base is None else str(base),
        "whole": whole,
    }
    return json.dumps(members), version


def load(model: torch.nn.Module, named_tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
    """Load a version into a model of SGLang; called by SGLang in each worker.

    Args:
        model: the worker's model. It keeps the copy of the checkpoint in host memory as an attribute.
        named_tensors: one pair, whose name and value are those of ``request``.

    Raises:
        ValueError: the pairs are something else.
        SparseDeltaError, OSError: see ``Mirror.deliver``.
    """
    if len(named_tensors) != 1:
        raise ValueError(f"{len(named_tensors)} tensors are given, expected the one of request()")
    name, version = named_tensors[0]
    members = _members(name)
    state: _State | None = getattr(model, _ATTRIBUTE, None)
    if state is None or state.name != name:
        if state:
            state.channel.close()
        channel = Channel(members["channel"])
        mirror = Mirror(channel, members["checkpoint"], base=members["base"])
        state = _State(name, channel, mirror)
        setattr(model, _ATTRIBUTE, state)
    target: Any = model

    def load_whole(tensors: Mapping[str, torch.Tensor]) -> None:
        target.load_weights(tensors.items())

    def load_changed(changed: Sequence[Changed]) -> None:
        target.load_weights([(one.name, one.tensor) for one in changed])

    state.mirror.deliver(
        int(version),
        whole=load_whole,
        changed=None if members["whole"] else load_changed,
        check=lambda changed: find_wrong(model, changed, next(model.parameters()).device),
    )


def _members(name: str) -> dict[str, Any]:
    try:
        members = json.loads(name)
    except ValueError:
        members = None
    if not isinstance(members, dict) or members.keys() != _MEMBERS:
        raise ValueError(f"{name[:80]!r} is not the name of a request for a version; use request()")
    return members
