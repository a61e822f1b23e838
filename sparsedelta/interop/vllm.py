"""``CheckpointWeightPatch`` objects of vLLM: made from a delta, and read as a delta.

Checked against vLLM 0.33, ``model_executor/model_loader/checkpoint_weight_patch.py``. The objects made here have
the same attributes, so vLLM need not be installed. A NaN means "unchanged" there, so a new NaN cannot be sent.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from sparsedelta._typing import JSON, AnyPath
from sparsedelta.codecs.values import Bits
from sparsedelta.errors import Corrupt, LossyConversion
from sparsedelta.format.delta import AnyDelta, Delta, opened
from sparsedelta.format.records import TensorSpec
from sparsedelta.interop.abilities import FLOATS, Abilities
from sparsedelta.interop.opening import CONVERTED, open_checkpoint, target_of
from sparsedelta.interop.scatter import Scatter
from sparsedelta.interop.transition import Transition
from sparsedelta.interop.view import Patch, PatchedCheckpoint
from sparsedelta.live.bits import flat_bits, torch_dtype, wire_name
from sparsedelta.ops.diff import between

if TYPE_CHECKING:
    import torch

_ABILITIES = Abilities(dtypes=FLOATS, nan=False)


class WeightPatch(NamedTuple):
    """New values for some elements of one tensor of a checkpoint, with the attributes of vLLM's class.

    Attributes:
        name: its name in the checkpoint.
        shape: its shape.
        dtype: its dtype.
        values: (nnz,) new values.
        indices: (nnz,) int64, flat indices, in order; None: ``values`` holds all elements.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    values: torch.Tensor
    indices: torch.Tensor | None = None


def to_patches(delta: AnyDelta, *, base: AnyPath, lossy: bool = False) -> list[WeightPatch]:
    """Return the changes of a delta as objects that vLLM's ``load_checkpoint_weight_patches`` takes.

    Args:
        delta: a ``.sd`` file or a loaded delta.
        base: its base.
        lossy: leave out what the objects cannot hold: new NaNs, tensors of other dtypes than F16, BF16 and F32, added
            and removed tensors, side files.

    Raises:
        LossyConversion: the objects cannot hold everything, and ``lossy`` is false.
        FormatError: the delta cannot be read.
        MismatchError: ``base`` is not its base.
    """
    import torch

    with ExitStack() as stack:
        old = stack.enter_context(open_checkpoint(base))
        target = target_of(stack.enter_context(opened(delta)), old, stack)
        change = Transition(old, target, _ABILITIES)
        patches = []
        for one in change.changed():
            dtype = torch_dtype(one.spec.dtype)
            assert dtype is not None
            signed = one.values.view(f"i{one.spec.dtype.width}")
            values = torch.from_numpy(signed.copy()).view(dtype)
            indices = torch.from_numpy(one.indices)
            patches.append(WeightPatch(one.name, one.spec.shape, dtype, values, indices))
        if change.losses and not lossy:
            raise LossyConversion(
                f"vLLM's patches cannot hold {'; '.join(change.losses[:5])}; allow the loss (lossy=True)"
            )
        return patches


def from_patches(patches: Iterable[Any], *, base: AnyPath, level: str = "default") -> Delta:
    """Return the delta that applies patches to a base, in order.

    Args:
        patches: objects with the attributes of vLLM's ``CheckpointWeightPatch``. Dense ones (without indices) and
            sparse ones can be mixed, also for one tensor; vLLM itself takes only one kind in a call.
        base: the checkpoint whose tensors they change.
        level: as for ``diff``.

    Raises:
        Corrupt: a patch does not fit the tensor, or is sparse and holds an index twice or a new NaN.
        StructureMismatch: the base has no tensor of a name.
    """
    by_name: dict[str, list[Patch]] = {}
    for patch in patches:
        by_name.setdefault(patch.name, []).append(_patch(patch))
    with open_checkpoint(base) as old:
        joined = {name: _InOrder(parts) for name, parts in by_name.items()}
        with PatchedCheckpoint(old, joined) as target:
            info: dict[str, JSON] = {CONVERTED: {"form": "vllm", "verified": "none", "says": {}}}
            return between(old, target, info=info, level=level)


@dataclass(frozen=True, slots=True)
class _InOrder:
    parts: Sequence[Patch]

    def __call__(self, old: Bits, spec: TensorSpec) -> Bits:
        for part in self.parts:
            old = part(old, spec)
        return old


def _patch(patch: Any) -> Scatter:
    values = patch.values.detach().to(patch.dtype).cpu().contiguous()
    shape = tuple(patch.shape)
    if patch.indices is None:
        indices = order = np.arange(values.numel())
        n_expected = math.prod(shape)
    else:
        if values.float().isnan().any():
            raise Corrupt(
                f"the patch of {patch.name!r} holds a NaN, which vLLM reads as an unchanged element"
            )
        found = patch.indices.detach().cpu()
        if found.is_floating_point() or found.ndim != 1:
            raise Corrupt(
                f"the indices of the patch of {patch.name!r} are {found.dtype} {list(found.shape)}, expected one"
                " dimension of int32 or int64"
            )
        order = np.argsort(found.long().numpy(), kind="stable")
        indices = found.long().numpy()[order]
        n_expected = len(indices)
    if values.numel() != n_expected:
        raise Corrupt(
            f"the patch of {patch.name!r} has {values.numel()} values, expected {n_expected}"
        )
    bits: Bits = flat_bits(values).numpy()[order].view(f"u{values.element_size()}")
    return Scatter(patch.name, wire_name(patch.dtype), indices, bits, shape)
