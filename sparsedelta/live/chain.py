"""Several deltas, each on the target of the one before it, as one change of a model in memory.

Every link is checked by its touched digests against what the links before it make of the model's values, before anything
is written. Work and memory go with the touched elements.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from sparsedelta._typing import Model, Names
from sparsedelta.codecs.chunk import Chunk, touched_digest
from sparsedelta.codecs.context import Bits
from sparsedelta.codecs.values import VALUE_ENCODINGS
from sparsedelta.dtypes import DType
from sparsedelta.errors import BaseMismatch, Corrupt
from sparsedelta.format.delta import Delta
from sparsedelta.live.bits import Overlay, TensorBytes, on_host
from sparsedelta.live.divided import Divided
from sparsedelta.live.held import Held, gather, in_order
from sparsedelta.live.inplace import check_same, prepare
from sparsedelta.live.patch import Patch
from sparsedelta.live.places import Place, find_places
from sparsedelta.live.ranks import Alone, Group
from sparsedelta.live.slots import memory_of
from sparsedelta.progress import Silent
from sparsedelta.tensors.changes import decode_row_chunk
from sparsedelta.tensors.parallel import Pace

_Index = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class _Link:
    """What one delta changes in a tensor."""

    delta: Delta
    place: Place


def prepare_chain(
    deltas: Sequence[Delta], model: Model, *, names: Names = None, group: Group | None = None
) -> list[Patch]:
    """Return the decoded changes of deltas as one change of each tensor; nothing is written.

    Args:
        deltas: each made from the target of the one before it, all of them in place.
        model: a module or a state dict that holds the base of the first.
        names: see ``Delta.apply_``.
        group: the processes that hold the model together; all of them call this. None: this process alone.

    Raises:
        MismatchError: the model is not the base, or a delta is not on the target of the one before it.
        FormatError: a delta is inconsistent.
        ValueError: a delta has no touched digests.
    """
    if len(deltas) == 1:
        return prepare(deltas[0], model, verify="touched", names=names, undo=False, group=group)
    group = group or Alone()
    places = group.together(lambda: [find_places(delta, model, names) for delta in deltas])
    links: dict[object, list[_Link]] = defaultdict(list)
    for delta, found in zip(deltas, places, strict=True):
        check_same(delta, found, group)
        for place in found.changed:
            links[memory_of(place.slot.tensor())].append(_Link(delta, place))
    pace = Pace(Silent())
    return group.together(
        lambda: group.each(
            lambda chain: _folded(chain, pace),
            [*links.values()],
            cost=lambda chain: sum(link.place.row.coded_bytes for link in chain),
            pace=pace,
        )
    )


def find_unwritten(patches: Sequence[Patch]) -> str | None:
    """Return the name of a tensor that does not hold the values that patches wrote; None if all hold them."""
    import torch

    for patch in patches:
        tensor = patch.place.slot.tensor()
        found = tensor.own if isinstance(tensor, Divided) else partial(gather, tensor)
        if not torch.equal(found(patch.index), patch.after):
            return patch.place.row.name
    return None


def _folded(links: Sequence[_Link], pace: Pace) -> Patch:
    import torch

    place = links[-1].place
    tensor, dtype = place.slot.tensor(), place.row.target.dtype
    index, bits = np.empty(0, np.int64), np.empty(0, dtype.view)
    held = tensor if isinstance(tensor, Divided) else TensorBytes(in_order(tensor))
    for link in links:
        start = Overlay(held, index, bits)
        steps = [_step(link, chunk, tensor, start) for chunk in link.place.row.chunks]
        pace.advance(link.place.row.coded_bytes)
        new = np.concatenate([step[0] for step in steps])
        index, bits = _merged(index, bits, new, np.concatenate([step[1] for step in steps]))
    where = torch.from_numpy(index).to(tensor.device)
    after = torch.from_numpy(bits.view(f"<i{dtype.width}")).to(tensor.device)
    digest = blake3(index.view(np.uint8).data).digest()
    if not isinstance(tensor, Divided):
        return Patch(place, where, digest, gather(tensor, where), after)
    mask = tensor.here(where)
    where, after = where[mask], after[mask]
    return Patch(place, where, digest, tensor.own(where), after, tensor.regions)


def _step(link: _Link, chunk: Chunk, tensor: Held, start: Overlay) -> tuple[_Index, Bits]:
    """Return which elements a chunk touches, and what they become."""
    row = link.place.row
    dtype = row.target.dtype
    try:
        base = start if chunk.coding.classes else None
        positions, codes = decode_row_chunk(row, chunk, link.delta.payload, base)
    except Corrupt as error:
        if chunk.coding.classes:
            raise _mismatch(row.name) from error
        raise
    index = positions.astype(np.int64) + chunk.start
    before = start.at(index, _held(tensor, index, dtype))
    after = VALUE_ENCODINGS[chunk.coding.values].decode(dtype, before, codes)
    if chunk.touched is None:
        raise ValueError(
            f"the delta has no digests of the touched values of tensor {row.name!r}, so that a model cannot"
            " be checked"
        )
    if touched_digest(before) != chunk.touched[0]:
        raise _mismatch(row.name)
    if touched_digest(after) != chunk.touched[1]:
        raise Corrupt(
            f"tensor {row.name!r}: its touched values are right, but they become others than the delta"
            " states; the delta is inconsistent",
            tensor=row.name,
        )
    return index, after


def _held(tensor: Held, index: _Index, dtype: DType) -> Bits:
    import torch

    where = torch.from_numpy(index).to(tensor.device)
    return on_host(gather(tensor, where)).view(dtype.view)


def _merged(index: _Index, bits: Bits, new: _Index, after: Bits) -> tuple[_Index, Bits]:
    """Return the elements of both, the new ones where both have them, in order."""
    if not len(new):
        return index, bits
    kept = new[np.minimum(np.searchsorted(new, index), len(new) - 1)] != index
    index, bits = np.concatenate([index[kept], new]), np.concatenate([bits[kept], after])
    order = np.argsort(index, kind="stable")
    return index[order], bits[order]


def _mismatch(name: str) -> BaseMismatch:
    return BaseMismatch(
        f"tensor {name!r} of the model does not have the values at its touched positions that the deltas were"
        " made from; nothing was written",
        tensor=name,
    )
