"""Stack siblings: deltas of one base that touch different elements."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from sparsedelta.errors import ConflictError, Corrupt
from sparsedelta.format.delta import Delta
from sparsedelta.format.records import Row, TensorKey
from sparsedelta.ops.stacking.common import Links, Stacking
from sparsedelta.ops.stacking.common_files import common_files
from sparsedelta.ops.stacking.fold import Fold, Link, count_overlap
from sparsedelta.tensors.parallel import Pace
from sparsedelta.tensors.sources import RebuiltTensor


class Siblings(Stacking):
    """Stacks deltas that were made from the same base."""

    def run(self) -> Delta:
        """Return the stack; its coded bytes are added to the payload."""
        target, chosen, carriers = common_files(self.deltas)
        work = self._work(chosen)
        for links in work:
            _check_rows(links)
        self._check_overlap(work)
        side_files = self.copy_carried(carriers)
        target = replace(target, weight_files=self.copy_headers(chosen), side_files=side_files)
        rows = self.run_all("stacking", self._row, work)
        # The path of a target that is one file is only a suggestion, and the deltas may differ in it.
        placed = zip(rows, chosen.tensors, strict=True)
        return self.result(target, [replace(row, file=own.file) for row, own in placed])

    def _work(self, chosen: Delta) -> list[Links]:
        """Return the links of all deltas to each tensor of ``chosen``, in its order.

        Raises:
            ConflictError: a delta changes a tensor that ``chosen`` does not have.
        """
        folder = (
            chosen.target.is_folder
        )  # the path of a single file is only a suggestion (FORMAT §3.1)

        def key(row: Row) -> TensorKey:
            return row.key if folder else ("", row.name)

        rows = [{key(row): row for row in delta.tensors} for delta in self.deltas]
        keys = [key(row) for row in chosen.tensors]
        for number, own in enumerate(rows, 1):
            lost = next(
                (row for k, row in own.items() if not row.is_copied and k not in set(keys)), None
            )
            if lost is not None:
                raise ConflictError(
                    f"delta {number} changes tensor {lost.name!r}, which another delta of its base removes"
                    " or renames; they have no common target",
                    tensor=lost.name,
                )
        return [
            [
                Link(number, own[k], delta.payload)
                for number, (delta, own) in enumerate(zip(self.deltas, rows, strict=True), 1)
                if k in own
            ]
            for k in keys
        ]

    def _check_overlap(self, work: Sequence[Links]) -> None:
        shared = [links for links in map(_changing, work) if len(links) > 1]
        counts = self.run_all(
            "comparing positions",
            lambda links, pace: count_overlap(links, pace, self.base_tensor(links[0])),
            shared,
        )
        n_positions, n_tensors = sum(counts), sum(count > 0 for count in counts)
        if n_positions:
            targets = [delta.target_fingerprint for delta in self.deltas]
            if any(one and targets.count(one) > 1 for one in targets):
                raise ConflictError("two of the deltas lead to the same target: give one of them")
            found = zip(shared, counts, strict=True)
            name = next(links[0].row.name for links, count in found if count)
            raise ConflictError(
                f"the deltas touch {n_positions:,} positions in common, in {n_tensors} of"
                f" {len(work)} tensors, such as {name!r}; use `sparsedelta merge` to combine them",
                tensor=name,
            )

    def _row(self, links: Links, pace: Pace) -> Row:
        changing = _changing(links) or links[:1]
        known = len(changing) == 1 and changing[0].row.target.digest is not None
        open_links = changing if known else [*changing[:-1], _without_target_digest(changing[-1])]
        if known or not self.checkpoint:
            self.check_base(open_links[0], pace)
            return Fold(open_links, self.payload, pace).run()
        base = self.base_tensor(changing[0])
        others = [(link.row, link.payload) for link in changing[1:]]
        target = RebuiltTensor(changing[0].row, base, changing[0].payload, pace, others=others)
        return self.compare(base, target, open_links, pace)


def _without_target_digest(link: Link) -> Link:
    """Return a link without its target digest, for tensors that several deltas change."""
    return replace(link, row=replace(link.row, target=link.row.target.with_digest(None)))


def _changing(links: Links) -> Links:
    return [link for link in links if not link.row.is_copied]


def _check_rows(links: Links) -> None:
    """Check the links of one tensor.

    Raises:
        ConflictError: a delta adds, retypes or reshapes the tensor, and another delta changes it.
        Corrupt: the deltas state different base tensors.
    """
    bases = [(link.row.base.name, link.row.base.spec) if link.row.base else None for link in links]
    changing = _changing(links)
    reshaping = [link for link in changing if not link.row.keeps_all]
    if reshaping and len(changing) > 1:
        other = next(link for link in changing if link is not reshaping[0])
        name = reshaping[0].row.name
        one, two = (
            f" ({dtype.name})" if not reshaping[0].row.target.same_dtype(other.row.target) else ""
            for dtype in (reshaping[0].row.target.dtype, other.row.target.dtype)
        )
        raise ConflictError(
            f"delta {reshaping[0].number} adds, retypes or reshapes tensor {name!r}{one}, and delta"
            f" {other.number} changes its elements{two}; they have no common target",
            tensor=name,
        )
    if len({base for base in bases if base}) > 1:
        name = links[0].row.name
        raise Corrupt(
            f"tensor {name!r}: the deltas were made from the same base, but state different base tensors;"
            " one of the deltas is inconsistent",
            tensor=name,
        )
