"""Linear layers whose backward pass computes the gradients of the trained components only.

A weight's gradient is a matrix product over the tokens, and a component of it is one dot product. On a CPU, an eighth of
the components takes less time as dot products than all of them as a matrix product. On other devices, and while
something ranks all components, the whole gradient is computed as in any linear layer.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from enum import Enum, auto
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from sift_train.masters import SparseParameter

# With more components or fewer tokens, the whole gradient takes less time. 16-bit numbers are multiplied faster as matrices.
_MOST, _MOST_OF_16_BITS, _FEWEST_TOKENS = 1 / 8, 1 / 20, 64
_BLOCK = 256  # tokens; what the dot products read of so many stays in the processor's cache
_DTYPES = torch.float32, torch.float64, torch.bfloat16, torch.float16
_LINK = "_trained_part"  # the attribute of a layer that holds its part, and ``Wanted`` for it

Wanted = Callable[[], Tensor | None]  # returns flat indices, (k,); None: the whole gradient


class SparseLinear(nn.Linear):
    """A linear layer of which some weights are trained. Its copies, also pickled ones, are ``nn.Linear``."""

    __module__ = nn.Linear.__module__  # ``torch.fx`` keeps the layers of this module whole

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name is part of ``nn.Linear``
        """Return the outputs of the layer, as ``nn.Linear`` does."""
        if _is_plain(input) and input.dtype == self.weight.dtype and _LINK in vars(self):
            part, wanted = vars(self)[_LINK]
            trained = part()
            if trained is not None and trained.parameter is self.weight:  # it was not replaced
                function: Any = _Linear  # untyped
                outputs: Tensor = function.apply(input, self.weight, self.bias, wanted)
                return outputs
        # Not super(): something that has kept this method may call it after ``LayerHandle.remove``.
        return nn.Linear.forward(self, input)

    def __reduce__(self) -> tuple[Any, ...]:
        state = {key: value for key, value in vars(self).items() if key != _LINK}
        return object.__new__, (nn.Linear,), state


def _is_plain(inputs: Tensor) -> bool:
    """Return whether a forward pass is on a CPU and will be differentiated, and nothing traces or converts it."""
    return (
        not torch.compiler.is_compiling()  # first: the compiler cannot read all of the rest
        and torch._C._get_tracing_state() is None
        and not torch._C._are_functorch_transforms_active()
        and torch.autograd.forward_ad._current_level < 0
        and not torch.is_autocast_enabled("cpu")
        and torch.is_grad_enabled()
        and type(inputs) is Tensor
        and inputs.device.type == "cpu"
        and inputs.dtype in _DTYPES
    )


class _Linear(torch.autograd.Function):
    """``linear``; the gradient of the weight is a sparse COO tensor of the wanted components, or dense."""

    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None, wanted: Wanted
    ) -> Tensor:
        of_inputs, of_weight, *_ = ctx.needs_input_grad
        ctx.wanted = wanted
        ctx.save_for_backward(inputs if of_weight else None, weight if of_inputs else None)
        outputs = nn.functional.linear(inputs, weight, bias)
        # Of other than contiguous 2-D inputs it may be a view, which nothing could change in place.
        if not outputs._is_view():
            return outputs
        same: Tensor = torch.ops.aten._unsafe_view(outputs, outputs.shape)  # untyped
        return same

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight = ctx.saved_tensors
        tokens = gradient.reshape(-1, gradient.shape[-1])
        of_weight = None
        use = _use_of(ctx.next_functions[1][0])
        if inputs is not None and use is not _Use.NONE:
            index = ctx.wanted() if use is _Use.ACCUMULATED else None
            of_weight = _of_weight(tokens, inputs.reshape(-1, inputs.shape[-1]), index)
        return (
            None if weight is None else gradient @ weight,
            of_weight,
            tokens.sum(0) if ctx.needs_input_grad[2] else None,
            None,
        )


class _Use(Enum):
    """What the backward pass that runs does with the gradient of a weight."""

    NONE = auto()
    ACCUMULATED = auto()  # in ``grad``
    RETURNED = auto()  # by ``torch.autograd.grad``


def _use_of(node: Any) -> _Use:
    try:
        executes = node is None or torch._C._will_engine_execute_node(node)
    except RuntimeError:  # so torch says that the gradient is returned
        return _Use.RETURNED
    return _Use.ACCUMULATED if executes else _Use.NONE


def _of_weight(gradient: Tensor, inputs: Tensor, index: Tensor | None) -> Tensor:
    """Return the gradient of a weight (m, n) from that of the outputs (tokens, m) and the inputs (tokens, n)."""
    n_rows, n_columns = gradient.shape[1], inputs.shape[1]
    most = _MOST if inputs.itemsize > 2 else _MOST_OF_16_BITS
    if (
        index is None
        or len(index) > most * n_rows * n_columns
        or len(inputs) < _FEWEST_TOKENS
        or torch.is_grad_enabled()  # with ``create_graph`` it is differentiated in turn
        or _is_batched(gradient)
    ):
        return gradient.mT @ inputs
    rows = index.long().div(n_columns, rounding_mode="floor")
    columns = index.long() - n_columns * rows
    starts = torch.searchsorted(rows, torch.arange(n_rows + 1))
    dtype = torch.promote_types(inputs.dtype, torch.float32)
    zeros, shape = inputs.new_zeros(len(index), dtype=dtype), (n_rows, n_columns)
    sums = torch.sparse_csr_tensor(starts, columns, zeros, shape, check_invariants=False)
    for some, own in zip(gradient.split(_BLOCK), inputs.split(_BLOCK), strict=True):
        sums = torch.sparse.sampled_addmm(sums, some.mT.to(dtype), own.to(dtype))
    return torch.sparse_coo_tensor(
        torch.stack([rows, columns]), sums.values().to(inputs.dtype), shape,
        check_invariants=False, is_coalesced=True,
    )  # fmt: skip


def _is_batched(tensor: Tensor) -> bool:
    if torch.compiler.is_compiling():  # the compiler cannot read the rest
        return False
    functorch = torch._C._functorch
    return functorch.is_legacy_batchedtensor(tensor) or functorch.is_batchedtensor(tensor)


@lru_cache
def _hide_beta_warning() -> None:
    """Let torch give its warning of CSR tensors, which it gives once, where nobody sees it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        torch.sparse_csr_tensor([0, 0], [], [], (1, 1), check_invariants=False)


