"""Read the columns of a manifest's structure and check them: rows (FORMAT §4) and chunks (FORMAT §5).

All checks run over whole columns. If chunks fail one, the same checks are made chunk by chunk, to find the first
wrong one and to say what is wrong with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from sparsedelta.codecs.chunk import (
    CODED_DIGEST_BYTES,
    MAX_SPAN,
    TOUCHED_BYTES,
    Coding,
    are_possible,
    check_chunk,
    n_streams,
)
from sparsedelta.dtypes import WIDTHS
from sparsedelta.errors import Corrupt, LimitExceeded
from sparsedelta.format.columns import ChunkColumns, Column, RowColumns, starts
from sparsedelta.format.records import DIGEST_BYTES, Target, TensorSpec, default_keep
from sparsedelta.format.safetensors_header import METADATA_KEY
from sparsedelta.format.strict_json import fixed_items, items
from sparsedelta.format.structure import (
    MAX_INTEGER_BITS,
    DigestReader,
    column,
    objects,
    strings,
)

MAX_ROWS = 1 << 19
MAX_CHUNKS = 1 << 20
MAX_NAME_BYTES = 1024
TENSORS = ("names", "layouts", "base_files", "base_names", "base_layouts", "keep", "n_chunks")
CHUNKS = ("starts", "spans", "nnz", "codings", "touched", "raw", "stored")


def read_columns(
    target: Target,
    counts: Sequence[int],
    base_paths: Sequence[str],
    layouts: Sequence[TensorSpec],
    codings: Sequence[Coding],
    tensors: Any,
    chunks: Any,
    reader: DigestReader,
    *,
    known: bool,
    offset: int,
    payload_bytes: int,
) -> RowColumns:
    """Return the checked columns of a manifest.

    Args:
        target: the target's files.
        counts: number of rows of each weight file.
        base_paths: paths of the base's weight files.
        layouts: the layouts, without digests.
        codings: the codings.
        tensors: member ``tensors`` of the structure, not checked.
        chunks: member ``chunks`` of the structure, not checked.
        reader: gives the digests.
        known: whether the digests of all target tensors are given.
        offset: payload offset of the first chunk.
        payload_bytes: size of the payload.

    Raises:
        FormatError: a rule of FORMAT §12 is broken.
    """
    names, own, files, base_names, base_layouts, keeps, n_chunks = objects(
        tensors, "tensors", TENSORS
    )
    n = len(items(names, "names", MAX_ROWS))
    strings(names, "names")
    layout = column(own, "layouts of tensors", n, below=len(layouts))
    base_file = column(files, "base_files", n, least=-1, below=len(base_paths))
    n_chunks = column(n_chunks, "n_chunks", n, below=MAX_CHUNKS + 1)  # so that sums do not overflow
    if sum(counts) != n:
        raise Corrupt(f"the weight files have {sum(counts)} rows, but there are {n} names")
    _check_names(names, counts)
    other_names = _exceptions(base_names, "base_names", base_file)
    other_layouts = _exceptions(base_layouts, "base_layouts", base_file, len(layouts))
    for exceptions, usual in ((other_names, names), (other_layouts, own)):
        if any(usual[row] == item for row, item in exceptions.items()):
            raise Corrupt(
                "base_names or base_layouts repeat the name or layout of the tensor itself"
            )
    _check_name_bytes(other_names.values())
    _check_total(layouts, layout)
    base_layout = layout.copy()
    base_layout[[*other_layouts]] = [*other_layouts.values()]
    sizes = np.array([spec.n_elements for spec in layouts] or [0], np.int64)
    has_base = base_file >= 0
    keep = np.where(has_base, sizes[layout], 0)
    for row, other in other_layouts.items():
        keep[row] = default_keep(layouts[other], layouts[own[row]])
    for row, number in _exceptions(keeps, "keep", base_file, MAX_INTEGER_BITS).items():
        if number >= keep[row]:
            raise Corrupt(
                f"tensor {names[row]!r} keeps {number} elements, expected fewer than {keep[row]}"
            )
        keep[row] = number
    first_chunk = starts(n_chunks)
    no_chunks = first_chunk[1:] == first_chunk[:-1]
    same_size = (keep == sizes[base_layout]) & (keep == sizes[layout])
    is_copied = has_base & no_chunks & same_size
    base_at = _placed(reader, has_base)
    target_at = _placed(reader, ~is_copied if known else ~has_base)
    widths = np.array([spec.dtype.width for spec in layouts] or [0], np.int64)[layout]
    target_at = np.where(is_copied, base_at, target_at)
    chunk_columns = _read_chunks(
        chunks, codings, names, first_chunk, widths, reader, offset=offset,
        payload_bytes=payload_bytes,
    )  # fmt: skip
    found = RowColumns(
        [file.path for file in target.weight_files],
        np.repeat(np.arange(len(counts)), counts),
        names,
        layouts,
        layout,
        np.array([spec.n_bytes for spec in layouts] or [0], np.int64)[layout],
        sizes[layout],
        base_paths,
        base_file,
        other_names,
        base_layout,
        keep,
        is_copied,
        base_at,
        target_at,
        first_chunk,
        chunk_columns,
        reader.raw,
    )
    _check_chunks(found, known=known)
    return found


def _placed(reader: DigestReader, wanted: npt.NDArray[np.bool_]) -> Column:
    """Return where the digests of the rows that have one are; -1 for the others."""
    at = np.full(len(wanted), -1, np.int64)
    at[wanted] = reader.places(int(np.count_nonzero(wanted)), DIGEST_BYTES)
    return at


def _exceptions(
    value: Any, what: str, base_file: Column, below: int | None = None
) -> dict[int, Any]:
    """Return a list of pairs ``[row, value]`` as a mapping from row numbers to values.

    The values must be strings, or integers below ``below`` if that is given.
    """
    pairs = [fixed_items(item, what, 2) for item in items(value, what, MAX_ROWS)]
    rows = column([row for row, _ in pairs], what, len(pairs), below=len(base_file))
    values = [item for _, item in pairs]
    if bool((rows[1:] <= rows[:-1]).any()):
        raise Corrupt(f"{what}: the row numbers do not ascend")
    if bool((base_file[rows] < 0).any()):
        raise Corrupt(f"{what}: a row without a base is listed")
    if below is None:
        strings(values, what)
    else:
        column(values, what, len(pairs), below=below)
    return dict(pairs)


def _check_total(layouts: Sequence[TensorSpec], layout: Column) -> None:
    counts = np.bincount(layout, minlength=len(layouts)).tolist()
    total = sum(8 * spec.n_bytes * n for spec, n in zip(layouts, counts, strict=True))
    if total >= MAX_INTEGER_BITS:
        raise LimitExceeded(f"the target has {total} bits, expected fewer than 2^63")


def _check_names(names: list[str], counts: Sequence[int]) -> None:
    _check_name_bytes(names)
    start = 0
    for count in counts:
        own = set(names[start : start + count])
        start += count
        if len(own) != count:
            raise Corrupt("a weight file has two tensors of the same name")
        if METADATA_KEY in own:
            raise Corrupt(f"a tensor cannot be named {METADATA_KEY}")


def _check_name_bytes(names: Iterable[str]) -> None:
    for name in names:
        if 4 * len(name) > MAX_NAME_BYTES < len(name.encode("utf-8")):
            raise LimitExceeded(f"tensor name {name[:80]!r}… is longer than {MAX_NAME_BYTES} bytes")


def _read_chunks(
    value: Any,
    codings: Sequence[Coding],
    names: Sequence[str],
    first_chunk: Column,
    widths: Column,
    reader: DigestReader,
    *,
    offset: int,
    payload_bytes: int,
) -> ChunkColumns:
    """Return the columns of ``chunks``, with the places of sizes and digests.

    Args:
        value: member ``chunks`` of the structure, not checked.
        codings: the codings.
        names: the names of the rows, for messages.
        first_chunk: where the chunks of each row begin, and the end of the last.
        widths: bytes of an element, for each row.
        reader: gives the digests.
        offset: payload offset of the first chunk.
        payload_bytes: size of the payload.
    """
    start, spans, nnz, coding, touched, raw, stored = objects(value, "chunks", CHUNKS)
    n = len(items(start, "starts", MAX_CHUNKS))
    if int(first_chunk[-1]) != n:
        raise Corrupt(f"the rows have {first_chunk[-1]} chunks, but {n} are listed")
    # Without repetitions there are few codings, so that a check for each of them is quick.
    known = [*dict.fromkeys(codings)]
    numbers = {one: number for number, one in enumerate(known)}
    renumbered = np.array([numbers[one] for one in codings] or [0], np.int64)
    coding_column = renumbered[column(coding, "codings of chunks", n, below=len(codings))]
    is_touched = column(touched, "touched of chunks", n, below=2) == 1
    raw_column, stored_column = column(raw, "raw sizes", None), column(stored, "stored sizes", None)
    end = offset + sum(stored)
    if end != payload_bytes:
        raise Corrupt(f"the payload has {payload_bytes} bytes, expected {end} by the manifest")
    width = np.repeat(widths, np.diff(first_chunk))
    table = np.array(
        [[n_streams(one, w) if w in WIDTHS else (0, 0) for w in range(9)] for one in known],
        np.int64,
    ).reshape(-1, 9, 2)
    n_streams_of = table[coding_column, width]
    first_stored, first_raw = starts(n_streams_of[:, 0]), starts(n_streams_of[:, 1])
    for first, found in ((first_stored, stored_column), (first_raw, raw_column)):
        if first[-1] < len(found):
            raise Corrupt("the chunks list more stream sizes than there are streams")
        if first[-1] > len(found):
            chunk = int(np.searchsorted(first, len(found), "right")) - 1
            name = names[int(np.searchsorted(first_chunk, chunk, "right")) - 1]
            raise Corrupt(f"tensor {name!r}: the sizes of some streams are missing")
    ends = starts(stored_column)[first_stored]
    coded_at = reader.places(n, CODED_DIGEST_BYTES)
    touched_at = np.full(n, -1, np.int64)
    touched_at[is_touched] = reader.places(int(np.count_nonzero(is_touched)), 2 * TOUCHED_BYTES)
    return ChunkColumns(
        known,
        column(start, "starts of chunks", n),
        column(spans, "spans of chunks", n),
        column(nnz, "nnz of chunks", n),
        coding_column,
        width,
        raw_column,
        stored_column,
        first_raw,
        first_stored,
        offset + ends,
        coded_at,
        touched_at,
    )


def _check_chunks(rows: RowColumns, *, known: bool) -> None:
    """Check all chunks (FORMAT §12, R8, R16 and R17); see ``check_chunk``."""
    chunks = rows.chunks
    n_chunks = np.diff(rows.first_chunk)
    row = np.repeat(np.arange(len(n_chunks)), n_chunks)
    start, span, n_elements = chunks.start, chunks.span, rows.n_elements[row]
    right = (span >= 1) & (span <= MAX_SPAN) & (start <= n_elements - span)
    right &= (chunks.nnz >= 1) & (chunks.nnz <= span)
    right[1:] &= (row[1:] != row[:-1]) | (start[1:] >= start[:-1] + span[:-1])
    if not known:
        right &= chunks.touched_at >= 0
    if bool(right.all()) and _have_possible_sizes(chunks):
        return
    for number in range(len(n_chunks)):
        _check_row(rows, number, known=known)


def _check_row(rows: RowColumns, number: int, *, known: bool) -> None:
    """Check the chunks of one row, and say what is wrong."""
    spec, end = rows.layouts[rows.layout[number]], 0
    first, last = rows.first_chunk[number : number + 2].tolist()
    for chunk in rows.chunk_records(first, last):
        check_chunk(chunk, spec.dtype, spec.n_elements)
        if chunk.start < end:
            raise Corrupt(f"tensor {rows.names[number]!r}: its chunks overlap or do not ascend")
        if not (chunk.touched or known):
            raise Corrupt(
                f"tensor {rows.names[number]!r}: it has no target digest, and a chunk has no touched"
                " digests"
            )
        end = chunk.end


def _have_possible_sizes(chunks: ChunkColumns) -> bool:
    """Return whether the sizes of all streams are possible; see ``check_chunk``."""
    group = 9 * chunks.coding + chunks.width
    for one in np.unique(group).tolist():
        own = group == one
        if not are_possible(
            chunks.codings[one // 9],
            one % 9,
            chunks.nnz[own],
            chunks.span[own],
            chunks.first_raw[:-1][own],
            chunks.first_stored[:-1][own],
            chunks.raw,
            chunks.stored,
        ):
            return False
    return True
