"""The common parts of stacking chains and stacking siblings."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias, TypeVar

from sparsedelta._typing import JSON
from sparsedelta.errors import BaseNeeded, Corrupt
from sparsedelta.files.checkpoint import Checkpoint, Tensor
from sparsedelta.format.delta import Delta
from sparsedelta.format.digests import base_tensors
from sparsedelta.format.records import (
    Base,
    Payload,
    Row,
    SideFile,
    Stored,
    Target,
    TensorKey,
    WeightFile,
)
from sparsedelta.format.spool import SpoolPayload
from sparsedelta.ops.stacking.common_files import Carrier
from sparsedelta.ops.stacking.fold import Link
from sparsedelta.progress import Progress
from sparsedelta.tensors.compare import Comparison
from sparsedelta.tensors.parallel import Pace, run_all
from sparsedelta.tensors.rebuild import BaseDiffers, check_base_tensor
from sparsedelta.tensors.sources import RebuiltTensor

_MOST_STACKED = 1 << 32  # info is free JSON, so an absurd count in it is ignored

Links: TypeAlias = Sequence[Link]  # the rows of one tensor, one per delta
R = TypeVar("R")


@dataclass
class Stacking(ABC):
    """The base class of ``Chain`` and ``Siblings``.

    Attributes:
        deltas: the deltas, in order.
        checkpoint: the base; None if it is not given.
        base: for each delta that was made from the base, the base tensors by row (``find_base``);
            empty if the base is not given.
        payload: receives the coded bytes.
        progress: receives the number of coded bytes read.
    """

    deltas: Sequence[Delta]
    checkpoint: Checkpoint | None
    base: Sequence[Mapping[TensorKey, Tensor]]
    payload: SpoolPayload
    progress: Progress | None

    @abstractmethod
    def run(self) -> Delta:
        """Return the stack; its coded bytes are added to the payload."""

    def base_tensor(self, link: Link) -> Tensor | None:
        """Return the base tensor of a link; None if the base is not given or has no tensor for the link."""
        if link.number > len(self.base):
            return None
        return self.base[link.number - 1].get(link.row.key)

    def check_base(self, link: Link, pace: Pace) -> None:
        """Raise BaseDiffers if the base is given and its tensor has another digest than the link expects."""
        base = self.base_tensor(link)
        if base is not None:
            check_base_tensor(link.row, base, pace.unreported())

    def run_all(
        self, label: str, work: Callable[[Links, Pace], R], items: Sequence[Links]
    ) -> list[R]:
        """Return the results of ``work`` for the links of each tensor; the work runs on all cores."""
        pace = Pace(self.progress)
        return run_all(
            lambda links: work(links, pace), items, cost=_coded_bytes, pace=pace, label=label
        )

    def result(self, target: Target, rows: Sequence[Row]) -> Delta:
        """Return the stack with this target and these rows.

        Raises:
            BaseNeeded: a tensor would have neither a target digest nor touched digests.
        """
        if any(row.target.digest is None for row in rows):
            unchecked = (r for r in rows if any(chunk.touched is None for chunk in r.chunks))
            row = next(unchecked, None)
            if row is not None:
                raise BaseNeeded(
                    f"several deltas change tensor {row.name!r}, so its digest can be computed only with"
                    " the base; give the base (base=, --base)",
                    tensor=row.name,
                )
        first = self.deltas[0]
        used, first_used = base_tensors(rows).keys(), base_tensors(first.tensors).keys()
        n_unused = first.base.n_unused + len(first_used) - len(used)
        base = Base(first.base.id, max(0, n_unused))
        return Delta(base, target, tuple(rows), self._info(), self.payload)

    def copy_headers(self, delta: Delta) -> tuple[WeightFile, ...]:
        """Return the weight files of a delta; its stored headers are copied to the payload."""
        return tuple(
            replace(file, stored=self._copy(delta.payload, file.stored))
            for file in delta.target.weight_files
        )

    def copy_carried(self, carriers: Iterable[Carrier]) -> tuple[SideFile, ...]:
        """Return the side files of carriers; carried content is copied to the payload."""
        return tuple(
            replace(one.file, stored=self._copy(one.delta.payload, one.file.stored))
            for one in carriers
        )

    def _copy(self, payload: Payload, stored: Stored | None) -> Stored | None:
        if stored is None:
            return None
        return self.payload.add_stored(stored, payload.read(stored.offset, stored.stored_bytes))

    def compare(self, base: Tensor | None, target: RebuiltTensor, links: Links, pace: Pace) -> Row:
        """Return the row found by comparing the rebuilt target tensor with the base tensor.

        Raises:
            BaseDiffers: the base tensor has another digest than the first link expects.
            Corrupt: the target tensor has another digest than the last link states.
        """
        chunks = [chunk for link in links for chunk in link.row.chunks]
        values = "ulp" if all(chunk.coding.values == "ulp" for chunk in chunks) else "target"
        silent = pace.unreported()  # the progress counts coded bytes only
        row = Comparison(base, target, values=values, payload=self.payload, pace=silent).run()
        first, last = links[0].row, links[-1].row
        if row.base and first.base:
            found = row.base.spec.digest
            if found != first.base.spec.digest:
                raise BaseDiffers(first, found or b"")
            row = replace(row, base=first.base)
        return row if last.target.digest is None else _checked(row, last)

    def _info(self) -> Mapping[str, JSON]:
        if len(self.deltas) == 1:
            return self.deltas[0].info
        n_stacked = 0
        for delta in self.deltas:
            known = delta.info.get("stacked")
            n_stacked += known if type(known) is int and 1 < known < _MOST_STACKED else 1
        last = self.deltas[-1].info
        nested = "stacked" in last and "last" in last
        return {"stacked": n_stacked, "last": last["last"] if nested else dict(last)}


def _checked(row: Row, expected: Row) -> Row:
    if row.target != expected.target:
        raise Corrupt(
            f"tensor {row.name!r}: the deltas do not rebuild the target of the last delta; the base is"
            " right, so one of the deltas is inconsistent",
            tensor=row.name,
        )
    return row


def _coded_bytes(links: Links) -> int:
    return sum(link.row.coded_bytes for link in links)
