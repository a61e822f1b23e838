"""``invert``: from the delta base → target to the delta target → base, exactly.

Differences in ulps are negated, which needs no base. What a delta does not hold, the base has to give:
tensors that were removed or cut, the bits that new values replaced, files that were replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import TypeVar

from sparsedelta._typing import JSON, AnyPath
from sparsedelta.errors import ConflictError, Corrupt, StructureMismatch
from sparsedelta.files.checkpoint import Checkpoint
from sparsedelta.format.delta import Delta, load
from sparsedelta.format.digests import fingerprint
from sparsedelta.format.records import Base, TensorDelta, header_key
from sparsedelta.format.spool import SpoolPayload
from sparsedelta.ops.apply import AnyDelta
from sparsedelta.ops.base_check import check_structure, explain_mismatch, included
from sparsedelta.ops.diff import describe_files
from sparsedelta.ops.inverse import files_without_base, inverse_row, only_base_tells, why_row
from sparsedelta.progress import Progress, Silent
from sparsedelta.tensors.changes import stage_of
from sparsedelta.tensors.compare import Compared, Comparison, Source, digest_tensor, spec_of
from sparsedelta.tensors.parallel import Pace, run_all
from sparsedelta.tensors.sources import MadeTensor

R = TypeVar("R")


def invert(
    delta: AnyDelta,
    *,
    base: AnyPath | None = None,
    base_id: str | None = None,
    exclude: Sequence[str] = (),
    progress: Progress | None = None,
    spool_dir: str | None = None,
) -> Delta:
    """Return the delta that makes the base of the target.

    A delta describes the files of its target, not those of its base. Without ``base`` the tensors
    are laid out as in the target, which is what the base did if the target was saved as it had been;
    with ``base`` its files come back byte for byte in any case.

    Args:
        delta: an ``.sd`` file or a loaded delta.
        base: the base of ``delta``, needed where that removes, retypes or shortens tensors, holds
            new values instead of differences, or carries files.
        base_id: where the target of ``delta``, the base of the result, may be found.
        exclude: globs of files of ``base`` to leave out; without "/" they match the last component.
        progress: told of the bytes read.
        spool_dir: where coded changes wait if they outgrow memory; None: the system's choice.

    Raises:
        ConflictError: ``base`` is needed and not given; the message says what for.
        FormatError: the delta cannot be read, or is inconsistent.
        MismatchError: ``base`` is not the base of the delta.
        CheckpointError: ``base`` cannot be read, or holds a file that cannot be carried.
    """
    with ExitStack() as context:
        opened = delta if isinstance(delta, Delta) else context.enter_context(load(delta))
        payload = SpoolPayload(spool_dir)
        try:
            opened.payload.check()
            if base is None:
                return _without_base(opened, base_id, payload, progress or Silent())
            checkpoint = context.enter_context(
                Checkpoint(base, exclude=exclude, include=included(opened), whole=False)
            )
            return _WithBase(opened, checkpoint, payload, progress or Silent()).run(base_id)
        except BaseException:
            payload.close()
            raise


def _without_base(
    delta: Delta, base_id: str | None, payload: SpoolPayload, progress: Progress
) -> Delta:
    reasons = only_base_tells(delta)
    known = delta.target.fingerprint
    if reasons or known is None:
        reason = reasons[0] if reasons else "its target's fingerprint is not known"
        raise ConflictError(
            f"the delta cannot be inverted without its base: {reason}; give the base (--base)"
        )
    target = files_without_base(delta)
    for file in target.weight_files:
        if file.stored_header:
            key = header_key(file.path)
            payload.append(key, [delta.payload.read(key, 0, delta.payload.n_bytes(key))])
    pace = Pace(progress)
    rows = _run(progress, lambda row: inverse_row(delta, row, payload, pace), delta.tensors, pace)
    kept = [row for row in rows if row.target]
    removed = sorted((row for row in rows if not row.target), key=lambda row: row.name.encode())
    return Delta(Base(base_id, known), target, (*kept, *removed), _info(delta), payload)


class _WithBase:
    """Inverts a delta whose base is given."""

    def __init__(
        self, delta: Delta, base: Checkpoint, payload: SpoolPayload, progress: Progress
    ) -> None:
        check_structure(delta, base)
        self._delta = delta
        self._base = base
        self._payload = payload
        self._progress = progress
        self._pace = Pace(progress)

    def run(self, base_id: str | None) -> Delta:
        delta, base = self._delta, self._base
        self._check_covered()
        there = {file.path: (file.n_bytes, file.digest) for file in delta.target.side_files}
        files = describe_files(base, there.get, self._payload)
        rows = {row.name: row for row in delta.tensors}
        names = [name for name in base.tensors if name in rows and rows[name].base]
        kept = set(names)
        names += sorted((name for name in rows if name not in kept), key=str.encode)
        compared = _run(self._progress, self._row, [rows[name] for name in names], self._pace)
        known = delta.target.fingerprint or fingerprint(
            (c.row.name, c.row.base.dtype.name, c.row.base.shape, c.base_digest)
            for c in compared
            if c.row.base and c.base_digest
        )
        return Delta(
            Base(base_id, known),
            replace(files, fingerprint=delta.base.fingerprint),
            tuple(c.row for c in compared),
            _info(delta),
            self._payload,
        )

    def _check_covered(self) -> None:
        """Check that the base has no weights beyond those that the delta knows."""
        known = {row.name for row in self._delta.tensors if row.base}
        further = next((name for name in self._base.tensors if name not in known), None)
        if further is not None:
            raise StructureMismatch(
                f"'{self._base.path}' has tensor {further!r} in weights of which the delta knows nothing;"
                " leave their files out (--exclude)",
                tensor=further,
            )

    def _row(self, row: TensorDelta) -> Compared:
        """Return the inverse of a row, by reading the base only where that tells more."""
        change = row.change
        told = why_row(row) is None and (
            change is None
            or row.base is None
            or (change.touched is not None and row.target and change.keep == row.target.n_elements)
        )
        if told and self._delta.target.fingerprint is not None:
            return Compared(inverse_row(self._delta, row, self._payload, self._pace), None, None)
        compared = self._compare(row)
        inverse = compared.row
        if row.base and inverse.target != row.base and compared.target_digest:
            raise explain_mismatch(self._delta, self._base, row, compared.target_digest)
        if row.target and row.target.digest is not None and inverse.base != row.target:
            raise Corrupt(
                f"tensor {row.name!r} does not become what the delta says, on the right base; the"
                " delta is inconsistent",
                tensor=row.name,
            )
        return compared

    def _compare(self, row: TensorDelta) -> Compared:
        name, silent = row.name, Pace(Silent())
        base = self._base.tensors.get(name) if row.base else None
        made: Source | None = base
        if row.target is None:
            made = None
        elif row.change:
            stage, keep = stage_of(self._delta, row), row.change.keep
            made = MadeTensor(name, row.target, base, [stage], keep, self._pace)
        if base is None:
            if made is None:
                raise ValueError(f"tensor {name!r} is in neither checkpoint")
            digest = digest_tensor(made, silent)
            return Compared(TensorDelta(name, spec_of(made, digest), None, None), digest, None)
        values = row.change.values if row.change else "ulp"
        return Comparison(made, base, values=values, payload=self._payload, pace=silent).run()


def _run(
    progress: Progress,
    work: Callable[[TensorDelta], R],
    rows: Sequence[TensorDelta],
    pace: Pace,
) -> list[R]:
    progress.start("inverting", sum(map(_coded_bytes, rows)))
    try:
        return run_all(work, rows, cost=_coded_bytes, pace=pace)
    finally:
        progress.finish()


def _coded_bytes(row: TensorDelta) -> int:
    return row.change.coded_bytes if row.change else 0


def _info(delta: Delta) -> Mapping[str, JSON]:
    """Return what is recorded of the delta in its inverse; the inverse of that is the delta again."""
    inverted = delta.info.get("inverted")
    if isinstance(inverted, dict) and len(delta.info) == 1:
        return inverted
    return {"inverted": dict(delta.info)}
