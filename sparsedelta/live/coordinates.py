"""Where a model holds the tensors of a checkpoint: the one map from names in files to places in a module.

For models of transformers that is where transformers itself would load them; other modules have their
checkpoint's names and shapes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from sparsedelta.errors import StructureMismatch
from sparsedelta.live.held import Held, Joined, Part
from sparsedelta.live.loading import Moved, Renamed, Unknown, find_loaded, is_transformers
from sparsedelta.live.strides import NotStrided, Piece, Region, compose, whole
from sparsedelta.live.wrappers import plain_name

if TYPE_CHECKING:
    import torch

Shape = tuple[int, ...]


class Own(Protocol):
    """Where a model holds one of its own tensors."""

    @property
    def name(self) -> str:
        """Of the tensor in the model."""

    def tensor(self) -> torch.Tensor:
        """Return the tensor that is there now."""


@dataclass(frozen=True, slots=True)
class Scattered:
    """Where a model holds a checkpoint's tensor that is part of its own, or lies in several of them.

    Attributes:
        name: of the checkpoint's tensor, and of the model's.
        shape: of the checkpoint's tensor.
        pieces: the model's tensors, their shapes, and which of their elements it is.
    """

    name: str
    shape: Shape
    pieces: tuple[tuple[Own, Shape, Piece], ...]

    def tensor(self) -> Held:
        """Return the tensor that is there now: a view of the checkpoint's shape if there is such a view.

        Raises:
            StructureMismatch: a tensor of the model is gone or has become one of another kind.
        """
        held = Joined(self.shape, [part for piece in self.pieces for part in _parts(*piece)])
        if held.is_in_order:
            try:
                return held.parts[0].tensor.view(self.shape)
            except RuntimeError:
                pass  # no strides have this shape
        return held


@dataclass(frozen=True, slots=True)
class Coordinates:
    """Where a model holds the tensors of a checkpoint.

    Attributes:
        slots: by name in the checkpoint.
        unknown: of those that it cannot be said where the model has them, what messages say of that.
        is_closed: other tensors of the checkpoint are not in the model, under whatever name.
    """

    slots: Mapping[str, Own | Scattered]
    unknown: Mapping[str, str]
    is_closed: bool


def find_coordinates(
    model: Any, own: Mapping[str, Own], shapes: Mapping[str, Shape], needed: Collection[str]
) -> Coordinates:
    """Return where a model holds the tensors of a checkpoint.

    Args:
        model: a module or a state dict.
        own: where it holds its own tensors, by name without what wrappers add.
        shapes: of the checkpoint's tensors, all of them.
        needed: names of those that must be found. If several models of transformers are parts of this one, it
            is the one that has them all.
    """
    found = [_of_part(prefix, part, own, shapes) for prefix, part in _parts_of_transformers(model)]
    if len(found) == 1 and found[0].is_closed:
        return found[0]
    if found and not own.keys() >= set(needed):
        fitting = [one for one in found if one.slots.keys() >= set(needed)] or found
        if len(fitting) == 1:
            return fitting[0]
    return Coordinates({}, {}, False)


def quantized_kind(model: Any) -> str | None:
    """Return the name of a model's class if transformers has quantized it."""
    for _, part in _parts_of_transformers(model):
        if getattr(part, "hf_quantizer", None) is not None:
            return type(part).__name__
    return None


def _parts_of_transformers(model: Any) -> list[tuple[str, Any]]:
    """Return the outermost models of transformers in a module, by their names there."""
    import torch

    found: list[tuple[str, Any]] = []
    if isinstance(model, torch.nn.Module):
        for name, module in model.named_modules():
            inside = any(name.startswith(f"{outer}." if outer else "") for outer, _ in found)
            if is_transformers(module) and not inside:
                found.append((name, module))
    return found


def _of_part(
    path: str, part: Any, own: Mapping[str, Own], shapes: Mapping[str, Shape]
) -> Coordinates:
    """Return where a model of transformers, at a path in another, holds a checkpoint's tensors."""
    prefix = plain_name(path)
    is_all = not prefix
    if getattr(part, "hf_quantizer", None) is not None:
        return Coordinates({}, {}, False)
    start = f"{prefix}." if prefix else ""
    passing = {plain_name(name) for name in _passing_buffers(part)}
    names = (name.removeprefix(start) for name in own if name.startswith(start))
    held = {name: own[start + name] for name in names if name not in passing}
    sizes = {name: tuple(slot.tensor().shape) for name, slot in held.items()}
    slots: dict[str, Own | Scattered] = {}
    unknown: dict[str, str] = {}
    for name, fate in find_loaded(part, sizes, shapes).items():
        match fate:
            case Renamed(new):
                slots[name] = held[new]
            case Moved(pieces):
                made = tuple((held[new], sizes[new], piece) for new, piece in pieces)
                label = f"{name} in {', '.join(held[new].name for new, _ in pieces)}"
                slots[name] = Scattered(label, shapes[name], made)
            case Unknown(reason):
                unknown[name] = f"cannot be changed in the {type(part).__name__}: {reason}"
    return Coordinates(slots, unknown, is_all)


def _passing_buffers(module: torch.nn.Module) -> Iterator[str]:
    """Yield the names of buffers that are not saved."""
    for prefix, one in module.named_modules():
        for name in one._non_persistent_buffers_set:
            yield f"{prefix}.{name}" if prefix else name


def _parts(own: Own, shape: Shape, piece: Piece) -> Iterator[Part]:
    """Yield views of one of the model's tensors, with the flat indices in the checkpoint's tensor."""
    import torch

    tensor = own.tensor()
    found = tuple(tensor.shape)
    problem = None
    if found != shape:
        problem = f"has become {list(found)}, expected {list(shape)}"
    elif type(tensor.data) is not torch.Tensor or tensor.layout != torch.strided:
        problem = f"is a {type(tensor.data).__name__} ({tensor.layout}), not a plain tensor"
    if problem:
        raise StructureMismatch(f"tensor {own.name!r} {problem}", tensor=own.name)
    memory = Region(shape, tensor.storage_offset(), tuple(tensor.stride()))
    try:
        pieces = compose(piece, Piece(whole(shape), memory))
    except NotStrided as error:
        raise StructureMismatch(
            f"tensor {own.name!r} is laid out otherwise than a contiguous one; make it contiguous",
            tensor=own.name,
        ) from error
    for one in pieces:
        target = one.target
        view = torch.as_strided(tensor.detach(), target.shape, target.strides, target.offset)
        yield Part(one.source, view)
