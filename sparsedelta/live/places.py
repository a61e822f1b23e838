"""The tensor of a model that each row of a delta refers to.

If a changed tensor is missing, or differs in dtype or shape, an error is raised. No changed tensor is skipped.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from sparsedelta._typing import Model, Names
from sparsedelta.errors import StructureMismatch
from sparsedelta.format.delta import Delta
from sparsedelta.format.records import Row, TensorKey
from sparsedelta.live.bits import shape_in_file, wire_name
from sparsedelta.live.held import Held
from sparsedelta.live.matching import (
    check_usable,
    check_writable,
    fits,
    is_in_place,
    matching_rows,
    misfit_error,
    same_change,
    shown,
)
from sparsedelta.live.searching import Search
from sparsedelta.live.slots import AnySlot, memory_of, sharing_memory
from sparsedelta.live.tensor_names import renamed


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
    named = [(row, renamed(row.key, names)) for row in delta.tensors]
    wanted = [(row, name) for row, name in named if name is not None]
    search = Search(delta, model, wanted, lambda row: bool(is_in_place(row) and row.chunks))

    def slot_of(key: TensorKey) -> AnySlot | None:
        name = renamed(key, names)
        return None if name is None else search.find(key[0], name)

    same_name: dict[tuple[str, str, str], list[Row]] = defaultdict(list)  # rows of several files
    for row, name in search.wanted:
        same_name[search.part_of(row.file), row.name, name].append(row)
    changed: dict[object, Place] = {}  # by the memory of the tensor
    found: list[tuple[list[Row], AnySlot]] = []
    for (_, _, name), rows in same_name.items():
        slot = search.find(rows[0].file, name)
        matching = matching_rows(rows, slot, slot_of)
        if slot is None or not matching:
            continue
        found.append((matching, slot))
        if matching[0].chunks:
            check_usable(matching[0], slot.tensor())
            check_writable(matching[0], slot.tensor())
            changed.setdefault(memory_of(slot.tensor()), Place(matching[0], slot))
    for matching, slot in found:
        memory = memory_of(slot.tensor())
        place = changed.get(memory)
        if place is not None and place.slot is not slot:
            _check_tied(matching[0], place)
            changed[memory] = replace(place, tied=(*place.tied, slot))
    _check_apart(found)
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
        check_usable(row, held)
        check_writable(row, held)
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
    named = [(row, renamed(row.key, names)) for row in delta.tensors]
    wanted = [(row, name) for row, name in named if name is not None]
    search = Search(delta, model, wanted, lambda row: True)
    for row, name in search.wanted:
        slot = search.find(row.file, name)
        if slot is None:
            raise StructureMismatch(
                f"tensor {row.name!r} of the target is not in the model", tensor=row.name
            )
        held = slot.tensor()
        if not fits(row, held):
            raise misfit_error(row, held)
        yield row, slot


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
        if not fits(row, tensor):
            raise StructureMismatch(
                f"tensor {name!r} is now {wire_name(tensor.dtype)} {list(shape_in_file(tensor.dtype, tensor.shape))},"
                f" expected {shown(row.target)}; nothing was written",
                tensor=row.name,
            )
        check_usable(row, tensor)
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


def _check_apart(found: Sequence[tuple[Sequence[Row], AnySlot]]) -> None:
    """Check that no tensor that changes has elements in common with one that does not."""
    held = [(rows[0], slot.tensor()) for rows, slot in found]
    places = [*{memory_of(tensor): (row, tensor) for row, tensor in held}.values()]
    for pair in sharing_memory([tensor for _, tensor in places], surely=True):
        one, other = (places[number][0] for number in pair)
        if bool(one.chunks) != bool(other.chunks):
            raise StructureMismatch(
                f"tensors {one.name!r} and {other.name!r} share a part of their memory in the model, and only one of them"
                " changes; untie them before applying the delta",
                tensor=one.name,
            )


def _check_tied(row: Row, place: Place) -> None:
    """Check that a row has the same base and target as the changed row whose memory it shares."""
    if not same_change(row, place.row):
        raise StructureMismatch(
            f"tensors {place.row.name!r} and {row.name!r} are tied in the model, but not in the delta's"
            " base and target; untie them before applying it",
            tensor=row.name,
        )
