"""Check whether a checkpoint is the base of a delta, and explain why it is not (FORMAT §10)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np

from sparsedelta._typing import AnyPath
from sparsedelta.errors import (
    AlreadyApplied,
    BaseMismatch,
    CheckpointError,
    MismatchError,
    PartlyApplied,
    StructureMismatch,
)
from sparsedelta.files import junk
from sparsedelta.files.checkpoint import Checkpoint, FileTensors, Tensor, check_links
from sparsedelta.files.side_files import digest_file
from sparsedelta.files.unread import conversion, is_distributed
from sparsedelta.format.columns import Column, RowColumns, base_paths, columns_of
from sparsedelta.format.delta import Delta
from sparsedelta.format.header_columns import HeaderColumns
from sparsedelta.format.paths import WEIGHT_SUFFIX
from sparsedelta.format.records import BaseTensor, Row, TensorKey, TensorSpec
from sparsedelta.ops.lookup import Lookup
from sparsedelta.tensors.compare import digest_tensor
from sparsedelta.tensors.rebuild import BaseDiffers
from sparsedelta.tensors.small import Places

_ANOTHER = ", as in another revision or fine-tune"
_COMPARED_BYTES = 1 << 28  # to say how many tensors of a wrong base differ


def included(delta: Delta) -> Sequence[str] | None:
    """Return the argument ``include`` of ``Checkpoint`` for a base or target of this delta.

    Files that ``files.junk`` excludes are left out, as ``diff`` leaves them out by default. If the
    delta names such a file, ``diff`` was called with ``include``; then all files are kept.
    """
    target = delta.target
    paths = {file.path for file in target.weight_files}
    paths |= {file.path for file in target.side_files}
    paths |= base_paths(delta.tensors)
    paths |= {*target.empty_folders}
    names_junk = any(
        junk.matches(component, junk.NOT_PART) for path in paths for component in path.split("/")
    )
    return None if names_junk else ()


def open_base(path: AnyPath, delta: Delta, *, exclude: Sequence[str] = ()) -> Checkpoint:
    """Return the checkpoint at ``path``, opened as a delta's base.

    Shards that the delta does not need may be missing.
    """
    return open_side(path, exclude=exclude, include=included(delta), whole=False, complete=False)


def open_side(
    path: AnyPath,
    *,
    exclude: Sequence[str] = (),
    include: Sequence[str] | None = None,
    whole: bool = True,
    complete: bool = True,
) -> Checkpoint:
    """Return an open checkpoint (see ``Checkpoint``), which may be one of torch.distributed."""
    if is_distributed(path):
        # Imported only for such a folder, because the room of other formats comes after this one.
        from sparsedelta.interop.regions import RegionFiles

        return RegionFiles(path, exclude=exclude, include=include)
    return Checkpoint(path, exclude=exclude, include=include, whole=whole, complete=complete)


def check_has_weights(checkpoint: Checkpoint) -> None:
    """Check that a checkpoint has a weight file.

    Raises:
        CheckpointError: it has none; the message says how to convert what it has.
    """
    if checkpoint.weight_files:
        return
    check_links(checkpoint.path)
    files = checkpoint.side_files
    hint = conversion(
        str(checkpoint.path),
        files,
        lambda path: files[path].read_bytes() if path in files else None,
    )
    inside = [
        path
        for path in checkpoint.left_out
        if any((checkpoint.path / path).glob(f"*{WEIGHT_SUFFIX}"))
    ]
    if inside:  # the folders that a Trainer writes
        last = max(inside, key=lambda path: (len(path), path))
        raise CheckpointError(
            f"'{checkpoint.path}' holds no {WEIGHT_SUFFIX} file, but checkpoints of a training; give one, such as"
            f" '{checkpoint.path / last}'"
        )
    left_out = ", ".join(checkpoint.left_out[:3])
    more = f"; left out: {left_out} (--include and include= keep files)" if left_out else ""
    raise CheckpointError(f"'{checkpoint.path}' holds no {WEIGHT_SUFFIX} file; {hint}{more}")


class PlacedTensors(Mapping[TensorKey, Tensor]):
    """The base tensors of rows that were read as columns, in weight files that were read as columns.

    Attributes:
        places: where they are.
    """

    def __init__(
        self, rows: RowColumns, files: Sequence[FileTensors], file: Column, number: Column
    ) -> None:
        """Describe the tensors.

        Args:
            rows: the rows.
            files: the files that hold the tensors.
            file: which of these files holds the base tensor of each row; -1 if the row has none, (n,).
            number: the number of the tensor in its file, (n,).
        """
        self._rows = rows
        self._files = files
        self._file = file
        self._number = number
        fd, at = np.full(len(file), -1, np.int64), np.zeros(len(file), np.int64)
        for one, held in enumerate(files):
            own = file == one
            fd[own] = held.fd
            at[own] = held.offset + held.columns.begin[number[own]]
        self.places = Places(fd, at)

    def of_row(self, row: int) -> Tensor | None:
        """Return the base tensor of a row; None if it has none."""
        if self._file[row] < 0:
            return None
        found = self._files[int(self._file[row])][int(self._number[row])]
        fd = int(self.places.fd[row])
        return found if fd == found.fd else replace(found, fd=fd)

    def moved(self, places: Places) -> PlacedTensors:
        """Return the same tensors in other files, which are equal to these byte for byte."""
        other = PlacedTensors(self._rows, self._files, self._file, self._number)
        other.places = places
        return other

    def rows_of(self, tensors: Sequence[Tensor]) -> Column:
        """Return the number of the row that each base tensor is the base tensor of; -1 if there is none, (n,)."""
        has_base = np.flatnonzero(self._file >= 0)
        by_place = zip(
            self.places.fd[has_base].tolist(), self.places.at[has_base].tolist(), strict=True
        )
        rows = dict(zip(by_place, has_base.tolist(), strict=True))
        return np.array([rows.get((one.fd, one.offset), -1) for one in tensors], np.int64)

    @cached_property
    def _by_key(self) -> dict[TensorKey, Tensor]:
        rows = self._rows
        found = ((row, self.of_row(row)) for row in range(len(rows.names)))
        return {
            (rows.paths[int(rows.file[row])], rows.names[row]): tensor
            for row, tensor in found
            if tensor
        }

    def __getitem__(self, key: TensorKey) -> Tensor:
        return self._by_key[key]

    def __iter__(self) -> Iterator[TensorKey]:
        return iter(self._by_key)

    def __len__(self) -> int:
        return int(np.count_nonzero(self._file >= 0))


def find_base(delta: Delta, base: Checkpoint) -> Mapping[TensorKey, Tensor]:
    """Return the base tensor of each row that has one, by the row's file and name.

    Raises:
        StructureMismatch: the base has no tensor of that name, dtype and shape.
        CheckpointError: it has none of that name, because a shard is missing or a link leads nowhere.
        LimitExceeded: the output would be too large; see ``Delta.check_output``.
    """
    delta.check_output()
    columns = columns_of(delta.tensors)
    placed = _find_in_columns(columns, base) if columns else None
    if placed is not None:
        return placed
    lookup = Lookup(base.tensors.values(), digest_tensor)
    found = {}
    for row in delta.tensors:
        if row.base:
            tensor = lookup.find(row.base)
            if tensor is None:
                check_has_weights(base)
                if lookup.at(row.base.file, row.base.name) is None:
                    check_links(base.path)
                    base.check_complete()
                raise structure_error(delta, base.path, row.base, lookup)
            if tensor.spec.dtype != row.base.spec.dtype:  # a file does not state the element type
                tensor = replace(tensor, spec=row.base.spec.with_digest(None))
            found[row.key] = tensor
    return found


def _find_in_columns(rows: RowColumns, base: Checkpoint) -> PlacedTensors | None:
    """Return the base tensors, if each is in the file that its row names; None otherwise."""
    by_path = {file.path: file.tensors for file in base.weight_files}
    n = len(rows.names)
    file, number = np.full(n, -1, np.int64), np.zeros(n, np.int64)
    files: list[FileTensors] = []
    for one in np.unique(rows.base_file).tolist():
        if one < 0:
            continue
        held = by_path.get(rows.base_paths[one])
        if held is None and len(by_path) == 1:  # the path of the only file does not matter
            (held,) = by_path.values()
        if not isinstance(held, FileTensors):
            return None
        own = np.flatnonzero(rows.base_file == one)
        found = _numbers(rows, own, held.columns)
        if found is None:
            return None
        file[own], number[own] = len(files), found
        files.append(held)
    return PlacedTensors(rows, files, file, number)


def _numbers(rows: RowColumns, own: Column, header: HeaderColumns) -> Column | None:
    """Return the number of the base tensor of each row ``own`` in a file; None if one is not there."""
    wanted = [rows.base_names.get(row, rows.names[row]) for row in own.tolist()]
    if wanted == header.names:
        found = np.arange(len(wanted))
    else:
        by_name = {name: number for number, name in enumerate(header.names)}
        found = np.array([by_name.get(name, -1) for name in wanted], np.int64)
    if bool((found < 0).any()):
        return None
    pairs = header.layout[found] * len(rows.layouts) + rows.base_layout[own]
    for pair in np.unique(pairs).tolist():
        there, expected = divmod(pair, len(rows.layouts))
        if not header.layouts[there].same_layout(rows.layouts[expected]):
            return None
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
        raise (_applied(delta, base) or _mismatch(delta, base, error)) from None
    except (StructureMismatch, BaseMismatch) as error:
        applied = _applied(delta, base)
        if applied is not None:
            raise applied from error
        if error.tensor is None and isinstance(error, BaseMismatch):  # about a file
            extent = _extent(delta, base)
            if extent.endswith(_ANOTHER):
                raise BaseMismatch(f"{error}; besides{extent}") from error
        raise


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
        other = _other_file(delta, base)
        if other:
            return AlreadyApplied(
                f"'{base.path}' already has the tensors of this delta's target, not of its base, but another file {other!r};"
                f" apply the delta to the base{_made_from(delta)}",
                tensor=name,
            )
        return AlreadyApplied(
            f"'{base.path}' already is this delta's target, not its base; there is nothing to apply",
            tensor=name,
        )
    return PartlyApplied(
        f"'{base.path}' has {len(done)} of {len(changed)} changed tensors of this delta's target, such as"
        f" {name!r}, and the other tensors of its base; apply the delta to the base{_made_from(delta)}",
        tensor=name,
    )


def _other_file(delta: Delta, checkpoint: Checkpoint) -> str | None:
    """Return the path of a side file of the target that a checkpoint has with other content; None if there is none.

    It may lack files: not all of a repository's are downloaded.
    """
    for file in delta.target.side_files:
        location = checkpoint.side_files.get(file.path)
        if location is not None and digest_file(location) != (file.n_bytes, file.digest):
            return file.path
    return None


def is_base(delta: Delta, checkpoint: Checkpoint) -> bool:
    """Return whether a checkpoint has all tensors of a delta's base, and at least one of them is another in the target."""
    rows = [row for row in delta.tensors if row.base]
    if all(row.is_copied for row in rows):
        return False
    lookup = Lookup(checkpoint.tensors.values(), digest_tensor)
    rows.sort(key=lambda row: row.is_copied)  # a changed tensor tells the target at once
    return all(row.base and _has(lookup, row.base) for row in rows)


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


