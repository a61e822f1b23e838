"""Where transformers puts the elements of a checkpoint's tensors when it loads them into a model.

This is the only module that uses the private loading code of transformers. Nothing is loaded: the conversions
run on tensors without data.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

from sparsedelta.live.moves import find_moves
from sparsedelta.live.strides import Piece, are_disjoint, identity

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Renamed:
    """The tensor becomes a tensor of the model, unchanged.

    Attributes:
        name: the tensor's name in the model.
    """

    name: str


@dataclass(frozen=True, slots=True)
class Moved:
    """The elements of the tensor are moved into one or more tensors of the model.

    Attributes:
        pieces: names in the model, each with a map from flat indices of the checkpoint's tensor to flat
            indices of the model's tensor.
    """

    pieces: tuple[tuple[str, Piece], ...]


@dataclass(frozen=True, slots=True)
class Unknown:
    """The elements of the tensor cannot be followed, for this reason."""

    reason: str


Fate: TypeAlias = Renamed | Moved | Unknown


@dataclass(slots=True)
class _Group:
    """Tensors of a checkpoint that are converted together.

    Attributes:
        converter: the ``WeightConverter`` of transformers.
        members: the tensors' names, each with the pattern that it matches.
    """

    converter: Any
    members: list[tuple[str, str]] = field(default_factory=list)


def is_transformers(model: object) -> bool:
    """Return whether a model is a ``PreTrainedModel`` of transformers."""
    # If transformers has not been imported, no model of it exists.
    transformers = sys.modules.get("transformers")
    return transformers is not None and isinstance(model, transformers.PreTrainedModel)


def find_loaded(
    model: Any, own: Mapping[str, tuple[int, ...]], given: Mapping[str, tuple[int, ...]]
) -> dict[str, Fate]:
    """Return where transformers loads the tensors of a checkpoint into a model.

    Args:
        model: a transformers model.
        own: shapes of the model's tensors by name.
        given: shapes of all tensors of the checkpoint by name; some conversions need several of them.

    Returns:
        The result for each name in the checkpoint. Tensors that transformers does not load are missing.
        ``Unknown``: not all elements of the tensor are moved unchanged.
    """
    groups, found = _grouped(model, own, given)
    for first, group in groups.items():
        found |= _converted(model, own, given, first, group)
    return found


def _grouped(
    model: Any, own: Mapping[str, tuple[int, ...]], given: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, _Group], dict[str, Fate]]:
    """Return the groups that are converted, by their first name in the model, and the results for all other tensors."""
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    transforms = _transforms(model)
    renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
    converters = [one for one in transforms if isinstance(one, WeightConverter)]
    by_pattern = {pattern: one for one in converters for pattern in one.source_patterns}
    prefix, names = model.base_model_prefix, dict(own)
    groups: dict[str, _Group] = {}
    found: dict[str, Fate] = {}
    taken: dict[str, str] = {}
    for name in sorted(given, key=dot_natural_key):
        new, pattern = rename_source_key(name, renamings, converters, prefix, names)
        if new not in own and name in own:
            new, pattern = rename_source_key(name, [], [], prefix, names)
        if new not in own:
            continue
        if pattern is not None:
            group = groups.setdefault(new, _Group(by_pattern[pattern]))
            group.members.append((name, pattern))
        elif taken.setdefault(new, name) == name:
            found[name] = Renamed(new)
        else:
            found[name] = Unknown(f"{taken[new]!r} is loaded in its place")
    return groups, found


def _transforms(model: Any) -> list[Any]:
    """Return the conversions in the order of use. Those that the user passed when loading come first."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    known = get_model_conversion_mapping(model)
    seen = {_key(one) for one in known}
    used = getattr(model, "_weight_conversions", None) or ()
    return [copy.deepcopy(one) for one in used if _key(one) not in seen] + known


def _key(transform: Any) -> tuple[str, ...]:
    return (
        type(transform).__name__,
        *transform.source_patterns,
        "",
        *transform.target_patterns,
        str(getattr(transform, "scope_prefix", None)),  # not in transformers 5.0
    )


def _converted(
    model: Any,
    own: Mapping[str, tuple[int, ...]],
    given: Mapping[str, tuple[int, ...]],
    first: str,
    group: _Group,
) -> dict[str, Fate]:
    """Return the results for the tensors of a group."""

    def run(tensors: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        converter = copy.deepcopy(group.converter)
        for (name, pattern), tensor in zip(group.members, tensors, strict=True):
            converter.add_tensor(first, name, pattern, tensor)
        made = converter.convert(first, model=_Shapes(model, own), config=model.config)
        made = made[0] if isinstance(made, tuple) else made  # with errors, in transformers 5.0
        made = {n: t[0] if isinstance(t, list) else t for n, t in made.items()}
        for name, tensor in made.items():
            if own.get(name) != tuple(tensor.shape):
                raise ValueError(f"{name!r} becomes {list(tensor.shape)}, expected {own.get(name)}")
        return made

    names = [name for name, _ in group.members]
    try:
        moves = find_moves([given[name] for name in names], run)
        return {name: _complete(given[name], own, m) for name, m in zip(names, moves, strict=True)}
    except Exception as error:  # operations of transformers or of the user may raise anything
        return dict.fromkeys(names, Unknown(str(error)))


def _complete(
    shape: tuple[int, ...], own: Mapping[str, tuple[int, ...]], moves: list[tuple[str, Piece]]
) -> Fate:
    """Return the result for a tensor: ``Unknown`` unless each element is moved to exactly one place."""
    n_found, n_elements = sum(piece.source.numel for _, piece in moves), math.prod(shape)
    if n_found != n_elements or not moves:
        return Unknown(f"{n_found} of its {n_elements} elements are found in the model")
    if not are_disjoint([piece.source for _, piece in moves]):
        return Unknown("some of its elements are in the model twice")
    if len(moves) == 1:
        ((name, piece),) = moves
        if own[name] == shape and piece == identity(n_elements):
            return Renamed(name)
    return Moved(tuple(moves))


class _Shapes:
    """A model whose parameters are replaced by tensors without data; conversions read their shapes."""

    def __init__(self, model: Any, own: Mapping[str, tuple[int, ...]]) -> None:
        self._model = model
        self._own = own

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def get_parameter(self, name: str) -> torch.Tensor:
        """Return a parameter without data."""
        import torch

        if name not in self._own:
            raise AttributeError(f"the model has no parameter {name!r}")
        return torch.empty(self._own[name], device="meta")
