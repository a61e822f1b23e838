"""Which tensor of a model each row of a delta means, and whether it can be changed in place.

Every changed tensor is found, fitting in dtype and shape, or the search fails: none is skipped.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from sparsedelta._typing import Model, Names
from sparsedelta.errors import StructureMismatch
from sparsedelta.format.delta import Delta
from sparsedelta.format.records import Row, TensorKey, TensorSpec
from sparsedelta.live.bits import (
    check_installed,
    is_read_only,
    overlaps_itself,
    torch_dtype,
    wire_name,
)

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
    """A changed tensor and where the model holds it.

    Attributes:
        row: of the delta.
        slot: where it is.
        tied: where else it is, under the names of other rows.
    """

    row: Row
    slot: Slot
    tied: tuple[Slot, ...] = ()


@dataclass(frozen=True, slots=True)
class Places:
    """Which tensors of a model are a delta's.

    Attributes:
        changed: those that the delta changes; tied ones once.
        unchanged: those that it leaves as they are, each with the rows that it may be; they are of one
            name in several files.
    """

    changed: Sequence[Place]
    unchanged: Sequence[tuple[Sequence[Row], Slot]]


def find_places(delta: Delta, model: Model, names: Names) -> Places:
    """Return where the model holds the delta's tensors, of which a changed one is never missing.

    A tensor of the model is found by its name, whatever the file it is in. If several files have a tensor
    of this name, it is the one with the dtype and shape that the model has.

    Args:
        delta: changes elements in place, and nothing else.
        model: a module or a state dict.
        names: from a tensor's name, or file and name, in the delta to its name in the model; None as a
            value: leave this tensor out. None: as they are, but for what wrappers add, and one common prefix.

    Raises:
        StructureMismatch: a changed tensor is missing, of another dtype or shape, one of several, tied to one
            that becomes another, or holds no plain data; or the delta adds, renames or reshapes tensors.
    """
    slots = find_slots(model)
    named = [(row, _renamed(row.key, names)) for row in delta.tensors]
    wanted = [(row, name) for row, name in named if name is not None]
    own_name = _resolver([name for row, name in wanted if _is_in_place(row) and row.chunks], slots)

    def slot_of(key: TensorKey) -> Slot | None:
        name = _renamed(key, names)
        return None if name is None else slots.get(own_name(name))

    alike: dict[tuple[str, str], list[Row]] = defaultdict(list)  # of one name, in several files
    for row, name in wanted:
        alike[row.name, own_name(name)].append(row)
    changed: dict[object, Place] = {}  # by memory
    found: list[tuple[list[Row], Slot]] = []
    for (_, name), rows in alike.items():
        slot = slots.get(name)
        meant = _meant(rows, slot, slot_of)
        if slot is None or not meant:
            continue
        found.append((meant, slot))
        if meant[0].chunks:
            _check_usable(meant[0], slot.tensor())
            _check_writable(meant[0], slot.tensor())
            changed.setdefault(memory_of(slot.tensor()), Place(meant[0], slot))
    for meant, slot in found:
        memory = memory_of(slot.tensor())
        place = changed.get(memory)
        if place is not None and place.slot is not slot:
            _check_tied(meant[0], place)
            changed[memory] = replace(place, tied=(*place.tied, slot))
    return Places([*changed.values()], [(rows, slot) for rows, slot in found if not rows[0].chunks])


def find_all(delta: Delta, model: Model, names: Names) -> list[Place]:
    """Return where the model holds the tensors of a delta's target, each of which it must have; tied ones once.

    Args:
        delta: names the tensors.
        model: a module or a state dict.
        names: see ``find_places``.

    Raises:
        StructureMismatch: a tensor is missing, of another dtype or shape, one of several files, holds no plain data,
            or is tied to one that the target does not tie it to.
    """
    slots = find_slots(model)
    named = [(row, _renamed(row.key, names)) for row in delta.tensors]
    wanted = [(row, name) for row, name in named if name is not None]
    own_name = _resolver([name for _, name in wanted], slots)
    found: dict[object, Place] = {}
    for row, name in wanted:
        slot = slots[own_name(name)]
        tensor = slot.tensor()
        if not _fits(row, tensor):
            raise _misfit_error(row, tensor)
        _check_usable(row, tensor)
        _check_writable(row, tensor)
        place = found.setdefault(memory_of(tensor), Place(row, slot))
        if place.row.target != row.target:
            raise StructureMismatch(
                f"tensors {place.row.name!r} and {row.name!r} are one tensor of the model, and two in the"
                " target; untie them, or leave one out (names)",
                tensor=row.name,
            )
    return [*found.values()]


def check_in_step(place: Place) -> torch.Tensor:
    """Return the tensor that is at a place now.

    Raises:
        StructureMismatch: it has another dtype or shape than when it was found, holds no plain data, or is no
            longer tied to those that it was tied to.
    """
    row, tensor = place.row, place.slot.tensor()
    if not _fits(row, tensor):
        raise StructureMismatch(
            f"tensor {place.slot.name!r} has become {wire_name(tensor.dtype)} {list(tensor.shape)},"
            f" expected {_shown(row.target)}; nothing was written",
            tensor=row.name,
        )
    _check_usable(row, tensor)
    for other in place.tied:
        if memory_of(other.tensor()) != memory_of(tensor):
            raise StructureMismatch(
                f"tensors {place.slot.name!r} and {other.name!r} were tied in the model and are no"
                " longer; nothing was written",
                tensor=row.name,
            )
    return tensor


def find_slots(model: Model) -> dict[str, Slot]:
    """Return where a model holds its tensors, by name, without what wrappers add to that.

    Raises:
        TypeError: it is neither a module nor a state dict.
        ModuleNotFoundError: torch is not installed.
    """
    check_installed("torch")
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


def _renamed(key: TensorKey, names: Names) -> str | None:
    if names is None:
        return key[1]
    if callable(names):
        return names(key[1])
    return names[key] if key in names else names.get(key[1], key[1])


def _resolver(changed: Sequence[str], slots: Mapping[str, Slot]) -> Callable[[str], str]:
    """Return what makes a name of the delta one of the model, the same way for every name."""
    changed = list(dict.fromkeys(changed))
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
        f"{problem}; give the names the model has, None for tensors to leave out (names)",
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


def _is_in_place(row: Row) -> bool:
    """Return whether only elements change: name, dtype and shape are those of the base."""
    return row.base is not None and row.base.name == row.name and row.keeps_all


def _meant(
    rows: Sequence[Row], slot: Slot | None, slot_of: Callable[[TensorKey], Slot | None]
) -> list[Row]:
    """Return which rows of one name a tensor of the model is: a changed one, else those that are unchanged.

    Args:
        rows: the rows of its name.
        slot: the tensor; None: the model has none of this name.
        slot_of: returns the tensor of a name in the base.

    Raises:
        StructureMismatch: several changed ones fit; or none fits, and one is changed.
    """
    tensor = None if slot is None else slot.tensor()
    fitting = [row for row in rows if _is_in_place(row) and _fits(row, tensor)]
    changed = [row for row in fitting if row.chunks]
    for other in changed[1:]:
        if not _same_change(changed[0], other):
            raise _several_error(changed[0], other)
    if fitting:
        return changed[:1] or fitting
    for row in rows:
        if _is_in_place(row):
            if row.chunks and tensor is not None:
                raise _misfit_error(row, tensor)
        elif not _is_tied_copy(row, slot, slot_of):
            raise _not_in_place_error(row, tensor)
    return [*rows]


def _fits(row: Row, tensor: torch.Tensor | None) -> bool:
    target = row.target
    return (
        tensor is not None
        and tensor.dtype == torch_dtype(target.dtype)
        and tuple(tensor.shape) == target.shape
    )


def _is_tied_copy(row: Row, slot: Slot | None, slot_of: Callable[[TensorKey], Slot | None]) -> bool:
    """Return whether a row is another tensor of the base, with which the model ties it."""
    if slot is None or row.base is None or not (row.is_copied and row.keeps_all):
        return False
    base_slot = slot_of(row.base.key)
    return base_slot is not None and memory_of(base_slot.tensor()) == memory_of(slot.tensor())


def _not_in_place_error(row: Row, tensor: torch.Tensor | None) -> StructureMismatch:
    base, name = row.base, repr(row.name)
    if base is None:
        problem = f"{'adds' if tensor is None else 'replaces'} tensor {name}"
    elif base.name != row.name:
        problem = f"makes tensor {name} from tensor {base.name!r}"
    else:
        problem = f"makes tensor {name} {_shown(row.target)} of {_shown(base.spec)}"
    return StructureMismatch(
        f"the delta {problem}, which cannot be done to a model in memory; load the target (load_model)",
        tensor=row.name,
        expected=_shown(base.spec if base else None),
        found=_shown(row.target),
    )


def _several_error(row: Row, other: Row) -> StructureMismatch:
    return StructureMismatch(
        f"tensor {row.name!r} of the model may be that of {row.file!r} or of {other.file!r}, both of which"
        f" the delta changes; leave one out, as with names={{({other.file!r}, {other.name!r}): None}}",
        tensor=row.name,
    )


def _misfit_error(row: Row, tensor: torch.Tensor) -> StructureMismatch:
    expected, found = row.target, f"{wire_name(tensor.dtype)} {list(tensor.shape)}"
    other_dtype = tuple(tensor.shape) == expected.shape
    hint = f"; load the model in {expected.dtype.name}" if other_dtype else ""
    return StructureMismatch(
        f"tensor {row.name!r} is {found} in the model, expected {_shown(expected)}{hint}",
        tensor=row.name,
        expected=_shown(expected),
        found=found,
    )


def _check_usable(row: Row, tensor: torch.Tensor) -> None:
    problem = _unusable(tensor)
    if problem:
        raise StructureMismatch(
            f"tensor {row.name!r} {problem}, so its elements cannot be changed in place",
            tensor=row.name,
        )


def _check_writable(row: Row, tensor: torch.Tensor) -> None:
    if is_read_only(tensor):
        raise StructureMismatch(
            f"tensor {row.name!r} is in memory that cannot be written, such as a file mapped for reading;"
            " give the model a copy of it",
            tensor=row.name,
        )


def _unusable(tensor: torch.Tensor) -> str | None:
    import torch

    if tensor.is_meta:
        return "holds no data (it is on the meta device)"
    if type(tensor.data) is not torch.Tensor:
        return f"is a {type(tensor.data).__name__}, not a plain tensor"
    if tensor.layout != torch.strided or overlaps_itself(tensor):
        return "has elements that share memory or are not laid out plainly"
    if tensor.is_inference() and not torch.is_inference_mode_enabled():
        return "was made in inference mode, which is over"
    return None


def memory_of(tensor: torch.Tensor) -> object:
    """Return what is equal for tensors that are the same elements in the same memory."""
    if tensor.is_meta or not tensor.numel():
        return id(tensor)
    return tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride()


def _check_tied(row: Row, place: Place) -> None:
    """Check that a tensor which shares its memory with a changed one becomes the same as that."""
    if not _same_change(row, place.row):
        raise StructureMismatch(
            f"tensors {place.row.name!r} and {row.name!r} are tied in the model, but not in the delta's"
            " base and target; untie them before applying it",
            tensor=row.name,
        )


def _same_change(row: Row, other: Row) -> bool:
    """Return whether two tensors are the same in the base, and in the target."""
    if row is other:
        return True
    if row.base is None or other.base is None or row.base.spec != other.base.spec:
        return False
    if row.target.digest is not None and other.target.digest is not None:
        return row.target == other.target
    # Equal touched values at as many positions say as much.
    changes = [[(c.start, c.span, c.nnz, c.touched) for c in one.chunks] for one in (row, other)]
    return changes[0] == changes[1] and all(chunk.touched for chunk in row.chunks)


def _shown(spec: TensorSpec | None) -> str:
    return "absent" if spec is None else f"{spec.dtype.name} {list(spec.shape)}"
