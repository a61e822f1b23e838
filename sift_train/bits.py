"""The bits of tensors as integers, for comparisons that are exact also for NaN and -0.0."""

from __future__ import annotations

import torch
from torch import Tensor

_DTYPES = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits_of(tensor: Tensor) -> Tensor:
    """Return a tensor's elements as integers of their size; a view if the tensor is contiguous."""
    return tensor.contiguous().view(_DTYPES[tensor.element_size()])
