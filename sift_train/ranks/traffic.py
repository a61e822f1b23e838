"""Computes what one optimizer step sends over the network, for SIFT and for other methods."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

MIB = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Bytes of the data that the ranks reduce in a step; an all-reduce sends 2 (N - 1) / N of them per rank.

    Attributes:
        n_devices: number of ranks, N.
        sharded: whether the weights are sharded, as by FSDP2.
        sift_bytes: data parallel: the gradients of the trained components, in the masters' dtype. Sharded: the
            dense gradients of the target tensors, which are reduced before components can be taken.
        ddp_bytes: gradients of all parameters, in the weights' dtype.
        lora_bytes: fp32 gradients of a LoRA of as many parameters as SIFT trains.
        gathered_bytes: weights that each rank gathers in a step, in the forward and the backward pass; 0
            if they are not sharded.
    """

    n_devices: int
    sharded: bool
    sift_bytes: int
    ddp_bytes: int
    lora_bytes: int
    gathered_bytes: int

    def __str__(self) -> str:
        names = [
            ("SIFT reduces per step", self.sift_bytes),
            ("full fine-tuning reduces", self.ddp_bytes),
            ("LoRA, equal count, reduces", self.lora_bytes),
        ]
        if self.sharded:
            names.append(("weights gathered, for all", self.gathered_bytes))
        kind = "sharded" if self.sharded else "data parallel"
        lines = [f"{self.n_devices} devices, {kind}; an all-reduce sends 2 (N-1)/N of these bytes"]
        return "\n".join(lines + [f"{name:<27}{n / MIB:>12,.2f} MiB" for name, n in names])


def traffic_of(
    model: nn.Module,
    targets: Iterable[nn.Parameter],
    *,
    master_bytes: int,
    n_trained: int,
    n_devices: int,
    sharded: bool,
) -> Traffic:
    """Return the traffic of training these parameters of a model, which may be on the meta device."""
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    dense = sum(p.numel() * p.element_size() for p in targets)
    return Traffic(
        n_devices=n_devices,
        sharded=sharded,
        sift_bytes=dense if sharded else master_bytes,
        ddp_bytes=weights,
        lora_bytes=4 * n_trained,
        gathered_bytes=2 * weights if sharded else 0,
    )


def unit_bytes(model: nn.Module) -> int:
    """Return the bytes of the largest unit that FSDP2 usually gathers: a layer, or what is outside of layers."""
    layers = [layer for m in model.modules() if isinstance(m, nn.ModuleList) for layer in m]
    inside = {p for layer in layers for p in layer.parameters()}
    sizes = [sum(p.numel() * p.element_size() for p in layer.parameters()) for layer in layers]
    rest = sum(p.numel() * p.element_size() for p in model.parameters() if p not in inside)
    return max([*sizes, rest])
