"""Where the weights of an ONNX model lie: in the file itself, or in files beside it.

The parts of protobuf that lead to them are read here: fields of a message as (number, begin, end). The rest of
the model is not interpreted.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from sparsedelta.errors import CheckpointError
from sparsedelta.interop.region import Region, spec_or_bytes, with_unique_names
from sparsedelta.system import read_at

# Field numbers of onnx.proto.
_GRAPH, _INITIALIZER = 7, 5
_DIMS, _DTYPE, _NAME, _RAW, _EXTERNAL = 1, 2, 8, 9, 13
_KEY, _VALUE = 1, 2
_DTYPES = {
    1: "F32", 2: "U8", 3: "I8", 4: "U16", 5: "I16", 6: "I32", 7: "I64", 9: "BOOL", 10: "F16", 11: "F64",
    12: "U32", 13: "U64", 14: "C64", 16: "BF16", 17: "F8_E4M3", 18: "F8_E4M3FNUZ", 19: "F8_E5M2",
    20: "F8_E5M2FNUZ",
}  # fmt: skip
_LEAST_BYTES = 64  # smaller tensors take less space beside the graph
_MAX_FIELDS = 1 << 20
_MAX_TEXT_BYTES = 1 << 16
_WINDOW_BYTES = 1 << 16
_MAX_DIMENSIONS = 1 << 10
_NUMBER = re.compile("[0-9]{1,18}")


def onnx_regions(fd: int, path: Path) -> dict[str, list[Region]]:
    """Return the weights by the file that holds them, relative to the model's folder; "" for the model itself.

    Raises:
        CheckpointError: the file is not an intact ONNX model.
    """
    message = _Message(fd, path)
    found: dict[str, list[Region]] = defaultdict(list)
    for graph, begin, end in message.fields(0, os.fstat(fd).st_size):
        if graph == _GRAPH:
            for number, first, last in message.fields(begin, end):
                if number == _INITIALIZER:
                    place, region = _tensor(message, first, last)
                    if region is not None and region.spec.n_bytes >= _LEAST_BYTES:
                        found[place].append(region)
    if not found:
        raise CheckpointError(f"'{path}' is not an ONNX model that can be read: it has no weights")
    return {
        place: with_unique_names(sorted(regions, key=lambda one: one.offset))
        for place, regions in found.items()
    }


class _Message:
    """A protobuf message in a file. Damage raises CheckpointError."""

    def __init__(self, fd: int, path: Path) -> None:
        self._fd, self._path = fd, path
        self._window, self._start = b"", 0
        self._n_fields = 0

    def error(self) -> CheckpointError:
        return CheckpointError(
            f"'{self._path}' is not an ONNX model that can be read: it is damaged"
        )

    def fields(self, at: int, end: int) -> Iterator[tuple[int, int, int]]:
        """Yield the number, begin and end of each field of bytes, and of each integer."""
        while at < end:
            self._n_fields += 1
            if self._n_fields > _MAX_FIELDS:
                raise self.error()
            key, at = self.integer(at)
            begin = at
            match key & 7:
                case 0:
                    _, at = self.integer(at)
                case 1:
                    at += 8
                case 2:
                    size, begin = self.integer(at)
                    at = begin + size
                case 5:
                    at += 4
                case _:
                    raise self.error()
            if at > end:
                raise self.error()
            yield key >> 3, begin, at

    def integer(self, at: int) -> tuple[int, int]:
        """Return an integer, and the position after it."""
        value = 0
        for shift in range(0, 70, 7):
            byte = self._byte(at)
            at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value, at
        raise self.error()

    def bytes(self, begin: int, end: int) -> bytes:
        """Return a short text."""
        if end - begin > _MAX_TEXT_BYTES:
            raise self.error()
        return read_at(self._fd, end - begin, begin)

    def _byte(self, at: int) -> int:
        if not self._start <= at < self._start + len(self._window):
            self._window, self._start = read_at(self._fd, _WINDOW_BYTES, at), at
            if not self._window:
                raise self.error()
        return self._window[at - self._start]


def _tensor(message: _Message, begin: int, end: int) -> tuple[str, Region | None]:
    """Return the file and the place of a tensor's data; None if it is stored as numbers in the graph."""
    dims: list[int] = []
    dtype, name, raw = 0, "", (-1, -1)
    external: dict[str, str] = {}
    for number, first, last in message.fields(begin, end):
        if number == _DIMS:
            dims += _integers(message, first, last)
        elif number == _DTYPE:
            dtype, _ = message.integer(first)
        elif number == _NAME:
            name = message.bytes(first, last).decode("utf-8", "replace")
        elif number == _RAW:
            raw = first, last
        elif number == _EXTERNAL:
            pair = {
                n: message.bytes(b, e).decode("utf-8", "replace")
                for n, b, e in message.fields(first, last)
            }
            external[pair.get(_KEY, "")] = pair.get(_VALUE, "")
    place = external.get("location", "")
    if place:
        offset, length = external.get("offset", "0"), external.get("length", "")
        if not (_NUMBER.fullmatch(offset) and _NUMBER.fullmatch(length)):
            return place, None
        raw = int(offset), int(offset) + int(length)
    if raw[0] < 0:
        return place, None
    spec = spec_or_bytes(_DTYPES.get(dtype), tuple(dims), raw[1] - raw[0])
    return place, Region(name or "tensor", spec, raw[0])


def _integers(message: _Message, begin: int, end: int) -> list[int]:
    """Return the integers of a repeated field, packed or not."""
    found = []
    while begin < end:
        value, begin = message.integer(begin)
        found.append(value)
        if len(found) > _MAX_DIMENSIONS:
            raise message.error()
    return found
