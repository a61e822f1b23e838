"""``verify``: read all of a delta, and compare it with its base and its target, writing nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sparsedelta._typing import AnyPath
from sparsedelta.codecs.chunk import check_streams, chunk_span, decode_chunk
from sparsedelta.errors import TargetMismatch
from sparsedelta.files.checkpoint import Checkpoint, Tensor
from sparsedelta.files.layout import rows_by_file, stored_header, target_layout
from sparsedelta.files.side_files import (
    carried_content,
    check_base_file,
    digest_file,
    read_side_file,
)
from sparsedelta.format.delta import Delta, load
from sparsedelta.format.digests import fingerprint
from sparsedelta.format.records import DIGEST_BYTES, TensorDelta, TensorSpec, tensor_key
from sparsedelta.ops.apply import AnyDelta, make_tensors
from sparsedelta.ops.base_check import check_structure, included
from sparsedelta.progress import Progress, Silent
from sparsedelta.tensors.compare import digest_tensor
from sparsedelta.tensors.parallel import Pace, run_all
from sparsedelta.tensors.rebuild import place_for


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What was found right.

    Attributes:
        n_tensors: tensors of the target.
        n_changed: tensors that the delta changes or adds.
        nnz: touched elements.
        payload_bytes: coded bytes read.
        base_checked: the base is the delta's, and becomes its target.
        target_checked: the target given is the delta's, files and all.
    """

    n_tensors: int
    n_changed: int
    nnz: int
    payload_bytes: int
    base_checked: bool
    target_checked: bool


def verify(
    delta: AnyDelta,
    *,
    base: AnyPath | None = None,
    target: AnyPath | None = None,
    exclude: Sequence[str] = (),
    progress: Progress | None = None,
) -> VerifyReport:
    """Return what was checked, all of it found right.

    Without base and target every stream of the delta is opened, and decoded if that does not take the
    base; and all of it is checked. With a base, all its
    digests are compared and the target is made in memory; with a target, all its files are compared.

    Args:
        delta: an ``.sd`` file or a loaded delta.
        base: the checkpoint that it should have been made from.
        target: the checkpoint that it should make.
        exclude: globs of files to leave out of both, as for ``diff``.
        progress: told of the bytes read.

    Raises:
        FormatError: the delta cannot be read, or is inconsistent.
        MismatchError: base or target is not the delta's.
        CheckpointError: base or target cannot be read as a checkpoint.
    """
    if not isinstance(delta, Delta):
        with load(delta) as opened:
            return verify(opened, base=base, target=target, exclude=exclude, progress=progress)
    progress = progress or Silent()
    check_delta(delta, progress)
    if base is not None:
        with _open(base, delta, exclude) as checkpoint:
            _check_with_base(delta, checkpoint, progress)
    if target is not None:
        with _open(target, delta, exclude) as checkpoint:
            _check_target(delta, checkpoint, progress)
    changed = [row.change for row in delta.tensors if row.change]
    return VerifyReport(
        n_tensors=sum(row.target is not None for row in delta.tensors),
        n_changed=len(changed),
        nnz=delta.nnz,
        payload_bytes=sum(change.coded_bytes for change in changed),
        base_checked=base is not None,
        target_checked=target is not None,
    )


def _open(path: AnyPath, delta: Delta, exclude: Sequence[str]) -> Checkpoint:
    return Checkpoint(path, exclude=exclude, include=included(delta), whole=False)


def check_delta(delta: Delta, progress: Progress) -> None:
    """Decode everything in a delta and check it against its manifest.

    Raises:
        FormatError: something is damaged or contradicts the manifest.
    """
    delta.payload.check()
    for side_file in delta.target.side_files:
        if side_file.carried:
            carried_content(delta, side_file)
    for file, rows in rows_by_file(delta):
        if file.stored_header:
            stored_header(delta, file, rows)
    pace = Pace(progress)
    changed = [row for row in delta.tensors if row.change]
    progress.start("decoding", sum(row.change.coded_bytes for row in changed if row.change))
    try:
        run_all(lambda row: _decode(delta, row, pace), changed, cost=_coded_bytes, pace=pace)
    finally:
        progress.finish()


