"""One parameter and the fp32 master of its selected components: gather, write back, revert.

The optimizer sees only the master. The parameter holds the master rounded to its own dtype at the
selected positions, and its original bits everywhere else.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sift_train.selection import index_dtype


class SparseParameter:
    """The trained components of one parameter.

    Attributes:
        name: the parameter's name in the model.
        parameter: the model's own, edited in place.
        train_num: how many components are trained, k.
        master: what the optimizer trains, shape (k,), fp32 (fp64 for an fp64 parameter).
        original: the selected components as they were, shape (k,), in the parameter's dtype, on
            the CPU; None before the selection.
    """

    def __init__(self, name: str, parameter: nn.Parameter, train_num: int) -> None:
        self.name = name
        self.parameter = parameter
        self.train_num = train_num
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        self.master = nn.Parameter(parameter.new_zeros(train_num, dtype=dtype))
        self.original: Tensor | None = None
        self._index: Tensor | None = None  # (k,) flat; None while unselected or if all are trained

    @property
    def is_selected(self) -> bool:
        """Whether the components are known yet."""
        return self.original is not None

    @property
    def trains_all(self) -> bool:
        """Whether every component is trained, so that no index is kept."""
        return self.train_num == self.parameter.numel()

    @property
    def idx(self) -> Tensor:
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
        numel = self.parameter.numel()
        return torch.arange(numel, dtype=index_dtype(numel), device=self.parameter.device)

    @property
    def data(self) -> Tensor:
        """The master's values, aliased."""
        return self.master.data

    def choose(self, index: Tensor) -> None:
        """Fix the trained components and load the master with their present values.

        Args:
            index: flat, strictly increasing, shape (k,), any integer dtype and device.

        Raises:
            ValueError: the components are already chosen, or the index has another shape, is not
                strictly increasing or leaves the parameter.
        """
        if self.is_selected:
            raise ValueError(f"the components of {self.name!r} are already selected")
        numel = self.parameter.numel()
        if index.shape != (self.train_num,) or index.is_floating_point():
            raise ValueError(
                f"index of {self.name!r} has dtype {index.dtype} and shape {tuple(index.shape)}, "
                f"expected integers of shape ({self.train_num},)"
            )
        inside = int(index[0]) >= 0 and int(index[-1]) < numel
        if not inside or bool((index[1:] <= index[:-1]).any()):
            raise ValueError(
                f"index of {self.name!r} is not strictly increasing within 0 to {numel - 1}; "
                "sort it and drop repetitions"
            )
        if not self.trains_all:
            self._index = index.to(self.parameter.device, index_dtype(numel))
        with torch.no_grad():
            selected = self._take(self.parameter)
            self.original = selected.to("cpu", copy=True)
            self.master.copy_(selected)

    def collect(self, gradient: Tensor) -> None:
        """Add the selected components of a dense gradient to the master's gradient.

        The sum is taken in the master's dtype. Where the master covers everything in the same
        dtype, its gradient may alias the dense one.
        """
        part = self._take(gradient).to(self.master.dtype)
        if self.master.grad is None:
            self.master.grad = part
        else:
            self.master.grad.add_(part)

    def write(self) -> None:
        """Overwrite the selected components of the parameter by the master's."""
        self._put(self.master.detach())

    def revert(self) -> None:
        """Give the selected components, and the master, their original bits back."""
        if self.original is not None:
            self._put(self.original.to(self.parameter.device))
            self.master.data.copy_(self.original)

    def swap_original(self, values: Tensor | None = None) -> Tensor:
        """Put values (default: the originals) in the selected positions; return what was there.

        Raises:
            ValueError: the components are not selected yet.
        """
        if self.original is None:
            raise ValueError(f"the components of {self.name!r} are not selected yet")
        before = self._take(self.parameter.detach()).clone()
        self._put((self.original if values is None else values).to(self.parameter.device))
        return before

    def _take(self, tensor: Tensor) -> Tensor:
        flat = tensor.detach().reshape(-1)
        return flat if self._index is None else flat.index_select(0, self._index)

    def _put(self, values: Tensor) -> None:
        flat = self.parameter.detach().view(-1)
        if self._index is None:
            flat.copy_(values)
        else:
            flat[self._index] = values.to(flat.dtype)
