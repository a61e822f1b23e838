"""``merge``: deltas of one base weighed against each other in float, as one delta of that base.

What no delta touches keeps its bits. Each tensor is made of the base's and of the changes alone, chunk
by chunk; no model is held whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

from sparsedelta._typing import JSON, AnyPath
from sparsedelta.errors import ConflictError, StructureMismatch
from sparsedelta.files.checkpoint import Checkpoint, Tensor
from sparsedelta.files.side_files import check_base_files, digest_file
from sparsedelta.format.delta import AnyDelta, Delta, opened
from sparsedelta.format.records import Base, Row, TensorKey
from sparsedelta.format.spool import SpoolPayload, new_payload
from sparsedelta.ops.base_check import explained, find_base
from sparsedelta.ops.diff import describe_files
from sparsedelta.ops.lookup import base_conflict
from sparsedelta.ops.merging.floats import work_dtype
from sparsedelta.ops.merging.merged_tensor import MergedTensor
from sparsedelta.ops.merging.recipe import Method, Recipe, make_recipe
from sparsedelta.ops.stacking.fold import Link
from sparsedelta.progress import Progress
from sparsedelta.tensors.compare import Comparison
from sparsedelta.tensors.parallel import Pace, run_all
from sparsedelta.tensors.rebuild import BaseDiffers
from sparsedelta.tensors.sources import MadeTensor


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
    """Return the delta that makes the merged model of ``base``; its files are the base's.

    With d_i the difference of target i to the base and w_i its weight, the merged difference is

    - ``linear``: Σ w_i d_i / Σ w_i, the weighted average of the targets;
    - ``task-arithmetic``: Σ w_i d_i (Ilharco et al., 2023);
    - ``ties``: of each d_i the largest elements are kept, as many as ``density`` says; where signs of
      w_i d_i disagree, those of the smaller sum are left out; the rest is averaged (Yadav et al., 2023);
    - ``dare``: elements of d_i are kept with probability ``density``, and scaled so that Σ |d_i| of
      the tensor is as before; then as task arithmetic (Yu et al., 2024);
    - ``dare-ties``: the same, then signs are elected as in ``ties``.

    Differences, products and sums are computed in float32 (float64 for F64), and the sum with the base
    is rounded once, to nearest even, to the dtype of the tensor.

    Args:
        base: the base of all deltas.
        deltas: ``.sd`` files or loaded deltas; at least one.
        method: see above.
        weights: one of each delta; None: 1 each.
        density: for ``ties`` and ``dare``, one for all deltas or one of each, above 0 and at most 1.
        seed: of the random choice; the same seed makes the same delta, on any machine.
        normalize: whether to divide by Σ w_i, for ``ties`` and ``dare-ties`` of those that agree; None:
            for ``linear`` and ``ties``.
        scale: what the merged difference is multiplied by.
        exclude: globs of files of ``base`` to leave out; without "/" they match the last component.
        progress: told of the bytes read.
        spool_dir: where coded changes wait if they outgrow memory; None: the system's choice.

    Raises:
        ConflictError: the deltas were made from different bases, or change what has no float.
        StructureMismatch: a delta adds, removes, retypes or reshapes tensors.
        FormatError: a delta cannot be read, or is inconsistent.
        MismatchError: ``base`` is not their base.
        ValueError: a setting is wrong.
    """
    recipe = make_recipe(
        len(deltas), method, weights, density, normalize=normalize, scale=scale, seed=seed
    )
    with ExitStack() as context:
        given = [context.enter_context(opened(one)) for one in deltas]
        _check_siblings(given)
        checkpoint = context.enter_context(
            Checkpoint(base, exclude=exclude, include=(), whole=False)
        )
        context.enter_context(explained(given[0], checkpoint))
        for one in given:
            check_base_files(one, checkpoint)
        rows = [_rows_by_base(delta, checkpoint) for delta in given]
        payload = context.enter_context(new_payload(spool_dir))
        return _Merge(given, rows, checkpoint, recipe, payload, Pace(progress)).run()


@dataclass(frozen=True)
class _Merge:
    deltas: Sequence[Delta]
    rows: Sequence[Mapping[TensorKey, Row]]  # of each delta, by the base tensor
    base: Checkpoint
    recipe: Recipe
    payload: SpoolPayload
    pace: Pace

    def run(self) -> Delta:
        base = self.base
        files = describe_files(base, lambda path: digest_file(base.side_files[path]), self.payload)
        rows = run_all(
            self._row,
            [*base.tensors.values()],
            cost=lambda tensor: 2 * tensor.spec.n_bytes,  # the base's and the merged
            pace=self.pace,
            label="merging",
        )
        base_id = next((delta.base.id for delta in self.deltas if delta.base.id), None)
        return Delta(Base(base_id), files, tuple(rows), self._info(), self.payload)

    def _row(self, tensor: Tensor) -> Row:
        """Return the merged tensor; one that no delta knows stays as it is."""
        rows = [rows.get(tensor.key) for rows in self.rows]
        links = [
            Link(number, row, delta.payload) if row and row.chunks else None
            for number, (delta, row) in enumerate(zip(self.deltas, rows, strict=True), 1)
        ]
        made = self._made(tensor, links) if any(links) else tensor
        row = Comparison(tensor, made, values="ulp", payload=self.payload, pace=self.pace).run()
        if row.base:
            found = row.base.spec.digest or b""
            for one in rows:
                if one and one.base and one.base.spec.digest != found:
                    raise BaseDiffers(one, found)
        return row

    def _made(self, tensor: Tensor, links: Sequence[Link | None]) -> MergedTensor | MadeTensor:
        silent = Pace()
        present = [link for link in links if link]
        if work_dtype(tensor.spec.dtype) is not None:
            return MergedTensor(tensor, links, self.recipe, silent)
        digests = {link.row.target.digest for link in present}
        if len(present) < len(links) or len(digests) > 1 or None in digests:
            raise ConflictError(
                f"tensor {tensor.name!r} is {tensor.spec.dtype.name}, which is not merged in float, and"
                " the targets do not agree on it",
                tensor=tensor.name,
            )
        # The merged delta has the files of the base; a target may have others.
        row = replace(present[0].row, file=tensor.file, name=tensor.name)
        return MadeTensor(row, tensor, present[0].payload, silent)

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


def _check_siblings(deltas: Sequence[Delta]) -> None:
    if not deltas:
        raise ValueError("no delta is given; give at least one")
    for number, delta in enumerate(deltas, 1):
        name = base_conflict(deltas[0], delta)
        if name is not None:
            raise ConflictError(
                f"deltas 1 and {number} were made from different bases: tensor {name!r} is another; only"
                " deltas of one base are merged",
                tensor=name,
            )
        used: set[TensorKey] = set()
        for row in delta.tensors:
            base = row.base
            if not base or not row.keeps_all or base.name != row.name or base.key in used:
                raise StructureMismatch(
                    f"delta {number} adds, renames, retypes or reshapes tensor {row.name!r}; only changes"
                    " of elements in place are merged",
                    tensor=row.name,
                )
            used.add(base.key)
    known = [{row.name for row in delta.tensors} for delta in deltas]
    for number, names in enumerate(known, 1):
        missing = sorted(set().union(*known) - names)
        if missing:
            raise StructureMismatch(
                f"delta {number} removes tensor {missing[0]!r}, which other deltas have; only changes of"
                " elements in place are merged",
                tensor=missing[0],
            )


def _rows_by_base(delta: Delta, base: Checkpoint) -> dict[TensorKey, Row]:
    found = find_base(delta, base)
    return {found[row.key].key: row for row in delta.tensors if row.key in found}
