"""Stack a chain of deltas: each was made from the target of the one before it."""

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
from sparsedelta.tensors.sources import RebuiltTensor


class Chain(Stacking):
    """Stacks deltas of which each was made from the target of the one before it."""

    def run(self) -> Delta:
        """Return the stack; its coded bytes are added to the payload."""
        last = self.deltas[-1]
        self._files = [{f.path: f for f in delta.target.side_files} for delta in self.deltas]
        carriers = [self._carrier(file) for file in last.target.side_files]
        side_files = self.copy_carried(carriers)
        target = replace(last.target, weight_files=self.copy_headers(last), side_files=side_files)
        return self.result(target, self.run_all("stacking", self._row, self._lineages()))

    def _lineages(self) -> list[Links]:
        """Return, for each tensor of the last target, its rows in the deltas that lead to it, in order."""
        lookups = [target_lookup(delta) for delta in self.deltas]
        rows = [{row.key: row for row in delta.tensors} for delta in self.deltas]
        result: list[Links] = []
        for row in self.deltas[-1].tensors:
            number = len(self.deltas)
            links = [Link(number, row, self.deltas[-1].payload)]
            while number > 1 and (needed := links[0].row.base):
                number -= 1
                found = lookups[number - 1].find(needed)
                if found is None:
                    raise ValueError(
                        f"tensor {needed.name!r} is not in the target of delta {number}, but delta"
                        f" {number + 1} needs it"
                    )
                payload = self.deltas[number - 1].payload
                links.insert(0, Link(number, rows[number - 1][found.key], payload))
            result.append(links)
        return result

    def _carrier(self, file: SideFile) -> Carrier:
        """Return the delta that carries the content of a side file of the last target.

        If none carries it, the file is the base's.
        """
        found = file
        for number in range(len(self.deltas), 0, -1):
            delta = self.deltas[number - 1]
            own = self._files[number - 1].get(file.path)
            if own is None or (own.n_bytes, own.digest) != (file.n_bytes, file.digest):
                raise ConflictError(
                    f"delta {number + 1} takes file {file.path!r} from its base, but this file"
                    f" {'differs in' if own else 'is missing from'} the target of delta {number}"
                )
            found = own
            if own.stored:
                return Carrier(delta, own)
        return Carrier(self.deltas[0], found)

    def _row(self, links: Links, pace: Pace) -> Row:
        fold, last = Fold(links, self.payload, pace), links[-1].row
        base, same_name = self.base_tensor(links[0]), None
        if self.checkpoint and links[0].row.base is None:
            # A delta of the chain removed or retyped the tensor, and a later one added it again.
            same_name = self.checkpoint.tensors.get(last.key)
        known = last.target.digest is not None
        if not self.checkpoint or (fold.copies and known and not same_name):
            self.check_base(links[0], pace)
            return fold.run()
        target: RebuiltTensor | None = None
        for link in links:
            target = RebuiltTensor(link.row, target or base, link.payload, pace)
        if target is None:
            raise ValueError("there is no delta for this tensor; give at least one")
        return self.compare(base or same_name, target, links, pace)
