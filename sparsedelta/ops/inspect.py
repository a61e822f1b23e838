"""``inspect``: report what a delta changes and how large its parts are, from header and manifest alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from types import MappingProxyType
from typing import Any

import numpy as np

from sparsedelta._typing import JSON, AnyPath
from sparsedelta.format.columns import RowColumns, columns_of, starts
from sparsedelta.format.container import FilePayload
from sparsedelta.format.delta import AnyDelta, Delta, opened_all
from sparsedelta.format.records import Row, SideFile, Stored, TensorSpec, WeightFile
from sparsedelta.ops.layers import Grid, by_layer, curve_points, mean_changes

STATES = ("changed", "added", "resized", "reshaped", "renamed", "unchanged")


_NONE: Mapping[str, int] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class TensorInspection:
    """What a delta changes in one tensor, and the size of these changes.

    Attributes:
        name: the tensor's name in the target.
        file: path of its weight file in the target.
        state: one of ``STATES``. "resized" means along the first dimension only; "renamed" means that
            only the name differs.
        dtype, shape: dtype and shape in the target.
        base_name, base_file, base_shape: name, file and shape of the base tensor that it is rebuilt
            from; None if there is none.
        nnz: number of changed elements. An element that the base lacks counts if its bits are not zero.
        numel: number of elements in the target.
        index_bytes, value_bytes: coded size of the positions, and of the values, in bytes.
        index_encodings, value_encodings: number of chunks that use each encoding.
    """

    name: str
    file: str
    state: str
    dtype: str
    shape: tuple[int, ...]
    base_name: str | None
    base_file: str | None
    base_shape: tuple[int, ...] | None
    nnz: int
    numel: int
    index_bytes: int
    value_bytes: int
    index_encodings: Mapping[str, int]
    value_encodings: Mapping[str, int]

    @property
    def payload_bytes(self) -> int:
        """Coded size of positions and values, in bytes."""
        return self.index_bytes + self.value_bytes

    @property
    def density(self) -> float:
        """Changed elements over all elements; 0 if there are none."""
        return _ratio(self.nnz, self.numel) or 0.0

    def as_json(self) -> dict[str, JSON]:
        """Return all attributes and properties as JSON."""
        members = {field.name: getattr(self, field.name) for field in fields(self)}
        return {
            **members,
            "shape": list(self.shape),
            "base_shape": None if self.base_shape is None else list(self.base_shape),
            "density": self.density,
            "payload_bytes": self.payload_bytes,
            "index_encodings": dict(self.index_encodings),
            "value_encodings": dict(self.value_encodings),
        }


@dataclass(frozen=True, slots=True)
class Sizes:
    """The sizes of a delta's parts in bytes; they add up to ``file_bytes``.

    Attributes:
        file_bytes: the whole file. None, like the next two, if the delta was not read from a file.
        header_bytes: the container's header and the length before it.
        manifest_bytes: the manifest.
        index_bytes: the positions of all tensors, as stored.
        value_bytes: the values of all tensors, as stored.
        side_file_bytes: the carried side files, as stored.
        stored_header_bytes: the headers of weight files that are not canonical, as stored.
    """

    file_bytes: int | None
    header_bytes: int | None
    manifest_bytes: int | None
    index_bytes: int
    value_bytes: int
    side_file_bytes: int
    stored_header_bytes: int

    @property
    def payload_bytes(self) -> int:
        """Size of the positions and values of all tensors, in bytes."""
        return self.index_bytes + self.value_bytes

    def as_json(self) -> dict[str, JSON]:
        """Return all attributes and properties as JSON."""
        return {**asdict(self), "payload_bytes": self.payload_bytes}


@dataclass(frozen=True, slots=True)
class Inspection:
    """What a delta changes, and how large its parts are.

    Attributes:
        base_id: where the base can be found; a hint, never proof.
        base_fingerprint: fingerprint of the base tensors that the target is rebuilt from, hex.
        n_unused: number of other tensors that the base had when the delta was made.
        target_fingerprint: fingerprint of the target, hex; None if the digest of a tensor is not known.
        target_kind: "folder" or "file".
        weight_files, side_files, empty_folders: the files of the target.
        target_bytes: size of the target's tensors in bytes, without headers and side files.
        sizes: sizes of the delta's parts.
        info: how the target was made, as recorded in the delta.
        tensors: one entry for each tensor of the target, in order.
    """

    base_id: str | None
    base_fingerprint: str
    n_unused: int
    target_fingerprint: str | None
    target_kind: str
    weight_files: tuple[WeightFile, ...]
    side_files: tuple[SideFile, ...]
    empty_folders: tuple[str, ...]
    target_bytes: int
    sizes: Sizes
    info: Mapping[str, JSON]
    tensors: tuple[TensorInspection, ...]

    @property
    def nnz(self) -> int:
        """Number of changed elements of all tensors."""
        return sum(tensor.nnz for tensor in self.tensors)

    @property
    def numel(self) -> int:
        """Number of elements of all tensors of the target."""
        return sum(tensor.numel for tensor in self.tensors)

    @property
    def density(self) -> float:
        """Changed elements over all elements; 0 if there are none."""
        return _ratio(self.nnz, self.numel) or 0.0

    @property
    def layers(self) -> list[Grid]:
        """The tensors as grids of layers and kinds, one grid for each stack of layers (``ops.layers``)."""
        return by_layer(self.tensors, self.mean_changes)[0]

    @property
    def mean_changes(self) -> dict[str, float]:
        """Mean |change| of the changed elements, by tensor, where the training recorded it."""
        return mean_changes(self.info)

    @property
    def losses(self) -> list[tuple[int, float]]:
        """The (step, loss) pairs that the training recorded; empty if it recorded none."""
        return curve_points(self.info)

    @property
    def states(self) -> dict[str, int]:
        """Number of tensors in each of ``STATES``, in that order."""
        found = Counter(tensor.state for tensor in self.tensors)
        return {state: found[state] for state in STATES}

    @property
    def index_encodings(self) -> dict[str, int]:
        """Number of chunks that use each index encoding, the most used first."""
        return _summed(tensor.index_encodings for tensor in self.tensors)

    @property
    def value_encodings(self) -> dict[str, int]:
        """Number of chunks that use each value encoding, the most used first."""
        return _summed(tensor.value_encodings for tensor in self.tensors)

    @property
    def share(self) -> float | None:
        """Size of the file over the size of the target's tensors.

        None if the delta was not read from a file, or the tensors have no bytes.
        """
        return _ratio(self.sizes.file_bytes, self.target_bytes)

    @property
    def payload_bytes_per_change(self) -> float | None:
        """Bytes of positions and values per changed element; None if nothing changed."""
        return _ratio(self.sizes.payload_bytes, self.nnz)

    @property
    def file_bytes_per_change(self) -> float | None:
        """Bytes of the whole file per changed element; None if there is no file or no change."""
        return _ratio(self.sizes.file_bytes, self.nnz)

    def as_json(self) -> dict[str, JSON]:
        """Return the inspection as JSON."""
        n_tensors = Counter(tensor.file for tensor in self.tensors)
        return {
            "base": {
                "id": self.base_id,
                "fingerprint": self.base_fingerprint,
                "n_unused": self.n_unused,
            },
            "target": {
                "kind": self.target_kind,
                "fingerprint": self.target_fingerprint,
                "tensor_bytes": self.target_bytes,
                "weight_files": [
                    {
                        "path": f.path,
                        "n_tensors": n_tensors[f.path],
                        "stored_header": f.stored is not None,
                    }
                    for f in self.weight_files
                ],
                "side_files": [
                    {"path": f.path, "n_bytes": f.n_bytes, "carried": f.stored is not None}
                    for f in self.side_files
                ],
                "empty_folders": list(self.empty_folders),
            },
            "n_tensors": len(self.tensors),
            "states": {**self.states},
            "nnz": self.nnz,
            "numel": self.numel,
            "density": self.density,
            "share": self.share,
            "sizes": self.sizes.as_json(),
            "payload_bytes_per_change": self.payload_bytes_per_change,
            "file_bytes_per_change": self.file_bytes_per_change,
            "index_encodings": {**self.index_encodings},
            "value_encodings": {**self.value_encodings},
            "info": dict(self.info),
            "tensors": [tensor.as_json() for tensor in self.tensors],
        }


def inspect(delta: AnyDelta, *, base: AnyPath | None = None) -> Inspection:
    """Return what a delta changes and how large its parts are. The payload is not read.

    Args:
        delta: an ``.sd`` file, a delta, or a file or folder of another form that ``convert`` reads. The
            size of the whole file is reported only for an ``.sd`` file or a delta loaded from one.
        base: the base of the delta, which other forms need; not used otherwise.

    Raises:
        BaseNeeded: the delta has another form, and ``base`` is None.
        FormatError: the file is not a delta that this release can read.
        OSError: the file cannot be opened.
    """
    with opened_all([delta], base) as (given,):
        columns = columns_of(given.tensors)
        rows = tuple(_of_columns(columns) if columns else map(_tensor, given.tensors))
        target, known = given.target, given.target_fingerprint
        return Inspection(
            given.base.id,
            given.base_fingerprint.hex(),
            given.base.n_unused,
            None if known is None else known.hex(),
            "folder" if target.is_folder else "file",
            target.weight_files,
            target.side_files,
            target.empty_folders,
            given.target_bytes,
            _sizes(given, rows),
            given.info,
            rows,
        )


def _sizes(delta: Delta, rows: tuple[TensorInspection, ...]) -> Sizes:
    index_bytes = sum(row.index_bytes for row in rows)
    value_bytes = sum(row.value_bytes for row in rows)
    side_file_bytes = _stored_bytes(file.stored for file in delta.target.side_files)
    stored_header_bytes = _stored_bytes(file.stored for file in delta.target.weight_files)
    file_bytes = header_bytes = manifest_bytes = None
    if isinstance(delta.payload, FilePayload):
        file_bytes, manifest_bytes = delta.payload.file_bytes, delta.payload.manifest_bytes
        payload_bytes = index_bytes + value_bytes + side_file_bytes + stored_header_bytes
        header_bytes = file_bytes - manifest_bytes - payload_bytes
    return Sizes(
        file_bytes,
        header_bytes,
        manifest_bytes,
        index_bytes,
        value_bytes,
        side_file_bytes,
        stored_header_bytes,
    )


def _stored_bytes(stored: Iterable[Stored | None]) -> int:
    return sum(one.stored_bytes for one in stored if one)


def _tensor(row: Row) -> TensorInspection:
    base, target, chunks = row.base, row.target, row.chunks
    return TensorInspection(
        row.name,
        row.file,
        _state(
            row.name,
            target,
            base.name if base else None,
            base.spec if base else None,
            is_copied=row.is_copied,
        ),
        target.dtype.name,
        target.shape,
        base.name if base else None,
        base.file if base else None,
        base.spec.shape if base else None,
        row.nnz,
        target.n_elements,
        sum(chunk.stored[0] for chunk in chunks) if chunks else 0,
        sum(sum(chunk.stored[1:]) for chunk in chunks) if chunks else 0,
        Counter(chunk.coding.index for chunk in chunks) if chunks else _NONE,
        Counter(chunk.coding.values for chunk in chunks) if chunks else _NONE,
    )


def _of_columns(rows: RowColumns) -> Iterator[TensorInspection]:
    """Yield what ``_tensor`` returns for each row, without making the rows."""
    chunks, codings = rows.chunks, rows.chunks.codings
    index_bytes = np.diff(starts(chunks.stored[chunks.first_stored[:-1]])[rows.first_chunk])
    columns: Any = (
        rows.file, rows.layout, rows.base_file, rows.base_layout, rows.is_copied, rows.n_elements,
        np.diff(starts(chunks.nnz)[rows.first_chunk]), index_bytes,
        chunks.coded_bytes_of(rows.first_chunk) - index_bytes, rows.first_chunk[:-1],
        rows.first_chunk[1:],
    )  # fmt: skip
    coding = chunks.coding.tolist()
    for number, values in enumerate(zip(*(one.tolist() for one in columns), strict=True)):
        file, layout, base_file, base_layout, is_copied, n, nnz, index, value, first, last = values
        name, spec = rows.names[number], rows.layouts[layout]
        base = rows.layouts[base_layout] if base_file >= 0 else None
        base_name = rows.base_names.get(number, name) if base else None
        own = [codings[one] for one in coding[first:last]]
        yield TensorInspection(
            name,
            rows.paths[file],
            _state(name, spec, base_name, base, is_copied=is_copied),
            spec.dtype.name,
            spec.shape,
            base_name,
            rows.base_paths[base_file] if base else None,
            base.shape if base else None,
            nnz,
            n,
            index,
            value,
            Counter(one.index for one in own) if own else _NONE,
            Counter(one.values for one in own) if own else _NONE,
        )


def _state(
    name: str,
    target: TensorSpec,
    base_name: str | None,
    base: TensorSpec | None,
    *,
    is_copied: bool,
) -> str:
    if base is None or not base.same_dtype(target):
        return "added"
    before, after = base.shape, target.shape
    if before != after:
        same_rows = len(before) == len(after) and before[1:] == after[1:]
        return "resized" if same_rows else "reshaped"
    if not is_copied:
        return "changed"
    return "unchanged" if base_name == name else "renamed"


def _summed(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for one in counts:
        total.update(one)
    return dict(total.most_common())


def _ratio(part: int | None, whole: int) -> float | None:
    return None if part is None or not whole else part / whole
