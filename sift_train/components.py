"""``Components``: which components of one parameter are trained, and what they were before training.

The parameter has its original bits everywhere else, apart from components that were dropped and keep their trained
value. Indices are relative to the parameter; if it is a shard, the caller adds the shard's offset for global indices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sift_train.bits import SLICE, equal_bits, mean_of, sums_of_changes
from sift_train.kept import Kept
from sift_train.ranks.shard import local_part, shard_of
from sift_train.selection import index_dtype


class Components:
    """The trained components of one parameter, and their values before training.

    Attributes:
        name: the parameter's name in the model.
        parameter: the model's parameter; it is edited in place.
        original: values of the selected components before training, shape (k,), in the parameter's
            dtype. On the CPU, unless weight decay goes toward the base. None before the selection.
        kept: components that were trained before, are dropped and keep their trained value; None if there are none.
        is_dense: whether every component is trained; a selection must then contain all of them.
        shard: where this rank's part of the parameter lies; None if the parameter is not sharded. Masters
            and indices are then those of this part.
        n_wanted: number of components to select, over all shards.
        n_matrices: number of matrices in the parameter; each gets the same number of components.

    Args:
        name: the parameter's name in the model.
        parameter: the model's parameter.
        train_num: number of components to select, over all shards.
        is_dense: whether every component is trained.
        n_matrices: number of matrices in the parameter.
    """

    def __init__(
        self,
        name: str,
        parameter: nn.Parameter,
        train_num: int,
        *,
        is_dense: bool = False,
        n_matrices: int = 1,
    ) -> None:
        self.name = name
        self.parameter = parameter
        self.is_dense = is_dense
        self.shard = shard_of(parameter)
        self.n_wanted = train_num
        self.n_matrices = n_matrices
        own = self.local.numel()
        n = train_num if self.shard is None else train_num * own // max(self.shard.numel, 1)
        self._train_num = n
        self.original: Tensor | None = None
        self.kept: Kept | None = None
        self._index: Tensor | None = (
            None  # (k,) flat; None before the selection, or if all are trained
        )
        self._seen_version = -1  # of the parameter, at the last read or write here

    @property
    def train_num(self) -> int:
        """Number of trained components, k."""
        return self._train_num

    @property
    def is_selected(self) -> bool:
        """Whether the components have been chosen."""
        return self.original is not None

    @property
    def local(self) -> Tensor:
        """The parameter's data; if the parameter is a DTensor, this rank's part of it."""
        return local_part(self.parameter)

    @property
    def trains_all(self) -> bool:
        """Whether every component is trained; no index is kept then."""
        if self.shard is not None and not self.is_selected:
            return self.n_wanted == self.shard.numel
        return self.train_num == self.local.numel()

    @property
    def flat_index(self) -> Tensor:
        """Flat indices of the trained components, shape (k,), strictly increasing.

        Raises:
            ValueError: the components are not selected yet.
        """
        if not self.is_selected:
            raise ValueError(
                f"the components of {self.name!r} are not selected yet; run one backward pass first"
            )
        if self._index is not None:
            return self._index
        numel = self.local.numel()
        return torch.arange(numel, dtype=index_dtype(numel), device=self.local.device)

    @property
    def numel(self) -> int:
        """Number of components of the parameter, over all shards."""
        return self.parameter.numel()

    @property
    def n_trained(self) -> int:
        """Number of trained components over all shards."""
        return self.train_num if self.shard is None else self.n_wanted

    def check_index(self, index: Tensor) -> None:
        """Check that an index can choose the components of this parameter.

        Raises:
            ValueError: the index has no integer dtype or is not strictly increasing; a position is outside the
                parameter; or the parameter is trained densely and a position is missing.
        """
        numel = self.local.numel()
        if index.dim() != 1 or index.is_floating_point() or index.dtype == torch.bool:
            raise ValueError(
                f"index of {self.name!r} has dtype {index.dtype} and shape {tuple(index.shape)}, "
                "expected one dimension of integers, the flat indices"
            )
        inside = not len(index) or (int(index[0]) >= 0 and int(index[-1]) < numel)
        if not inside or bool((index[1:] <= index[:-1]).any()):
            raise ValueError(
                f"index of {self.name!r} is not strictly increasing within 0 to {numel - 1}; "
                "sort it and remove duplicates"
            )
        if self.is_dense and len(index) != numel:
            raise ValueError(
                f"{self.name!r} is trained densely; its index must contain every position"
            )

    def _set_index(self, index: Tensor) -> None:
        self._train_num = len(index)
        self._index = None
        if not self.trains_all:
            self._index = index.to(self.local.device, index_dtype(self.local.numel()))

    def _flat(self, index: Any) -> Tensor:
        """Return the flat indices, increasing, of coordinates or of flat indices in any order."""
        given = torch.as_tensor(index)
        shape = self.local.shape
        if given.dim() == 2 and given.shape[0] == len(shape) and not given.is_floating_point():
            for axis, size in zip(given, shape, strict=True):
                if len(axis) and not (int(axis.min()) >= 0 and int(axis.max()) < size):
                    raise ValueError(
                        f"idx of {self.name!r} has a coordinate outside the parameter's shape "
                        f"{tuple(shape)}"
                    )
            strides = torch.tensor([1, *reversed(shape[1:])]).cumprod(0).flip(0)
            given = (given.long().cpu() * strides[:, None]).sum(0)
        return given.sort().values if given.dim() == 1 else given

    def _drop(self, index: Tensor, original: Tensor, *, keeps: bool) -> None:
        """Give components their originals back, or note those that keep another value."""
        values = take(self.parameter, index.to(self.local.device))
        if not keeps:
            self._put(index.to(self.local.device), original.to(self.local.device))
            return
        is_changed = ~equal_bits(values.cpu(), original)
        kept = self.kept or Kept(index[:0], original[:0])
        self.kept = kept.with_more(index[is_changed], original[is_changed])

    @property
    def mean_change(self) -> float | None:
        """Mean |change| of the components whose bits changed; None if none or not finite."""
        return mean_of(sums_of_changes(self.changes(SLICE)))

    @property
    def kept_state(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """Flat indices, originals and values of the dropped components that are kept, shape (m,); None if none are."""
        if self.kept is None:
            return None
        values = take(self.parameter, self.kept.index.to(self.local.device))
        return self.kept.index, self.kept.original, values

    @property
    def before_training(self) -> Tensor:
        """The parameter with its values from before training: a copy, or the data itself if nothing is selected."""
        now = self.local
        if self.original is None:
            return now
        index, original = self._touched
        if index is None:
            return original.to(now.device, copy=True).view(now.shape)
        flat = now.reshape(-1).clone()
        for part, values in zip(index.split(SLICE), original.split(SLICE), strict=True):
            flat[part.long()] = values.to(flat.device)
        return flat.view(now.shape)

    @property
    def _touched(self) -> tuple[Tensor | None, Tensor]:
        """Flat indices, increasing, of all components that may differ from the base, and their originals; None: all of them."""
        if self.original is None:
            raise ValueError(f"the components of {self.name!r} are not selected yet")
        if self.kept is None or self._index is None:
            return self._index, self.original
        index, order = torch.cat([self._index, self.kept.index.to(self._index.device)]).sort()
        original = torch.cat([self.original, self.kept.original.to(self.original.device)])
        return index, original[order.to(original.device)]

    def changes(self, n: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the originals and the current values of ``n`` components at a time, on the CPU."""
        if self.original is None:
            return
        flat = self.local.reshape(-1)
        index, original = self._touched
        for start in range(0, len(original), n):
            own = slice(start, start + n)
            now = flat[own] if index is None else flat.index_select(0, index[own])
            yield original[own].cpu(), now.cpu()

    def first_values(self) -> Callable[[int, int], Tensor]:
        """Return a function that reads elements ``start`` to ``end`` of ``local``, flat, as they were before training.

        It returns a copy on the CPU, shape (end - start,). Its result is right until the next step or selection.
        """
        flat = self.local.reshape(-1)
        index, original = (None, None) if self.original is None else self._touched

        def read(start: int, end: int) -> Tensor:
            if original is not None and index is None:
                return original[start:end].to("cpu", copy=True)
            values = flat[start:end].to("cpu", copy=True)
            if index is not None and original is not None:
                edges = torch.tensor([start, end], dtype=index.dtype, device=index.device)
                low, high = torch.searchsorted(index, edges).tolist()
                values[index[low:high].cpu().long() - start] = original[low:high].cpu()
            return values

        return read

    def _check_holds(self, index: Tensor | None, original: Tensor, trained: Tensor) -> None:
        """Check that the parameter holds each component's original or trained value."""
        found = take(self.parameter, index).cpu()
        rounded = trained.cpu().to(found.dtype)
        if original.shape != found.shape or original.dtype != found.dtype:
            raise ValueError(
                f"the saved {self.name!r} has {original.numel()} components of {original.dtype}, "
                f"expected {found.numel()} of {found.dtype}"
            )
        if not bool((equal_bits(found, original.cpu()) | equal_bits(found, rounded)).all()):
            raise ValueError(
                f"{self.name!r} does not hold the weights with which the saved run began; "
                "load the same base"
            )

    def swap_original(self, values: Tensor | None = None) -> Tensor:
        """Write values (default: the originals) to all positions that may differ; return the old values.

        Raises:
            ValueError: the components are not selected yet.
        """
        index, original = self._touched
        before = take(self.parameter, index).clone()
        self._put(index, (original if values is None else values).to(self.parameter.device))
        return before

    def _gather(self, tensor: Tensor) -> Tensor:
        return take(tensor, self._index)

    def _scatter(self, values: Tensor) -> None:
        self._put(self._index, values)

    def _put(self, index: Tensor | None, values: Tensor) -> None:
        flat = self.local.view(-1)
        if index is None:
            flat.copy_(values)
        else:
            flat.index_copy_(0, index.long(), values.to(flat.dtype))
        self._seen_version = self.local._version


def take(tensor: Tensor, index: Tensor | None) -> Tensor:
    """Return the elements at flat indices; None: all, not copied."""
    flat = local_part(tensor).reshape(-1)
    return flat if index is None else flat.index_select(0, index)
