"""``invert``: turn a delta base → target into the delta target → base, exactly.

Differences in ulps are negated, which needs no base. The base is needed for everything that the delta
does not hold: removed or shortened tensors, bits that new values replaced, and replaced files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

from blake3 import blake3

from sparsedelta._typing import JSON, AnyPath
from sparsedelta.errors import BaseNeeded, Corrupt
from sparsedelta.files.checkpoint import Checkpoint, Tensor
from sparsedelta.files.layout import canonical_header, rows_by_file
from sparsedelta.files.side_files import check_base_files, is_of_other_files
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
from sparsedelta.ops.inverse import base_file, inverse_row, is_invertible_alone, why_base_needed
from sparsedelta.progress import Progress
from sparsedelta.tensors.compare import Comparison
from sparsedelta.tensors.parallel import Pace, run_all
from sparsedelta.tensors.rebuild import BaseDiffers, check_base_tensor
from sparsedelta.tensors.sources import RebuiltTensor


def invert(
    delta: AnyDelta,
    *,
    base: AnyPath | None = None,
    base_id: str | None = None,
    exclude: Sequence[str] = (),
    progress: Progress | None = None,
    spool_dir: str | None = None,
) -> Delta:
    """Return the inverse of a delta: it rebuilds the base from the target.

    A delta describes the files of its target, not those of its base. With ``base``, the result rebuilds
    all files of the base, byte for byte. Without ``base``, it arranges the base's tensors in files as the
    target does. These files equal those of the base if base and target were saved in the same way.

    Args:
        delta: an ``.sd`` file or a loaded delta.
        base: the base of ``delta``. Required if the delta removes, retypes or shortens tensors, holds
            new values instead of differences, or carries files.
        base_id: where the target of ``delta``, which is the base of the result, can be found.
        exclude: globs of files of ``base`` to leave out; a glob without "/" matches the last component.
        progress: receives the number of bytes read.
        spool_dir: folder for the temporary file that holds the coded changes if they do not fit in memory;
            None for the system's temporary folder.

    Raises:
        BaseNeeded: ``base`` is required, but not given; the message says why.
        FormatError: the delta cannot be read, or is inconsistent.
        MismatchError: ``base`` is not the base of the delta.
        CheckpointError: ``base`` cannot be read, or has a file that no delta can carry.
        ValueError: the delta is one between files that are not safetensors.
    """
    with ExitStack() as context:
        given = context.enter_context(opened(delta))
        payload = context.enter_context(new_payload(spool_dir))
        given.check_output()
        if is_of_other_files(given):
            raise ValueError(
                "the delta is one between files that are not safetensors, which cannot be inverted; make the delta back from the"
                " files: `sparsedelta convert BASE back.sd --base TARGET`"
            )
        if base is None:
            return _without_base(given, base_id, payload, progress)
        checkpoint = context.enter_context(
            Checkpoint(base, exclude=exclude, include=included(given), whole=False)
        )
        context.enter_context(explained(given, checkpoint))
        rows = _rows_by_base(given, checkpoint)
        check_base_files(given, checkpoint)
        return _WithBase(given, rows, checkpoint, payload, Pace(progress)).run(base_id)


def _without_base(
    delta: Delta, base_id: str | None, payload: SpoolPayload, progress: Progress | None
) -> Delta:
    reasons = why_base_needed(delta)
    if reasons:
        raise BaseNeeded(
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
    """Return the weight file of the base that corresponds to a weight file of the target.

    Args:
        delta: the delta.
        file: the weight file of the target.
        rows: the rows of ``file``; their base tensors are the tensors of the result.
        payload: receives the header if it is stored.
    """
    path = base_file(delta, file.path)
    if file.stored:
        coded = delta.payload.read(file.stored.offset, file.stored.stored_bytes)
        return replace(file, path=path, stored=payload.add_stored(file.stored, coded))
    header = canonical_header(file, [(row.name, row.base.spec) for row in rows if row.base])
    return replace(file, path=path, digest=blake3(header).digest()[:DIGEST_BYTES])


def _rows_by_base(delta: Delta, base: Checkpoint) -> dict[TensorKey, Row]:
    """Return, for each base tensor that the delta uses, the row to invert.

    If several rows refer to one base tensor, the row with the same file and name is preferred, then a row
    with the same name.
    """
    result: dict[TensorKey, Row] = {}
    rows = {row.key: row for row in delta.tensors}
    for key, tensor in find_base(delta, base).items():
        known = result.setdefault(tensor.key, rows[key])
        if key == tensor.key or (rows[key].name == tensor.name != known.name):
            result[tensor.key] = rows[key]
    return result


@dataclass(frozen=True)
class _WithBase:
    """Inverts a delta with the help of its base."""

    delta: Delta
    rows: Mapping[TensorKey, Row]  # by the base tensor
    base: Checkpoint
    payload: SpoolPayload
    pace: Pace

    def run(self, base_id: str | None) -> Delta:
        delta, base = self.delta, self.base
        in_target = {file.path: (file.n_bytes, file.digest) for file in delta.target.side_files}
        files = describe_files(base, in_target.get, self.payload)
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
        """Return the row that rebuilds a tensor of the base from the target.

        It inverts the row of the delta where possible, and otherwise compares both tensors.
        """
        row = self.rows.get(tensor.key)
        pace = self.pace.unreported()  # the progress counts coded bytes only
        if row is None or row.base is None:
            return Comparison(None, tensor, values="ulp", payload=self.payload, pace=pace).run()
        base = BaseTensor(tensor.file, tensor.name, row.base.spec)
        if is_invertible_alone(row) and row.target.digest is not None:
            check_base_tensor(row, tensor, pace)
            return inverse_row(row, base, self.delta, self.payload, self.pace)
        target = RebuiltTensor(row, tensor, self.delta.payload, self.pace)
        inverse = Comparison(target, tensor, values="ulp", payload=self.payload, pace=pace).run()
        if inverse.target != row.base.spec:
            raise BaseDiffers(row, inverse.target.digest or b"")
        if inverse.base and row.target.digest not in (None, inverse.base.spec.digest):
            raise Corrupt(
                f"tensor {row.name!r}: the rebuilt target has another digest than the delta states; the"
                " base is right, so the delta is inconsistent; download it again",
                tensor=row.name,
            )
        return inverse


def _info(delta: Delta) -> Mapping[str, JSON]:
    """Return the ``info`` of the inverse; inverting twice gives the delta's own ``info``."""
    inverted = delta.info.get("inverted")
    if isinstance(inverted, dict) and len(delta.info) == 1:
        return inverted
    return {"inverted": dict(delta.info)}