class LayerHandle:
    """Makes a linear layer a ``SparseLinear``, until ``remove``.

    Args:
        layer: a ``nn.Linear``.
        part: the trained components of its weight.
        wanted: returns in each backward pass the components whose gradients suffice, flat and increasing, (k,); None if
            all gradients are needed.
    """

    def __init__(self, layer: nn.Module, part: SparseParameter, wanted: Wanted) -> None:
        _hide_beta_warning()
        vars(layer)[_LINK] = weakref.ref(part), wanted
        layer.__class__ = SparseLinear
        self._layer = weakref.ref(layer)

    def remove(self) -> None:
        """Make the layer a ``nn.Linear`` again, unless something else has changed its class."""
        layer: Any = self._layer()
        if layer is None:
            return
        vars(layer).pop(_LINK, None)
        is_own = type(layer) is SparseLinear
        if is_own:
            layer.__class__ = nn.Linear


def layers_of(
    model: nn.Module, parts: Iterable[SparseParameter]
) -> Iterator[tuple[nn.Module, SparseParameter]]:
    """Yield the linear layers whose weights are trained in part, and these parts.

    Layers of a subclass and those whose forward pass something has replaced are left out.
    """
    sparse: dict[Tensor, SparseParameter] = {
        p.parameter: p for p in parts if not p.is_dense and p.shard is None
    }
    for layer in model.modules():
        if type(layer) is nn.Linear and layer.weight in sparse and "forward" not in vars(layer):
            yield layer, sparse[layer.weight]
