"""The inverse of a delta as far as the delta alone tells it: rows, and the files they lie in."""

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


def only_base_tells(delta: Delta) -> list[str]:
    """Return why the base is needed to invert a delta, each reason as a clause; none if it is not."""
    return [*_why_tensors(delta), *_why_files(delta)]


def _why_tensors(delta: Delta) -> Iterator[str]:
    if delta.base.n_unused:
        yield "it leaves out tensors of its base"
    if any(row.target.digest is None for row in delta.tensors):
        yield "it does not know the digests of its target"
    files = {file.path: base_file(delta, file.path) for file in delta.target.weight_files}
    for row in delta.tensors:
        reason = why_row(row)
        if reason:
            yield reason
        if row.base and (row.base.name != row.name or row.base.file != files[row.file]):
            yield f"it renames or moves tensor {row.base.name!r}"


def base_file(delta: Delta, path: str) -> str:
    """Return the path in the base of a weight file of the target, if the base has the target's layout.

    The path of a checkpoint that is one file is but a suggestion (FORMAT §3.1).
    """
    files = {row.base.file for row in delta.tensors if row.base}
    if delta.target.is_folder or len(files) != 1:
        return path
    (file,) = files
    return path if "/" in file else file


def why_row(row: Row) -> str | None:
    """Return why the tensor's elements cannot be inverted without the base, None if they can."""
    if row.base is None:
        return None
    name = repr(row.base.name)
    if row.keep < row.base.spec.n_elements:
        return f"it cuts tensor {name}"
    for chunk in row.chunks:
        if chunk.start < row.keep and chunk.coding.values != "ulp":
            return f"it holds new values of tensor {name}, not differences"
        if chunk.start < row.keep and chunk.coding.classes:
            return f"it sorts the changes of tensor {name} by its base's exponents"
    return None


def _why_files(delta: Delta) -> Iterator[str]:
    for side_file in delta.target.side_files:
        if side_file.stored:
            yield f"it carries file {side_file.path!r}"
    for file, rows in rows_by_file(delta):
        if rows and all(row.base is None for row in rows):
            yield f"it adds all tensors of file {file.path!r}"
        elif file.stored and not all(row.keeps_all for row in rows):
            yield f"it stores the header of {file.path!r}, which its base cannot have"


def inverse_row(row: Row, base: BaseTensor, delta: Delta, payload: SpoolPayload, pace: Pace) -> Row:
    """Return the inverse of a row that needs no base, having put its chunks into ``payload``.

    Args:
        row: the row.
        base: what it is made from, and the inverse makes.
        delta: holds it.
        payload: receives the chunks.
        pace: told of the coded bytes.
    """
    reader = ChangeReader(row, delta.payload, pace)
    found = (_negated(reader, chunk, payload) for chunk in row.chunks)
    made_from = BaseTensor(row.file, row.name, row.target)
    chunks = tuple(chain.from_iterable(found))
    return Row(base.file, base.name, base.spec, made_from, row.keep, chunks)


def _negated(reader: ChangeReader, chunk: Chunk, payload: SpoolPayload) -> Iterator[Chunk]:
    """Yield the record of the negated chunk; none if all of it is cut."""
    n = min(chunk.end, reader.row.keep) - chunk.start
    if n <= 0:
        return
    for piece in reader.window(chunk.start, n):
        differences = ulp_differences(piece.codes)
        codes = ulp_codes(np.negative(differences, out=differences))
        # Of a chunk that is cut, the digests are of positions that are cut, too.
        touched = chunk.touched[::-1] if chunk.touched and n == chunk.span else None
        negated, streams = encode_chunk(
            Span(chunk.start, n), piece.positions, codes, values="ulp", touched=touched
        )
        yield payload.add_chunk(negated, streams)


def told(row: Row) -> bool:
    """Return whether nothing would be lost by inverting a row without reading its base tensor."""
    return why_row(row) is None and (
        row.is_copied
        or (row.keep == row.target.n_elements and all(chunk.touched for chunk in row.chunks))
    )
