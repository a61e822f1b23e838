"""Finds on a tensor's own device the elements that are chosen by their ranks in exponent classes (FORMAT §6.2).

The elements stay where they are. Only the ranks are copied to the device, 4 bytes for each.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import numpy as np

from sparsedelta.codecs.exponent_classes import Choice, class_table

if TYPE_CHECKING:
    import torch

HOST = frozenset({"cpu"})  # devices whose memory is the host's
# For one thread at a time: a search takes 25 bytes of the device's memory per element of a span.
device_lock = threading.Lock()


def find_on_device(choice: Choice, flat: torch.Tensor) -> torch.Tensor:
    """Return the chosen elements, ascending, int64 ``(nnz,)``, on the device of the span.

    Args:
        choice: which elements.
        flat: bits of the span before the change as signed integers, ``(span,)``.

    Raises:
        Corrupt: see ``Choice.find``.
    """
    import torch

    device = flat.device
    ranks = np.concatenate([ranks for ranks, _ in choice.listed]).view(np.int32)
    sizes = torch.tensor([len(ranks) for ranks, _ in choice.listed], device=device)
    of_rest = torch.tensor([of_rest for _, of_rest in choice.listed], device=device)
    class_of = torch.from_numpy(class_table(choice.thresholds)).to(device)

    def for_each_rank(values: torch.Tensor) -> torch.Tensor:
        return values.repeat_interleave(sizes, output_size=len(ranks))

    with device_lock:
        ordered, order = class_of.index_select(0, _keys(flat)).sort(stable=True)
        numbers = torch.arange(len(sizes) + 1, dtype=ordered.dtype, device=device)
        edges = torch.searchsorted(ordered, numbers)
        places = torch.from_numpy(ranks).to(device) + for_each_rank(edges[:-1])
        is_outside = (places >= for_each_rank(edges[1:])).any()
        places.clamp_(max=len(flat) - 1)
        chosen = of_rest.index_select(0, ordered.int())
        chosen.index_copy_(0, places, for_each_rank(~of_rest))
        found = torch.empty_like(chosen).index_copy_(0, order, chosen).nonzero().flatten()
        if len(found) != choice.nnz or bool(is_outside):
            raise choice.error()
    return found


def _keys(flat: torch.Tensor) -> torch.Tensor:
    """Return the key of every element, int32; see ``codecs.exponent_classes.keys_of``."""
    import torch

    width = flat.element_size()
    if width == 1:
        return (flat & 127).to(torch.int32)
    return ((flat >> 8 * width - 9) & 255).to(torch.int32)
