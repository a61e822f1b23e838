"""What stacking chains and stacking siblings have in common: rows in, rows and coded bytes out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias, TypeVar

from sparsedelta._typing import JSON
from sparsedelta.errors import ConflictError, Corrupt
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
from sparsedelta.tensors.sources import MadeTensor

_MOST_STACKED = 1 << 32  # more than anyone stacks: info may say anything

Links: TypeAlias = Sequence[Link]  # what each delta does to one tensor
R = TypeVar("R")


@dataclass
class Stacking(ABC):
    """What chains and siblings have in common.

    Attributes:
        deltas: in order.
        checkpoint: the base, if it is given.
        base: the base tensors of each delta that was made from the base, by row, if that is given.
        payload: receives the coded bytes.
        progress: told of the coded bytes read.
    """

    deltas: Sequence[Delta]
    checkpoint: Checkpoint | None
    base: Sequence[Mapping[TensorKey, Tensor]]
    payload: SpoolPayload
    progress: Progress | None

    @abstractmethod
    def run(self) -> Delta:
        """Return the stack; its coded bytes are in the payload afterwards."""

    def base_tensor(self, link: Link) -> Tensor | None:
        """Return the base tensor of a delta that was made from the base, if the base is given."""
        if link.number > len(self.base):
            return None
        return self.base[link.number - 1].get(link.row.key)

    def check_base(self, link: Link, pace: Pace) -> None:
        """Raise BaseDiffers if the base is given and has another tensor than a delta of it was made from."""
        base = self.base_tensor(link)
        if base is not None:
            check_base_tensor(link.row, base, pace.unreported())

    def run_all(
        self, label: str, work: Callable[[Links, Pace], R], items: Sequence[Links]
    ) -> list[R]:
        """Return ``work`` of the links of every tensor, done on all cores."""
        pace = Pace(self.progress)
        return run_all(
            lambda links: work(links, pace), items, cost=_coded_bytes, pace=pace, label=label
        )

    def result(self, target: Target, rows: Sequence[Row]) -> Delta:
        """Return the stack, made of its target and rows.

        Raises:
            ConflictError: nothing would say whether a tensor of it is right.
        """
        if any(row.target.digest is None for row in rows):
            unchecked = (r for r in rows if any(chunk.touched is None for chunk in r.chunks))
            row = next(unchecked, None)
            if row is not None:
                raise ConflictError(
                    f"several of the deltas change tensor {row.name!r}; what it becomes only the base"
                    " tells: give it (base=, --base)",
                    tensor=row.name,
                )
        first = self.deltas[0]
        used, before = base_tensors(rows).keys(), base_tensors(first.tensors).keys()
        n_unused = first.base.n_unused + len(before) - len(used)
        base = Base(first.base.id, max(0, n_unused))
        return Delta(base, target, tuple(rows), self._info(), self.payload)

    def copy_headers(self, delta: Delta) -> tuple[WeightFile, ...]:
        """Return the weight files of a delta, having taken over the headers it stores."""
        return tuple(
            replace(file, stored=self._copy(delta.payload, file.stored))
            for file in delta.target.weight_files
        )

    def copy_carried(self, carriers: Iterable[Carrier]) -> tuple[SideFile, ...]:
        """Return side files, having taken over the content of those that are carried."""
        return tuple(
            replace(one.file, stored=self._copy(one.delta.payload, one.file.stored))
            for one in carriers
        )

    def _copy(self, payload: Payload, stored: Stored | None) -> Stored | None:
        if stored is None:
            return None
        return self.payload.add_stored(stored, payload.read(stored.offset, stored.stored_bytes))

    def compare(self, base: Tensor | None, made: MadeTensor, links: Links, pace: Pace) -> Row:
        """Return a row found by comparing the target tensor, made on the way, with the base's.

        Raises:
            BaseDiffers: the base tensor is another than the first delta was made from.
            Corrupt: the target tensor is another than the last delta says.
        """
        chunks = [chunk for link in links for chunk in link.row.chunks]
        values = "ulp" if all(chunk.coding.values == "ulp" for chunk in chunks) else "target"
        silent = pace.unreported()  # coded bytes are what is counted
        row = Comparison(base, made, values=values, payload=self.payload, pace=silent).run()
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
            f"tensor {row.name!r} does not become the target of the last delta, on the right base;"
            " one of the deltas is inconsistent",
            tensor=row.name,
        )
    return row


def _coded_bytes(links: Links) -> int:
    return sum(link.row.coded_bytes for link in links)
