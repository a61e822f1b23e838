"""What pictures of a delta show: its tensors as layers by kinds, and the losses of its making.

A layer is a row, a kind of tensor a column. Names say where a tensor belongs: its first number is the layer, what follows it the kind. Numbers
further on, as of experts, are counted together. Tensors without a number have a row of their own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


class Countable(Protocol):
    """A tensor of which something is known to have changed."""

    @property
    def name(self) -> str:
        """The tensor's name."""

    @property
    def nnz(self) -> int:
        """Changed elements."""

    @property
    def numel(self) -> int:
        """All elements."""


@dataclass(frozen=True, slots=True)
class Cell:
    """Tensors of one kind in one layer, taken together.

    Attributes:
        names: of the tensors.
        nnz, numel: changed elements, and all.
        mean_change: mean |change| of the changed ones; None if it is not known of all of them.
    """

    names: tuple[str, ...]
    nnz: int
    numel: int
    mean_change: float | None = None

    @property
    def density(self) -> float:
        """Changed elements over all elements; 0 if there are none."""
        return self.nnz / self.numel if self.numel else 0.0


@dataclass(frozen=True, slots=True)
class Grid:
    """Layers by kinds.

    Attributes:
        stack: what stands before the layer's number, such as ``encoder.layer``.
        layers: numbers, ascending.
        kinds: what stands after it, in the order in which they first come.
        cells: by layer and kind; a layer may lack some.
    """

    stack: str
    layers: tuple[int, ...]
    kinds: tuple[str, ...]
    cells: dict[tuple[int, str], Cell]

    @property
    def changed_kinds(self) -> tuple[str, ...]:
        """The kinds of which something changed in some layer."""
        changed = {kind for (_, kind), cell in self.cells.items() if cell.nnz}
        return tuple(kind for kind in self.kinds if kind in changed)

    @property
    def tells_change(self) -> bool:
        """Whether it is known of any cell how far its elements moved."""
        return any(cell.mean_change is not None for cell in self.cells.values())


def by_layer(
    tensors: Iterable[Countable], mean_changes: Mapping[str, float] | None = None
) -> tuple[list[Grid], list[Cell]]:
    """Return a grid per stack of layers, and the tensors that belong to none; all in order.

    Args:
        tensors: of a delta.
        mean_changes: by tensor, the mean |change| of its changed elements, as far as known.
    """
    known = mean_changes or {}
    gathered: dict[str, dict[tuple[int, str], list[Countable]]] = {}
    single: list[Cell] = []
    for tensor in tensors:
        found = _NUMBER.search(tensor.name)
        if found is None:
            single.append(_cell([tensor], known))
            continue
        stack = tensor.name[: found.start()].rstrip(".")
        kind = _NUMBER.sub("*", tensor.name[found.end() :].lstrip(".")) or "(itself)"
        place = (int(found.group()), kind)
        gathered.setdefault(stack, {}).setdefault(place, []).append(tensor)
    return [_grid(stack, own, known) for stack, own in gathered.items()], single


def _grid(
    stack: str, gathered: dict[tuple[int, str], list[Countable]], known: Mapping[str, float]
) -> Grid:
    cells = {place: _cell(own, known) for place, own in gathered.items()}
    layers = tuple(sorted({layer for layer, _ in cells}))
    kinds = tuple(dict.fromkeys(kind for _, kind in cells))
    return Grid(stack, layers, kinds, cells)


def _cell(tensors: Sequence[Countable], known: Mapping[str, float]) -> Cell:
    changed = [tensor for tensor in tensors if tensor.nnz]
    nnz = sum(tensor.nnz for tensor in changed)
    mean_change = None
    if changed and all(tensor.name in known for tensor in changed):
        mean_change = sum(known[tensor.name] * tensor.nnz for tensor in changed) / nnz
    names = tuple(tensor.name for tensor in tensors)
    return Cell(names, nnz, sum(tensor.numel for tensor in tensors), mean_change)


def mean_changes(info: Mapping[str, Any]) -> dict[str, float]:
    """Return the mean |change| by tensor as the maker of a delta recorded it; what is no figure is not."""
    raw: Any = info.get("mean_change")
    if not isinstance(raw, Mapping):
        return {}
    return {name: float(mean) for name, mean in raw.items() if _is_number(mean) and mean >= 0}


def curve_points(info: Mapping[str, Any]) -> list[tuple[int, float]]:
    """Return (step, loss) as the maker of a delta recorded them; none if they are not of this form."""
    raw: Any = info.get("losses")
    if not _is_list(raw):
        return []
    points = []
    for entry in raw:
        if not (_is_list(entry) and len(entry) == 2 and all(map(_is_number, entry))):
            return []
        points.append((int(entry[0]), float(entry[1])))
    return points


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _is_number(value: object) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return abs(value) < 1e15
