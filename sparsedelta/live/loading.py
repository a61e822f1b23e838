"""What transformers makes of the tensors of a checkpoint when it loads them into a model.

The only module that uses how transformers loads: its table of conversions, and how names are looked up in
it. Nothing is loaded: the conversions run on tensors without data.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

from sparsedelta.live.moves import find_moves
from sparsedelta.live.strides import Piece, identity

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Renamed:
    """A checkpoint's tensor becomes a tensor of the model as it is.

    Attributes:
        name: its name in the model.
    """

    name: str


@dataclass(frozen=True, slots=True)
class Moved:
    """The elements of a checkpoint's tensor become elements of tensors of the model.

    Attributes:
        pieces: names in the model, each with a map from flat indices of the checkpoint's tensor to its own.
    """

    pieces: tuple[tuple[str, Piece], ...]


@dataclass(frozen=True, slots=True)
class Unknown:
    """Where a checkpoint's tensor goes is not known, and why."""

    reason: str


Fate: TypeAlias = Renamed | Moved | Unknown


@dataclass(slots=True)
class _Group:
    """Tensors of a checkpoint that are converted together.

    Attributes:
        converter: of transformers; it keeps the tensors.
        members: the tensors' names, each with the pattern that it matches.
    """

    converter: Any
    members: list[tuple[str, str]] = field(default_factory=list)


def is_transformers(model: object) -> bool:
    """Return whether it is a model of transformers."""
    # A model of transformers cannot be there before transformers is.
    transformers = sys.modules.get("transformers")
    return transformers is not None and isinstance(model, transformers.PreTrainedModel)


def find_loaded(
    model: Any, own: Mapping[str, tuple[int, ...]], given: Mapping[str, tuple[int, ...]]
) -> dict[str, Fate]:
    """Return where transformers loads the tensors of a checkpoint into a model.

    Args:
        model: of transformers.
        own: shapes of the model's tensors by name.
        given: shapes of the checkpoint's tensors by name: all of them, since some names are read in the light
            of others.

    Returns:
        By name in the checkpoint; those that transformers leaves out are missing. Of a tensor that is not just
        moved, or only in part, the reason.
    """
    groups, found = _grouped(model, own, given)
    for first, group in groups.items():
        found |= _converted(model, own, given, first, group)
    return found


def _grouped(
    model: Any, own: Mapping[str, tuple[int, ...]], given: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, _Group], dict[str, Fate]]:
    """Return which tensors are converted, by the first name they get; and those that are only renamed."""
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
    prefix = model.base_model_prefix
    groups: dict[str, _Group] = {}
    found: dict[str, Fate] = {}
    taken: dict[str, str] = {}
    for name in sorted(given, key=dot_natural_key):
        new, pattern = rename_source_key(name, renamings, converters, prefix, own)
        if new not in own and name in own:
            new, pattern = rename_source_key(name, [], [], prefix, own)
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
    """Return how names and tensors are changed, in order; those that the user has given come first."""
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
    """Return where the tensors of a group go."""

    def run(tensors: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        converter = copy.deepcopy(group.converter)
        for (name, pattern), tensor in zip(group.members, tensors, strict=True):
            converter.add_tensor(first, name, pattern, tensor)
        made = converter.convert(first, model=_Shapes(model, own), config=model.config)
        made = {n: t[0] if isinstance(t, list) else t for n, t in made.items()}
        for name, tensor in made.items():
            if own.get(name) != tuple(tensor.shape):
                raise ValueError(f"{name!r} becomes {list(tensor.shape)}, expected {own.get(name)}")
        return made

    names = [name for name, _ in group.members]
    try:
        moves = find_moves([given[name] for name in names], run)
    except Exception as error:  # an operation of the library, or of a user, may raise anything
        return dict.fromkeys(names, Unknown(str(error)))
    return {name: _complete(given[name], own, m) for name, m in zip(names, moves, strict=True)}


def _complete(
    shape: tuple[int, ...], own: Mapping[str, tuple[int, ...]], moves: list[tuple[str, Piece]]
) -> Fate:
    """Return where a tensor goes, if all of it goes somewhere, once."""
    n_found, n_elements = sum(piece.source.numel for _, piece in moves), math.prod(shape)
    if n_found != n_elements or not moves:
        return Unknown(f"{n_found} of its {n_elements} elements are found in the model")
    if len(moves) == 1:
        ((name, piece),) = moves
        if own[name] == shape and piece == identity(n_elements):
            return Renamed(name)
    return Moved(tuple(moves))


class _Shapes:
    """A model of which conversions ask the shapes of its parameters, whatever they hold."""

    def __init__(self, model: Any, own: Mapping[str, tuple[int, ...]]) -> None:
        self._model = model
        self._own = own

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def get_parameter(self, name: str) -> torch.Tensor:
        """Return a parameter, without data."""
        import torch

        if name not in self._own:
            raise AttributeError(f"the model has no parameter {name!r}")
        return torch.empty(self._own[name], device="meta")
