"""All tensors of a model from a delta and a base on disk, one after the other; each is checked before it is written.

The model is not taken back if this is broken off: it is then partly the one and partly the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING

from sparsedelta._typing import Model, Names
from sparsedelta.errors import StructureMismatch
from sparsedelta.files.checkpoint import Checkpoint, Tensor
from sparsedelta.format.delta import Delta
from sparsedelta.format.records import Payload, Row
from sparsedelta.live.bits import integer_dtype
from sparsedelta.live.held import assign, whole_digest
from sparsedelta.live.places import Place, find_all
from sparsedelta.live.slots import sharing_memory
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
            has another tensor; nothing was written. Or two tensors share a part of their memory, and differ there in the
            target; all were written.
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
    _check_shared(places)


def _check_shared(places: Sequence[Place]) -> None:
    """Check that tensors that may share elements hold what was written to each."""
    held = [place.slot.tensor() for place in places]
    for number in sorted(set(chain.from_iterable(sharing_memory(held)))):
        row = places[number].row
        if row.target.digest not in (None, whole_digest(held[number])):
            raise StructureMismatch(
                f"tensor {row.name!r} of the model shares a part of its memory with another one, and they differ there in the"
                " target; untie them, or leave one out (names)",
                tensor=row.name,
            )


def rebuilt(row: Row, base: Tensor | None, payload: Payload, pace: Pace) -> torch.Tensor:
    """Return a tensor of the target in host memory, checked, as integers of the element size, ``(numel,)``."""
    import torch

    # Not an array of numpy: torch cannot view its strides as another dtype if it has no elements.
    made = torch.empty(row.target.n_bytes, dtype=torch.uint8)
    memory = made.numpy().data

    def keep(data: memoryview, offset: int) -> None:
        memory[offset : offset + len(data)] = data

    rebuild(row, base, payload, keep, check="full", pace=pace)
    return made.view(integer_dtype(row.target.dtype.width))