def _mismatch(delta: Delta, base: Checkpoint, error: BaseDiffers) -> BaseMismatch:
    row, digest = error.row, error.digest
    expected = row.base.spec.digest if row.base else None
    shown = expected.hex() if expected else "none"
    return BaseMismatch(
        f"tensor {row.name!r} has digest {digest.hex()[:12]}… in the base, expected {shown[:12]}…;"
        f" this is not the base that the delta was made from{_made_from(delta)}{_extent(delta, base)}",
        tensor=row.name,
        expected=shown,
        found=digest.hex(),
    )


def _extent(delta: Delta, base: Checkpoint) -> str:
    """Return how many tensors of a wrong base differ and the likely cause, as a clause; "" if that says nothing.

    At most ``_COMPARED_BYTES`` are read: of a large base, only some tensors from all over it are compared.
    """
    needed = [row.base for row in delta.tensors if row.base and row.base.spec.digest]
    step = 1 + sum(one.spec.n_bytes for one in needed) // _COMPARED_BYTES
    lookup, left, is_right = Lookup(base.tensors.values(), digest_tensor), _COMPARED_BYTES, []
    for one in needed[::step]:
        if one.spec.n_bytes <= left:
            left -= one.spec.n_bytes
            is_right.append(_has(lookup, one))
    n_wrong, is_whole = is_right.count(False), len(is_right) == len(needed)
    compared = (
        f"{n_wrong:,} of {len(is_right):,} tensors{'' if is_whole else ' that were compared'}"
    )
    if n_wrong > 1:
        return f": {compared} differ{_ANOTHER}"
    if n_wrong == 1 and is_whole and len(needed) > 1:
        return f": {compared} differs, perhaps in a damaged copy"
    return ""