def _decode(delta: Delta, row: TensorDelta, pace: Pace) -> None:
    if row.target is None or row.change is None:
        return
    offset = 0
    for chunk in row.change.chunks:
        n_bytes = sum(chunk.coded_bytes)
        with place_for(chunk, row.target.dtype):
            coded = delta.payload.read(tensor_key(row.name), offset, n_bytes) if n_bytes else b""
            span = chunk_span(row.target.n_elements, chunk.number)
            if chunk.needs_base:
                check_streams(chunk, row.target.dtype, coded)
            else:
                decode_chunk(chunk, row.target.dtype, span, coded)
        offset += n_bytes
        pace.advance(n_bytes)


def _check_with_base(delta: Delta, base: Checkpoint, progress: Progress) -> None:
    check_structure(delta, base)
    for file in delta.target.side_files:
        if not file.carried:
            check_base_file(delta, base, file)
    target_layout(delta, lambda file: read_side_file(delta, base, file))
    make_tensors(base, delta, {}, check="full", progress=progress, every_base=True)


def _check_target(delta: Delta, target: Checkpoint, progress: Progress) -> None:
    """Compare every file of a checkpoint with the delta's target; kind 'file' goes by any name."""
    if target.is_folder != delta.target.is_folder:
        kinds = {True: "a folder", False: "a file"}
        raise TargetMismatch(
            f"'{target.path}' is {kinds[target.is_folder]}, the delta makes"
            f" {kinds[delta.target.is_folder]}"
        )
    if target.is_folder:
        _check_file_names(delta, target)
        for file in delta.target.side_files:
            if digest_file(target.side_files[file.path]) != (file.n_bytes, file.digest):
                raise TargetMismatch(
                    f"file '{target.side_files[file.path]}' is not the delta's target's"
                )
    layout = target_layout(delta, lambda file: target.side_files[file.path].read_bytes())
    found_files = {file.path: file for file in target.weight_files}
    for expected in layout:
        found = found_files[expected.path] if target.is_folder else target.weight_files[0]
        if found.raw_header != expected.header:
            raise TargetMismatch(
                f"the header of '{target.path / found.path if target.is_folder else target.path}'"
                " is not the delta's target's"
            )
    _check_target_tensors(delta, target, progress)


def _check_file_names(delta: Delta, target: Checkpoint) -> None:
    described = delta.target
    expected = {file.path for file in described.weight_files}
    expected |= {file.path for file in described.side_files}
    expected |= {f"{folder}/" for folder in described.empty_folders}
    found = {file.path for file in target.weight_files} | target.side_files.keys()
    found |= {f"{folder}/" for folder in target.empty_folders}
    for path in sorted(expected ^ found):
        problem = "is missing from" if path in expected else "is not of the delta's target, but in"
        raise TargetMismatch(f"{path!r} {problem} '{target.path}'")


def _check_target_tensors(delta: Delta, target: Checkpoint, progress: Progress) -> None:
    pace = Pace(progress)
    rows = [(row, row.target) for row in delta.tensors if row.target]

    def digest(item: tuple[TensorDelta, TensorSpec]) -> tuple[Tensor, bytes]:
        row, spec = item
        tensor = target.tensors.get(row.name)
        if tensor is None:
            raise TargetMismatch(
                f"tensor {row.name!r} of the delta's target is missing from '{target.path}'",
                tensor=row.name,
            )
        found = digest_tensor(tensor, pace)
        if spec.digest is not None and found[:DIGEST_BYTES] != spec.digest:
            raise TargetMismatch(
                f"tensor {row.name!r} has digest {found.hex()[:12]}… in '{target.path}', the delta"
                f" makes {spec.digest.hex()[:12]}…",
                tensor=row.name,
                expected=spec.digest.hex(),
                found=found[:DIGEST_BYTES].hex(),
            )
        return tensor, found

    progress.start("reading the target", target.tensor_bytes)
    try:
        digests = run_all(digest, rows, cost=lambda item: item[1].n_bytes, pace=pace)
    finally:
        progress.finish()
    found = fingerprint((t.name, t.dtype.name, t.shape, whole) for t, whole in digests)
    if delta.target.fingerprint not in (None, found):
        raise TargetMismatch(f"'{target.path}' has not the fingerprint of the delta's target")


def _coded_bytes(row: TensorDelta) -> int:
    return row.change.coded_bytes if row.change else 0
