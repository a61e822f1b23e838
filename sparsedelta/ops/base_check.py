"""Check whether a checkpoint is the base of a delta, and explain why it is not (FORMAT §10)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from sparsedelta._typing import AnyPath
from sparsedelta.errors import (
    AlreadyApplied,
    BaseMismatch,
    MismatchError,
    PartlyApplied,
    StructureMismatch,
)
from sparsedelta.files import junk
from sparsedelta.files.checkpoint import Checkpoint, Tensor
from sparsedelta.format.delta import Delta
from sparsedelta.format.records import BaseTensor, Row, TensorKey, TensorSpec
from sparsedelta.ops.lookup import Lookup
from sparsedelta.tensors.compare import digest_tensor
from sparsedelta.tensors.rebuild import BaseDiffers


def included(delta: Delta) -> Sequence[str] | None:
    """Return the argument ``include`` of ``Checkpoint`` for a base or target of this delta.

    Files that ``files.junk`` excludes are left out, as ``diff`` leaves them out by default. If the
    delta names such a file, ``diff`` was called with ``include``; then all files are kept.
    """
    target = delta.target
    paths = {file.path for file in target.weight_files}
    paths |= {file.path for file in target.side_files}
    paths |= {row.base.file for row in delta.tensors if row.base}
    paths |= {*target.empty_folders}
    names_junk = any(
        junk.matches(component, junk.NOT_PART) for path in paths for component in path.split("/")
    )
    return None if names_junk else ()


def open_base(path: AnyPath, delta: Delta, *, exclude: Sequence[str] = ()) -> Checkpoint:
    """Return the checkpoint at ``path``, opened as a delta's base.

    Shards that the delta does not need may be missing.
    """
    return Checkpoint(path, exclude=exclude, include=included(delta), whole=False, complete=False)


def find_base(delta: Delta, base: Checkpoint) -> dict[TensorKey, Tensor]:
    """Return the base tensor of each row that has one, by the row's file and name.

    Raises:
        StructureMismatch: the base has no tensor of that name, dtype and shape.
        LimitExceeded: the output would be too large; see ``Delta.check_output``.
    """
    delta.check_output()
    lookup = Lookup(base.tensors.values(), digest_tensor)
    found = {}
    for row in delta.tensors:
        if row.base:
            tensor = lookup.find(row.base)
            if tensor is None:
                other = lookup.at(row.base.file, row.base.name)
                raise structure_error(delta, base.path, row.base, other.spec if other else None)
            if tensor.spec.dtype != row.base.spec.dtype:  # a file does not state the element type
                tensor = replace(tensor, spec=row.base.spec.with_digest(None))
            found[row.key] = tensor
    return found


@contextmanager
def explained(delta: Delta, base: Checkpoint) -> Iterator[None]:
    """Return a context that turns a mismatch inside it into the error that explains it best.

    Raises:
        AlreadyApplied: the checkpoint is the target.
        PartlyApplied: some changed tensors are the target's, all others the base's.
        StructureMismatch, BaseMismatch: it is neither of these.
    """
    try:
        yield
    except BaseDiffers as error:
        raise (_applied(delta, base) or _mismatch(delta, error.row, error.digest)) from None
    except (StructureMismatch, BaseMismatch) as error:
        applied = _applied(delta, base)
        if applied is None:
            raise
        raise applied from error


def _applied(delta: Delta, base: Checkpoint) -> MismatchError | None:
    """Return the error for a checkpoint that is the target, entirely or in part; None if it is not."""
    lookup = Lookup(base.tensors.values(), digest_tensor)
    changed = [row for row in delta.tensors if not row.is_copied]
    done: list[Row] = []
    for row in changed:
        if _is_applied(base, row):
            done.append(row)
        elif row.base and not _has(lookup, row.base):
            return None
    if not done:
        return None
    name = done[0].name
    if len(done) == len(changed):
        return AlreadyApplied(
            f"'{base.path}' already is this delta's target; there is nothing to do", tensor=name
        )
    return PartlyApplied(
        f"'{base.path}' has {len(done)} of {len(changed)} changed tensors of this delta's target, such as"
        f" {name!r}, and the other tensors of its base; apply the delta to the base{_made_from(delta)}",
        tensor=name,
    )


def _is_applied(base: Checkpoint, row: Row) -> bool:
    """Return whether a checkpoint already holds a row's target tensor, in the row's file and by its name."""
    file = row.file if base.is_folder else base.weight_files[0].path
    found = base.tensors.get((file, row.name))
    lookup = Lookup([found] if found else [], digest_tensor)
    return _has(lookup, BaseTensor(row.file, row.name, row.target))


def _has(lookup: Lookup[Tensor], wanted: BaseTensor) -> bool:
    found = lookup.find(wanted)
    return (
        found is not None
        and wanted.spec.digest is not None
        and digest_tensor(found) == wanted.spec.digest
    )


def _mismatch(delta: Delta, row: Row, digest: bytes) -> BaseMismatch:
    expected = row.base.spec.digest if row.base else None
    shown = expected.hex() if expected else "none"
    return BaseMismatch(
        f"tensor {row.name!r} has digest {digest.hex()[:12]}… in the base, expected {shown[:12]}…;"
        f" this is not the base that the delta was made from{_made_from(delta)}",
        tensor=row.name,
        expected=shown,
        found=digest.hex(),
    )


def structure_error(
    delta: Delta, where: AnyPath, expected: BaseTensor, found: TensorSpec | None
) -> StructureMismatch:
    """Return the error for a base at ``where`` in which a tensor is missing or has another layout.

    Args:
        delta: the delta.
        where: path of the checkpoint, for the message.
        expected: the base tensor that the delta needs.
        found: the tensor of that name; None if there is none.
    """
    return StructureMismatch(
        f"tensor {expected.name!r} in '{where}' is {_shown(found)}, expected {_shown(expected.spec)};"
        f" this is not the base that the delta was made from{_made_from(delta)}",
        tensor=expected.name,
        expected=_shown(expected.spec),
        found=_shown(found),
    )


def _shown(spec: TensorSpec | None) -> str:
    return f"{spec.dtype.name} {list(spec.shape)}" if spec else "absent"


def _made_from(delta: Delta) -> str:
    return f", {delta.base.id}" if delta.base.id else ""
