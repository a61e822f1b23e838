"""A safetensors header as columns, for files of many tensors; an entry becomes an object only when it is accessed.

Only headers as the safetensors library writes them are read this way, and only with the compiled kernels. Every other
header is read entry by entry (``safetensors_header``).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sparsedelta.codecs import kernels
from sparsedelta.dtypes import DTYPES, tensor_bytes
from sparsedelta.errors import FormatError
from sparsedelta.format.columns import Column, LazySequence
from sparsedelta.format.records import TensorSpec
from sparsedelta.format.safetensors_header import (
    ALIGNMENT,
    MAX_DIMENSIONS,
    METADATA_KEY,
    HeaderEntry,
)
from sparsedelta.format.strict_json import compact_json, parse_json

_METADATA = f'{{"{METADATA_KEY}":'.encode()
_MANY = 64  # for fewer entries, columns save no time
_LONGEST_NAME = 1024


@dataclass(frozen=True, slots=True)
class HeaderColumns:
    """The entries of a header, whose data follow each other without gaps.

    Attributes:
        metadata: the ``__metadata__``; None if it is missing.
        names: the name of each tensor.
        layouts: the layouts; all dtypes are known.
        layout: number of the layout of each tensor, (n,).
        begin: first byte of each tensor, and the end of the last, counted from the start of the data, (n + 1,).
    """

    metadata: dict[str, str] | None
    names: list[str]
    layouts: Sequence[TensorSpec]
    layout: Column
    begin: Column


class HeaderEntries(LazySequence[HeaderEntry]):
    """The entries of a header that was read as columns."""

    def __init__(self, columns: HeaderColumns) -> None:
        super().__init__(len(columns.names))
        self._columns = columns

    def records(self, start: int, end: int) -> list[HeaderEntry]:
        """Return the entries from ``start`` to ``end``."""
        columns = self._columns
        begins = columns.begin[start : end + 1].tolist()
        return [
            HeaderEntry(name, spec.dtype.name, spec.shape, begin, stop)
            for name, spec, begin, stop in zip(
                columns.names[start:end],
                map(columns.layouts.__getitem__, columns.layout[start:end].tolist()),
                begins,
                begins[1:],
                strict=False,
            )
        ]


def read_header_columns(raw: bytes) -> HeaderColumns | None:
    """Return the columns of a canonical header (FORMAT §3.2); None for any other header, and for a short one."""
    n = raw.count(b'"data_offsets":[')
    if kernels.native is None or n < _MANY:
        return None
    metadata, start = _read_metadata(raw)
    padding = len(raw) - len(raw.rstrip(b" "))
    if not start or len(raw) % ALIGNMENT or padding >= ALIGNMENT:
        return None
    table = np.empty((n, 3), np.int64)
    found = kernels.native.read_entries(raw, start, table)
    if found is None:
        return None
    names, texts = found
    layouts = [_read_layout(text) for text in texts]
    known = [layout for layout in layouts if layout is not None]
    layout, begin, end = np.ascontiguousarray(table.T)
    follow = begin[0] == 0 and bool((begin[1:] == end[:-1]).all())
    if len(known) < len(layouts) or not follow or not _are_plain(names):
        return None
    sizes = np.array([spec.n_bytes for spec in known], np.int64)
    if not bool((end - begin == sizes[layout]).all()):
        return None
    return HeaderColumns(metadata, names, known, layout, np.append(begin, end[-1]))


def _are_plain(names: list[str]) -> bool:
    unique = set(names)
    return (
        len(unique) == len(names)
        and METADATA_KEY not in unique
        and max(map(len, names)) <= _LONGEST_NAME
    )


def _read_metadata(raw: bytes) -> tuple[dict[str, str] | None, int]:
    """Return the metadata of a header, and where its entries begin; 0 if it is not canonical."""
    if not raw.startswith(_METADATA):
        return None, 1 if raw.startswith(b"{") else 0
    start = len(_METADATA)
    try:
        _, end = json.JSONDecoder().raw_decode(raw.decode("latin-1"), start)
        metadata = parse_json(raw[start:end], METADATA_KEY)
    except (FormatError, ValueError, RecursionError):
        return None, 0
    plain = type(metadata) is dict and all(type(value) is str for value in metadata.values())
    if not plain or compact_json(metadata) != raw[start:end] or raw[end : end + 1] != b",":
        return None, 0
    return metadata, end + 1


def _read_layout(text: bytes) -> TensorSpec | None:
    """Return a layout from its text in a header, ``F32","shape":[2,3]``; None if it is unusual."""
    name, _, sizes = text.partition(b'","shape":')
    dtype = DTYPES.get(name.decode("utf-8", "replace"))
    shape = tuple(map(int, filter(None, sizes[1:-1].split(b","))))
    if dtype is None or len(shape) > MAX_DIMENSIONS or math.prod(shape) >= 1 << 48:
        return None
    try:
        tensor_bytes(dtype, shape)
    except FormatError:
        return None
    return TensorSpec(dtype, shape)


def render_header_columns(
    metadata: Mapping[str, str] | None,
    names: Sequence[str],
    layouts: Sequence[TensorSpec],
    layout: Column,
    ends: Column,
) -> bytes | None:
    """Return a canonical header, as ``render_header`` does; None if the compiled kernels cannot render it.

    Args:
        metadata: the ``__metadata__``; None if there is none.
        names: the name of each tensor.
        layouts: the layouts.
        layout: number of the layout of each tensor, (n,).
        ends: where the data of each tensor end; those of the next begin there, (n,).
    """
    if kernels.native is None or len(names) < _MANY:
        return None
    texts = [
        compact_json(spec.dtype.name)[1:] + b',"shape":' + compact_json([*spec.shape])
        for spec in layouts
    ]
    entries = kernels.native.put_entries([*names], texts, layout, ends)
    if entries is None:
        return None
    start = b"{" if metadata is None else _METADATA + compact_json(dict(metadata)) + b","
    raw: bytes = start + entries + b"}"
    return raw + b" " * (-len(raw) % ALIGNMENT)
