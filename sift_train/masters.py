"""``SparseParameter``: one parameter and the fp32 master of its selected components.

The optimizer sees only the master. After a write-back the parameter holds the master, rounded to
the parameter's dtype, at the selected positions, and its original bits everywhere else, apart from
components that were dropped and keep their trained value. Indices are
relative to the parameter; if it is a shard, the caller adds the shard's offset for global indices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sift_train.bits import bits_of
from sift_train.kept import Kept, find
from sift_train.lean import Lean
from sift_train.ranks.shard import local_part, shard_of
from sift_train.selection import index_dtype


class SparseParameter:
    """The trained components of one parameter.

    Attributes:
        name: the parameter's name in the model.
        parameter: the model's parameter; it is edited in place.
        master: the tensor that the optimizer trains, shape (k,), fp32 (fp64 for an fp64 parameter).
        original: values of the selected components before training, shape (k,), in the parameter's
            dtype. On the CPU, unless weight decay goes toward the base. None before the selection.
        lean: what is kept in place of the masters, which have no values between the steps then; None: they have.
        kept: components that were trained before, are dropped and keep their trained value; None if there are none.
        is_dense: whether every component is trained; a selection must then contain all of them.
        shard: where this rank's part of the parameter lies; None if the parameter is not sharded. Masters
            and indices are then those of this part.
        n_wanted: number of components to select, over all shards.
        n_matrices: number of matrices in the parameter; each gets the same number of components.
    """

    def __init__(
        self,
        name: str,
        parameter: nn.Parameter,
        train_num: int,
        *,
        is_dense: bool = False,
        n_matrices: int = 1,
        lean: Lean | None = None,
    ) -> None:
        self.name = name
        self.parameter = parameter
        self.is_dense = is_dense
        self.shard = shard_of(parameter)
        self.n_wanted = train_num
        self.n_matrices = n_matrices
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        own = self.local.numel()
        n = train_num if self.shard is None else train_num * own // max(self.shard.numel, 1)
        self.lean = lean
        self.master = nn.Parameter(self._new_master(n, dtype))
        self.original: Tensor | None = None
        self.kept: Kept | None = None
        self._index: Tensor | None = (
            None  # (k,) flat; None before the selection, or if all are trained
        )
        self._gradient_is_used = False
        self._written_version = -1
        self._seen_version = -1  # of the parameter, at the last read or write here

    @property
    def train_num(self) -> int:
        """Number of trained components, k."""
        return self.master.numel()

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
    def is_trained(self) -> bool:
        """Whether the master differs from the original."""
        if self.original is None:
            return False
        before = self.original.to(self.master.device, self.master.dtype)
        return not torch.equal(before.nan_to_num(), self.data.nan_to_num())

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
    def idx(self) -> Tensor:
        """Coordinates of the trained components, int64, shape (dimensions, k), as in the original code.

        ``parameter[tuple(idx)]`` returns the components. Setting ``idx`` chooses the components, by
        coordinates as ``numpy.unravel_index`` returns them or by flat indices, in any order.

        Raises:
            ValueError: on reading, the components are not selected yet. On setting, as ``choose``.
        """
        shape = self.local.shape
        if not shape:
            return torch.empty((0, self.train_num), dtype=torch.int64)
        return torch.stack(torch.unravel_index(self.flat_index.long(), shape))

    @idx.setter
    def idx(self, index: Any) -> None:
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
        self.choose(given.sort().values if given.dim() == 1 else given)

    @property
    def data(self) -> Tensor:
        """The data of the master, not a copy; with ``lean``, between the steps, what it will be in the next one."""
        if self.lean is None or self.lean.is_loaded or not self.is_selected:
            return self.master.data
        return self.lean.masters_of(self._gather(self.parameter), self.master.dtype)

    @property
    def is_replaced(self) -> bool:
        """Whether something else has given a lean master values between the steps."""
        is_empty = self.lean is not None and not self.lean.is_loaded
        return is_empty and self.train_num > 0 and self.master.stride() != (0,)

    def load(self) -> None:
        """Give a lean master its values for a step."""
        if self.lean is not None and self.is_selected and not self.lean.is_loaded:
            self.master.data = self.data
            self.lean.is_loaded = True
            self._written_version = self.master._version

    def release(self) -> None:
        """Free the values of a lean master after a step, once they are written."""
        if self.lean is not None:
            self.lean.is_loaded = False
            self.master.data = self._new_master(self.train_num, self.master.dtype)
            self._written_version = self.master._version

    def _new_master(self, n: int, dtype: torch.dtype) -> Tensor:
        """Return zeros, shape (n,); with ``lean`` NaNs in the memory of one, which cannot be written to."""
        if self.lean is None:
            return self.local.new_zeros(n, dtype=dtype)
        return self.local.new_full((), math.nan, dtype=dtype).expand(n)

    def choose(self, index: Tensor) -> None:
        """Set the trained components, and copy their current values to the master.

        An earlier choice is replaced if it has not been trained. The master is resized if ``index``
        has another length.

        Args:
            index: flat, strictly increasing, shape (k,), any integer dtype and device.

        Raises:
            ValueError: the components chosen before have been trained; the index has no integer
                dtype or is not strictly increasing; or a position is outside the parameter.
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
        if self.is_trained:
            raise ValueError(
                f"the components of {self.name!r} have been trained; choose before the first step"
            )
        if self.is_dense and len(index) != numel:
            raise ValueError(
                f"{self.name!r} is trained densely; its index must contain every position"
            )
        self.take_up(index)

    def take_up(self, index: Tensor) -> None:
        """Set the trained components as ``choose`` does, without checking the index."""
        if len(index) != self.train_num:
            self.master.data = self._new_master(len(index), self.master.dtype)
            self.master.grad = None
        self._index = None
        if not self.trains_all:
            self._index = index.to(self.local.device, index_dtype(self.local.numel()))
        with torch.no_grad():
            selected = self._gather(self.parameter)
            self.original = selected.to("cpu", copy=True)
            if self.lean is None:
                self.master.copy_(selected)
            else:
                self.lean.begin(selected)
        self._written_version = self.master._version
        self._seen_version = self.local._version

    def move(self, index: Tensor, *, keeps: bool) -> Callable[[Tensor], Tensor] | None:
        """Train other components from now on; the masters of those that stay are not changed.

        The parameter must hold the masters, as after a step. The gradient of the masters is dropped.

        Args:
            index: flat, strictly increasing, on the CPU.
            keeps: dropped components keep their trained value; otherwise they get their original one.

        Returns:
            A function that carries a tensor of a value for each component, shape (k,), over to the new ones; those
            that were not trained before get 0. None if the components are the same.

        Raises:
            ValueError: the components are not selected yet.
        """
        before = self.flat_index.cpu()
        if torch.equal(before, index) or self.original is None:
            return None
        at, stays = find(before, index)
        is_dropped = torch.ones(len(before), dtype=torch.bool)
        is_dropped[at[stays]] = False
        self._drop(before[is_dropped], self.original.cpu()[is_dropped], keeps=keeps)

        def carry(old: Tensor) -> Tensor:
            if not len(old):
                return old.new_zeros(len(index))
            return torch.where(stays.to(old.device), old[at.to(old.device)], 0)

        masters, original = self.data.clone(), self.original.cpu()
        self.take_up(index)
        held: Tensor = self.original
        if self.kept is not None:
            held, self.kept = self.kept.taken(index, held)
        self._set_masters(torch.where(stays.to(masters.device), carry(masters), self.data))
        self.original = torch.where(stays, original[at], held) if len(original) else held
        self.master.grad = None
        return carry

    def _set_masters(self, masters: Tensor) -> None:
        """Set the masters, shape (k,), to values of which the parameter holds the rounded ones."""
        with torch.no_grad():
            if self.lean is None:
                self.master.copy_(masters)
            else:
                self.lean.keep_error(masters, self._gather(self.parameter))
        self._written_version = self.master._version

    def _drop(self, index: Tensor, original: Tensor, *, keeps: bool) -> None:
        """Give components their originals back, or note those that keep another value."""
        values = _take(self.parameter, index.to(self.local.device))
        if not keeps:
            self._put(index.to(self.local.device), original.to(self.local.device))
            return
        is_changed = ~_equal_bits(values.cpu(), original)
        kept = self.kept or Kept(index[:0], original[:0])
        self.kept = kept.with_more(index[is_changed], original[is_changed])

    @property
    def numel(self) -> int:
        """Number of components of the parameter, over all shards."""
        return self.parameter.numel()

    @property
    def n_trained(self) -> int:
        """Number of trained components over all shards."""
        return self.train_num if self.shard is None else self.n_wanted

    def collect(self, gradient: Tensor) -> None:
        """Add the selected components of a dense gradient to the master's gradient.

        The first gradient after an optimizer step starts a new sum, even if the old gradient was
        not dropped. The sum has the master's dtype. If all components are trained and the dtypes
        are equal, the master's gradient may be the dense gradient itself.
        """
        part = self._gather(gradient).to(self.master.dtype)
        if self.master.grad is None or self._gradient_is_used:
            self.master.grad = part
        else:
            self.master.grad.add_(part)
        self._gradient_is_used = False

    @property
    def pending_gradient(self) -> Tensor | None:
        """The master's gradient; None if there is none that a step has not used yet."""
        return None if self._gradient_is_used else self.master.grad

    def set_gradient(self, gradient: Tensor) -> None:
        """Replace the master's gradient, shape (k,), by one that no step has used yet."""
        self.master.grad = gradient
        self._gradient_is_used = False

    def spend(self) -> None:
        """Record that an optimizer step has used the master's gradient."""
        self._gradient_is_used = True

    def write(self, may_write: Tensor | None = None) -> None:
        """Overwrite the selected components of the parameter with the master's values.

        Args:
            may_write: a bool tensor of one element on the device; if it is False the parameter
                keeps its values. The host does not read it. None means True.
        """
        values = self.master.detach()
        if self.lean is not None:
            if not self.lean.is_loaded:
                return  # the parameter holds all there is
            values = self.lean.rounded(values, self._gather(self.parameter), may_write)
        elif may_write is not None:
            held = self._gather(self.parameter)
            values = torch.where(may_write, values.to(held.dtype), held)
        self._scatter(values)
        self._written_version = self.master._version

    def settle(self, may_write: Tensor | None = None) -> None:
        """Make master and parameter equal: the one that was changed last in place determines the other.

        If another program has written to the parameter, as ``load_state_dict`` does, the master takes
        the components that differ; the others keep their precision. Otherwise the master is written.
        """
        if self.is_overwritten:
            self.adopt()
        else:
            self.write(may_write)

    @property
    def is_overwritten(self) -> bool:
        """Whether anything else has written to the parameter since it was last read or written here."""
        return self.is_selected and self._seen_version != self.local._version

    def adopt(self) -> None:
        """Copy the selected components of the parameter to the master where they differ in bits.

        With ``lean`` they are the masters from then on.
        """
        held = self._gather(self.parameter)
        with torch.no_grad():
            if self.lean is not None:
                self.lean.begin(held)
                self.release()
            else:
                same = _equal_bits(held, self.master.detach().to(held.dtype))
                self.master.copy_(torch.where(same, self.master, held.to(self.master.dtype)))
        self._written_version = self.master._version
        self._seen_version = self.local._version

    def follow(self) -> None:
        """Move the master, its gradient and the index to the parameter's device."""
        device = self.parameter.device
        if self.master.device == device:
            return
        was_behind, gradient = self.is_behind, self.master.grad
        self.master.grad = None
        if self.lean is not None:
            self.lean.follow(device)
        self.master.data = (
            self.master.data.to(device)
            if self.lean is None or self.lean.is_loaded
            else self._new_master(self.train_num, self.master.dtype)
        )
        self.master.grad = None if gradient is None else gradient.to(device)
        if self._index is not None:
            self._index = self._index.to(device)
        if not was_behind:
            self._written_version = self.master._version

    @property
    def is_behind(self) -> bool:
        """Whether the master was changed in place after the last write-back."""
        return self._written_version != self.master._version

    @property
    def differs(self) -> bool:
        """Whether the selected weights differ in bits from the master rounded to their dtype."""
        if self.lean is not None and not self.lean.is_loaded:
            return False
        held = self._gather(self.parameter)
        return not _same_bits(held, self.master.detach().to(held.dtype))

    @property
    def mean_change(self) -> float | None:
        """Mean |change| of the components whose bits changed; None if none or not finite."""
        if self.original is None:
            return None
        index, original = self._touched
        return mean_change(original.cpu(), _take(self.parameter, index).cpu())

    @property
    def change(self) -> Tensor:
        """|master - original| of each component, shape (k,), in the master's dtype, on its device.

        Raises:
            ValueError: the components are not selected yet.
        """
        if self.original is None:
            raise ValueError(f"the components of {self.name!r} are not selected yet")
        return (self.data - self.original.to(self.master)).abs()

    @property
    def saved_masters(self) -> Tensor:
        """The masters, shape (k,); with ``lean`` the weights, of which the rounding errors are apart."""
        return self.master.detach() if self.lean is None else self._gather(self.parameter)

    @property
    def kept_state(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """Flat indices, originals and values of the dropped components that are kept, shape (m,); None if none are."""
        if self.kept is None:
            return None
        values = _take(self.parameter, self.kept.index.to(self.local.device))
        return self.kept.index, self.kept.original, values

    @property
    def before_training(self) -> Tensor:
        """The parameter with its values from before training: a copy, or the data itself if nothing is selected."""
        now = self.local
        if self.original is None:
            return now
        flat = now.reshape(-1).clone()
        index, original = self._touched
        flat[slice(None) if index is None else index.long()] = original.to(flat.device)
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

    def first_values(self, start: int, end: int) -> Tensor:
        """Return a copy on the CPU of elements of ``local``, flat, as they were before training, shape (end - start,)."""
        values = self.local.reshape(-1)[start:end].to("cpu", copy=True)
        if self.original is None:
            return values
        index, original = self._touched
        if index is None:
            return original[start:end].to("cpu", copy=True)
        edges = torch.tensor([start, end], dtype=index.dtype, device=index.device)
        low, high = torch.searchsorted(index, edges).tolist()
        values[index[low:high].cpu().long() - start] = original[low:high].cpu()
        return values

    def decay_to_original(self, share: float) -> None:
        """Move the master toward the original by a share of their difference.

        Raises:
            ValueError: the components are not selected yet.
        """
        if self.original is None:
            raise ValueError(f"the components of {self.name!r} are not selected yet")
        self.original = self.original.to(
            self.master.device
        )  # kept on the device, since every step needs it
        with torch.no_grad():
            self.master.lerp_(self.original.to(self.master.dtype), share)

    def revert(self) -> None:
        """Restore the original bits of the selected components, also in the master."""
        if self.original is not None:
            self.swap_original()
            self.kept = None
            self._set_masters(self.original.to(self.master))

    def restore(
        self,
        index: Tensor | None,
        original: Tensor,
        master: Tensor,
        kept: tuple[Kept, Tensor] | None = None,
        compensation: Tensor | None = None,
    ) -> None:
        """Restore a saved index, originals and masters, and write the masters to the parameter.

        Args:
            index: as for ``choose``; None if all components are trained.
            original: values of the components before training, shape (k,).
            master: values of the master, shape (k,).
            kept: the components that are dropped and keep another value, and these values, shape (m,).
            compensation: what rounding has cut off the masters, shape (k,).

        Raises:
            ValueError: the parameter holds neither the originals nor the masters at these
                positions, or the index is invalid (see ``choose``).
        """
        self.revert()
        self.original = None
        numel = self.local.numel()
        self.choose(torch.arange(numel, dtype=index_dtype(numel)) if index is None else index)
        self._check_holds(self._index, original, master)
        if kept is not None:
            self.kept, values = kept
            at = self.kept.index.to(self.local.device)
            self._check_holds(at, self.kept.original, values)
            self._put(at, values.to(self.local.device))
        self.original = original.cpu().clone()
        own = master.to(self.master)
        self._scatter(own)
        if compensation is not None:
            own = own + compensation.to(own)
        self._set_masters(own)

    def _check_holds(self, index: Tensor | None, original: Tensor, trained: Tensor) -> None:
        """Check that the parameter holds each component's original or trained value."""
        found = _take(self.parameter, index).cpu()
        rounded = trained.cpu().to(found.dtype)
        if original.shape != found.shape or original.dtype != found.dtype:
            raise ValueError(
                f"the saved {self.name!r} has {original.numel()} components of {original.dtype}, "
                f"expected {found.numel()} of {found.dtype}"
            )
        if not bool((_equal_bits(found, original.cpu()) | _equal_bits(found, rounded)).all()):
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
        before = _take(self.parameter, index).clone()
        self._put(index, (original if values is None else values).to(self.parameter.device))
        return before

    def _gather(self, tensor: Tensor) -> Tensor:
        return _take(tensor, self._index)

    def _scatter(self, values: Tensor) -> None:
        self._put(self._index, values)

    def _put(self, index: Tensor | None, values: Tensor) -> None:
        flat = self.local.view(-1)
        if index is None:
            flat.copy_(values)
        else:
            flat.index_copy_(0, index.long(), values.to(flat.dtype))
        self._seen_version = self.local._version


def _take(tensor: Tensor, index: Tensor | None) -> Tensor:
    """Return the elements at flat indices; None: all, not copied."""
    flat = local_part(tensor).reshape(-1)
    return flat if index is None else flat.index_select(0, index)


def _same_bits(left: Tensor, right: Tensor) -> bool:
    return torch.equal(left.view(torch.uint8), right.view(torch.uint8))


def _equal_bits(left: Tensor, right: Tensor) -> Tensor:
    return bits_of(left) == bits_of(right)


def mean_change(before: Tensor, after: Tensor) -> float | None:
    """Return the mean |change| of the elements whose bits changed.

    None if there is none, the mean is not finite, or the tensors have other shapes or dtypes than each
    other, or an integer dtype.
    """
    is_comparable = before.dtype == after.dtype and before.shape == after.shape
    if not is_comparable or not before.is_floating_point() or before.itemsize < 2:
        return None
    distances = moved(before, after)
    mean = float(distances.mean()) if len(distances) else math.nan
    return mean if math.isfinite(mean) else None


def moved(before: Tensor, after: Tensor) -> Tensor:
    """Return |change| in fp64 of the elements whose bits changed; both tensors have one float dtype and shape."""
    changed = ~_equal_bits(before, after)
    return (after[changed].double() - before[changed].double()).abs()
