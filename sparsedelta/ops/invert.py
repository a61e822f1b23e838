"""``invert``: from the delta base → target to the delta target → base, exactly.

Differences in ulps are negated, which needs no base. What a delta does not hold, the base has to give:
tensors that were removed or cut, the bits that new values replaced, files that were replaced.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

from blake3 import blake3

from sparsedelta._typing import JSON, AnyPath
from sparsedelta.errors import ConflictError, Corrupt
from sparsedelta.files.checkpoint import Checkpoint, Tensor
from sparsedelta.files.layout import canonical_header, rows_by_file
from sparsedelta.files.side_files import check_base_files
from sparsedelta.format.delta import AnyDelta, Delta, opened
from sparsedelta.format.records import (
    DIGEST_BYTES,
    Base,
    BaseTensor,
    Row,
    TensorKey,
    WeightFile,
)
from sparsedelta.format.spool import SpoolPayload, new_payload
from sparsedelta.ops.base_check import explained, find_base, included
from sparsedelta.ops.diff import describe_files
from sparsedelta.ops.inverse import base_file, inverse_row, only_base_tells, told
from sparsedelta.progress import Progress
from sparsedelta.tensors.compare import Comparison
from sparsedelta.tensors.parallel import Pace, run_all
from sparsedelta.tensors.rebuild import BaseDiffers, check_base_tensor
from sparsedelta.tensors.sources import MadeTensor


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
        given = context.enter_context(opened(delta))
        payload = context.enter_context(new_payload(spool_dir))
        given.check_output()
        if base is None:
            return _without_base(given, base_id, payload, progress)
        checkpoint = context.enter_context(
            Checkpoint(base, exclude=exclude, include=included(given), whole=False)
        )
        context.enter_context(explained(given, checkpoint))
        check_base_files(given, checkpoint)
        rows = _rows_by_base(given, checkpoint)
        return _WithBase(given, rows, checkpoint, payload, Pace(progress)).run(base_id)


def _without_base(
    delta: Delta, base_id: str | None, payload: SpoolPayload, progress: Progress | None
) -> Delta:
    reasons = only_base_tells(delta)
    if reasons:
        raise ConflictError(
            f"the delta cannot be inverted without its base: {reasons[0]}; give the base (base=, --base)"
        )
    pace = Pace(progress)
    bases = [(row, row.base) for row in delta.tensors if row.base]
    rows = run_all(
        lambda item: inverse_row(*item, delta, payload, pace),
        bases,
        cost=lambda item: item[0].coded_bytes,
        pace=pace,
        label="inverting",
    )
    files = tuple(_weight_file(delta, file, own, payload) for file, own in rows_by_file(delta))
    target = replace(delta.target, weight_files=files)
    n_added = len(delta.tensors) - len(rows)
    return Delta(Base(base_id, n_added), target, tuple(rows), _info(delta), payload)


def _weight_file(
    delta: Delta, file: WeightFile, rows: Sequence[Row], payload: SpoolPayload
) -> WeightFile:
    """Return the file of the base that the rows of a file of the target were made from."""
    path = base_file(delta, file.path)
    if file.stored:
        coded = delta.payload.read(file.stored.offset, file.stored.stored_bytes)
        return replace(file, path=path, stored=payload.add_stored(file.stored, coded))
    header = canonical_header(file, [(row.name, row.base.spec) for row in rows if row.base])
    return replace(file, path=path, digest=blake3(header).digest()[:DIGEST_BYTES])


def _rows_by_base(delta: Delta, base: Checkpoint) -> dict[TensorKey, Row]:
    """Return a row that is made from each tensor of the base: of several, the one that is named like it."""
    result: dict[TensorKey, Row] = {}
    rows = {row.key: row for row in delta.tensors}
    for key, tensor in find_base(delta, base).items():
        known = result.setdefault(tensor.key, rows[key])
        if key == tensor.key or (rows[key].name == tensor.name != known.name):
            result[tensor.key] = rows[key]
    return result


@dataclass(frozen=True)
class _WithBase:
    """Inverts a delta whose base is given."""

    delta: Delta
    rows: Mapping[TensorKey, Row]  # by the base tensor
    base: Checkpoint
    payload: SpoolPayload
    pace: Pace

    def run(self, base_id: str | None) -> Delta:
        delta, base = self.delta, self.base
        there = {file.path: (file.n_bytes, file.digest) for file in delta.target.side_files}
        files = describe_files(base, there.get, self.payload)
        rows = run_all(
            self._row,
            [*base.tensors.values()],
            cost=lambda tensor: tensor.spec.n_bytes,
            pace=self.pace,
            label="inverting",
            n_bytes=sum(row.coded_bytes for row in delta.tensors),
        )
        used = {row.base.key for row in rows if row.base}
        n_unused = sum(row.key not in used for row in delta.tensors)
        return Delta(Base(base_id, n_unused), files, tuple(rows), _info(delta), self.payload)

    def _row(self, tensor: Tensor) -> Row:
        """Return how a tensor of the base is made from the target's, by reading it only where that tells more."""
        row = self.rows.get(tensor.key)
        pace = self.pace.unreported()  # coded bytes are what is counted
        if row is None or row.base is None:
            return Comparison(None, tensor, values="ulp", payload=self.payload, pace=pace).run()
        base = BaseTensor(tensor.file, tensor.name, row.base.spec)
        if told(row) and row.target.digest is not None:
            check_base_tensor(row, tensor, pace)
            return inverse_row(row, base, self.delta, self.payload, self.pace)
        made = MadeTensor(row, tensor, self.delta.payload, self.pace)
        inverse = Comparison(made, tensor, values="ulp", payload=self.payload, pace=pace).run()
        if inverse.target != row.base.spec:
            raise BaseDiffers(row, inverse.target.digest or b"")
        if inverse.base and row.target.digest not in (None, inverse.base.spec.digest):
            raise Corrupt(
                f"tensor {row.name!r} does not become what the delta says, on the right base; the"
                " delta is inconsistent",
                tensor=row.name,
            )
        return inverse


def _info(delta: Delta) -> Mapping[str, JSON]:
    """Return what is recorded of the delta in its inverse; the inverse of that is the delta again."""
    inverted = delta.info.get("inverted")
    if isinstance(inverted, dict) and len(delta.info) == 1:
        return inverted
    return {"inverted": dict(delta.info)}
