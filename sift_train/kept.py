"""``Kept``: components that were trained and then dropped, and that keep their trained value in the parameter."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Kept:
    """Dropped components of one parameter, on the CPU; their trained values are in the parameter.

    Attributes:
        index: flat, strictly increasing, shape (m,).
        original: their values from before training, shape (m,).
    """

    index: Tensor
    original: Tensor

    def __len__(self) -> int:
        return len(self.index)

    def with_more(self, index: Tensor, original: Tensor) -> Kept:
        """Return these components and others, of which none may be among these."""
        both = torch.cat([self.index, index.to(self.index.dtype)])
        order = both.argsort()
        return Kept(both[order], torch.cat([self.original, original])[order])

    def taken(self, index: Tensor, values: Tensor) -> tuple[Tensor, Kept]:
        """Return the originals of components that are trained from now on, and the components left.

        Args:
            index: flat, strictly increasing, shape (n,).
            values: their values in the parameter, which are the originals of those that are not kept here.
        """
        at, is_held = find(self.index, index)
        originals = torch.where(is_held, self.original[at], values) if len(self) else values
        stays = torch.ones(len(self), dtype=torch.bool)
        stays[at[is_held]] = False
        return originals, Kept(self.index[stays], self.original[stays])


def find(index: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Return where each wanted position is in an index, and whether it is there; the place is 0 otherwise.

    Args:
        index: strictly increasing, shape (k,).
        wanted: shape (n,).
    """
    if not len(index):
        return torch.zeros(len(wanted), dtype=torch.int64), torch.zeros(
            len(wanted), dtype=torch.bool
        )
    at = torch.searchsorted(index, wanted.to(index.dtype)).clamp_(max=len(index) - 1)
    is_there = index[at] == wanted
    return torch.where(is_there, at, 0), is_there
