"""Which tensor of a model each row of a delta means, and whether it can be changed in place.

Every changed tensor is found, fitting in dtype and shape, or the search fails: none is skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sparsedelta._typing import Model, Names
from sparsedelta.errors import StructureMismatch
from sparsedelta.format.delta import Delta
from sparsedelta.format.records import Change, TensorDelta, TensorSpec
from sparsedelta.live.bits import overlaps_itself, torch_dtype, wire_name

if TYPE_CHECKING:
    import torch


# What wrappers put into the names of what they wrap: torch.compile, FSDP, activation checkpointing,
# and PEFT around a layer it adapts.
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "base_layer"}
_TRIED = 8  # missing names of which a common prefix is looked for
_OUTER = (("base_model", "model"), ("module",))  # PEFT's model, and data parallelism


@dataclass(frozen=True, slots=True)
class Slot:
    """Where a model holds a tensor; what it holds may be replaced, as by ``model.to``.

    Attributes:
        name: of the tensor in the model.
        model: a module, or a state dict.
    """

    name: str
    model: Any

    def tensor(self) -> torch.Tensor:
        """Return the tensor that is there now.

        Raises:
            StructureMismatch: none is there any longer.
        """
        import torch

        found: torch.Tensor | None
        if isinstance(self.model, Mapping):
            found = self.model.get(self.name)
        else:
            *path, key = self.name.split(".")
            module = self.model
            for part in path:
                module = module._modules.get(part) if module is not None else None
            held = None if module is None else getattr(module, key, None)
            found = held if isinstance(held, torch.Tensor) else None
        if found is None:
            raise StructureMismatch(
                f"tensor {self.name!r} is in the model no longer", tensor=self.name
            )
        return found


@dataclass(frozen=True, slots=True)
class Place:
    """A changed tensor and where the model holds it."""

    row: TensorDelta
    target: TensorSpec
    change: Change
    slot: Slot


def find_places(delta: Delta, model: Model, names: Names) -> list[Place]:
    """Return where the model holds each tensor that the delta changes; tied ones once.

    Args:
        delta: changes elements in place, and nothing else.
        model: a module or a state dict.
        names: from a tensor's name in the delta to that in the model; None as a value: leave this
            tensor out. None: as they are, but for what wrappers add, and one common prefix.

    Raises:
        StructureMismatch: a tensor is missing, of another dtype or shape, tied to one that becomes
            another, or holds no plain data; or the delta adds, removes or reshapes tensors.
    """
    slots = find_slots(model)
    renamed = [(row, _renamed(row.name, names)) for row in delta.tensors]
    changed = [(row, name) for row, name in renamed if name is not None and row.base != row.target]
    for row, _ in changed:
        _check_in_place(row)
    resolve = _resolver([name for _, name in changed], slots)
    places: dict[object, Place] = {}
    for row, name in changed:
        place = _place(row, slots[resolve(name)])
        places.setdefault(_memory_of(place.slot.tensor()), place)
    for row, wanted in renamed:
        slot = None if wanted is None else slots.get(resolve(wanted))
        if slot is not None:
            _check_tied(row, places.get(_memory_of(slot.tensor())))
    return list(places.values())


def unchanged_places(delta: Delta, model: Model, names: Names) -> list[tuple[TensorDelta, Slot]]:
    """Return the tensors that the delta leaves as they are and the model has."""
    slots = find_slots(model)
    renamed = [(row, _renamed(row.name, names)) for row in delta.tensors]
    changed = [name for row, name in renamed if name is not None and row.base != row.target]
    resolve = _resolver(changed, slots)
    return [
        (row, slots[resolve(name)])
        for row, name in renamed
        if name is not None and row.base == row.target and resolve(name) in slots
    ]


def find_slots(model: Model) -> dict[str, Slot]:
    """Return where a model holds its tensors, by name, without what wrappers add to that.

    Raises:
        TypeError: it is neither a module nor a state dict.
    """
    import torch

    if isinstance(model, torch.nn.Module):
        found = list(_module_slots(model))
    elif isinstance(model, Mapping):
        found = [Slot(name, model) for name in model]
    else:
        raise TypeError(f"model is a {type(model).__name__}, expected a module or a state dict")
    slots = {slot.name: slot for slot in found}
    for slot in found:
        slots.setdefault(_plain(slot.name), slot)
    return slots


def _module_slots(model: torch.nn.Module) -> Iterator[Slot]:
    for prefix, module in model.named_modules(remove_duplicate=False):
        for members in (module._parameters, module._buffers):
            for key, tensor in members.items():
                if tensor is not None:
                    yield Slot(f"{prefix}.{key}" if prefix else key, model)


def _plain(name: str) -> str:
    parts = tuple(part for part in name.split(".") if part not in _WRAPPERS)
    for outer in _OUTER:
        if parts[: len(outer)] == outer:
            parts = parts[len(outer) :]
    return ".".join(parts)


def _renamed(name: str, names: Names) -> str | None:
    if names is None:
        return name
    return names(name) if callable(names) else names.get(name, name)


def _resolver(changed: Sequence[str], slots: Mapping[str, Slot]) -> Callable[[str], str]:
    """Return what makes a name of the delta one of the model, the same way for every name."""
    missing = [name for name in changed if name not in slots]
    if not missing:
        return lambda name: name
    ways = {way for name in missing[:: len(missing) // _TRIED + 1] for way in _ways(name, slots)}
    left = {way: [n for n in changed if _converted(n, way) not in slots] for way in ways}
    fewest = min(map(len, left.values()), default=len(missing))
    best = sorted(way for way in ways if len(left[way]) == fewest)
    if len(best) == 1 and not fewest:
        return lambda name: _converted(name, best[0])
    if best and not fewest:
        shown = " and ".join(repr(_converted(missing[0], way)) for way in best)
        problem = (
            f"tensor {missing[0]!r}, which the delta changes, fits several ways of naming, {shown}"
        )
    else:
        missing = left[best[0]] if best else missing
        more = f", nor are {len(missing) - 1} more" if len(missing) > 1 else ""
        problem = f"tensor {missing[0]!r}, which the delta changes, is not in the model{more}"
    raise StructureMismatch(
        f"{problem}; give the names the model has (names)",
        tensor=missing[0],
        expected=missing[0],
        found="absent",
    )


def _ways(name: str, slots: Mapping[str, Slot]) -> Iterator[tuple[str, str]]:
    """Yield prefixes to cut off and to put before names, with which the model has ``name``."""
    for own in slots:
        if own.endswith("." + name) and own == _plain(own):
            yield "", own.removesuffix(name)
    parts = name.split(".")
    for n_cut in range(1, len(parts)):
        if ".".join(parts[n_cut:]) in slots:
            yield ".".join(parts[:n_cut]) + ".", ""


def _converted(name: str, way: tuple[str, str]) -> str:
    cut, add = way
    return add + name.removeprefix(cut)


def _check_in_place(row: TensorDelta) -> None:
    change, base, target = row.change, row.base, row.target
    if base is None or target is None:
        problem = f"{'adds' if base is None else 'removes'} tensor {row.name!r}"
    elif not base.same_layout(target) or not change or change.keep != target.n_elements:
        problem = f"makes tensor {row.name!r} {_shown(target)} of {_shown(base)}"
    else:
        return
    raise StructureMismatch(
        f"the delta {problem}, which cannot be done to a model in memory; load the target (load_model)",
        tensor=row.name,
        expected=_shown(base),
        found=_shown(target),
    )


def _place(row: TensorDelta, slot: Slot) -> Place:
    base, target, change, name = row.base, row.target, row.change, repr(row.name)
    if base is None or target is None or change is None:
        raise ValueError(f"tensor {name} is not changed in place")
    tensor = slot.tensor()
    found = f"{wire_name(tensor.dtype)} {list(tensor.shape)}"
    if tensor.dtype != torch_dtype(base.dtype) or tuple(tensor.shape) != base.shape:
        hint = "" if tuple(tensor.shape) != base.shape else f"; load the model in {base.dtype.name}"
        raise StructureMismatch(
            f"tensor {name} is {found} in the model, expected {_shown(base)}{hint}",
            tensor=row.name,
            expected=_shown(base),
            found=found,
        )
    problem = _unusable(tensor)
    if problem:
        raise StructureMismatch(
            f"tensor {name} {problem}, so its elements cannot be changed in place",
            tensor=row.name,
            expected=_shown(base),
            found=found,
        )
    return Place(row, target, change, slot)


def _unusable(tensor: torch.Tensor) -> str | None:
    import torch

    if tensor.is_meta:
        return "holds no data (it is on the meta device)"
    if type(tensor.data) is not torch.Tensor:
        return f"is a {type(tensor.data).__name__}, not a plain tensor"
    if tensor.layout != torch.strided or overlaps_itself(tensor):
        return "has elements that share memory or are not laid out plainly"
    return None


def _memory_of(tensor: torch.Tensor) -> object:
    if tensor.is_meta or not tensor.numel():
        return id(tensor)
    return tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride()


def _check_tied(row: TensorDelta, place: Place | None) -> None:
    """Check that a tensor which shares its memory with a changed one becomes the same as that."""
    if place is None or row is place.row:
        return
    same = (row.base, row.target) == (place.row.base, place.row.target)
    if same and place.target.digest is None:  # equal touched values say as much
        touched = row.change.touched if row.change else None
        same = touched is not None and touched == place.change.touched
    if not same:
        raise StructureMismatch(
            f"tensors {place.row.name!r} and {row.name!r} are tied in the model, but not in the delta's"
            " base and target; untie them before applying it",
            tensor=row.name,
        )


def _shown(spec: TensorSpec | None) -> str:
    return "absent" if spec is None else f"{spec.dtype.name} {list(spec.shape)}"
