"""A chain of deltas as one: each was made from the target of the one before it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from sparsedelta.errors import ConflictError, Corrupt
from sparsedelta.format.delta import Delta
from sparsedelta.format.records import SideFile, Target, TensorDelta, header_key
from sparsedelta.ops.stacking.common_files import Carrier
from sparsedelta.ops.stacking.compose import Composition
from sparsedelta.ops.stacking.stacking import Item, Stacking
from sparsedelta.tensors.changes import chain_stages, check_alike
from sparsedelta.tensors.parallel import Pace


class Chain(Stacking):
    """Deltas each made from the target of the one before it."""

    in_turn = True

    def run(self) -> Delta:
        """Return the stack; its coded bytes are in the payload afterwards."""
        by_name = [{row.name: row for row in delta.tensors} for delta in self.deltas]
        self._check_rows(by_name)
        last = self.deltas[-1]
        carriers = [self._carrier(file) for file in last.target.side_files]
        self.copy_carried(carriers)
        for file in last.target.weight_files:
            if file.stored_header:
                self.copy(last, header_key(file.path))
        names = [row.name for row in last.tensors if row.target]
        targets = set(names)
        names += sorted(
            (r.name for r in self.deltas[0].tensors if r.base and r.name not in targets),
            key=str.encode,
        )
        work = [(name, [rows.get(name) for rows in by_name]) for name in names]
        rows = self.run_all("stacking", self._row, work)
        target = Target(
            last.target.fingerprint,
            last.target.is_folder,
            last.target.weight_files,
            tuple(carrier.file for carrier in carriers),
            last.target.empty_folders,
        )
        return self.result(target, rows)

    def _check_rows(self, by_name: Sequence[Mapping[str, TensorDelta]]) -> None:
        for rows, following in itertools.pairwise(by_name):
            for name in rows.keys() | following.keys():
                row, after = rows.get(name), following.get(name)
                check_alike(name, row.target if row else None, after.base if after else None)

    def _carrier(self, file: SideFile) -> Carrier:
        """Return where the content of a side file of the last target comes from."""
        found = file
        for number in range(len(self.deltas), 0, -1):
            delta = self.deltas[number - 1]
            there = {f.path: f for f in delta.target.side_files}.get(file.path)
            if there is None or (there.n_bytes, there.digest) != (file.n_bytes, file.digest):
                raise ConflictError(
                    f"delta {number + 1} takes file {file.path!r} from its base, but the target of"
                    f" delta {number} has {'another' if there else 'none'}"
                )
            found = there
            if there.carried:
                return Carrier(delta, there)
        return Carrier(self.deltas[0], found)

    def _row(self, item: Item, pace: Pace) -> TensorDelta:
        name, rows = item
        first, last = rows[0], rows[-1]
        base = first.base if first else None
        target = last.target if last else None
        if target is None or (base == target and target.digest is not None):
            return TensorDelta(name, base, target, None)
        stages, keep = chain_stages(list(zip(self.deltas, rows, strict=True)))
        composition = Composition(target, stages, keep)
        if self.base is None or len(stages) < 2:
            return TensorDelta(name, base, target, composition.write(self.payload, pace))
        row = self.compare(name, composition, pace).row
        if row.target != target and target.digest is not None:
            raise Corrupt(
                f"tensor {name!r} does not become the target of the last delta, on the right base;"
                " one of the deltas is inconsistent",
                tensor=name,
            )
        return TensorDelta(name, base, target, row.change)
