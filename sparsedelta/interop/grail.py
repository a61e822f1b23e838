"""The delta files of grail (PULSE), versions 2, 3 and 3.1: one zstd frame of a JSON header and coded tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from sparsedelta._typing import JSON
from sparsedelta.codecs.values import Bits
from sparsedelta.errors import Corrupt, FormatError, LimitExceeded, UnsupportedVersion
from sparsedelta.files.checkpoint import Checkpoint
from sparsedelta.format.records import TensorSpec
from sparsedelta.format.safetensors_header import read_shape
from sparsedelta.format.strict_json import compact_json, integer, items, parse_json, text
from sparsedelta.interop.abilities import FLOATS, Abilities
from sparsedelta.interop.files import packed, unpacked, write_new
from sparsedelta.interop.form import Form, Reading, Setting, Settings
from sparsedelta.interop.scatter import Scatter, check_shape
from sparsedelta.interop.source import Source
from sparsedelta.interop.transition import Changed, Transition
from sparsedelta.interop.view import PatchedCheckpoint, check_same_length

_ZSTD = b"\x28\xb5\x2f\xfd"
_VERSIONS = {2: "2", 3: "3", 31: "3.1"}
_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_INDEX_DTYPES: dict[str, str] = {"uint8": "|u1", "uint16": "<u2", "int32": "<i4"}
_HEADER_BYTES = 1 << 20  # beside what the names of the tensors take
_INT32 = (1 << 31) - 1
_LEVEL = 1


class Grail(Form):
    """New values at gap-coded positions, without digests."""

    name = "grail"
    title = "grail (PULSE), delta file v2, v3 or v3.1"
    source = "one-covenant/grail at 54d6342, infrastructure/sparse_codec.py"
    abilities = Abilities(dtypes=FLOATS)
    settings: ClassVar[Settings] = {"version": (31, 3, 2)}

    def recognise(self, source: Source) -> bool:
        """Return whether the file is a zstd frame that begins with a grail header."""
        if source.start[:4] != _ZSTD:
            return False
        try:
            start = unpacked_start(source, 4 + 16)
        except FormatError:
            return False
        return start[4:].startswith(b'{"version":')

    def read(self, source: Source, base: Checkpoint) -> Reading:
        """Return the delta, opened with its base; see ``Form.read``."""
        specs = [tensor.spec for tensor in base.tensors.values()]
        most_header = _HEADER_BYTES + sum(1024 + 6 * len(t.name) for t in base.tensors.values())
        limit = 4 + most_header + 12 * sum(spec.n_elements for spec in specs)
        raw = unpacked(source.read_bytes(limit), limit, f"'{source.path}'")
        n_header = int.from_bytes(raw[:4], "little")
        if n_header > most_header:
            raise LimitExceeded(
                f"the header of '{source.path}' has {n_header} bytes, but that of a delta of this base has at most"
                f" {most_header}"
            )
        if len(raw) < 4 + n_header:
            raise Corrupt(f"'{source.path}' ends within its header; the delta is damaged")
        header = parse_json(raw[4 : 4 + n_header], f"the header of '{source.path}'")
        version = header.get("version") if isinstance(header, dict) else None
        if version not in _VERSIONS:
            raise UnsupportedVersion(
                f"'{source.path}' has version {str(version)[:20]}, expected 2, 3 or 31"
            )
        data = memoryview(raw)[4 + n_header :]
        patches: dict[str, _Change] = {}
        for entry in items(header.get("tensors"), "tensors"):
            one = _Change.of(entry, data, version)
            if one.name in patches:
                raise Corrupt(f"tensor {one.name!r} is listed twice; the delta is damaged")
            patches[one.name] = one
        says: dict[str, JSON] = {"version": _VERSIONS[version]}
        return Reading(PatchedCheckpoint(base, patches), "none", says)

    def write(self, change: Transition, out: Path, settings: Mapping[str, Setting]) -> None:
        """Write the form; see ``Form.write``."""
        version = int(settings["version"])
        entries: list[dict[str, Any]] = []
        blocks: list[bytes] = []
        offset = 0
        for one in change.changed():
            coded = _Coded.of(one, version)
            entries.append(coded.entry(one, offset, version))
            blocks += [*coded.indices, coded.values]
            offset += sum(map(len, blocks[-len(coded.indices) - 1 :]))
        header = compact_json({"version": version, "tensors": entries})
        raw = b"".join([len(header).to_bytes(4, "little"), header, *blocks])
        write_new(out, [packed(raw, _LEVEL)])


def unpacked_start(source: Source, n_bytes: int) -> bytes:
    """Return the first bytes that a zstd file holds, at most ``n_bytes``, without reading much of the file."""
    import zstandard

    try:
        with (
            open(source.path, "rb") as file,
            zstandard.ZstdDecompressor(max_window_size=1 << 27).stream_reader(file) as reader,
        ):
            found: bytes = reader.read(n_bytes)
    except zstandard.ZstdError as error:
        raise Corrupt(f"'{source.path}' is not an intact zstd frame: {error}") from error
    return found


@dataclass(frozen=True, slots=True)
class _Coded:
    """The streams of one tensor: one of positions for version 2, else rows and columns; and the values."""

    indices: tuple[bytes, ...]
    dtypes: tuple[str, ...]
    values: bytes

    @classmethod
    def of(cls, one: Changed, version: int) -> _Coded:
        """Return the streams of a changed tensor."""
        columns = _n_columns(one.spec.shape)
        rows = one.indices // columns
        if max(columns, int(rows[-1]), int(one.indices[-1]) if version == 2 else 0) > _INT32:
            raise ValueError(
                f"tensor {one.name!r} of shape {list(one.spec.shape)} needs positions of more than 31 bits, which"
                " grail files do not have; choose another form"
            )
        values = one.values.tobytes()
        if version == 2:
            return cls((np.diff(one.indices, prepend=0).astype("<i4").tobytes(),), (), values)
        row_gaps = np.diff(rows, prepend=0)
        new_row = np.diff(rows, prepend=-1) != 0
        cols = one.indices % columns
        col_gaps = np.where(new_row, cols, np.diff(cols, prepend=0))
        dtypes = ("int32", "int32")
        if version == 31:
            dtypes = (
                "uint8"
                if row_gaps.max() <= 0xFF
                else "uint16"
                if row_gaps.max() <= 0xFFFF
                else "int32",
                "uint16" if col_gaps.max() <= 0xFFFF else "int32",
            )
        streams = (
            gaps.astype(_INDEX_DTYPES[dtype]).tobytes()
            for gaps, dtype in zip((row_gaps, col_gaps), dtypes, strict=True)
        )
        return cls(tuple(streams), dtypes, values)

    def entry(self, one: Changed, offset: int, version: int) -> dict[str, Any]:
        """Return the member of ``tensors`` for these streams, the first of which is at ``offset``."""
        sizes = [len(stream) for stream in self.indices]
        entry: dict[str, Any] = {
            "name": one.name,
            "shape": list(one.spec.shape),
            "num_nonzero": len(one.indices),
            "value_dtype": _NAMES[one.spec.dtype.name],
        }
        if version == 31:
            entry |= {"row_dtype": self.dtypes[0], "col_dtype": self.dtypes[1]}
        entry |= {"indices_offset": offset, "indices_size": sum(sizes)}
        if version != 2:
            entry |= {"rows_size": sizes[0], "cols_size": sizes[1]}
        return entry | {"values_offset": offset + sum(sizes), "values_size": len(self.values)}


def _n_columns(shape: Sequence[int]) -> int:
    return max(1, math.prod(shape[1:])) if len(shape) > 1 else 1


@dataclass(frozen=True, slots=True)
class _Change:
    """An item of ``tensors``, whose positions are decoded when the tensor is read.

    Several items can name the same bytes, so positions of all tensors together could take any amount of memory.

    Attributes:
        name, shape: of the tensor.
        entry: the item.
        data: all streams.
        version: of the format.
        dtype: of the values.
    """

    name: str
    shape: tuple[int, ...]
    entry: Mapping[str, Any]
    data: memoryview
    version: int
    dtype: str

    @classmethod
    def of(cls, entry: Any, data: memoryview, version: int) -> _Change:
        """Return an item, checked as far as it can be without the base."""
        if not isinstance(entry, dict):
            raise Corrupt("an item of tensors is no object; the delta is damaged")
        name = text(entry.get("name"), "name")
        shape = read_shape(entry.get("shape"), f"tensor {name!r}")
        stated = entry.get("value_dtype")
        if not isinstance(stated, str) or stated not in _DTYPES:
            raise Corrupt(
                f"tensor {name!r} has values of dtype {str(stated)[:40]!r}, expected one of {', '.join(_DTYPES)}"
            )
        return cls(name, shape, entry, data, version, _DTYPES[stated])

    def __call__(self, old: Bits, spec: TensorSpec) -> Bits:
        """Return the new bits; see ``Patch``."""
        check_shape(self.shape, spec, self.name)
        entry, name = self.entry, self.name
        n = integer(entry.get("num_nonzero"), f"tensor {name!r}, num_nonzero")
        width = "<u4" if self.dtype == "F32" else "<u2"
        values = _stream(entry, self.data, "values_offset", entry.get("values_size"), width, name)
        if n > len(old) or len(values) != n:
            raise Corrupt(
                f"tensor {name!r} does not hold num_nonzero positions; the delta is damaged"
            )
        if self.version == 2:
            gaps = _stream(
                entry, self.data, "indices_offset", entry.get("indices_size"), "<i4", name
            )
            check_same_length(len(gaps), n, name)
            indices = np.cumsum(gaps, dtype=np.int64)
        else:
            indices = _from_rows(entry, self.data, self.version, self.shape, name, n)
        return Scatter(name, self.dtype, indices, values)(old, spec)


def _from_rows(
    entry: Mapping[str, Any],
    data: memoryview,
    version: int,
    shape: Sequence[int],
    name: str,
    n: int,
) -> npt.NDArray[np.int64]:
    kinds = []
    for key in ("row_dtype", "col_dtype"):
        kind = entry.get(key, "int32") if version == 31 else "int32"
        if not isinstance(kind, str) or kind not in _INDEX_DTYPES:
            raise Corrupt(f"tensor {name!r} has {key} {str(kind)[:40]!r}, which is not known")
        kinds.append(_INDEX_DTYPES[kind])
    n_rows = integer(entry.get("rows_size"), f"tensor {name!r}, rows_size")
    row_gaps = _stream(entry, data, "indices_offset", n_rows, kinds[0], name)
    col_gaps = _stream(
        entry, data, "indices_offset", entry.get("cols_size"), kinds[1], name, n_rows
    )
    check_same_length(len(row_gaps), n, name)
    check_same_length(len(col_gaps), n, name)
    if not len(row_gaps):
        return np.empty(0, np.int64)
    rows = np.cumsum(row_gaps, dtype=np.int64)
    starts = row_gaps != 0
    starts[0] = True
    sums = np.cumsum(col_gaps, dtype=np.int64)
    before = (sums - col_gaps)[starts]
    cols = sums - np.repeat(before, np.diff(np.flatnonzero(np.append(starts, True))))
    columns = _n_columns(shape)
    if (
        columns > _INT32
        or int(cols.min()) < 0
        or int(cols.max()) >= columns
        or int(np.abs(rows).max()) > _INT32
    ):
        raise Corrupt(
            f"tensor {name!r} has a column outside its {columns} columns; the delta is damaged"
        )
    indices: npt.NDArray[np.int64] = rows * columns + cols
    return indices


def _stream(
    entry: Mapping[str, Any],
    data: memoryview,
    key: str,
    size: Any,
    dtype: str,
    name: str,
    skip: int = 0,
) -> npt.NDArray[Any]:
    """Return one stream of a tensor as integers."""
    where = f"tensor {name!r}, {key}"
    begin = integer(entry.get(key), where) + skip
    end = begin + integer(size, where)
    if end > len(data) or (end - begin) % np.dtype(dtype).itemsize:
        raise Corrupt(f"{where}: the stream from byte {begin} to {end} does not lie in the file")
    return np.frombuffer(data[begin:end], dtype)
