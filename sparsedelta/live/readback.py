"""Compares what an engine's model holds with what was loaded into it, by the model's own loader.

The loader runs again, and each write of it to the model's memory is replaced by a comparison. So no map of fused, sharded or
renamed parameters is needed, and nothing is written.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from sparsedelta.live.bits import flat_bits, integer_view, scatter

if TYPE_CHECKING:
    import torch

_log = logging.getLogger(__name__)
Load = Callable[[Iterable[tuple[str, "torch.Tensor"]]], object]


class _NotReadable(Exception):
    """The loader writes in a way that has no comparison."""


def find_unloaded(
    model: torch.nn.Module, load: Load, tensors: Iterable[tuple[str, torch.Tensor]], *, nan: bool
) -> str | None:
    """Return the name of a tensor of which the model holds other values than were loaded; None if there is none.

    Args:
        model: the model that ``load`` writes to.
        load: the model's loader, which copies tensors, or parts of them, into parameters and buffers.
        tensors: what was loaded, by name.
        nan: an element that is NaN is not compared; see ``only_changed``.

    Returns:
        None also if the loader writes in another way than by copies, so that nothing can be said; this is logged.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    held = [*model.parameters(), *model.buffers()]
    memory = {tensor.untyped_storage().data_ptr() for tensor in held}

    current: list[str] = []
    wrong: list[str] = []

    class Comparing(TorchDispatchMode):
        """Replaces writes to the model's memory by comparisons."""

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            written = _written(func, args, kwargs or {})
            if not any(one.untyped_storage().data_ptr() in memory for one in written):
                return func(*args, **(kwargs or {}))
            if func is torch.ops.aten.copy_.default:
                if _differs(args[0], args[1], nan=nan):
                    wrong.extend(current)
            elif func not in (torch.ops.aten.fill_.Scalar, torch.ops.aten.zero_.default):
                raise _NotReadable(str(func))
            return args[0]  # what lies beside the loaded values, such as padding, is not compared

    def named() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in tensors:
            current[:] = [name]
            yield name, tensor

    try:
        with Comparing(), torch.no_grad():  # type: ignore[no-untyped-call]
            load(named())
    except Exception as error:
        _log.warning(
            "the values that the engine has loaded cannot be read back: %s: %s",
            type(error).__name__,
            error,
        )
        return None
    return wrong[0] if wrong else None


def only_changed(
    tensor: torch.Tensor, index: torch.Tensor, values: torch.Tensor, device: torch.device
) -> torch.Tensor:
    """Return a tensor on a device with values at flat indices and NaN elsewhere.

    Args:
        tensor: gives dtype and shape; it must be a float that has NaN.
        index: flat indices, (nnz,).
        values: new values, (nnz,), none of them NaN.
        device: where the result is.
    """
    import torch

    found = torch.full(tensor.shape, float("nan"), dtype=tensor.dtype, device=device)
    scatter(found, index.to(device), integer_view(values).to(device))
    return found


def _written(func: Any, args: Any, kwargs: Any) -> list[torch.Tensor]:
    """Return the tensors that an operation of torch writes to."""
    import torch

    named = zip(func._schema.arguments, args, strict=False)
    given = [(one, value) for one, value in named] + [
        (one, kwargs[one.name]) for one in func._schema.arguments if one.name in kwargs
    ]
    return [
        value
        for one, value in given
        if one.alias_info is not None
        and one.alias_info.is_write
        and isinstance(value, torch.Tensor)
    ]


def _differs(held: torch.Tensor, loaded: torch.Tensor, *, nan: bool) -> bool:
    """Return whether a tensor has other bits than a copy of another one to it would give it."""
    import torch

    expected = torch.empty_like(held, memory_format=torch.contiguous_format)
    expected.copy_(loaded)
    equal = flat_bits(expected) == flat_bits(held.contiguous())
    if nan:
        equal |= expected.isnan().view(-1)
    return not bool(equal.all())
