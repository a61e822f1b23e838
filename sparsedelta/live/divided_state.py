"""A model that ranks divide, as a whole: its fingerprint, and the write of all of its tensors. All ranks call these."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeAlias

from sparsedelta._typing import Model, Names
from sparsedelta.errors import BaseMismatch, StructureMismatch
from sparsedelta.files.checkpoint import Checkpoint
from sparsedelta.format.delta import Delta
from sparsedelta.format.digests import fingerprint
from sparsedelta.format.records import Base, Row, Target
from sparsedelta.format.spool import new_payload
from sparsedelta.live.bits import integer_dtype
from sparsedelta.live.held import scatter, whole_digest
from sparsedelta.live.parts import components_of
from sparsedelta.live.places import Place, find_all, find_each
from sparsedelta.live.ranks import Ranks, send
from sparsedelta.live.saved import SavedState
from sparsedelta.live.slots import memory_of
from sparsedelta.live.whole import rebuilt
from sparsedelta.ops.base_check import explained, find_base
from sparsedelta.progress import Silent
from sparsedelta.tensors.parallel import Pace

if TYPE_CHECKING:
    import torch

_BLOCK_ELEMENTS = 1 << 22
Source: TypeAlias = tuple[Delta, Checkpoint]


def divided_fingerprint(model: Model, ranks: Ranks) -> bytes | None:
    """Return the fingerprint of a model, every byte of which the ranks exchange once.

    Returns:
        None: the way the model is saved is unknown, or ranks that hold the same elements have different values.
    """

    def read() -> bytes | None:
        digests: dict[object, bytes] = {}
        for _, slot in found:
            tensor = slot.tensor()
            if memory_of(tensor) not in digests:
                digests[memory_of(tensor)] = whole_digest(tensor)
        own = [digests[memory_of(slot.tensor())] for _, slot in found]
        if any(other != own for other in ranks.gathered(own)):
            return None
        rows = (row for row, _ in found)
        return fingerprint(
            (row.name, row.target.with_digest(digest))
            for row, digest in zip(rows, own, strict=True)
        )

    try:
        rows = ranks.together(lambda: ranks.shared(_saved(model) if ranks.is_first else []))
        found = ranks.together(lambda: [*find_each(_described(rows), model, None)])
        return ranks.together(read)
    except (StructureMismatch, BaseMismatch):
        return None


def _saved(model: Model) -> list[Row]:
    """Return the tensors that would be saved of a model, on rank 0."""
    if components_of(model) is not None:
        raise StructureMismatch("a pipeline is not saved in one file")
    saved = SavedState(model, is_divided=True)
    try:
        return [Row("", name, spec, None, 0, ()) for name, spec in saved.specs.items()]
    finally:
        saved.close()


def _described(rows: Sequence[Row], target: Target | None = None) -> Delta:
    """Return a delta with rows that have no changes."""
    with new_payload(None) as payload:
        payload.close()
        return Delta(Base(None), target or Target(False, (), (), ()), rows, {}, payload)


def write_divided(source: Source | None, model: Model, ranks: Ranks, *, names: Names) -> None:
    """Write the target of a delta into a model, whatever the model holds; see ``write_whole``.

    Rank 0 rebuilds one tensor at a time in host memory, and sends it in blocks. Each rank writes what it holds.

    Args:
        source: on rank 0 the delta, which has all tensors of the model, and what it was made from; None on the others.
        model: a module or a state dict.
        ranks: that divide it.
        names: see ``Delta.apply_``.

    Raises:
        StructureMismatch, BaseMismatch, FormatError: see ``write_whole``.
    """
    import torch

    def found() -> list[Place]:
        own = source[0] if source else _described([])
        told = ranks.shared(([row.with_chunks(()) for row in own.tensors], own.target))
        return find_all(_described(*told), model, names)

    places = ranks.together(found)

    def write() -> None:
        rebuild = None if source is None else _rebuilding(*source)
        for place in places:
            row, tensor = place.row, place.slot.tensor()
            bits = rebuild(row) if rebuild else None
            dtype = integer_dtype(row.target.dtype.width)
            for start in range(0, row.target.n_elements, _BLOCK_ELEMENTS):
                end = min(start + _BLOCK_ELEMENTS, row.target.n_elements)
                block = torch.empty(end - start, dtype=dtype) if bits is None else bits[start:end]
                index = torch.arange(start, end, device=tensor.device)
                with torch.no_grad():
                    scatter(tensor, index, send(block).to(tensor.device))

    ranks.together(write)


def _rebuilding(delta: Delta, base: Checkpoint) -> Callable[[Row], torch.Tensor]:
    """Return a function from a row without changes to the bits of its tensor, ``(numel,)``."""
    rows = {row.key: row for row in delta.tensors}
    found, pace = find_base(delta, base), Pace(Silent())

    def work(row: Row) -> torch.Tensor:
        with explained(delta, base):
            return rebuilt(rows[row.key], found.get(row.key), delta.payload, pace)

    return work
