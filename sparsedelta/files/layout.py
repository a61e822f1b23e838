"""The layout of the target's weight files: header bytes, and the offset of each tensor (FORMAT §3.2)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from blake3 import blake3

from sparsedelta.errors import Corrupt, FormatError
from sparsedelta.format.columns import Column, RowColumns, columns_of
from sparsedelta.format.delta import Delta
from sparsedelta.format.header_columns import render_header_columns
from sparsedelta.format.manifest import read_text
from sparsedelta.format.records import DIGEST_BYTES, Row, Stored, TensorSpec, WeightFile
from sparsedelta.format.safetensors_header import HeaderEntry, parse_header, render_header


@dataclass(frozen=True, slots=True)
class FileLayout:
    """The layout of one weight file of the target.

    Attributes:
        path: relative to the target.
        header: the bytes of its header, without the length before them.
        offsets: position of each tensor's first byte in the file, (n,).
        n_bytes: size of the whole file.
    """

    path: str
    header: bytes
    offsets: Column
    n_bytes: int


def rows_by_file(delta: Delta) -> list[tuple[WeightFile, tuple[Row, ...]]]:
    """Return each weight file of the target with its rows."""
    rows: dict[str, list[Row]] = {file.path: [] for file in delta.target.weight_files}
    for row in delta.tensors:
        rows[row.file].append(row)
    return [(file, tuple(rows[file.path])) for file in delta.target.weight_files]


def target_layout(delta: Delta) -> list[FileLayout]:
    """Return the layout of each weight file of the target.

    Raises:
        Corrupt: a header does not have the digest in the manifest, or a stored header does not
            describe the tensors of its file.
        LimitExceeded: a stored header exceeds a limit.
    """
    columns = columns_of(delta.tensors)
    if columns:
        return _layout_of_columns(delta, columns)
    result = []
    for file, rows in rows_by_file(delta):
        entries = list(_entries((row.name, row.target) for row in rows))
        header = _checked(file, _header(delta, file, entries))
        ends = np.array([entry.end for entry in entries], np.int64)
        result.append(_placed(file, header, ends))
    return result


def _layout_of_columns(delta: Delta, columns: RowColumns) -> list[FileLayout]:
    result, start = [], 0
    counts = np.bincount(columns.file, minlength=len(columns.paths)).tolist()
    for file, n in zip(delta.target.weight_files, counts, strict=True):
        rows = slice(start, start + n)
        start += n
        ends = np.cumsum(columns.n_bytes[rows])
        used, layout = np.unique(columns.layout[rows], return_inverse=True)
        names, layouts = columns.names[rows], [columns.layouts[i] for i in used.tolist()]
        header = None
        if not file.stored:
            header = render_header_columns(file.metadata, names, layouts, layout, ends)
        if header is None:
            specs = map(layouts.__getitem__, layout.tolist())
            header = _header(delta, file, [*_entries(zip(names, specs, strict=True))])
        result.append(_placed(file, _checked(file, header), ends))
    return result


def _placed(file: WeightFile, header: bytes, ends: Column) -> FileLayout:
    """Return the layout of a file whose tensors end at ``ends``, counted from the start of the data."""
    start = 8 + len(header)
    begins = np.concatenate([[0], ends])
    return FileLayout(file.path, header, start + begins[:-1], start + int(begins[-1]))


def _header(delta: Delta, file: WeightFile, entries: Sequence[HeaderEntry]) -> bytes:
    """Return the header bytes of a weight file; their digest is not checked."""
    if file.stored:
        return _read_stored(delta, file, file.stored, entries)
    return render_header(file.metadata, entries)


def _checked(file: WeightFile, raw: bytes) -> bytes:
    """Return the header of a weight file if it has the right digest."""
    found = blake3(raw).digest()[:DIGEST_BYTES]
    if found != file.digest:
        raise Corrupt(
            f"the header of {file.path!r} does not match its digest; the delta is damaged",
            expected=file.digest.hex(),
            found=found.hex(),
        )
    return raw


def _read_stored(
    delta: Delta, file: WeightFile, stored: Stored, entries: Sequence[HeaderEntry]
) -> bytes:
    what = f"the stored header of {file.path!r}"
    raw = read_text(delta.payload.read(stored.offset, stored.stored_bytes), stored.n_bytes)
    try:
        header = parse_header(raw, what)
    except FormatError as error:
        raise Corrupt(str(error)) from error
    if not header.only_known_members or set(header.entries) != set(entries):
        raise Corrupt(f"{what} describes other tensors than the delta; the delta is inconsistent")
    return raw


def canonical_header(file: WeightFile, tensors: Iterable[tuple[str, TensorSpec]]) -> bytes:
    """Return the bytes of a file's canonical header, with its metadata.

    Args:
        file: gives the metadata.
        tensors: name and spec of each tensor, in the order of the data.
    """
    return render_header(file.metadata, _entries(tensors))


def _entries(tensors: Iterable[tuple[str, TensorSpec]]) -> Iterator[HeaderEntry]:
    begin = 0
    for name, spec in tensors:
        end = begin + spec.n_bytes
        yield HeaderEntry(name, spec.dtype.name, spec.shape, begin, end)
        begin = end
