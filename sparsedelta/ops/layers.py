"""The data for pictures of a delta: its tensors by layer and kind, and the losses of the training.

The name of a tensor gives its place: the first number is the layer, and the text after it is the kind.
Later numbers in the name, such as those of experts, are replaced by ``*``, so all experts of a layer count
as one kind. Tensors whose names have no number are listed separately.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


class Countable(Protocol):
    """A tensor with its number of changed elements."""

    @property
    def name(self) -> str:
        """The tensor's name."""

    @property
    def nnz(self) -> int:
        """Number of changed elements."""

    @property
    def numel(self) -> int:
        """Number of all elements."""


@dataclass(frozen=True, slots=True)
class Cell:
    """All tensors of one kind in one layer.

    Attributes:
        names: the names of the tensors.
        nnz, numel: number of changed elements, and of all elements.
        mean_change: mean |change| of the changed elements; None if it is not known for all tensors.
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
    """A table of tensors: one row for each layer of a stack, one column for each kind.

    Attributes:
        stack: the part of the names before the layer's number, such as ``encoder.layer``.
        layers: the layers' numbers, ascending.
        kinds: the part of the names after the number, in order of first appearance.
        cells: by layer and kind; a layer may lack some kinds.
    """

    stack: str
    layers: tuple[int, ...]
    kinds: tuple[str, ...]
    cells: dict[tuple[int, str], Cell]

    @property
    def changed_kinds(self) -> tuple[str, ...]:
        """The kinds that have a changed element in at least one layer."""
        changed = {kind for (_, kind), cell in self.cells.items() if cell.nnz}
        return tuple(kind for kind in self.kinds if kind in changed)

    @property
    def has_mean_change(self) -> bool:
        """Whether the mean change of at least one cell is known."""
        return any(cell.mean_change is not None for cell in self.cells.values())


def by_layer(
    tensors: Iterable[Countable], mean_changes: Mapping[str, float] | None = None
) -> tuple[list[Grid], list[Cell]]:
    """Return one grid for each stack of layers, and one cell for each tensor without a number.

    Both are in the order of the tensors.

    Args:
        tensors: the tensors of a delta.
        mean_changes: mean |change| of the changed elements, by tensor, where it is known.
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
        layer = int(found.group())
        gathered.setdefault(stack, {}).setdefault((layer, kind), []).append(tensor)
    return [_grid(stack, own, known) for stack, own in gathered.items()], single


def _grid(
    stack: str, gathered: dict[tuple[int, str], list[Countable]], known: Mapping[str, float]
) -> Grid:
    cells = {key: _cell(own, known) for key, own in gathered.items()}
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
    """Return the mean |change| by tensor from a delta's ``info``; entries of another form are ignored."""
    raw: Any = info.get("mean_change")
    if not isinstance(raw, Mapping):
        return {}
    return {name: float(mean) for name, mean in raw.items() if _is_number(mean) and mean >= 0}


def curve_points(info: Mapping[str, Any]) -> list[tuple[int, float]]:
    """Return the (step, loss) pairs in a delta's ``info``; empty if they have another form."""
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
