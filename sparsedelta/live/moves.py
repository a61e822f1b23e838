"""Find where a computation moves the elements of its inputs, by running it on tensors without data.

Copies, stacks and concatenations are followed. Views share the storage, so they need no step. The elements
that another operation returns have no source; callers notice that elements of the inputs are not found.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sparsedelta.live.strides import Piece, Region, compose, identity, whole

if TYPE_CHECKING:
    import torch


def find_moves(
    shapes: Sequence[tuple[int, ...]],
    run: Callable[[Sequence[torch.Tensor]], Mapping[str, torch.Tensor]],
) -> list[list[tuple[str, Piece]]]:
    """Return where the elements of each input of a computation are in its results.

    Args:
        shapes: shapes of the inputs.
        run: the computation: it takes tensors without data and returns tensors by name.

    Returns:
        For each input, names of results, each with the map from the input's flat indices to those of the result.

    Raises:
        NotStrided: strides cannot express a map.
    """
    import torch

    given = [torch.empty(shape, device="meta") for shape in shapes]
    moves = _Moves()
    with torch.no_grad(), moves.recording():
        made = run(given)
    for name, tensor in made.items():
        moves.add_result(name, tensor)
    return [
        [*moves.follow(_storage(tensor), identity(tensor.numel()))] if tensor.numel() else []
        for tensor in given
    ]


class _Moves:
    """Copies between storages."""

    def __init__(self) -> None:
        self._steps: dict[int, list[tuple[int, Piece]]] = defaultdict(list)
        self._results: dict[int, str] = {}
        self._kept: list[
            torch.Tensor
        ] = []  # keeps storages alive, since the id of a freed one may be reused
        self._ids = itertools.count(-1, -1)

    def recording(self) -> Any:
        """Return a context in which copies are recorded."""
        import torch
        from torch.utils._python_dispatch import TorchDispatchMode
        from torch.utils._pytree import tree_leaves

        moves = self

        class Record(TorchDispatchMode):
            def __torch_dispatch__(
                self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
            ) -> Any:
                result = func(*args, **(kwargs or {}))
                leaves = tree_leaves((args, result))
                moves._kept += [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
                for source, target in _copies(str(func), args, result):
                    moves._steps[_storage(source)].append((_storage(target), _copy(source, target)))
                return result

        return Record()  # type: ignore[no-untyped-call]

    def add_result(self, name: str, tensor: torch.Tensor) -> None:
        """Record a tensor as the result with this name."""
        key = next(self._ids)
        self._results[key] = name
        self._steps[_storage(tensor)].append(
            (key, Piece(_region(tensor), whole(tuple(tensor.shape))))
        )

    def follow(self, storage: int, piece: Piece) -> Iterator[tuple[str, Piece]]:
        """Yield the results that have elements of a storage, each with the map to it."""
        for target, step in self._steps.get(storage, ()):
            for moved in compose(piece, step):
                if target in self._results:
                    yield self._results[target], moved
                else:
                    yield from self.follow(target, moved)


def _copies(
    name: str, args: Sequence[Any], result: Any
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield the pairs (source, target) that an operation copies."""
    match name.split(".")[1]:
        case "clone" | "_to_copy":
            if _storage(args[0]) != _storage(result):
                yield args[0], result
        case "copy_":
            if args[0].shape == args[1].shape:
                yield args[1], args[0]
        case "stack":
            dim = args[1] if len(args) > 1 else 0
            yield from zip(args[0], result.unbind(dim), strict=True)
        case "cat":
            dim = args[1] if len(args) > 1 else 0
            parts = [part for part in args[0] if part.shape != (0,)]
            sizes = [part.shape[dim] for part in parts]
            yield from zip(parts, result.split(sizes, dim), strict=True)


def _copy(source: torch.Tensor, target: torch.Tensor) -> Piece:
    return Piece(_region(source), _region(target))


def _region(tensor: torch.Tensor) -> Region:
    return Region(tuple(tensor.shape), int(tensor.storage_offset()), tuple(tensor.stride()))


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
