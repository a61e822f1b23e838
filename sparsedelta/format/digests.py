"""Fingerprints: one digest for all tensors of a checkpoint (FORMAT §14)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache

import numpy as np
from blake3 import blake3

from sparsedelta.format.columns import Column, RowColumns, columns_of
from sparsedelta.format.records import DIGEST_BYTES, Row, TensorKey, TensorSpec

_DOMAIN = b"sparsedelta fingerprint 2\0"


def fingerprint(tensors: Iterable[tuple[str, TensorSpec]]) -> bytes:
    """Return the 32-byte fingerprint of a set of tensors.

    It depends on their names, dtypes, shapes and bytes, but not on their order or files.

    Args:
        tensors: name and spec of each tensor. Every spec must have a digest.
    """
    return blake3(_DOMAIN + b"".join(sorted(_coded(*tensor) for tensor in tensors))).digest()


def target_fingerprint(rows: Sequence[Row]) -> bytes | None:
    """Return the fingerprint of the target tensors of rows; None if the digest of one is not known."""
    columns = columns_of(rows)
    if columns is None:
        if any(row.target.digest is None for row in rows):
            return None
        return fingerprint((row.name, row.target) for row in rows)
    if bool((columns.target_at < 0).any()):
        return None
    return _of_columns(columns, columns.names, columns.layout, columns.target_at)


def base_fingerprint(rows: Sequence[Row]) -> bytes:
    """Return the fingerprint of the base tensors that rows refer to."""
    columns = columns_of(rows)
    if columns is None:
        return fingerprint((name, spec) for (_, name), spec in base_tensors(rows).items())
    own = np.flatnonzero(columns.base_file >= 0)
    names = [columns.base_names.get(row, columns.names[row]) for row in own.tolist()]
    paths = map(columns.base_paths.__getitem__, columns.base_file[own].tolist())
    keys = zip(paths, names, strict=True)
    last = dict(
        zip(keys, own.tolist(), strict=True)
    )  # a tensor that several rows refer to counts once
    used = np.array([*last.values()], np.int64)
    return _of_columns(
        columns, [name for _, name in last], columns.base_layout[used], columns.base_at[used]
    )


def _of_columns(
    columns: RowColumns, names: Sequence[str], layout: Column, digest_at: Column
) -> bytes:
    """Return the fingerprint of tensors with these names, layouts and digests."""
    layouts = [_coded_layout(spec.dtype.name, spec.shape) for spec in columns.layouts]
    coded = (name.encode("utf-8") for name in names)
    places = zip(layout.tolist(), digest_at.tolist(), strict=True)
    records = [
        len(name).to_bytes(4, "little")
        + name
        + layouts[one]
        + columns.digests[at : at + DIGEST_BYTES]
        for name, (one, at) in zip(coded, places, strict=True)
    ]
    return blake3(_DOMAIN + b"".join(sorted(records))).digest()


def _coded(name: str, spec: TensorSpec) -> bytes:
    coded = name.encode("utf-8")
    layout = _coded_layout(spec.dtype.name, spec.shape)
    return len(coded).to_bytes(4, "little") + coded + layout + (spec.digest or b"")


@lru_cache(maxsize=1 << 10)
def _coded_layout(dtype: str, shape: tuple[int, ...]) -> bytes:
    coded = dtype.encode("utf-8")
    sizes = (size.to_bytes(8, "little") for size in shape)
    return b"".join([bytes([len(coded)]), coded, len(shape).to_bytes(4, "little"), *sizes])


def base_tensors(rows: Iterable[Row]) -> dict[TensorKey, TensorSpec]:
    """Return the specs of the base tensors that rows refer to, by file and name in the base."""
    return {row.base.key: row.base.spec for row in rows if row.base}
