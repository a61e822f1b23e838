"""Where the tensors of a GGUF file lie; each is opaque bytes.

Only the names and offsets of the tensors are interpreted. A tensor reaches to the begin of the next one, padding
included, so nothing depends on how a quantized block is coded. Tensors of F32, F16 and BF16 without padding keep
their dtype.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path

from sparsedelta.errors import CheckpointError
from sparsedelta.files.unread import GGUF
from sparsedelta.interop.region import Region, spec_or_bytes
from sparsedelta.system import read_at

_VERSIONS = (2, 3)
_MAX_HEADER_BYTES = 256 << 20  # vocabularies make a few megabytes
_MAX_ITEMS, _MAX_DIMENSIONS = 1 << 20, 4
_ALIGNMENT_KEY, _ALIGNMENT = b"general.alignment", 32
_STRING, _ARRAY, _U32 = 8, 9, 4
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_FLOATS = {0: "F32", 1: "F16", 30: "BF16"}


class _Cursor:
    """Reads the header from its begin. An end that comes too early raises CheckpointError."""

    def __init__(self, data: bytes, path: Path) -> None:
        self.data, self.path, self.at = data, path, len(GGUF)

    def error(self, why: str) -> CheckpointError:
        return CheckpointError(f"'{self.path}' is not a GGUF file that can be read: {why}")

    def take(self, n_bytes: int) -> bytes:
        if n_bytes > len(self.data) - self.at:
            raise self.error("it ends within its header, or its header is too large")
        self.at += n_bytes
        return self.data[self.at - n_bytes : self.at]

    def number(self, code: str) -> int:
        (found,) = struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))
        return int(found)

    def count(self) -> int:
        found = self.number("Q")
        if found > _MAX_ITEMS:
            raise self.error(f"its header counts {found} items, the limit is {_MAX_ITEMS}")
        return found

    def name(self) -> str:
        try:
            return self.take(self.number("Q")).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.error("the name of a tensor is not UTF-8") from error

    def n_dimensions(self) -> int:
        found = self.number("I")
        if found > _MAX_DIMENSIONS:
            raise self.error(f"a tensor has {found} dimensions, the limit is {_MAX_DIMENSIONS}")
        return found

    def skip_value(self, kind: int, *, in_array: bool = False) -> None:
        if kind == _STRING:
            self.take(self.number("Q"))
        elif kind == _ARRAY and not in_array:
            item, n = self.number("I"), self.number("Q")
            if item in _SIZES:
                self.take(n * _SIZES[item])
            else:
                for _ in range(min(n, _MAX_HEADER_BYTES)):  # each item takes 8 bytes or more
                    self.skip_value(item, in_array=True)
        elif kind in _SIZES:
            self.take(_SIZES[kind])
        else:
            raise self.error(f"its metadata has the unknown type {kind}")


def gguf_regions(fd: int, path: Path) -> list[Region]:
    """Return the tensors of a GGUF file, in order. A tensor reaches to the begin of the next one.

    Raises:
        CheckpointError: it is not an intact GGUF file.
    """
    n_bytes = os.fstat(fd).st_size
    cursor = _Cursor(read_at(fd, min(n_bytes, _MAX_HEADER_BYTES), 0), path)
    version = cursor.number("I")
    if version not in _VERSIONS:
        raise cursor.error(f"it has version {version}, expected one of {_VERSIONS}")
    n_tensors, n_values = cursor.count(), cursor.count()
    alignment = _ALIGNMENT
    for _ in range(n_values):
        key = cursor.take(cursor.number("Q"))
        kind = cursor.number("I")
        if key == _ALIGNMENT_KEY and kind == _U32:
            alignment = cursor.number("I")
        else:
            cursor.skip_value(kind)
    infos = []
    for _ in range(n_tensors):
        name = cursor.name()
        shape = tuple(cursor.number("Q") for _ in range(cursor.n_dimensions()))
        kind = cursor.number("I")
        infos.append((cursor.number("Q"), name, shape, kind))
    if not infos or not alignment or alignment & (alignment - 1):
        raise cursor.error("it has no tensors, or its alignment is no power of two")
    data = -(-cursor.at // alignment) * alignment
    infos.sort()
    edges = [*(data + info[0] for info in infos), n_bytes]
    if len({info[1] for info in infos}) < len(infos) or edges[0] > len(cursor.data):
        raise cursor.error("a tensor is listed twice, or the first one does not follow the header")
    found: list[Region] = []
    for (_, name, shape, kind), begin, end in zip(infos, edges, edges[1:], strict=False):
        if end <= begin:
            raise cursor.error(f"tensor {name!r} overlaps another one, or lies outside the file")
        spec = spec_or_bytes(
            _FLOATS.get(kind), shape[::-1], end - begin
        )  # the fastest dimension is first
        found.append(Region(name, spec, begin))
    return found
