"""Deltas of one base as one that has the changes of all, where none touches what another does."""

from __future__ import annotations

from collections.abc import Sequence

from sparsedelta.errors import BaseMismatch, ConflictError, Corrupt
from sparsedelta.files.checkpoint import Checkpoint
from sparsedelta.format.delta import Delta
from sparsedelta.format.digests import fingerprint
from sparsedelta.format.records import Target, TensorDelta, TensorSpec, header_key
from sparsedelta.ops.stacking.common_files import common_files, is_structural
from sparsedelta.ops.stacking.compose import Composition, count_overlap
from sparsedelta.ops.stacking.stacking import Item, Rows, Stacking
from sparsedelta.progress import Silent
from sparsedelta.tensors.changes import Stage, stage_of
from sparsedelta.tensors.compare import Compared, digest_tensor, spec_of
from sparsedelta.tensors.parallel import Pace


class Siblings(Stacking):
    """Deltas made from one base."""

    in_turn = False

    def run(self) -> Delta:
        """Return the stack; its coded bytes are in the payload afterwards."""
        by_name = [{row.name: row for row in delta.tensors} for delta in self.deltas]
        target, chosen, carriers = common_files(self.deltas)
        work = [(row.name, [rows.get(row.name) for rows in by_name]) for row in chosen.tensors]
        for name, rows in work:
            self._check_rows(name, rows)
        self._check_overlap(work)
        self.copy_carried(carriers)
        for file in target.weight_files:
            if file.stored_header:
                self.copy(chosen, header_key(file.path))
        author = self._author(work)
        compared = self.run_all("stacking", lambda item, pace: self._row(item, author, pace), work)
        known = author.target.fingerprint if author else self._fingerprint(compared)
        target = Target(
            known,
            target.is_folder,
            target.weight_files,
            target.side_files,
            target.empty_folders,
        )
        return self.result(target, [c.row for c in compared])

    def _check_rows(self, name: str, rows: Rows) -> None:
        bases = [row.base if row else None for row in rows]
        if any(base != bases[0] for base in bases):
            raise Corrupt(
                f"tensor {name!r}: the bases of the deltas have one fingerprint, but differ in it; one"
                " of the deltas is inconsistent",
                tensor=name,
            )
        altering = [number for number, row in enumerate(rows, 1) if row and row.base != row.target]
        reshaping = [n for n, row in enumerate(rows, 1) if row and is_structural(row)]
        if reshaping and len(altering) > 1:
            other = next(number for number in altering if number not in reshaping)
            raise ConflictError(
                f"delta {reshaping[0]} removes, retypes or reshapes tensor {name!r}, delta {other} changes"
                " its elements",
                tensor=name,
            )

    def _check_overlap(self, work: Sequence[Item]) -> None:
        shared = [item for item in work if len(self._stages(item[1])) > 1]
        counts = self.run_all(
            "comparing positions",
            lambda item, pace: count_overlap(
                self._stages(item[1]), pace, self.base.tensors.get(item[0]) if self.base else None
            ),
            shared,
        )
        n_positions, n_tensors = sum(counts), sum(count > 0 for count in counts)
        if n_positions:
            name = next(item[0] for item, count in zip(shared, counts, strict=True) if count)
            raise ConflictError(
                f"the deltas touch {n_positions:,} positions in common, in {n_tensors} of"
                f" {len(work)} tensors, {name!r} among them; `sparsedelta merge` weighs such changes"
                " against each other",
                tensor=name,
            )

    def _author(self, work: Sequence[Item]) -> Delta | None:
        """Return the delta that alone changes tensors, or any if none does, if its target is known.

        None: several do, or the base is there to make that target known.
        """
        authors = {
            number
            for _, rows in work
            for number, row in enumerate(rows)
            if row and row.base != row.target
        }
        if len(authors) > 1:
            return None
        author = self.deltas[authors.pop() if authors else 0]
        known = author.target.fingerprint is not None or self.base is None
        return author if known else None

    def _stages(self, rows: Rows) -> list[Stage]:
        return [
            stage_of(delta, row, number)
            for number, (delta, row) in enumerate(zip(self.deltas, rows, strict=True), 1)
            if row and row.change
        ]

    def _row(self, item: Item, author: Delta | None, pace: Pace) -> Compared:
        name, rows = item
        present = [row for row in rows if row]
        row = next((row for row in present if row.base != row.target), present[0])
        stages = self._stages(rows)
        composition = None
        if row.target and stages:
            composition = Composition(row.target, stages, stages[0].change.keep)
        if author is None and self.base is not None:
            return self._with_base(row, self.base, composition, pace)
        if composition is None:
            return Compared(row, None, None)
        target = composition.target
        if author is None:
            target = TensorSpec(target.dtype, target.shape, None)
        change = composition.write(self.payload, pace)
        return Compared(TensorDelta(name, row.base, target, change), None, None)

    def _with_base(
        self, row: TensorDelta, base: Checkpoint, composition: Composition | None, pace: Pace
    ) -> Compared:
        if composition:
            return self.compare(row.name, composition, pace)
        tensor = base.tensors[row.name]
        digest = digest_tensor(tensor, Pace(Silent()))
        spec = spec_of(tensor, digest)
        same = TensorDelta(row.name, spec, spec if row.target else None, None)
        compared = Compared(same, digest, digest if row.target else None)
        self.check_base(row.name, compared)
        return compared

    def _fingerprint(self, compared: Sequence[Compared]) -> bytes | None:
        """Return the target's fingerprint, None without the base; check the base's."""
        if self.base is None:
            return None
        found = fingerprint(
            (c.row.name, c.row.base.dtype.name, c.row.base.shape, c.base_digest)
            for c in compared
            if c.row.base and c.base_digest
        )
        expected = self.deltas[0].base.fingerprint
        if found != expected:
            raise BaseMismatch(
                f"'{self.base.path}' has fingerprint {found.hex()[:12]}…, expected"
                f" {expected.hex()[:12]}…; this is not the base that the deltas were made from",
                expected=expected.hex(),
                found=found.hex(),
            )
        return fingerprint(
            (c.row.name, c.row.target.dtype.name, c.row.target.shape, c.target_digest)
            for c in compared
            if c.row.target and c.target_digest
        )
