"""The inverse of a delta as far as the delta alone tells it: rows, and the files they lie in."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import chain

import numpy as np

from sparsedelta.codecs.chunk import Chunk, chunk_span, encode_chunk
from sparsedelta.codecs.values import ulp_codes, ulp_differences
from sparsedelta.files.layout import rows_by_file
from sparsedelta.format.delta import Delta
from sparsedelta.format.records import Change, Target, TensorDelta, TensorSpec, tensor_key
from sparsedelta.format.spool import SpoolPayload
from sparsedelta.ops.stacking.common_files import is_structural
from sparsedelta.tensors.changes import Stage, stage_of
from sparsedelta.tensors.parallel import Pace


def only_base_tells(delta: Delta) -> list[str]:
    """Return why the base is needed to invert a delta, each reason as a clause; none if it is not."""
    return [*filter(None, map(why_row, delta.tensors)), *_why_files(delta)]


def why_row(row: TensorDelta) -> str | None:
    """Return why a row cannot be inverted without the base, None if it can."""
    name, change = repr(row.name), row.change
    if row.target is None:
        return f"it removes tensor {name}"
    if row.base is None or change is None:
        return None
    if row.base.dtype is not row.target.dtype:
        return f"it retypes tensor {name}"
    if change.values != "ulp":
        return f"it holds new values of tensor {name}, not differences"
    if any(chunk.needs_base for chunk in change.chunks):
        return f"it codes the changes of tensor {name} by its base's exponents"
    if change.keep < row.base.n_elements:
        return f"it cuts tensor {name}"
    return None


def _why_files(delta: Delta) -> Iterator[str]:
    for side_file in delta.target.side_files:
        if side_file.carried:
            yield f"it carries file {side_file.path!r}"
    for file, rows in rows_by_file(delta):
        if rows and all(row.base is None for row in rows):
            yield f"it adds all tensors of file {file.path!r}"
        elif file.stored_header and any(is_structural(row) for row in rows):
            yield f"it stores the header of {file.path!r}, which its base cannot have"


def files_without_base(delta: Delta) -> Target:
    """Return the files of the inverse's target: those of the delta's target, less added tensors."""
    weight_files = tuple(
        replace(file, n_tensors=sum(row.base is not None for row in rows))
        for file, rows in rows_by_file(delta)
    )
    return replace(delta.target, fingerprint=delta.base.fingerprint, weight_files=weight_files)


def inverse_row(delta: Delta, row: TensorDelta, payload: SpoolPayload, pace: Pace) -> TensorDelta:
    """Return the inverse of a row that needs no base, having put its chunks into ``payload``."""
    if row.base is None or row.change is None:
        return TensorDelta(row.name, row.target, row.base, None)
    keep = row.change.keep
    stage = replace(stage_of(delta, row), limit=keep)
    found = [_negated(stage, row.base, chunk.number, payload, pace) for chunk in row.change.chunks]
    swapped = row.change.touched[::-1] if row.change.touched else None
    whole = stage.target.n_elements == keep  # else digests are of positions that are cut, too
    change = Change(keep, "ulp", swapped if whole else None, tuple(chain.from_iterable(found)))
    return TensorDelta(row.name, row.target, row.base, change)


def _negated(
    stage: Stage, base: TensorSpec, number: int, payload: SpoolPayload, pace: Pace
) -> list[Chunk]:
    """Return the record of a negated chunk; none if all of it is cut."""
    if stage.chunk(number) is None:
        return []
    positions, codes = stage.decode(number, pace)
    if not len(positions):
        return []
    differences = ulp_differences(codes)
    chunk, frames = encode_chunk(
        number,
        chunk_span(base.n_elements, number),
        positions,
        ulp_codes(np.negative(differences, out=differences)),
    )
    payload.append(tensor_key(stage.name), frames)
    return [chunk]
