"""``merge``: combine several deltas of one base in floating point into one delta of that base.

Elements that no delta touches keep their bits. Each tensor is computed chunk by chunk, so a whole model is
never in memory.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from sparsedelta._typing import JSON, AnyPath
from sparsedelta.errors import ConflictError, StructureMismatch
from sparsedelta.files.checkpoint import Checkpoint, Tensor
from sparsedelta.files.shards import INDEX_SUFFIX
from sparsedelta.files.side_files import check_base_files, digest_file
from sparsedelta.format.columns import Column, RowColumns, columns_of
from sparsedelta.format.delta import AnyDelta, Delta, opened
from sparsedelta.format.records import DIGEST_BYTES, Base, Row, TensorKey
from sparsedelta.format.spool import SpoolPayload, new_payload
from sparsedelta.ops.base_check import PlacedTensors, explained, find_base
from sparsedelta.ops.diff import describe_files
from sparsedelta.ops.lookup import base_conflict
from sparsedelta.ops.merging.floats import work_dtype
from sparsedelta.ops.merging.merged_tensor import MergedTensor
from sparsedelta.ops.merging.recipe import Method, Recipe, make_recipe
from sparsedelta.ops.merging.small import small_merge
from sparsedelta.ops.stacking.fold import Link
from sparsedelta.progress import Progress
from sparsedelta.tensors.compare import Comparison
from sparsedelta.tensors.parallel import Pace
from sparsedelta.tensors.rebuild import BaseDiffers, check_rebuilt
from sparsedelta.tensors.small_pairs import Pair, PairComparison, run_pairs
from sparsedelta.tensors.sources import RebuiltTensor

_log = logging.getLogger(__name__)


def merge(
    base: AnyPath,
    *deltas: AnyDelta,
    method: Method = "linear",
    weights: Sequence[float] | None = None,
    density: float | Sequence[float] | None = None,
    seed: int = 0,
    normalize: bool | None = None,
    scale: float = 1.0,
    exclude: Sequence[str] = (),
    progress: Progress | None = None,
    spool_dir: str | None = None,
) -> Delta:
    """Return the delta from ``base`` to the merged model, which has the files of the base.

    Let d_i be the difference between target i and the base, and w_i its weight. The merged difference is

    - ``linear``: Σ w_i d_i / Σ w_i, the weighted average of the targets;
    - ``task-arithmetic``: Σ w_i d_i (Ilharco et al., 2023);
    - ``ties``: each d_i keeps only its ``density`` · numel largest elements. For each element, the
      sign with the larger sum of w_i d_i is elected, and the w_i d_i of that sign are averaged
      (Yadav et al., 2023);
    - ``dare``: each element of d_i is kept with probability ``density``, and the kept elements are
      scaled so that Σ |d_i| over the tensor stays the same; then as ``task-arithmetic`` (Yu et al., 2024);
    - ``dare-ties``: elements are dropped and scaled as in ``dare``, then signs are elected as in ``ties``.

    Differences, products and sums are computed in float32 (float64 for F64). The sum with the base is
    rounded once, to nearest even, to the dtype of the tensor.

    Args:
        base: the base of all deltas.
        deltas: ``.sd`` files or loaded deltas; at least one.
        method: one of the methods above.
        weights: one weight for each delta; None: 1 for each.
        density: above 0 and at most 1; one number for all deltas, or one for each. None: 1, which keeps all changes.
            ``ties`` keeps this share of all elements of a tensor, whether changed or not, so a density above the
            delta's own cuts nothing; then a warning is logged. ``dare`` and ``dare-ties`` keep each change with
            this probability.
        seed: seed of the random choice; the same seed gives the same delta on any machine.
        normalize: whether to divide by the sum of the weights; with elected signs, by the weights of
            the deltas that have the elected sign. None: only for ``linear`` and ``ties``.
        scale: factor for the merged difference.
        exclude: globs of files of ``base`` to leave out; a glob without "/" matches the last component.
        progress: receives the number of bytes read.
        spool_dir: folder for the temporary file that holds the coded changes if they do not fit in memory;
            None for the system's temporary folder.

    Raises:
        ConflictError: the deltas were made from different bases, or their targets differ in a tensor
            whose dtype cannot be merged in floating point.
        StructureMismatch: a delta adds, removes, renames, retypes or reshapes tensors.
        FormatError: a delta cannot be read, or is inconsistent.
        MismatchError: ``base`` is not the base of the deltas.
        CheckpointError: ``base`` cannot be read, or has a file that no delta can carry.
        ValueError: a setting is wrong.
    """
    recipe = make_recipe(
        len(deltas), method, weights, density, normalize=normalize, scale=scale, seed=seed
    )
    with ExitStack() as context:
        given = [context.enter_context(opened(one)) for one in deltas]
        _check_siblings(given)
        _warn_of_repetition(given)
        _warn_of_density(given, recipe)
        checkpoint = context.enter_context(
            Checkpoint(base, exclude=exclude, include=(), whole=False)
        )
        context.enter_context(explained(given[0], checkpoint))
        found = [find_base(delta, checkpoint) for delta in given]
        for one in given:
            # The merged model has the base's own index, so the tensors may be in other shards than in a delta's base.
            check_base_files(one, checkpoint, [f"*{INDEX_SUFFIX}"])
        payload = context.enter_context(new_payload(spool_dir))
        paces = Pace(progress), Pace()
        return _Merge(given, found, checkpoint, recipe, payload, *paces).run()


@dataclass(frozen=True)
class _Merge:
    deltas: Sequence[Delta]
    found: Sequence[Mapping[TensorKey, Tensor]]  # for each delta, from the row to its base tensor
    base: Checkpoint
    recipe: Recipe
    payload: SpoolPayload
    pace: Pace
    silent: Pace

    def run(self) -> Delta:
        base = self.base
        files = describe_files(base, lambda path: digest_file(base.side_files[path]), self.payload)
        comparison = PairComparison("ulp", self.payload)
        small = small_merge(
            self.deltas, self.found, self._numbers, self._tensors, self.recipe, comparison
        )
        pairs: list[Pair] = [(tensor, tensor) for tensor in self._tensors]
        rows = run_pairs(pairs, small.run if small else None, self._row, self.pace, label="merging")
        base_id = next((delta.base.id for delta in self.deltas if delta.base.id), None)
        return Delta(Base(base_id), files, tuple(rows), self._info(), self.payload)

    @cached_property
    def _tensors(self) -> list[Tensor]:
        return [*self.base.tensors.values()]

    @cached_property
    def _numbers(self) -> list[Column]:
        """For each delta, the number of the row of each base tensor; -1 if it has none."""
        return [
            _row_numbers(delta, found, self._tensors)
            for delta, found in zip(self.deltas, self.found, strict=True)
        ]

    def _row(self, number: int) -> Row:
        """Return the row of a merged tensor; a tensor that no delta changes is copied from the base."""
        tensor = self._tensors[number]
        numbers = [int(own[number]) for own in self._numbers]
        rows = [
            delta.tensors[own] if own >= 0 else None
            for delta, own in zip(self.deltas, numbers, strict=True)
        ]
        links = [
            Link(number, row, delta.payload) if row and row.chunks else None
            for number, (delta, row) in enumerate(zip(self.deltas, rows, strict=True), 1)
        ]
        merged = self._merged(tensor, links) if any(links) else tensor
        row = Comparison(tensor, merged, values="ulp", payload=self.payload, pace=self.pace).run()
        if row.base:
            found = row.base.spec.digest or b""
            for one in rows:
                if one and one.base and one.base.spec.digest != found:
                    raise BaseDiffers(one, found)
        if isinstance(merged, RebuiltTensor):
            check_rebuilt(next(link.row for link in links if link), row.target.digest or b"")
        return row

    def _merged(self, tensor: Tensor, links: Sequence[Link | None]) -> MergedTensor | RebuiltTensor:
        """Return the merged tensor of the changes in ``links``."""
        present = [link for link in links if link]
        if work_dtype(tensor.spec.dtype) is not None:
            return MergedTensor(tensor, links, self.recipe, self.silent)
        digests = {link.row.target.digest for link in present}
        if len(present) < len(links) or len(digests) > 1 or None in digests:
            raise ConflictError(
                f"tensor {tensor.name!r} has dtype {tensor.spec.dtype.name}, which cannot be merged in"
                " floating point, and its values differ between the targets; merge deltas that agree on it",
                tensor=tensor.name,
            )
        # The merged delta has the files of the base; a target may have others.
        row = replace(present[0].row, file=tensor.file, name=tensor.name)
        return RebuiltTensor(row, tensor, present[0].payload, self.silent)

    def _info(self) -> Mapping[str, JSON]:
        recipe = self.recipe
        targets = [delta.target_fingerprint for delta in self.deltas]
        merged: dict[str, JSON] = {
            "method": recipe.method,
            "weights": [*recipe.weights],
            "normalize": recipe.normalize,
            "scale": recipe.scale,
            "targets": [target.hex() if target else None for target in targets],
        }
        if recipe.method not in ("linear", "task-arithmetic"):
            merged["density"] = [*recipe.densities]
        if recipe.drops_at_random:
            merged["seed"] = recipe.seed
        return {"merged": merged}


def _warn_of_density(deltas: Sequence[Delta], recipe: Recipe) -> None:
    """Log a warning if TIES has a density below 1 and yet keeps all changes of all deltas."""
    if recipe.method != "ties" or min(recipe.densities) == 1:
        return
    largest = 0.0
    for number, delta in enumerate(deltas):
        for row in delta.tensors:
            if row.nnz > recipe.n_kept(number, row.target.n_elements):
                return
            largest = max(largest, row.nnz / max(1, row.target.n_elements))
    if largest:
        _log.warning(
            "density %g cuts nothing: ties keeps this share of all elements of a tensor, and no delta changes more"
            " than %.3g of one; give a smaller density, or leave it out",
            min(recipe.densities),
            largest,
        )


def _warn_of_repetition(deltas: Sequence[Delta]) -> None:
    """Log a warning if deltas have the same target, as when one is given twice."""
    first: dict[bytes, int] = {}
    for number, delta in enumerate(deltas, 1):
        target = delta.target_fingerprint
        if target is not None and first.setdefault(target, number) != number:
            _log.warning(
                "deltas %d and %d have the same target, which counts twice; give each delta once, and weights to"
                " make one count more",
                first[target],
                number,
            )


def _check_siblings(deltas: Sequence[Delta]) -> None:
    if not deltas:
        raise ValueError("no delta is given; give at least one")
    if _change_the_same_tensors(deltas):
        return
    for number, delta in enumerate(deltas, 1):
        name = base_conflict(deltas[0], delta)
        if name is not None:
            raise ConflictError(
                f"deltas 1 and {number} were made from different bases: tensor {name!r} differs; only"
                " deltas of the same base can be merged",
                tensor=name,
            )
        used: set[TensorKey] = set()
        for row in delta.tensors:
            base = row.base
            if not base or not row.keeps_all or base.name != row.name or base.key in used:
                raise StructureMismatch(
                    f"delta {number} adds, renames, retypes or reshapes tensor {row.name!r}; only changes"
                    " of elements can be merged",
                    tensor=row.name,
                )
            used.add(base.key)
    known = [{row.name for row in delta.tensors} for delta in deltas]
    for number, names in enumerate(known, 1):
        missing = sorted(set().union(*known) - names)
        if missing:
            raise StructureMismatch(
                f"delta {number} removes tensor {missing[0]!r}, which other deltas have; only changes of"
                " elements can be merged",
                tensor=missing[0],
            )


def _change_the_same_tensors(deltas: Sequence[Delta]) -> bool:
    """Return whether deltas surely have the same base and only change elements, as their columns show at once."""
    columns = [columns_of(delta.tensors) for delta in deltas]
    first = columns[0]
    for one in columns:
        if one is None or first is None or not _only_changes(one):
            return False
        if (one.names, one.base_paths, one.layouts) != (
            first.names,
            first.base_paths,
            first.layouts,
        ):
            return False
        if not (
            np.array_equal(one.layout, first.layout)
            and np.array_equal(one.base_file, first.base_file)
            and _base_digests(one) == _base_digests(first)
        ):
            return False
    return True


def _only_changes(rows: RowColumns) -> bool:
    """Return whether every row keeps all of a base tensor of its name, and no two rows the same one."""
    return (
        not rows.base_names
        and bool((rows.base_file >= 0).all())
        and np.array_equal(rows.base_file, rows.file)
        and np.array_equal(rows.base_layout, rows.layout)
        and np.array_equal(rows.keep, rows.n_elements)
        and len({*rows.base_paths}) == len(rows.base_paths)
    )


def _base_digests(rows: RowColumns) -> bytes:
    """Return the digests of the base tensors of all rows, which all have one; they are next to each other."""
    start = int(rows.base_at[0]) if len(rows.base_at) else 0
    return rows.digests[start : start + DIGEST_BYTES * len(rows.base_at)]


def _row_numbers(
    delta: Delta, found: Mapping[TensorKey, Tensor], tensors: Sequence[Tensor]
) -> Column:
    if isinstance(found, PlacedTensors):
        return found.rows_of(tensors)
    numbers = {
        found[row.key].key: number for number, row in enumerate(delta.tensors) if row.key in found
    }
    return np.array([numbers.get(tensor.key, -1) for tensor in tensors], np.int64)
