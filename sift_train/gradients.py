"""``MasterGradient``: the sum of the gradients that a master gets between two steps."""

from __future__ import annotations

import math

from torch import Tensor, nn

from sift_train.host import Arrival


class MasterGradient:
    """Sums gradients into the ``grad`` of a master, on the master's device.

    A gradient from another device may still be on its way. Until ``arrive`` is called, ``grad`` is NaNs in the memory of
    one number; if something replaces or drops ``grad`` meanwhile, that gradient is dropped.

    Args:
        master: the master.
    """

    def __init__(self, master: nn.Parameter) -> None:
        self._master = master
        self._is_used = False  # by a step
        self._arrival: tuple[Arrival, Tensor, Tensor | None] | None = None

    def add(self, values: Tensor) -> None:
        """Add a gradient, shape (k,), in any dtype; the first one after a step starts a new sum."""
        self._sum(values.to(self._master.dtype), self.pending)

    def add_from_device(self, values: Tensor) -> None:
        """Add a gradient, shape (k,), of another device, without waiting for it."""
        self.arrive()
        before = self.pending
        blank = self._master.detach().new_full((), math.nan).expand(len(values))
        self._arrival = Arrival(values), blank, before
        self.set(blank)

    def arrive(self) -> None:
        """Wait for the gradient that is on its way, and add it, unless it was dropped meanwhile."""
        if self._arrival is not None:
            is_wanted = self.is_arriving
            (arrival, _, before), self._arrival = self._arrival, None
            values = arrival.wait()
            if is_wanted:
                self._sum(values.to(self._master.dtype), before)

    def _sum(self, values: Tensor, before: Tensor | None) -> None:
        self.set(values if before is None else before.add_(values))

    @property
    def is_arriving(self) -> bool:
        """Whether a gradient is on its way that was not dropped."""
        return self._arrival is not None and self._master.grad is self._arrival[1]

    @property
    def pending(self) -> Tensor | None:
        """The gradient; None if there is none that a step has not used yet."""
        return None if self._is_used else self._master.grad

    def set(self, gradient: Tensor) -> None:
        """Replace the gradient, shape (k,), by one that no step has used yet."""
        self._master.grad = gradient
        self._is_used = False

    def spend(self) -> None:
        """Record that an optimizer step has used the gradient."""
        self._is_used = True
