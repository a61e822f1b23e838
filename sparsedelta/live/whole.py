"""All tensors of a model from a delta and a base on disk, one after the other; each is checked before it is written.

The model is not taken back if this is broken off: it is then partly the one and partly the other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from sparsedelta._typing import Model, Names
from sparsedelta.files.checkpoint import Checkpoint, Tensor
from sparsedelta.format.delta import Delta
from sparsedelta.format.records import Payload, Row
from sparsedelta.live.bits import integer_dtype
from sparsedelta.live.held import assign
from sparsedelta.live.places import Place, find_all
from sparsedelta.ops.base_check import explained, find_base
from sparsedelta.progress import Silent
from sparsedelta.tensors.parallel import Pace, run_all
from sparsedelta.tensors.rebuild import rebuild

if TYPE_CHECKING:
    import torch


def write_whole(delta: Delta, base: Checkpoint, model: Model, *, names: Names = None) -> None:
    """Write the target of a delta into a model, whatever the model holds.

    Args:
        delta: has all tensors of the model.
        base: what the delta was made from; an empty folder for a delta on nothing.
        model: a module or a state dict.
        names: see ``Delta.apply_``.

    Raises:
        StructureMismatch: the model has a tensor of the target not, or with another dtype or shape; or the base
            has another tensor. Nothing was written.
        BaseMismatch: a tensor of the base has another digest.
        FormatError: the delta is inconsistent.
    """
    import torch

    places = find_all(delta, model, names)
    found = find_base(delta, base)
    pace = Pace(Silent())

    def work(place: Place) -> None:
        made = rebuilt(place.row, found.get(place.row.key), delta.payload, pace)
        with torch.no_grad():
            assign(place.slot.tensor(), made)

    with explained(delta, base):
        run_all(work, places, cost=lambda place: place.row.target.n_bytes, pace=pace)


def rebuilt(row: Row, base: Tensor | None, payload: Payload, pace: Pace) -> torch.Tensor:
    """Return a tensor of the target in host memory, checked, as integers of the element size, ``(numel,)``."""
    import torch

    made = np.empty(row.target.n_bytes, np.uint8)

    def keep(data: memoryview, offset: int) -> None:
        made[offset : offset + len(data)] = np.frombuffer(data, np.uint8)

    rebuild(row, base, payload, keep, check="full", pace=pace)
    return torch.from_numpy(made).view(integer_dtype(row.target.dtype.width))
