"""Where the storages of a file written by ``torch.save`` lie, and what its pickle calls them.

The file is a zip archive, or, in a checkpoint of torch.distributed, several one after another. A storage is a
stored member ``data/<key>``. The pickle is read as data (``inert_pickle``); nothing of it is executed.
"""

from __future__ import annotations

import io
import math
import os
import struct
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from sparsedelta.dtypes import DTYPES
from sparsedelta.errors import CheckpointError
from sparsedelta.files.unread import ZIP
from sparsedelta.format.records import TensorSpec
from sparsedelta.interop.inert_pickle import (
    MAX_BYTES,
    Global,
    Made,
    Persistent,
    PickleRefused,
    children,
    read_inert,
)
from sparsedelta.interop.region import MAX_NAME_BYTES, Region, with_unique_names
from sparsedelta.system import read_at

_END = b"PK\x05\x06"
_END_BYTES = 22
_LOCAL_HEADER = struct.Struct("<4s22xHH")
_LEAST_BYTES = (
    64  # smaller storages, such as the step of an optimizer, take less space beside the pickle
)
_MAX_ARCHIVES = 1 << 16
# What zipfile raises for damaged archives; ValueError includes PickleRefused, and names that are not UTF-8.
_DAMAGED = (
    zipfile.BadZipFile, OSError, EOFError, NotImplementedError, RuntimeError, ValueError, IndexError, struct.error,
)  # fmt: skip
_DTYPES = {
    "FloatStorage": "F32", "DoubleStorage": "F64", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8",
    "ByteStorage": "U8", "BoolStorage": "BOOL", "ComplexFloatStorage": "C64",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float8_e8m0fnu": "F8_E8M0",
    "float8_e4m3fnuz": "F8_E4M3FNUZ", "float8_e5m2fnuz": "F8_E5M2FNUZ",
    "uint16": "U16", "uint32": "U32", "uint64": "U64",
}  # fmt: skip


def archive_regions(
    fd: int, path: str | os.PathLike[str], names: Mapping[int, str]
) -> list[Region]:
    """Return the storages in a file, in the order of their data.

    Args:
        fd: descriptor of the file.
        path: names it in errors.
        names: of saved objects, by the position where their archive begins.

    Raises:
        CheckpointError: the file does not end with such an archive, or is damaged.
    """
    found: list[Region] = []
    begin = -1
    for begin, archive in _archives(fd, path):
        with archive:
            found += _members(fd, archive, names.get(begin, ""))
    found.sort(key=lambda one: one.offset)
    if begin < 0:
        raise CheckpointError(
            f"'{path}' is no complete zip archive; it was not written by torch.save, or a part is missing"
        )
    return with_unique_names(found)


@dataclass(frozen=True, slots=True)
class Stored:
    """A file that ``torch.save`` wrote, open.

    Attributes:
        path: names it in errors.
        archive: the zip archive.
        members: by their path in the archive's folder.
    """

    path: str | os.PathLike[str]
    archive: zipfile.ZipFile
    members: Mapping[str, zipfile.ZipInfo]

    def root(self) -> Any:
        """Return what the pickle holds, as data.

        Raises:
            CheckpointError: there is no pickle, or it cannot be read as data.
        """
        try:
            return read_inert(self._read("data.pkl"))
        except PickleRefused as error:
            raise CheckpointError(f"the pickle in '{self.path}' is not read: {error}") from error

    def data(self, key: str) -> bytes:
        """Return the bytes of a storage. Raises CheckpointError if it is missing or damaged."""
        return self._read(f"data/{key}")

    def _read(self, inner: str) -> bytes:
        member = self.members.get(inner)
        if member is None or member.compress_type != zipfile.ZIP_STORED:
            raise CheckpointError(
                f"'{self.path}' has no stored member {inner[:80]!r}; save it again with torch.save"
            )
        try:
            return self.archive.read(member)
        except _DAMAGED as error:
            raise CheckpointError(f"'{self.path}' is damaged: {error}") from error


@contextmanager
def open_archive(fd: int, path: str | os.PathLike[str]) -> Iterator[Stored]:
    """Yield the archive at the end of a file that ``torch.save`` wrote.

    Raises:
        CheckpointError: there is none.
    """
    for _, archive in _archives(fd, path):
        with archive:
            yield Stored(path, archive, _by_inner_path(archive))
            return
    raise CheckpointError(
        f"'{path}' is not a zip archive; files from before torch 1.6 must be saved again"
    )


def _by_inner_path(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    return {member.filename.partition("/")[2]: member for member in archive.infolist()}


def _archives(fd: int, path: str | os.PathLike[str]) -> Iterator[tuple[int, zipfile.ZipFile]]:
    """Yield the zip archives that a file consists of, each with its begin, from the last to the first."""
    end = os.fstat(fd).st_size
    for _ in range(_MAX_ARCHIVES):
        record = read_at(fd, _END_BYTES, max(0, end - _END_BYTES))
        if not record.startswith(_END) or record[-2:] != b"\0\0":
            return
        try:
            archive = zipfile.ZipFile(_Part(fd, end))
        except _DAMAGED as error:
            raise CheckpointError(
                f"'{path}' is not a zip archive that can be read: {error}"
            ) from error
        begin = min((member.header_offset for member in archive.infolist()), default=end)
        if not 0 <= begin < archive.start_dir:
            raise CheckpointError(f"'{path}' is damaged: a zip archive in it has no members")
        yield begin, archive
        end = begin
    raise CheckpointError(f"'{path}' holds more than {_MAX_ARCHIVES} zip archives")


class _Part(io.RawIOBase):
    """The begin of a file, to be read by ``zipfile``."""

    def __init__(self, fd: int, n_bytes: int) -> None:
        self._fd, self._n_bytes, self._at = fd, n_bytes, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = (0, self._at, self._n_bytes)[whence]
        if start + offset < 0:
            raise OSError("a position before the begin of the file")
        self._at = start + offset
        return self._at

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._n_bytes - self._at)
        data = read_at(self._fd, left if size < 0 else min(size, left), self._at)
        self._at += len(data)
        return data


