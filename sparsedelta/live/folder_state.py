"""A model's tensors under the names and in the layout of a checkpoint folder that the model can be loaded from.

How transformers loads the folder decides, since it may name tensors otherwise than the library saves them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from sparsedelta.dtypes import DTYPES
from sparsedelta.errors import StructureMismatch
from sparsedelta.format.records import TensorSpec
from sparsedelta.live.bits import shape_in_file, wire_name
from sparsedelta.live.coordinates import Own, Scattered, Shape, find_coordinates
from sparsedelta.live.held import in_order
from sparsedelta.live.saved import SAVE_FIRST, check_convertible, memory_of, plain, state_of
from sparsedelta.tensors.parallel import n_workers

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class _Kept:
    """A tensor of the model as it was when the model was given."""

    name: str
    value: torch.Tensor

    def tensor(self) -> torch.Tensor:
        """Return it."""
        return self.value


class FolderState:
    """The tensors of a folder as a model of transformers holds them.

    Attributes:
        kind: the model's class, for messages.
        specs: dtype and shape of each tensor that the model has, by its name in the folder; and of each tensor
            of the model that the folder lacks, by its name in the model.
    """

    def __init__(self, model: Any, shapes: Mapping[str, Shape]) -> None:
        """Find the folder's tensors in the model.

        Args:
            model: of transformers, without wrappers.
            shapes: of the folder's tensors, by name.

        Raises:
            StructureMismatch: it is quantized, has adapters, or is not known to hold a tensor.
        """
        self.kind = type(model).__name__
        check_convertible(model)
        own = {name: _Kept(name, plain(tensor)) for name, tensor in state_of(model).items()}
        found = find_coordinates(model, own, shapes, shapes)
        for name, problem in found.unknown.items():
            raise StructureMismatch(f"tensor {name!r} {problem}; {SAVE_FIRST}", tensor=name)
        lacking = _lacking(own, found.slots.values())
        lacking -= {*(model._keys_to_ignore_on_save or ())}
        self._slots = {**found.slots, **{name: own[name] for name in lacking}}
        self.specs = {name: _spec(slot) for name, slot in self._slots.items()}
        self._read = lru_cache(n_workers())(lambda name: in_order(self._slots[name].tensor()))

    def read(self, name: str) -> torch.Tensor:
        """Return a contiguous tensor. It shares the model's memory unless it is in another order there."""
        return self._read(name)

    def close(self) -> None:
        """Release the model's tensors."""
        self._read.cache_clear()
        self._slots = {}


def _lacking(own: Mapping[str, _Kept], slots: Collection[Own | Scattered]) -> set[str]:
    """Return the names of the model's tensors, tied ones left out, of which not all elements are in slots."""
    n_found = Counter[str]()
    for slot in slots:
        for name, n_elements in _used(slot):
            n_found[name] += n_elements
    known = {name for name, kept in own.items() if n_found[name] >= kept.value.numel()}
    memory = {memory_of(own[name].value) for name in known}
    return {name for name, kept in own.items() if memory_of(kept.value) not in memory} - known


def _used(slot: Own | Scattered) -> Iterator[tuple[str, int]]:
    if isinstance(slot, Scattered):
        yield from ((own.name, piece.source.numel) for own, _, piece in slot.pieces)
    else:
        yield slot.name, slot.tensor().numel()


def _spec(slot: Own | Scattered) -> TensorSpec:
    held = slot.tensor()
    return TensorSpec(DTYPES[wire_name(held.dtype)], shape_in_file(held.dtype, held.shape))
