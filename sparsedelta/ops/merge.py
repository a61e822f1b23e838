"""``merge``: deltas of one base weighed against each other in float, as one delta of that base.

What no delta touches keeps its bits. Each tensor is made of the base's and of the changes alone, chunk
by chunk; no model is held whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace

from sparsedelta._typing import JSON, AnyPath
from sparsedelta.errors import BaseMismatch, ConflictError, StructureMismatch
from sparsedelta.files.checkpoint import Checkpoint
from sparsedelta.files.side_files import digest_file
from sparsedelta.format.delta import Delta, load
from sparsedelta.format.digests import fingerprint
from sparsedelta.format.records import Base, TensorDelta
from sparsedelta.format.spool import SpoolPayload
from sparsedelta.ops.apply import AnyDelta
from sparsedelta.ops.base_check import check_structure, explain_mismatch
from sparsedelta.ops.diff import describe_files
from sparsedelta.ops.merging.floats import work_dtype
from sparsedelta.ops.merging.merged_tensor import MergedTensor
from sparsedelta.ops.merging.recipe import Method, Recipe, make_recipe
from sparsedelta.ops.stacking.common_files import is_structural
from sparsedelta.progress import Progress, Silent
from sparsedelta.tensors.changes import Stage, stage_of
from sparsedelta.tensors.compare import Compared, Comparison, digest_tensor, spec_of
from sparsedelta.tensors.parallel import Pace, run_all
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
        opened = [
            one if isinstance(one, Delta) else context.enter_context(load(one)) for one in deltas
        ]
        _check_siblings(opened)
        checkpoint = context.enter_context(
            Checkpoint(base, exclude=exclude, include=(), whole=False)
        )
        for one in opened:
            check_structure(one, checkpoint)
            one.payload.check()
        payload = SpoolPayload(spool_dir)
        try:
            return _Merge(opened, checkpoint, recipe, payload, progress or Silent()).run()
        except BaseException:
            payload.close()
            raise


class _Merge:
    def __init__(
        self,
        deltas: Sequence[Delta],
        base: Checkpoint,
        recipe: Recipe,
        payload: SpoolPayload,
        progress: Progress,
    ) -> None:
        self._deltas = deltas
        self._base = base
        self._recipe = recipe
        self._payload = payload
        self._progress = progress
        self._pace = Pace(progress)
        self._rows = [{row.name: row for row in delta.tensors} for delta in deltas]

    def run(self) -> Delta:
        base, known = self._base, self._rows[0]
        further = next((name for name in base.tensors if name not in known), None)
        if further is not None:
            raise StructureMismatch(
                f"'{base.path}' has tensor {further!r} in weights of which the deltas know nothing;"
                " leave their files out (--exclude)",
                tensor=further,
            )
        files = describe_files(base, lambda path: digest_file(base.side_files[path]), self._payload)
        self._progress.start("merging", 2 * base.tensor_bytes)
        try:
            compared = run_all(
                self._row,
                list(base.tensors),
                cost=lambda name: base.tensors[name].n_bytes,
                pace=self._pace,
            )
        finally:
            self._progress.finish()
        self._check_base(_fingerprint(compared, of_target=False))
        base_id = next((delta.base.id for delta in self._deltas if delta.base.id), None)
        return Delta(
            Base(base_id, self._deltas[0].base.fingerprint),
            replace(files, fingerprint=_fingerprint(compared, of_target=True)),
            tuple(c.row for c in compared),
            self._info(),
            self._payload,
        )

    def _row(self, name: str) -> Compared:
        tensor = self._base.tensors[name]
        rows = [rows[name] for rows in self._rows]
        stages = [
            stage_of(delta, row, number) if row.change else None
            for number, (delta, row) in enumerate(zip(self._deltas, rows, strict=True), 1)
        ]
        if not any(stages):
            digest = digest_tensor(tensor, self._pace)
            spec = spec_of(tensor, digest)
            compared = Compared(TensorDelta(name, spec, spec, None), digest, digest)
        else:
            made = self._made(name, stages)
            compared = Comparison(
                tensor, made, values="ulp", payload=self._payload, pace=self._pace
            ).run()
        if compared.base_digest and compared.row.base != rows[0].base:
            raise explain_mismatch(self._deltas[0], self._base, rows[0], compared.base_digest)
        return compared

    def _made(self, name: str, stages: Sequence[Stage | None]) -> MergedTensor | MadeTensor:
        tensor, silent = self._base.tensors[name], Pace(Silent())
        present = [stage for stage in stages if stage]
        spec = present[0].target
        if work_dtype(spec.dtype) is not None:
            return MergedTensor(spec, tensor, stages, self._recipe, silent)
        digests = {stage.target.digest for stage in present}
        if len(present) < len(stages) or len(digests) > 1 or None in digests:
            raise ConflictError(
                f"tensor {name!r} is {spec.dtype.name}, which is not merged in float, and the targets"
                " do not agree on it",
                tensor=name,
            )
        return MadeTensor(name, spec, tensor, present[:1], spec.n_elements, silent)

    def _check_base(self, found: bytes) -> None:
        expected = self._deltas[0].base.fingerprint
        if found != expected:
            raise BaseMismatch(
                f"'{self._base.path}' has fingerprint {found.hex()[:12]}…, expected"
                f" {expected.hex()[:12]}…; this is not the base that the deltas were made from",
                expected=expected.hex(),
                found=found.hex(),
            )

    def _info(self) -> Mapping[str, JSON]:
        recipe = self._recipe
        targets = [delta.target.fingerprint for delta in self._deltas]
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
    first = deltas[0].base.fingerprint
    for number, delta in enumerate(deltas, 1):
        if delta.base.fingerprint != first:
            raise ConflictError(
                f"delta {number} was made from base {delta.base.fingerprint.hex()[:12]}…, delta 1 from"
                f" {first.hex()[:12]}…; only deltas of one base are merged",
                expected=first.hex(),
                found=delta.base.fingerprint.hex(),
            )
        for row in delta.tensors:
            if is_structural(row):
                raise StructureMismatch(
                    f"delta {number} adds, removes, retypes or reshapes tensor {row.name!r}; only"
                    " changes of elements in place are merged",
                    tensor=row.name,
                )


def _fingerprint(compared: Sequence[Compared], *, of_target: bool) -> bytes:
    found = []
    for c in compared:
        spec = c.row.target if of_target else c.row.base
        digest = c.target_digest if of_target else c.base_digest
        if spec and digest:
            found.append((c.row.name, spec.dtype.name, spec.shape, digest))
    return fingerprint(found)