def _members(fd: int, archive: zipfile.ZipFile, of: str) -> Iterator[Region]:
    """Yield the storages of one archive; ``of`` is the name of the saved object."""
    members = _by_inner_path(archive)
    named = _named(archive, members)
    for inner, member in members.items():
        if not inner.startswith("data/") or member.compress_type != zipfile.ZIP_STORED:
            continue
        if member.file_size < _LEAST_BYTES or member.file_size != member.compress_size:
            continue
        header = read_at(fd, _LOCAL_HEADER.size, member.header_offset)
        if len(header) < _LOCAL_HEADER.size or not header.startswith(ZIP):
            continue
        _, n_name, n_extra = _LOCAL_HEADER.unpack(header)
        offset = member.header_offset + len(header) + n_name + n_extra
        if offset + member.file_size > archive.start_dir:
            continue
        name, spec = named.get(inner.removeprefix("data/"), (inner, None))
        if spec is None or spec.n_bytes != member.file_size:
            spec = TensorSpec(DTYPES["U8"], (member.file_size,))
        yield Region(".".join(filter(None, (of, name))) or "tensor", spec, offset)


def _named(
    archive: zipfile.ZipFile, members: Mapping[str, zipfile.ZipInfo]
) -> dict[str, tuple[str, TensorSpec]]:
    """Return name and layout of storages by key, as the pickle states them; nothing if it cannot be read."""
    pickle, order = members.get("data.pkl"), members.get("byteorder")
    if pickle is None or pickle.compress_type != zipfile.ZIP_STORED or pickle.file_size > MAX_BYTES:
        return {}
    try:
        if order is not None and archive.read(order)[:6] != b"little":
            return {}
        return _tensors(read_inert(archive.read(pickle)))
    except _DAMAGED:
        return {}


def _tensors(root: Any) -> dict[str, tuple[str, TensorSpec]]:
    found: dict[str, tuple[str, TensorSpec]] = {}
    waiting: list[tuple[_Path, Any]] = [(_Path("", None, 0), root)]
    seen: set[int] = set()
    while waiting:
        path, node = waiting.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        layout = _layout(node)
        if layout is not None:
            key, spec = layout
            if key not in found:
                found[key] = path.text(), spec
            continue
        parts = [
            (path.inner(key), part)
            for key, part in children(node)
            if isinstance(part, Made | tuple)
        ]
        waiting.extend(part for part in reversed(parts) if part[0].length <= MAX_NAME_BYTES)
    return found


@dataclass(frozen=True, slots=True)
class _Path:
    """The keys that lead to a value. They are joined only for tensors, since every value of a pickle has a path.

    Attributes:
        key: the last key.
        before: what leads to the value that has the key; None for the outermost.
        length: of the text, in characters.
    """

    key: str
    before: _Path | None
    length: int

    def inner(self, key: str) -> _Path:
        """Return the path of a part. A part without a key of its own has the path of the whole."""
        return _Path(key, self, self.length + len(key) + 1) if key else self

    def text(self) -> str:
        """Return the keys, joined by dots."""
        keys: list[str] = []
        path = self
        while path.before is not None:
            keys.append(path.key)
            path = path.before
        return ".".join(reversed(keys))


def _layout(node: Any) -> tuple[str, TensorSpec] | None:
    """Return the key and layout of a tensor's storage; None if the node is not a tensor."""
    if not (isinstance(node, Made) and isinstance(node.call, Global)):
        return None
    if not node.call.name.startswith("torch._utils._rebuild_tensor") or not isinstance(
        node.args, tuple
    ):
        return None
    match node.args:
        case (
            Persistent(key=("storage", Global(name=kind), str(key), _, int(n))),
            offset,
            size,
            *rest,
        ):
            names = [kind, *(one.name for one in rest if isinstance(one, Global))]
            dtype = next(
                (_DTYPES[n] for n in (x.rpartition(".")[2] for x in names) if n in _DTYPES), None
            )
            if dtype is None:
                return None
            width = DTYPES[dtype].width
            n_values = n // width if kind.endswith("UntypedStorage") else n
            whole = offset == 0 and _is_shape(size) and math.prod(size) == n_values
            return key, TensorSpec(DTYPES[dtype], tuple(size) if whole else (max(0, n_values),))
    return None


def _is_shape(size: Any) -> bool:
    return (
        isinstance(size, tuple)
        and len(size) <= 16
        and all(isinstance(n, int) and 0 <= n < 1 << 48 for n in size)
    )
