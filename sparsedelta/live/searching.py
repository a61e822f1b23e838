"""Where a model has the tensors of a delta: in the model, or in the part of it that is saved in the tensor's folder."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

from sparsedelta._typing import Model
from sparsedelta.errors import StructureMismatch
from sparsedelta.format.delta import Delta
from sparsedelta.format.records import Row
from sparsedelta.live.bits import check_installed
from sparsedelta.live.coordinates import find_coordinates
from sparsedelta.live.held import Held
from sparsedelta.live.matching import fits, has_contents
from sparsedelta.live.parts import Part, choose_folder, folder_of, is_of_pipeline, parts_by_folder
from sparsedelta.live.slots import AnySlot, slots_of
from sparsedelta.live.tensor_names import name_converter


class Search:
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
        own = slots_of(part, self._whole)
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
        own_name = name_converter(rest, own, closed=coordinates.is_closed)

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
            fitting[folder] = [(row, tensor) for row, tensor in held if fits(row, tensor)]
            names = {row.name for row, _ in fitting[folder]}
            return len(names) if 2 * len(names) > len({row.name for row, _ in found}) else 0

        def holds(folder: str) -> bool:
            return all(has_contents(row, tensor) for row, tensor in fitting[folder])

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
