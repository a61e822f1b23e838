"""Fingerprints of training data and of weights that are not trained: a run resumes only with those that it began with."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable

import torch
from torch import nn

_INTEGERS = {
    1: torch.uint8,
    2: torch.int16,
    4: torch.int32,
    8: torch.int64,
}  # by bytes of an element


def fingerprint_of(items: Iterable[object]) -> str:
    """Return 16 hexadecimal digits that depend on the ``repr`` of all items, in their order."""
    digest = hashlib.sha256()
    for item in items:
        digest.update(f"{item!r}\n".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:16]


def fingerprint_of_others(model: nn.Module, trained: Collection[nn.Parameter]) -> str:
    """Return a fingerprint of the bits of a model's other parameters, by the sum of each."""
    own = {id(parameter) for parameter in trained}
    sums = []
    for name, parameter in model.named_parameters():
        held = parameter.detach()
        is_plain = type(parameter.data) is torch.Tensor and not held.is_meta
        integer = _INTEGERS.get(held.element_size())
        if id(parameter) not in own and is_plain and integer is not None:
            bits = held.view(integer).sum(dtype=torch.int64).item()
            sums.append((name, tuple(held.shape), bits))
    return fingerprint_of(sums)
