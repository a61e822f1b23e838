"""Copies between a model's device and the host, for masters that are kept on the host.

On CUDA the copies do not make the host wait: gradients leave on a stream of their own while the backward pass goes on,
and new weights go out from pinned memory. This is the only code of the package that uses streams.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

MASTERS_DEVICES = ("model", "cpu")


def refuse_scaler(masters_device: str) -> None:
    """Refuse a gradient scaler if masters are kept on the host.

    A scaler of torch copies its scale to the CPU without waiting for it, and would read it too early.

    Raises:
        ValueError: they are.
    """
    if masters_device == "cpu":
        raise ValueError(
            "masters_device is 'cpu', but fp16 needs a gradient scaler, which cannot read gradients on the CPU; use bf16, or"
            " masters_device 'model'"
        )


class Arrival:
    """A tensor on its way to the host.

    Args:
        source: the tensor. It is kept until the copy is complete; on the CPU it is the copy.
    """

    def __init__(self, source: Tensor) -> None:
        self._source: Tensor | None = source
        self._event: torch.cuda.Event | None = None
        if source.is_cuda:
            stream = _copy_stream(source.device)
            stream.wait_stream(torch.cuda.current_stream(source.device))
            self._copy = torch.empty_like(source, device="cpu", pin_memory=True)
            with torch.cuda.stream(stream):
                self._copy.copy_(source, non_blocking=True)
            self._event = stream.record_event()
        else:
            self._copy = source.to("cpu")

    def wait(self) -> Tensor:
        """Return the copy on the host, once it is complete."""
        if self._event is not None:
            self._event.synchronize()
        self._source = None
        return self._copy


def sent(values: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return values of the host in a dtype on a device; the host need not wait for the copy."""
    if device.type != "cuda":
        return values.to(device, dtype)
    # torch keeps the pinned memory until the copy is complete, also if nothing here refers to it.
    pinned = torch.empty(values.shape, dtype=dtype, pin_memory=True).copy_(values)
    return pinned.to(device, non_blocking=True)


@cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
