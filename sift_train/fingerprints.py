"""Fingerprints of training data and of weights that are not trained, by which a run knows what it began with."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable

import torch
from torch import nn

# By bytes of an element.
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_BLOCK_ELEMENTS = 1 << 24  # a sum copies them as integers of 8 bytes


def fingerprint_of(items: Iterable[object]) -> str:
    """Return 16 hexadecimal digits that depend on the ``repr`` of all items, in their order."""
    digest = hashlib.sha256()
    for item in items:
        digest.update(f"{item!r}\n".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:16]


def sums_of_others(model: nn.Module, trained: Collection[nn.Parameter]) -> dict[str, int]:
    """Return the sum of the bits, as integers, of each parameter of a model that is not trained, by name."""
    own = {id(parameter) for parameter in trained}
    sums = {}
    for name, parameter in model.named_parameters():
        held = parameter.detach()
        is_plain = type(parameter.data) is torch.Tensor and not held.is_meta
        integer = _INTEGERS.get(held.element_size())
        if id(parameter) not in own and is_plain and integer is not None:
            blocks = held.view(integer).reshape(-1).split(_BLOCK_ELEMENTS)
            sums[name] = sum(int(block.sum(dtype=torch.int64)) for block in blocks)
    return sums
