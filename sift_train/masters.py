"""``SparseParameter``: one parameter and the fp32 master of its selected components.

The optimizer sees only the master. After a write-back the parameter holds the master, rounded to
the parameter's dtype, at the selected positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sift_train.bits import equal_bits, same_bits
from sift_train.components import Components
from sift_train.gradients import MasterGradient
from sift_train.host import sent
from sift_train.kept import Kept, find
from sift_train.lean import Lean
from sift_train.selection import index_dtype


class SparseParameter(Components):
    """The trained components of one parameter, and their master.

    Attributes:
        master: the tensor that the optimizer trains, shape (k,), fp32 (fp64 for an fp64 parameter).
        lean: what is kept in place of the masters, which have no values between the steps then; None: they have.
        is_on_host: whether the master is on the CPU, wherever the parameter is.

    Args:
        name: as for ``Components``.
        parameter: the same.
        train_num: the same.
        is_dense: the same.
        n_matrices: the same.
        lean: what is kept in place of the masters.
        is_on_host: whether the master is kept on the CPU.
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
        is_on_host: bool = False,
    ) -> None:
        super().__init__(name, parameter, train_num, is_dense=is_dense, n_matrices=n_matrices)
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        self.lean = lean
        self.is_on_host = is_on_host
        self.master = nn.Parameter(self._new_master(self.train_num, dtype))
        self._gradient = MasterGradient(self.master)
        self._written_version = -1

    @property
    def is_trained(self) -> bool:
        """Whether the master differs from the original."""
        if self.original is None:
            return False
        before = self.original.to(self.master.device, self.master.dtype)
        return not torch.equal(before.nan_to_num(), self.data.nan_to_num())

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
        self.choose(self._flat(index))

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

    @property
    def _home(self) -> torch.device:
        """The device of the master."""
        return torch.device("cpu") if self.is_on_host else self.parameter.device

    def _new_master(self, n: int, dtype: torch.dtype) -> Tensor:
        """Return zeros, shape (n,); with ``lean`` NaNs in the memory of one, which cannot be written to."""
        if self.lean is None:
            return self.local.new_zeros(n, dtype=dtype, device=self._home)
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
        self.check_index(index)
        if self.is_trained:
            raise ValueError(
                f"the components of {self.name!r} have been trained; choose before the first step"
            )
        self.take_up(index)

    def take_up(self, index: Tensor) -> None:
        """Set the trained components as ``choose`` does, without checking the index."""
        if len(index) != self.train_num:
            self.master.data = self._new_master(len(index), self.master.dtype)
            self.master.grad = None
        self._set_index(index)
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

    def collect(self, gradient: Tensor) -> None:
        """Add the selected components of a gradient to the master's gradient.

        The gradient is dense, or sparse with values for the selected components only.

        The first gradient after an optimizer step starts a new sum, even if the old gradient was
        not dropped. The sum has the master's dtype. If all components are trained and the dtypes
        are equal, the master's gradient may be the dense gradient itself. With ``is_on_host`` the master has it after
        ``arrive``.
        """
        values = self._gather(gradient)
        if self.is_on_host:
            self._gradient.add_from_device(values)
        else:
            self._gradient.add(values)

    def _gather(self, tensor: Tensor) -> Tensor:
        if tensor.is_sparse:
            # Each value is of one component, in their order, unless the layer was used several times.
            is_once = tensor._nnz() == self.train_num
            return tensor._values() if is_once else tensor.coalesce().values()
        return super()._gather(tensor)

    def arrive(self) -> None:
        """Wait for a gradient on its way to the host, before anything reads the master's gradient."""
        self._gradient.arrive()

    @property
    def is_arriving(self) -> bool:
        """Whether a gradient is on its way to the host."""
        return self._gradient.is_arriving

    @property
    def pending_gradient(self) -> Tensor | None:
        """The master's gradient; None if there is none that a step has not used yet."""
        return self._gradient.pending

    def set_gradient(self, gradient: Tensor) -> None:
        """Replace the master's gradient, shape (k,), by one that no step has used yet."""
        self._gradient.set(gradient)

    def spend(self) -> None:
        """Record that an optimizer step has used the master's gradient."""
        self._gradient.spend()

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
        elif self.is_on_host:
            values = sent(values, self.local.device, self.parameter.dtype)
        if self.lean is None and may_write is not None:
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
        held = self._gather(self.parameter).to(self.master.device)
        with torch.no_grad():
            if self.lean is not None:
                self.lean.begin(held)
                self.release()
            else:
                same = equal_bits(held, self.master.detach().to(held.dtype))
                self.master.copy_(torch.where(same, self.master, held.to(self.master.dtype)))
        self._written_version = self.master._version
        self._seen_version = self.local._version

    def follow(self) -> None:
        """Move the index to the parameter's device, and the master and its gradient, unless they are kept on the host."""
        if self._index is not None and self._index.device != self.parameter.device:
            self._index = self._index.to(self.parameter.device)
        device = self._home
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
        held = self._gather(self.parameter).to(self.master.device)
        return not same_bits(held, self.master.detach().to(held.dtype))

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
        self._scatter(own.to(self.local.device))
        if compensation is not None:
            own = own + compensation.to(own)
        self._set_masters(own)
