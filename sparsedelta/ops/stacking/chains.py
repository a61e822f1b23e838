"""A chain of deltas as one: each was made from the target of the one before it."""

from __future__ import annotations

from dataclasses import replace

from sparsedelta.errors import ConflictError
from sparsedelta.format.delta import Delta
from sparsedelta.format.records import Row, SideFile
from sparsedelta.ops.apply import target_lookup
from sparsedelta.ops.stacking.common import Links, Stacking
from sparsedelta.ops.stacking.common_files import Carrier
from sparsedelta.ops.stacking.fold import Fold, Link
from sparsedelta.tensors.parallel import Pace
from sparsedelta.tensors.sources import MadeTensor


class Chain(Stacking):
    """Deltas each made from the target of the one before it."""

    def run(self) -> Delta:
        """Return the stack; its coded bytes are in the payload afterwards."""
        last = self.deltas[-1]
        self._files = [{f.path: f for f in delta.target.side_files} for delta in self.deltas]
        carriers = [self._carrier(file) for file in last.target.side_files]
        side_files = self.copy_carried(carriers)
        target = replace(last.target, weight_files=self.copy_headers(last), side_files=side_files)
        return self.result(target, self.run_all("stacking", self._row, self._lineages()))

    def _lineages(self) -> list[Links]:
        """Return for each tensor of the last target what made it, from delta to delta."""
        lookups = [target_lookup(delta) for delta in self.deltas]
        rows = [{row.key: row for row in delta.tensors} for delta in self.deltas]
        result: list[Links] = []
        for row in self.deltas[-1].tensors:
            number = len(self.deltas)
            links = [Link(number, row, self.deltas[-1].payload)]
            while number > 1 and (wanted := links[0].row.base):
                number -= 1
                found = lookups[number - 1].find(wanted)
                if found is None:
                    raise ValueError(f"delta {number} does not make tensor {wanted.name!r}")
                payload = self.deltas[number - 1].payload
                links.insert(0, Link(number, rows[number - 1][found.key], payload))
            result.append(links)
        return result

    def _carrier(self, file: SideFile) -> Carrier:
        """Return where the content of a side file of the last target comes from."""
        found = file
        for number in range(len(self.deltas), 0, -1):
            delta = self.deltas[number - 1]
            there = self._files[number - 1].get(file.path)
            if there is None or (there.n_bytes, there.digest) != (file.n_bytes, file.digest):
                raise ConflictError(
                    f"delta {number + 1} takes file {file.path!r} from its base, but the target of"
                    f" delta {number} has {'another' if there else 'none'}"
                )
            found = there
            if there.stored:
                return Carrier(delta, there)
        return Carrier(self.deltas[0], found)

    def _row(self, links: Links, pace: Pace) -> Row:
        fold, last = Fold(links, self.payload, pace), links[-1].row
        base, came_back = self.base_tensor(links[0]), None
        if self.checkpoint and links[0].row.base is None:
            came_back = self.checkpoint.tensors.get(last.key)  # dropped or retyped on the way
        known = last.target.digest is not None
        if not self.checkpoint or (fold.copies and known and not came_back):
            self.check_base(links[0], pace)
            return fold.run()
        made: MadeTensor | None = None
        for link in links:
            made = MadeTensor(link.row, made or base, link.payload, pace)
        if made is None:
            raise ValueError("a tensor without a delta cannot be stacked")
        return self.compare(base or came_back, made, links, pace)
