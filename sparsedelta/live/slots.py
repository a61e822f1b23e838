"""The tensor of a model that each row of a delta refers to, and whether it can be changed in place.

If a changed tensor is missing, or differs in dtype or shape, an error is raised. No changed tensor is skipped.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeAlias

from sparsedelta._typing import Model, Names
from sparsedelta.errors import StructureMismatch
from sparsedelta.format.delta import Delta
from sparsedelta.format.records import Row, TensorKey, TensorSpec
from sparsedelta.live.bits import (
    check_installed,
    is_read_only,
    overlaps_itself,
    shape_in_file,
    torch_dtype,
    wire_name,
)
from sparsedelta.live.coordinates import Own, Scattered, find_coordinates
from sparsedelta.live.divided import Divided, divided
from sparsedelta.live.held import Held, parts_of, whole_digest
from sparsedelta.live.parts import (
    Part,
    choose_folder,
    folder_of,
    holder_of,
    is_of_pipeline,
    parts_by_folder,
)
from sparsedelta.live.wrappers import plain_name

if TYPE_CHECKING:
    import torch

AnySlot: TypeAlias = Own | Scattered

_N_TRIED = 8  # missing names that are tried to find a common prefix


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


@dataclass(frozen=True, slots=True)
class Place:
    """A changed tensor of the delta, and where the model holds it.

    Attributes:
        row: the row of the delta.
        slot: where the model holds the tensor.
        tied: other slots with the same memory, which other rows of the delta refer to.
        checked: traits of the tensor that was checked last, if any; see ``current_tensor``.
    """

    row: Row
    slot: AnySlot
    tied: tuple[AnySlot, ...] = ()
    checked: list[object] = field(default_factory=list, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Places:
    """The tensors of a model that a delta refers to.

    Attributes:
        changed: the tensors that the delta changes. Tied tensors are listed once.
        unchanged: the tensors that the delta does not change, each with the rows that may describe it. There
            are several rows if several files of the delta have a tensor of this name.
    """

    changed: Sequence[Place]
    unchanged: Sequence[tuple[Sequence[Row], AnySlot]]


def find_places(delta: Delta, model: Model, names: Names) -> Places:
    """Return where a model holds the tensors of a delta. All changed tensors are found.

    A row is matched with a place in the model by name, whatever its file. If several files of the delta
    have a tensor of this name, the one with the model's dtype and shape is taken.

    Args:
        delta: a delta that only changes elements in place.
        model: a module or a state dict.
        names: a mapping or function from a tensor's name in the delta to its name in the model. A mapping may
            also have ``(file, name)`` as keys. The value None leaves a tensor out. If ``names`` is
            None, a transformers model is searched as transformers loads a checkpoint. In any other model,
            the names must be equal, except for parts that wrappers insert and one common prefix.

    Raises:
        StructureMismatch: a changed tensor is missing, has another dtype or shape, matches several rows with
            different changes, is tied to a tensor that changes differently, or is not a plain tensor; or the
            delta adds, renames or reshapes tensors.
    """
    named = [(row, _renamed(row.key, names)) for row in delta.tensors]
    wanted = [(row, name) for row, name in named if name is not None]
    search = _Search(delta, model, wanted, lambda row: bool(_is_in_place(row) and row.chunks))

    def slot_of(key: TensorKey) -> AnySlot | None:
        name = _renamed(key, names)
        return None if name is None else search.find(key[0], name)

    same_name: dict[tuple[str, str, str], list[Row]] = defaultdict(list)  # rows of several files
    for row, name in search.wanted:
        same_name[search.part_of(row.file), row.name, name].append(row)
    changed: dict[object, Place] = {}  # by the memory of the tensor
    found: list[tuple[list[Row], AnySlot]] = []
    for (_, _, name), rows in same_name.items():
        slot = search.find(rows[0].file, name)
        matching = _matching_rows(rows, slot, slot_of)
        if slot is None or not matching:
            continue
        found.append((matching, slot))
        if matching[0].chunks:
            _check_usable(matching[0], slot.tensor())
            _check_writable(matching[0], slot.tensor())
            changed.setdefault(memory_of(slot.tensor()), Place(matching[0], slot))
    for matching, slot in found:
        memory = memory_of(slot.tensor())
        place = changed.get(memory)
        if place is not None and place.slot is not slot:
            _check_tied(matching[0], place)
            changed[memory] = replace(place, tied=(*place.tied, slot))
    return Places([*changed.values()], [(rows, slot) for rows, slot in found if not rows[0].chunks])


def find_all(delta: Delta, model: Model, names: Names) -> list[Place]:
    """Return the places of all tensors of a delta's target in a model; of tied tensors, one.

    Args:
        delta: contains the names of the tensors.
        model: a module or a state dict.
        names: see ``find_places``.

    Raises:
        StructureMismatch: a tensor is not in the model, its place is not known, it has another dtype or shape, is
            not a plain tensor, or is tied to one that differs from it in the target.
    """
    found: dict[object, Place] = {}
    for row, slot in find_each(delta, model, names):
        held = slot.tensor()
        _check_usable(row, held)
        _check_writable(row, held)
        place = found.setdefault(memory_of(held), Place(row, slot))
        if place.row.target != row.target:
            raise StructureMismatch(
                f"tensors {place.row.name!r} and {row.name!r} are one tensor of the model, and two in the"
                " target; untie them, or leave one out (names)",
                tensor=row.name,
            )
    return [*found.values()]


def find_each(delta: Delta, model: Model, names: Names) -> Iterator[tuple[Row, AnySlot]]:
    """Yield all tensors of a delta's target, each with its place in a model; see ``find_all``.

    Raises:
        StructureMismatch: a tensor is not in the model, its place is not known, or it has another dtype or shape.
    """
    named = [(row, _renamed(row.key, names)) for row in delta.tensors]
    wanted = [(row, name) for row, name in named if name is not None]
    search = _Search(delta, model, wanted, lambda row: True)
    for row, name in search.wanted:
        slot = search.find(row.file, name)
        if slot is None:
            raise StructureMismatch(
                f"tensor {row.name!r} of the target is not in the model", tensor=row.name
            )
        held = slot.tensor()
        if not _fits(row, held):
            raise _misfit_error(row, held)
        yield row, slot


class _Search:
    """Finds the places of a delta's tensors in a model, or in the part of it that is saved in the tensor's folder.

    Attributes:
        wanted: the rows of the delta that describe tensors of the model, each with its name after ``names`` was
            applied.
    """

    def __init__(
        self,
        delta: Delta,
        model: Model,
        wanted: Sequence[tuple[Row, str]],
        is_needed: Callable[[Row], bool],
    ) -> None:
        """Search the model.

        Args:
            delta: the delta.
            model: a module, a state dict or a pipeline.
            wanted: rows of the delta with their names.
            is_needed: returns whether the tensor of a row must be in the model.

        Raises:
            StructureMismatch: a needed tensor is not in the model, or its place is not known.
        """
        check_installed("torch")
        self._whole = model
        self._is_needed = is_needed
        by_folder: dict[str, list[tuple[Row, str]]] = defaultdict(list)
        for row, name in wanted:
            by_folder[folder_of(row.file)].append((row, name))
        parts = parts_by_folder(model, by_folder)
        if parts is None and len(by_folder) > 1 and is_of_pipeline(delta):
            parts = self._only_part(by_folder)
        else:
            _check_has_parts(parts, by_folder)
        self._parts = parts
        if parts is None:
            self.wanted = wanted
            self._find = {"": self._finder(Part("", model), wanted)}
        else:
            self.wanted = [each for each in wanted if folder_of(each[0].file) in parts]
            self._find = {
                folder: self._finder(part, by_folder[folder])
                for folder, part in parts.items()
                if folder in by_folder
            }

    def part_of(self, file: str) -> str:
        """Return what tells the part of the model that a file belongs to from others."""
        return "" if self._parts is None else folder_of(file)

    def find(self, file: str, name: str) -> AnySlot | None:
        """Return where the model has the tensor of a file; None if it lacks it."""
        find = self._find.get(self.part_of(file))
        return None if find is None else find(name)

    def _finder(
        self, part: Part, wanted: Sequence[tuple[Row, str]]
    ) -> Callable[[str], AnySlot | None]:
        """Return a function from a name in the delta to the place in a part; None if the part lacks it."""
        own = _slots_of(part, self._whole)
        needed = [name for row, name in wanted if self._is_needed(row)]
        shapes = {
            name: row.target.shape
            for row, name in reversed(wanted)
            if name == row.name or name not in own
        }
        coordinates = find_coordinates(part.module, own, shapes, needed)
        for name in needed:
            if name in coordinates.unknown:
                raise StructureMismatch(
                    f"tensor {name!r} {coordinates.unknown[name]}; load the target (load_model)",
                    tensor=name,
                )
        rest = [name for name in needed if name not in coordinates.slots]
        own_name = _name_converter(rest, own, closed=coordinates.is_closed)

        def find(name: str) -> AnySlot | None:
            if name in coordinates.unknown:
                return None
            return coordinates.slots.get(name) or own.get(own_name(name))

        return find

    def _only_part(
        self, by_folder: Mapping[str, Sequence[tuple[Row, str]]]
    ) -> dict[str, Part] | None:
        """Return the model as the part of the pipeline that it is; None if it is none of them."""
        fitting: dict[str, list[tuple[Row, Held]]] = {}

        def n_fitting(folder: str) -> int:
            try:
                find = self._finder(Part("", self._whole), by_folder[folder])
            except StructureMismatch:
                return 0
            found = [(row, find(name)) for row, name in by_folder[folder]]
            held = [(row, slot.tensor()) for row, slot in found if slot is not None]
            fitting[folder] = [(row, tensor) for row, tensor in held if _fits(row, tensor)]
            names = {row.name for row, _ in fitting[folder]}
            return len(names) if 2 * len(names) > len({row.name for row, _ in found}) else 0

        def holds(folder: str) -> bool:
            return all(_has_contents(row, tensor) for row, tensor in fitting[folder])

        found = choose_folder(by_folder, n_fitting, holds)
        if len(found) > 1:
            raise StructureMismatch(
                f"the model may be that of the folder {found[0]!r} or of {found[1]!r} in the delta's pipeline;"
                " apply the delta to the pipeline"
            )
        return {found[0]: Part("", self._whole)} if found else None


def _check_has_parts(
    parts: Mapping[str, Part] | None, by_folder: Mapping[str, Sequence[tuple[Row, str]]]
) -> None:
    """Check that a pipeline has a model for each folder in which the delta changes a tensor."""
    for folder in by_folder.keys() - (by_folder if parts is None else parts):
        for row, _ in by_folder[folder]:
            if not row.is_copied:
                raise StructureMismatch(
                    f"the delta changes tensor {row.name!r} of '{row.file}', and the model has no part of this"
                    f" folder; load the model with it, or leave the tensor out, as with"
                    f" names={{({row.file!r}, {row.name!r}): None}}",
                    tensor=row.name,
                )


def _has_contents(row: Row, tensor: Held) -> bool:
    """Return whether a tensor of a model has the contents of a tensor of the base or of the target."""
    known = {row.target.digest, row.base.spec.digest if row.base else None} - {None}
    return not known or whole_digest(tensor) in known


def current_tensor(place: Place, found: dict[str, Held] | None = None) -> Held:
    """Return the tensor that the model holds at a place now.

    Args:
        place: the place.
        found: the tensors that were found just now, by the names of their slots; this one is added. Places of
            several deltas then share one search.

    Raises:
        StructureMismatch: since ``find_places``, the tensor has been removed, has got another dtype or shape,
            is not a plain tensor any longer, or is no longer tied to the same tensors.
    """
    found = {} if found is None else found
    row, name = place.row, place.slot.name
    tensor = found.get(name)
    if tensor is None:
        tensor = found[name] = place.slot.tensor()
    traits = _traits(tensor)
    if traits is None or place.checked != [traits]:
        if not _fits(row, tensor):
            raise StructureMismatch(
                f"tensor {name!r} is now {wire_name(tensor.dtype)} {list(shape_in_file(tensor.dtype, tensor.shape))},"
                f" expected {_shown(row.target)}; nothing was written",
                tensor=row.name,
            )
        _check_usable(row, tensor)
        place.checked[:] = [traits]
    for other in place.tied:
        if memory_of(other.tensor()) != memory_of(tensor):
            raise StructureMismatch(
                f"tensors {name!r} and {other.name!r} were tied in the model and no longer are;"
                " nothing was written",
                tensor=row.name,
            )
    return tensor


def _traits(tensor: Held) -> object:
    """Return an object that is equal as long as a tensor that passed the checks passes them; None if there is none."""
    import torch

    if not isinstance(tensor, torch.Tensor):
        return None
    in_mode = torch.is_inference_mode_enabled()
    layout = tensor.dtype, tensor.shape, tensor.stride(), tensor.device
    return type(tensor), tensor.data_ptr(), *layout, tensor.is_inference(), in_mode


def find_slots(model: Model) -> dict[str, Slot]:
    """Return the slots of a model's tensors by name. A name that has parts of wrappers is also listed without them.

    Raises:
        TypeError: the model is neither a module nor a state dict.
        ModuleNotFoundError: torch is not installed.
    """
    return _slots_of(Part("", model), model)


def _slots_of(part: Part, whole: Model) -> dict[str, Slot]:
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


def _renamed(key: TensorKey, names: Names) -> str | None:
    if names is None:
        return key[1]
    if callable(names):
        return names(key[1])
    return names[key] if key in names else names.get(key[1], key[1])


def _name_converter(
    changed: Sequence[str], slots: Mapping[str, Slot], *, closed: bool
) -> Callable[[str], str]:
    """Return a function from a name in the delta to the name in the model.

    Either the names are equal, or one prefix is removed from all names, or one is added.

    Args:
        changed: names in the delta of the tensors that it changes.
        slots: the tensors of the model by name.
        closed: the names must be equal; no prefix is tried.

    Raises:
        StructureMismatch: no prefix, or more than one, fits all changed tensors.
    """
    changed = list(dict.fromkeys(changed))
    missing = [name for name in changed if name not in slots]
    if not missing:
        return lambda name: name
    tried = () if closed else missing[:: len(missing) // _N_TRIED + 1]
    prefixes = {pair for name in tried for pair in _prefixes(name, slots)}
    not_found = {
        pair: [name for name in changed if _converted(name, pair) not in slots] for pair in prefixes
    }
    fewest = min(map(len, not_found.values()), default=len(missing))
    best = sorted(pair for pair in prefixes if len(not_found[pair]) == fewest)
    if len(best) == 1 and not fewest:
        return lambda name: _converted(name, best[0])
    if best and not fewest:
        shown = " and ".join(repr(_converted(missing[0], pair)) for pair in best)
        problem = f"tensor {missing[0]!r}, which the delta changes, may be one of several in the model, {shown}"
    else:
        missing = not_found[best[0]] if best else missing
        more = f", nor are {len(missing) - 1} more" if len(missing) > 1 else ""
        problem = f"tensor {missing[0]!r}, which the delta changes, is not in the model{more}"
    raise StructureMismatch(
        f"{problem}; give the model's names, and None for tensors to leave out (names)",
        tensor=missing[0],
        expected=missing[0],
        found="absent",
    )


def _prefixes(name: str, slots: Mapping[str, Slot]) -> Iterator[tuple[str, str]]:
    """Yield pairs (prefix to remove, prefix to add) that turn ``name`` into a name in the model."""
    for own in slots:
        if own.endswith("." + name) and own == plain_name(own):
            yield "", own.removesuffix(name)
    parts = name.split(".")
    for n_cut in range(1, len(parts)):
        if ".".join(parts[n_cut:]) in slots:
            yield ".".join(parts[:n_cut]) + ".", ""


def _converted(name: str, prefixes: tuple[str, str]) -> str:
    remove, add = prefixes
    return add + name.removeprefix(remove)


def _is_in_place(row: Row) -> bool:
    """Return whether a row only changes elements, so that name, dtype and shape are those of the base."""
    return row.base is not None and row.base.name == row.name and row.keeps_all


def _matching_rows(
    rows: Sequence[Row], slot: AnySlot | None, slot_of: Callable[[TensorKey], AnySlot | None]
) -> list[Row]:
    """Return the rows that describe a tensor of the model: one changed row, else all unchanged rows that fit.

    If no row fits and none is changed, all rows are returned.

    Args:
        rows: the rows with the tensor's name, from different files.
        slot: the tensor; None if the model has no tensor of this name.
        slot_of: returns the slot of a tensor of the base, or None.

    Raises:
        StructureMismatch: several rows with different changes fit; or no row fits, and one of them is changed.
    """
    tensor = None if slot is None else slot.tensor()
    fitting = [row for row in rows if _is_in_place(row) and _fits(row, tensor)]
    changed = [row for row in fitting if row.chunks]
    for other in changed[1:]:
        if not _same_change(changed[0], other):
            raise _ambiguous_error(changed[0], other)
    if fitting:
        return changed[:1] or fitting
    for row in rows:
        if _is_in_place(row):
            if row.chunks and tensor is not None:
                raise _misfit_error(row, tensor)
        elif not _is_tied_copy(row, slot, slot_of):
            raise _not_in_place_error(row, tensor)
    return [*rows]


def _fits(row: Row, tensor: Held | None) -> bool:
    target = row.target
    return (
        tensor is not None
        and tensor.dtype == torch_dtype(target.dtype)
        and shape_in_file(tensor.dtype, tensor.shape) == target.shape
    )


def _is_tied_copy(
    row: Row, slot: AnySlot | None, slot_of: Callable[[TensorKey], AnySlot | None]
) -> bool:
    """Return whether a row is a copy of another tensor of the base that the model ties to this one."""
    if slot is None or row.base is None or not (row.is_copied and row.keeps_all):
        return False
    base_slot = slot_of(row.base.key)
    return base_slot is not None and memory_of(base_slot.tensor()) == memory_of(slot.tensor())


def _not_in_place_error(row: Row, tensor: Held | None) -> StructureMismatch:
    base, name = row.base, repr(row.name)
    if base is None:
        problem = f"{'adds' if tensor is None else 'replaces'} tensor {name}"
    elif base.name != row.name:
        problem = f"makes tensor {name} from tensor {base.name!r}"
    else:
        problem = f"changes tensor {name} from {_shown(base.spec)} to {_shown(row.target)}"
    return StructureMismatch(
        f"the delta {problem}, which is not possible in a model in memory; load the target (load_model)",
        tensor=row.name,
        expected=_shown(base.spec if base else None),
        found=_shown(row.target),
    )


def _ambiguous_error(row: Row, other: Row) -> StructureMismatch:
    return StructureMismatch(
        f"tensor {row.name!r} of the model may be that of {row.file!r} or of {other.file!r}, and the delta"
        f" changes both; leave one out, as with names={{({other.file!r}, {other.name!r}): None}}",
        tensor=row.name,
    )


def _misfit_error(row: Row, tensor: Held) -> StructureMismatch:
    shape = shape_in_file(tensor.dtype, tensor.shape)
    expected, found = row.target, f"{wire_name(tensor.dtype)} {list(shape)}"
    other_dtype = shape == expected.shape
    hint = f"; load the model in {expected.dtype.name}" if other_dtype else ""
    if other_dtype and found.startswith("F32"):
        hint += ", or load the target (load_model) if transformers always keeps this tensor in F32"
    return StructureMismatch(
        f"tensor {row.name!r} is {found} in the model, expected {_shown(expected)}{hint}",
        tensor=row.name,
        expected=_shown(expected),
        found=found,
    )


def _check_usable(row: Row, tensor: Held) -> None:
    problem = next(filter(None, map(_unusable, parts_of(tensor))), None)
    if problem:
        raise StructureMismatch(
            f"tensor {row.name!r} {problem}, so its elements cannot be changed in place",
            tensor=row.name,
        )


def _check_writable(row: Row, tensor: Held) -> None:
    if any(map(is_read_only, parts_of(tensor))):
        raise StructureMismatch(
            f"tensor {row.name!r} is in read-only memory, such as a file mapped for reading; replace it in"
            " the model by a copy",
            tensor=row.name,
        )


def _unusable(tensor: torch.Tensor) -> str | None:
    import torch

    if tensor.is_meta:
        return (
            "holds no data (it is on the meta device); load the model without offloading, or load the target"
            " (load_model)"
        )
    if type(tensor.data) is not torch.Tensor:
        return f"is of type {type(tensor.data).__name__}, not a plain tensor"
    if tensor.layout != torch.strided or overlaps_itself(tensor):
        return "has elements that share memory, or is not a strided tensor"
    if tensor.is_inference() and not torch.is_inference_mode_enabled():
        return "was made in inference mode, which has ended"
    return None


def memory_of(held: Held) -> object:
    """Return an object that is equal for two tensors if they are the same elements in memory."""
    if isinstance(held, Divided):
        return held.owner
    return tuple(map(_part_memory, parts_of(held)))


def _part_memory(tensor: torch.Tensor) -> object:
    if tensor.is_meta or not tensor.numel():
        return id(tensor)
    return tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride()


def _check_tied(row: Row, place: Place) -> None:
    """Check that a row has the same base and target as the changed row whose memory it shares."""
    if not _same_change(row, place.row):
        raise StructureMismatch(
            f"tensors {place.row.name!r} and {row.name!r} are tied in the model, but not in the delta's"
            " base and target; untie them before applying it",
            tensor=row.name,
        )


def _same_change(row: Row, other: Row) -> bool:
    """Return whether two rows have the same tensor in the base, and the same in the target."""
    if row is other:
        return True
    if row.base is None or other.base is None or row.base.spec != other.base.spec:
        return False
    if row.target.digest is not None and other.target.digest is not None:
        return row.target == other.target
    # If a digest is missing, compare the spans and counts of the chunks and the digests of touched values.
    changes = [[(c.start, c.span, c.nnz, c.touched) for c in one.chunks] for one in (row, other)]
    return changes[0] == changes[1] and all(chunk.touched for chunk in row.chunks)


def _shown(spec: TensorSpec | None) -> str:
    return "absent" if spec is None else f"{spec.dtype.name} {list(spec.shape)}"