def structure_error(
    delta: Delta, where: AnyPath, expected: BaseTensor, lookup: Lookup[Any]
) -> StructureMismatch:
    """Return the error for a base at ``where`` in which a tensor is missing or has another layout.

    Args:
        delta: the delta.
        where: path of the checkpoint, for the message.
        expected: the base tensor that the delta needs.
        lookup: the tensors of the checkpoint.
    """
    other = lookup.at(expected.file, expected.name)
    found = _shown(other.spec if other else None)
    needed = [row.base for row in delta.tensors if row.base]
    n_unfit = sum(lookup.lacks(one) for one in needed)
    wanted = f"the base that the delta was made from{_made_from(delta)}"
    reason = f"tensor {expected.name!r} in '{where}' is {found}, expected {_shown(expected.spec)}; this is not {wanted}"
    if 2 * n_unfit > len(needed) > 1:
        reason = (
            f"'{where}' is another model than {wanted}: {n_unfit:,} of {len(needed):,} tensors are absent or have"
            f" another dtype or shape, such as {expected.name!r}, which is {found}, expected {_shown(expected.spec)}"
        )
    return StructureMismatch(
        reason, tensor=expected.name, expected=_shown(expected.spec), found=found
    )


def _shown(spec: TensorSpec | None) -> str:
    return f"{spec.dtype.name} {list(spec.shape)}" if spec else "absent"


def _made_from(delta: Delta) -> str:
    return f", {delta.base.id}" if delta.base.id else ""
