"""What stacking chains and stacking siblings have in common: rows in, rows and coded bytes out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeAlias, TypeVar

from sparsedelta._typing import JSON
from sparsedelta.files.checkpoint import Checkpoint
from sparsedelta.format.delta import Delta
from sparsedelta.format.records import Base, Target, TensorDelta, side_file_key
from sparsedelta.format.spool import SpoolPayload
from sparsedelta.ops.base_check import explain_mismatch
from sparsedelta.ops.stacking.common_files import Carrier
from sparsedelta.ops.stacking.compose import Composition
from sparsedelta.progress import Progress, Silent
from sparsedelta.tensors.compare import Compared, Comparison
from sparsedelta.tensors.parallel import Pace, run_all
from sparsedelta.tensors.sources import MadeTensor

_BLOCK_BYTES = 1 << 20
_MOST_STACKED = 1 << 32  # more than anyone stacks: info may say anything

Rows: TypeAlias = Sequence[TensorDelta | None]  # of one tensor, one of each delta
Item: TypeAlias = tuple[str, Rows]  # name and rows
R = TypeVar("R")


class Stacking(ABC):
    """What chains and siblings have in common."""

    in_turn: bool  # each delta is of the target of the one before it

    def __init__(
        self,
        deltas: Sequence[Delta],
        base: Checkpoint | None,
        payload: SpoolPayload,
        progress: Progress,
    ) -> None:
        self.deltas = deltas
        self.base = base
        self.payload = payload
        self._progress = progress

    @abstractmethod
    def run(self) -> Delta:
        """Return the stack; its coded bytes are in the payload afterwards."""

    def run_all(
        self, label: str, work: Callable[[Item, Pace], R], items: Sequence[Item]
    ) -> list[R]:
        """Return ``work`` of the rows of every tensor, done on all cores."""
        pace = Pace(self._progress)
        self._progress.start(label, sum(_coded_bytes(item) for item in items))
        try:
            return run_all(lambda item: work(item, pace), items, cost=_coded_bytes, pace=pace)
        finally:
            self._progress.finish()

    def result(self, target: Target, rows: Iterable[TensorDelta]) -> Delta:
        """Return the stack, made of its target and rows."""
        first = self.deltas[0].base
        return Delta(
            Base(first.id, first.fingerprint), target, tuple(rows), self._info(), self.payload
        )

    def copy(self, delta: Delta, key: str) -> None:
        """Take an entry over as it is."""
        n_bytes = delta.payload.n_bytes(key)
        for offset in range(0, n_bytes, _BLOCK_BYTES):
            size = min(_BLOCK_BYTES, n_bytes - offset)
            self.payload.append(key, [delta.payload.read(key, offset, size)])

    def copy_carried(self, carriers: Iterable[Carrier]) -> None:
        """Take the content of carried side files over."""
        for carrier in carriers:
            if carrier.file.carried:
                self.copy(carrier.delta, side_file_key(carrier.file.path))

    def compare(self, name: str, composition: Composition, pace: Pace) -> Compared:
        """Return a row found by comparing the target's tensor, made on the way, with the base's."""
        base = self.base.tensors.get(name) if self.base else None
        made = MadeTensor(
            name,
            composition.target,
            base,
            composition.stages,
            composition.keep,
            pace,
            in_turn=self.in_turn,
        )
        silent = Pace(Silent())  # coded bytes are what is counted
        compared = Comparison(
            base, made, values=composition.values, payload=self.payload, pace=silent
        ).run()
        self.check_base(name, compared)
        return compared

    def check_base(self, name: str, compared: Compared) -> None:
        """Check that the base's tensor is the one that the first delta was made from."""
        if self.base is None or compared.base_digest is None:
            return
        row = next(row for row in self.deltas[0].tensors if row.name == name)
        if row.base != compared.row.base:
            raise explain_mismatch(self.deltas[0], self.base, row, compared.base_digest)

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


def _coded_bytes(item: Item) -> int:
    return sum(row.change.coded_bytes for row in item[1] if row and row.change)
