"""The tensors of a model by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeAlias

from sparsedelta._typing import Model
from sparsedelta.errors import StructureMismatch
from sparsedelta.live.bits import check_installed
from sparsedelta.live.coordinates import Own, Scattered
from sparsedelta.live.divided import Divided, divided
from sparsedelta.live.held import Held, parts_of
from sparsedelta.live.parts import Part, holder_of
from sparsedelta.live.wrappers import plain_name

if TYPE_CHECKING:
    import torch

AnySlot: TypeAlias = Own | Scattered


@dataclass(frozen=True, slots=True)
class Slot:
    """The name of a tensor in a model. The tensor itself may be replaced, as by ``model.to``.

    Attributes:
        name: the tensor's name in the model.
        model: a module or a state dict.
    """

    name: str
    model: Any

    def tensor(self) -> torch.Tensor | Divided:
        """Return the tensor that the model has under this name now, or what this rank holds of it.

        Raises:
            StructureMismatch: there is no such tensor any longer.
        """
        import torch

        found: torch.Tensor | None
        if isinstance(self.model, Mapping):
            found = self.model.get(self.name)
        else:
            *path, key = _parts(self.name)
            module = self.model
            for part in path:
                module = module._modules.get(part) if module is not None else None
            found = None if module is None else module._parameters.get(key)
            if found is None and module is not None:
                held = getattr(module, key, None)
                found = held if isinstance(held, torch.Tensor) else None
        if found is None:
            raise StructureMismatch(
                f"tensor {self.name!r} is no longer in the model", tensor=self.name
            )
        return divided(self.name, found) or found


@lru_cache(1 << 16)
def _parts(name: str) -> tuple[str, ...]:
    return tuple(name.split("."))


def find_slots(model: Model) -> dict[str, Slot]:
    """Return the slots of a model's tensors by name. A name that has parts of wrappers is also listed without them.

    Raises:
        TypeError: the model is neither a module nor a state dict.
        ModuleNotFoundError: torch is not installed.
    """
    return slots_of(Part("", model), model)


def slots_of(part: Part, whole: Model) -> dict[str, Slot]:
    """Return the slots of a part's tensors by their names in the part; the slots have the names in the whole model."""
    check_installed("torch")
    import torch

    if isinstance(part.module, torch.nn.Module):
        found = list(_names_in(part.module))
    elif isinstance(part.module, Mapping):
        found = list(part.module)
    else:
        raise TypeError(
            f"model is of type {type(whole).__name__}, expected a module, a state dict or a pipeline"
        )
    start = f"{part.path}." if part.path else ""
    holder = holder_of(whole)
    slots = {name: Slot(start + name, holder) for name in found}
    for name in found:
        slots.setdefault(plain_name(name), slots[name])
    return slots


def _names_in(model: torch.nn.Module) -> Iterator[str]:
    for prefix, module in model.named_modules(remove_duplicate=False):
        for members in (module._parameters, module._buffers):
            for key, tensor in members.items():
                if tensor is not None:
                    yield f"{prefix}.{key}" if prefix else key


def memory_of(held: Held) -> object:
    """Return an object that is equal for two tensors if they are the same elements in memory."""
    if isinstance(held, Divided):
        return held.owner
    return tuple(map(_part_memory, parts_of(held)))


def _part_memory(tensor: torch.Tensor) -> object:
    if tensor.is_meta or not tensor.numel():
        return id(tensor)
    return tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride()


def sharing_memory(held: Sequence[Held], *, surely: bool = False) -> list[tuple[int, int]]:
    """Return pairs of places in the list whose tensors overlap in memory, for each of these at least one.

    Args:
        held: the tensors.
        surely: leave out tensors with gaps between their elements, in which others may lie, such as the parts of a fused one.
    """
    spans = []
    for number, one in enumerate(held):
        for part in parts_of(one):
            if part.is_meta or not part.numel():
                continue
            steps = zip(part.shape, part.stride(), strict=True)
            n_spanned = sum((n - 1) * step for n, step in steps) + 1
            if not surely or n_spanned == part.numel():
                start = part.data_ptr()
                end = start + n_spanned * part.element_size()
                spans.append((str(part.device), start, end, number))
    found: list[tuple[int, int]] = []
    before = ("", 0, 0, -1)  # the span that ends last of those so far
    for span in sorted(spans):
        is_within = span[0] == before[0] and span[1] < before[2]
        if is_within and span[3] != before[3]:
            found.append((before[3], span[3]))
        if not is_within or span[2] > before[2]:
            before = span
    return found
