"""Invert the rows of a delta without its base, or find out why the base is needed."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

import numpy as np

from sparsedelta.codecs.chunk import Chunk, Span, encode_chunk
from sparsedelta.codecs.values import ulp_codes, ulp_differences
from sparsedelta.files.layout import rows_by_file
from sparsedelta.format.delta import Delta
from sparsedelta.format.records import BaseTensor, Row
from sparsedelta.format.spool import SpoolPayload
from sparsedelta.tensors.changes import ChangeReader
from sparsedelta.tensors.parallel import Pace


def why_base_needed(delta: Delta) -> list[str]:
    """Return the reasons why the base is needed to invert a delta, as clauses; empty if it is not."""
    return [*_reasons_by_tensors(delta), *_reasons_by_files(delta)]


def _reasons_by_tensors(delta: Delta) -> Iterator[str]:
    if delta.base.n_unused:
        yield "it leaves out tensors of its base"
    if any(row.target.digest is None for row in delta.tensors):
        yield "it does not know the digests of its target"
    files = {file.path: base_file(delta, file.path) for file in delta.target.weight_files}
    for row in delta.tensors:
        reason = why_base_tensor_needed(row)
        if reason:
            yield reason
        if row.base and (row.base.name != row.name or row.base.file != files[row.file]):
            yield f"it renames or moves tensor {row.base.name!r}"


def base_file(delta: Delta, path: str) -> str:
    """Return the path in the base of the target's weight file ``path``, if both have the same layout.

    If base and target are single files, their names may differ (FORMAT §3.1).
    """
    files = {row.base.file for row in delta.tensors if row.base}
    if delta.target.is_folder or len(files) != 1:
        return path
    (file,) = files
    return path if "/" in file else file


def why_base_tensor_needed(row: Row) -> str | None:
    """Return the reason why a row cannot be inverted without its base tensor; None if it can."""
    if row.base is None:
        return None
    name = repr(row.base.name)
    if row.keep < row.base.spec.n_elements:
        return f"it cuts tensor {name}"
    for chunk in row.chunks:
        if chunk.start < row.keep and chunk.coding.values != "ulp":
            return f"it holds new values of tensor {name}, not differences"
        if chunk.start < row.keep and chunk.coding.classes:
            return f"its changes of tensor {name} are coded with the exponents of the base"
    return None


def _reasons_by_files(delta: Delta) -> Iterator[str]:
    for side_file in delta.target.side_files:
        if side_file.stored:
            yield f"it carries file {side_file.path!r}"
    for file, rows in rows_by_file(delta):
        if rows and all(row.base is None for row in rows):
            yield f"it adds all tensors of file {file.path!r}"
        elif file.stored and not all(row.keeps_all for row in rows):
            yield f"it stores the header of {file.path!r}, and the base has another header"


def inverse_row(row: Row, base: BaseTensor, delta: Delta, payload: SpoolPayload, pace: Pace) -> Row:
    """Return the inverse of a row; its chunks are added to ``payload``.

    Args:
        row: a row that can be inverted without its base tensor (``why_base_tensor_needed``).
        base: its base tensor, which is the target of the inverse.
        delta: the delta of the row.
        payload: receives the chunks.
        pace: receives the number of coded bytes read.
    """
    reader = ChangeReader(row, delta.payload, pace)
    found = (_negated(reader, chunk, payload) for chunk in row.chunks)
    made_from = BaseTensor(row.file, row.name, row.target)
    chunks = tuple(chain.from_iterable(found))
    return Row(base.file, base.name, base.spec, made_from, row.keep, chunks)


def _negated(reader: ChangeReader, chunk: Chunk, payload: SpoolPayload) -> Iterator[Chunk]:
    """Yield the inverse of a chunk; nothing if the chunk lies entirely beyond the base tensor."""
    n = min(chunk.end, reader.row.keep) - chunk.start
    if n <= 0:
        return
    for piece in reader.window(chunk.start, n):
        differences = ulp_differences(piece.codes)
        codes = ulp_codes(np.negative(differences, out=differences))
        # The digests of a chunk that is cut also cover the positions that are cut off.
        touched = chunk.touched[::-1] if chunk.touched and n == chunk.span else None
        negated, streams = encode_chunk(
            Span(chunk.start, n), piece.positions, codes, values="ulp", touched=touched
        )
        yield payload.add_chunk(negated, streams)


def is_invertible_alone(row: Row) -> bool:
    """Return whether ``inverse_row`` is as good as a comparison with the base tensor.

    It is if no base tensor is needed and no touched digest is lost.
    """
    return why_base_tensor_needed(row) is None and (
        row.is_copied
        or (row.keep == row.target.n_elements and all(chunk.touched for chunk in row.chunks))
    )
