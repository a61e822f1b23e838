"""The buffers of a model that its state dict holds, such as running statistics."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


def saved_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return the buffers that the state dict holds, by name; a shared one has several names."""
    return {
        f"{prefix}.{name}" if prefix else name: buffer
        for prefix, module in model.named_modules(remove_duplicate=False)
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    }


@torch.no_grad()
def set_buffers(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Give buffers of a model other values.

    They are overwritten, so what shares their memory changes too. One of another shape or dtype is replaced.

    Args:
        model: the model.
        values: of its buffers, by name; other names are left out.
    """
    for prefix, module in model.named_modules():
        for name, buffer in list(module._buffers.items()):
            value = values.get(f"{prefix}.{name}" if prefix else name)
            if value is None or buffer is None:
                continue
            if (buffer.shape, buffer.dtype) == (value.shape, value.dtype) and not buffer.is_meta:
                buffer.copy_(value)
            else:
                device = value.device if buffer.is_meta else buffer.device
                module._buffers[name] = value.to(device, copy=True)
