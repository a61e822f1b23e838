"""The map from the tensors of a checkpoint to their places in a model.

In a transformers model, a tensor's place is where transformers loads it. In any other model, a tensor has the
same name and shape as in the checkpoint.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from sparsedelta.errors import StructureMismatch
from sparsedelta.live.divided import Divided
from sparsedelta.live.held import Held, Joined, Part
from sparsedelta.live.loading import Moved, Renamed, Unknown, find_loaded, is_transformers
from sparsedelta.live.strides import NotStrided, Piece, Region, compose, whole
from sparsedelta.live.wrappers import plain_name

if TYPE_CHECKING:
    import torch

Shape = tuple[int, ...]


class Own(Protocol):
    """A tensor of the model itself."""

    @property
    def name(self) -> str:
        """The tensor's name in the model."""

    def tensor(self) -> torch.Tensor | Divided:
        """Return the tensor that the model has under this name now."""


@dataclass(frozen=True, slots=True)
class Scattered:
    """The place of a checkpoint's tensor that is a part of a model's tensor, or is divided among several.

    Attributes:
        name: the names of the checkpoint's tensor and of the model's tensors, for messages.
        shape: shape of the checkpoint's tensor.
        pieces: tensors of the model, each with its shape and the map from the checkpoint's tensor to it.
    """

    name: str
    shape: Shape
    pieces: tuple[tuple[Own, Shape, Piece], ...]

    def tensor(self) -> Held:
        """Return the tensor as the model holds it now: a view with the checkpoint's shape where that is possible.

        Raises:
            StructureMismatch: a tensor of the model was removed, has got another shape, or is not a plain
                tensor.
        """
        found = [own.tensor() for own, _, _ in self.pieces]
        parts = [
            part
            for tensor, (own, shape, piece) in zip(found, self.pieces, strict=True)
            for part in _parts(own.name, tensor, shape, piece)
        ]
        divided = [tensor for tensor in found if isinstance(tensor, Divided)]
        if divided:
            owner = tuple(
                (tensor.owner if isinstance(tensor, Divided) else id(tensor), piece.target)
                for tensor, (_, _, piece) in zip(found, self.pieces, strict=True)
            )
            return Divided(self.name, self.shape, parts, divided[0].dtype, divided[0].device, owner)
        held = Joined(self.shape, parts)
        if held.is_in_order:
            try:
                return held.parts[0].tensor.view(self.shape)
            except RuntimeError:
                pass  # no view has this shape
        return held


@dataclass(frozen=True, slots=True)
class Coordinates:
    """The places of a checkpoint's tensors in a model.

    Attributes:
        slots: the places, by name in the checkpoint.
        unknown: tensors that transformers loads, but not by only moving elements; by name, with the reason
            for messages.
        is_closed: all other tensors of the checkpoint are not in the model, even under another name.
    """

    slots: Mapping[str, Own | Scattered]
    unknown: Mapping[str, str]
    is_closed: bool


_NOTHING = Coordinates({}, {}, False)


def find_coordinates(
    model: Any, own: Mapping[str, Own], shapes: Mapping[str, Shape], needed: Collection[str]
) -> Coordinates:
    """Return the places of a checkpoint's tensors in a model.

    Args:
        model: a module or a state dict.
        own: the model's own tensors, by name without the parts that wrappers insert.
        shapes: shapes of all tensors of the checkpoint.
        needed: names of tensors that must be found. If the model contains several transformers models, the
            one that has all of them is used. Their names may start with its path in the model.

    Raises:
        StructureMismatch: several transformers models in the model have all tensors.
    """
    parts = [(plain_name(path), part) for path, part in _parts_of_transformers(model)]
    found = [_of_part(path, part, own, shapes) for path, part in parts]
    missing = set(needed) - own.keys()
    if len(found) == 1 and (missing or found[0].is_closed):
        return found[0]
    fitting = [number for number, one in enumerate(found) if one.slots.keys() >= missing]
    if not missing or not fitting:
        return _NOTHING
    if len(fitting) > 1:
        first, second = (parts[number][0] for number in fitting[:2])
        raise StructureMismatch(
            f"tensor {min(missing)!r} may be that of {first!r} or of {second!r} in the model; apply the delta"
            f" to one of them, or let the names start with {first + '.'!r} (names)",
            tensor=min(missing),
        )
    return found[fitting[0]]


def quantized_kind(model: Any) -> str | None:
    """Return the class name of a model that transformers has quantized; None for other models."""
    for _, part in _parts_of_transformers(model):
        if getattr(part, "hf_quantizer", None) is not None:
            return type(part).__name__
    return None


def _parts_of_transformers(model: Any) -> list[tuple[str, Any]]:
    """Return the outermost transformers models in a module, each with its name in the module."""
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
    """Return the places of a checkpoint's tensors in a transformers model at a path in another module."""
    if getattr(part, "hf_quantizer", None) is not None:
        return _NOTHING
    start = f"{path}." if path else ""
    passing = {plain_name(name) for name in _passing_buffers(part)}
    names = (name.removeprefix(start) for name in own if name.startswith(start))
    held = {name: own[start + name] for name in names if name not in passing}
    sizes = {name: tuple(slot.tensor().shape) for name, slot in held.items()}
    slots: dict[str, Own | Scattered] = {}
    unknown: dict[str, str] = {}
    given = {name.removeprefix(start): name for name in shapes}
    loaded = find_loaded(part, sizes, {inner: shapes[name] for inner, name in given.items()})
    for inner, fate in loaded.items():
        name = given[inner]
        match fate:
            case Renamed(new):
                slots[name] = held[new]
            case Moved(pieces):
                placed = tuple((held[new], sizes[new], piece) for new, piece in pieces)
                label = f"{name} in {', '.join(held[new].name for new, _ in pieces)}"
                slots[name] = Scattered(label, shapes[name], placed)
            case Unknown(reason):
                unknown[name] = f"cannot be changed in the {type(part).__name__}: {reason}"
    return Coordinates(slots, unknown, not path)


def _passing_buffers(module: torch.nn.Module) -> Iterator[str]:
    """Yield the names of buffers that are not saved."""
    for prefix, one in module.named_modules():
        for name in one._non_persistent_buffers_set:
            yield f"{prefix}.{name}" if prefix else name


def _parts(name: str, tensor: torch.Tensor | Divided, shape: Shape, piece: Piece) -> Iterator[Part]:
    """Yield views of a tensor of the model, each with its flat indices in the checkpoint's tensor."""
    import torch

    found = tuple(tensor.shape)
    held = tensor.parts if isinstance(tensor, Divided) else [Part(whole(shape), tensor)]
    problem = None
    if found != shape:
        problem = f"has become {list(found)}, expected {list(shape)}"
    elif isinstance(tensor, Divided):
        pass
    elif type(tensor.data) is not torch.Tensor or tensor.layout != torch.strided:
        problem = f"is a {type(tensor.data).__name__} ({tensor.layout}), not a plain tensor"
    if problem:
        raise StructureMismatch(f"tensor {name!r} {problem}", tensor=name)
    for part in held:
        memory = part.tensor.detach()
        there = Region(tuple(memory.shape), int(memory.storage_offset()), memory.stride())
        try:
            pieces = compose(piece, Piece(part.region, there))
        except NotStrided as error:
            raise StructureMismatch(
                f"tensor {name!r} has strides that do not divide each other; make it contiguous",
                tensor=name,
            ) from error
        for one in pieces:
            target = one.target
            view = torch.as_strided(memory, target.shape, target.strides, target.offset)
            yield Part(one.source, view)
