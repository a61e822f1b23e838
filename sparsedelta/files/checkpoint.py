"""A checkpoint on disk: one safetensors file, or a folder of safetensors files and other files.

Opening a checkpoint reads and checks headers only. Tensors are read on demand, also from several
threads at once. This module opens no file for writing.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from sparsedelta.dtypes import dtype_of
from sparsedelta.errors import CheckpointError, FormatError
from sparsedelta.files import junk
from sparsedelta.files.shards import INDEX_SUFFIX, SHARD, roles, shard_path
from sparsedelta.files.unread import stand_in, way_out
from sparsedelta.format.columns import LazySequence
from sparsedelta.format.container import START_BYTES
from sparsedelta.format.header_columns import HeaderColumns, HeaderEntries, read_header_columns
from sparsedelta.format.paths import WEIGHT_SUFFIX, path_problem
from sparsedelta.format.records import TensorKey, TensorSpec
from sparsedelta.format.safetensors_header import (
    MAX_HEADER_BYTES,
    Header,
    HeaderEntry,
    parse_header,
)
from sparsedelta.format.strict_json import parse_json
from sparsedelta.fs import open_regular
from sparsedelta.system import allow_open_files, read_at, read_into


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of an open checkpoint.

    Attributes:
        file: path of its weight file, relative to the checkpoint.
        name: its name in that file.
        spec: dtype and shape; the digest is None.
        fd: descriptor of the open weight file.
        offset: position of its first byte in the file.
    """

    file: str
    name: str
    spec: TensorSpec
    fd: int
    offset: int

    @property
    def key(self) -> TensorKey:
        """File and name."""
        return self.file, self.name

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer`` with the tensor's bytes from ``offset``.

        Raises:
            CheckpointError: the file has become shorter since it was opened.
        """
        read_exactly(self.fd, buffer, self.offset + offset, self.name)


@dataclass(frozen=True, slots=True)
class WeightFile:
    """One safetensors file of a checkpoint.

    Attributes:
        path: relative to the checkpoint.
        raw_header: the bytes of its header, without the length before them.
        header: the parsed header.
        tensors: its tensors, in the order of their data.
    """

    path: str
    raw_header: bytes
    header: Header
    tensors: Sequence[Tensor]

    @property
    def names(self) -> Sequence[str]:
        """The names of its tensors."""
        held = self.tensors
        return held.columns.names if isinstance(held, FileTensors) else [t.name for t in held]


class FileTensors(LazySequence[Tensor]):
    """The tensors of a weight file whose header was read as columns.

    Attributes:
        path: path of the weight file, relative to the checkpoint.
        columns: its header.
        fd: descriptor of the open file.
        offset: position of the first tensor's first byte in the file.
    """

    def __init__(self, path: str, columns: HeaderColumns, fd: int, offset: int) -> None:
        super().__init__(len(columns.names))
        self.path = path
        self.columns = columns
        self.fd = fd
        self.offset = offset

    def records(self, start: int, end: int) -> list[Tensor]:
        """Return the tensors from ``start`` to ``end``."""
        columns = self.columns
        offsets = (columns.begin[start:end] + self.offset).tolist()
        numbers = columns.layout[start:end].tolist()
        return [
            Tensor(self.path, name, columns.layouts[number], self.fd, offset)
            for name, number, offset in zip(columns.names[start:end], numbers, offsets, strict=True)
        ]


class Checkpoint:
    """An open checkpoint. All paths are relative to it, except ``path``.

    Attributes:
        path: the file or folder.
        is_folder: whether ``path`` is a folder.
        weight_files: the safetensors files, sorted by path.
        roles: the role of each weight file, by path (``files.shards.roles``).
        side_files: location of every other file, by path, sorted.
        empty_folders: paths of the folders that hold nothing, sorted.
        left_out: paths of the files and folders that ``files.junk`` excluded, sorted.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        exclude: Sequence[str] = (),
        include: Sequence[str] | None = None,
        whole: bool = True,
        complete: bool = True,
    ) -> None:
        """Open a checkpoint.

        Args:
            path: a safetensors file or a folder.
            exclude: globs of files to leave out. A glob without "/" matches the last component.
            include: globs of files to keep although ``files.junk`` excludes them. None keeps all.
            whole: raise an error for links to folders and for pipes and devices. If false, they are
                ignored.
            complete: raise an error if shards are missing, or if an index file disagrees with its
                shards.

        Raises:
            CheckpointError: ``path`` cannot be read as a checkpoint, or is inconsistent.
            FileNotFoundError: ``path`` does not exist.
        """
        if isinstance(exclude, str):  # else each character would count as a glob
            exclude = [exclude]
        if isinstance(include, str):
            include = [include]
        self.path = Path(path)
        self.is_folder = self.path.is_dir()
        self._fds: list[int] = []
        self.weight_files: tuple[WeightFile, ...] = ()
        self.roles: dict[str, str] = {}
        self.side_files: dict[str, Path] = {}
        self.empty_folders: tuple[str, ...] = ()
        self.left_out: tuple[str, ...] = ()
        try:
            if self.is_folder:
                self._open_folder(exclude, include, whole=whole, complete=complete)
            else:
                self._open_file()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all files."""
        while self._fds:
            os.close(self._fds.pop())

    @cached_property
    def tensors(self) -> dict[TensorKey, Tensor]:
        """All tensors by file and name, in the order of the files and of the data in them."""
        return {tensor.key: tensor for file in self.weight_files for tensor in file.tensors}

    def check_complete(self) -> None:
        """Check that no shard is missing, of a folder that was opened with ``complete=False``.

        Raises:
            CheckpointError: one is, or an index file cannot be read.
        """
        _complete_sets(self.side_files, {file.path for file in self.weight_files})

    def location(self, file: str) -> Path:
        """Return the path of a weight file on disk."""
        return self.path / file if self.is_folder else self.path

    @property
    def tensor_bytes(self) -> int:
        """Size of all tensors in bytes."""
        return sum(tensor.spec.n_bytes for tensor in self.tensors.values())

    def _open_file(self) -> None:
        self._add_weight_file(self.path.name, self.path)
        self.roles = roles([self.path.name], {})
        if (self.weight_files[0].header.metadata or {}).get("format") == "sparsedelta":
            raise CheckpointError(
                f"'{self.path}' is a delta, not a checkpoint; give the folder of a model, or its safetensors file"
            )

    def _open_folder(
        self,
        exclude: Sequence[str],
        include: Sequence[str] | None,
        *,
        whole: bool,
        complete: bool,
    ) -> None:
        files, folders, left_out = list_folder(self.path, exclude, include, whole=whole)
        self.left_out = tuple(left_out)
        self.empty_folders = tuple(folders)
        weights = {path for path in files if path.endswith(WEIGHT_SUFFIX)}
        allow_open_files(len(weights))
        for path in sorted(weights):
            _check_utf8(path, files[path])
        indexes = _complete_sets(files, weights) if complete else {}
        for path in sorted(weights):
            self._add_weight_file(path, files[path])
        self._check_indexes(indexes)
        self.roles = roles(weights, {index: set(m.values()) for index, m in indexes.items()})
        self.side_files = {path: files[path] for path in files if path not in weights}

    def _add_weight_file(self, path: str, location: Path) -> None:
        fd = open_regular(location)
        self._fds.append(fd)
        raw = _read_header(fd, location)
        offset = 8 + len(raw)
        columns = read_header_columns(raw)
        tensors: Sequence[Tensor]
        if columns is None:
            header = _parse_header(raw, location)
            tensors = _tensors(path, header, fd, offset, location)
            end = header.entries[-1].end if header.entries else 0
        else:
            header = Header(columns.metadata, HeaderEntries(columns), True)
            tensors = FileTensors(path, columns, fd, offset)
            end = int(columns.begin[-1])
        found = os.fstat(fd).st_size - offset
        if found != end:
            raise CheckpointError(
                f"'{location}' has {found} bytes of data, expected {end} by its header; copy or"
                " download it again"
            )
        self.weight_files = (*self.weight_files, WeightFile(path, raw, header, tensors))

    def _check_indexes(self, indexes: dict[str, dict[str, str]]) -> None:
        names = {file.path: file.names for file in self.weight_files}
        for index, weight_map in indexes.items():
            found = {name: path for path in set(weight_map.values()) for name in names[path]}
            for name in weight_map.keys() | found.keys():
                if found.get(name) != weight_map.get(name):
                    raise CheckpointError(
                        f"tensor {name!r} is in {found.get(name, 'no shard')}, but {index} names"
                        f" {weight_map.get(name, 'no shard for it')}; the checkpoint is inconsistent"
                    )


def list_folder(
    root: Path, exclude: Sequence[str], include: Sequence[str] | None = None, *, whole: bool
) -> tuple[dict[str, Path], list[str], list[str]]:
    """Return the files below a folder by relative path, its empty folders, and what was left out.

    All are sorted. A symbolic link to a file counts as a file. If ``exclude`` matches a folder,
    everything in it is excluded. For ``include`` and ``whole`` see ``Checkpoint``.

    Returns:
        Location of each file by relative path; relative paths of empty folders; relative paths of
        the files and folders that ``files.junk`` excluded.

    Raises:
        CheckpointError: ``whole`` is true, and there is a link to a folder, a pipe or a device.
        OSError: the folder, or with ``whole`` a folder in it, cannot be listed.
    """

    def fail(error: OSError) -> None:
        if whole or error.filename == os.fspath(root):
            raise error

    files: dict[str, Path] = {}
    empty: list[str] = []
    left_out: list[str] = []
    is_part = junk.is_part([] if include is None else include)

    def kept(paths: list[str]) -> list[str]:
        found = sorted(path for path in paths if not junk.matches(path, exclude))
        if include is None:
            return found
        left_out.extend(path for path in found if not is_part(path))
        return [path for path in found if is_part(path)]

    for folder, subfolders, names in os.walk(root, onerror=fail):
        here = Path(folder)
        relative = "" if here == root else here.relative_to(root).as_posix() + "/"
        subfolders[:] = [Path(path).name for path in kept([relative + s for s in subfolders])]
        for name in subfolders:
            if whole and (here / name).is_symlink():
                raise CheckpointError(
                    f"'{here / name}' is a symbolic link to a folder, which is not followed;"
                    " replace it with the folder or leave it out (exclude=, --exclude)"
                )
        here_files = [path[len(relative) :] for path in kept([relative + name for name in names])]
        for name in here_files:
            if (here / name).is_file():
                files[relative + name] = here / name
            elif whole and (here / name).is_symlink() and not (here / name).exists():
                raise _dangling(here / name, "leave it out (exclude=, --exclude)")
            elif whole:
                raise CheckpointError(
                    f"'{here / name}' is not a regular file; leave it out (exclude=, --exclude)"
                )
        if relative and not subfolders and not here_files:
            empty.append(relative[:-1])
    return (
        dict(sorted(files.items(), key=lambda item: os.fsencode(item[0]))),
        sorted(empty, key=os.fsencode),
        sorted(left_out, key=os.fsencode),
    )


def check_links(root: Path) -> None:
    """Check that no weight file below a folder is a link to a file that does not exist.

    The weights of a base may be incomplete, so this is called only when weights are missing.

    Raises:
        CheckpointError: one is.
    """
    for path in sorted(root.rglob("*" + WEIGHT_SUFFIX)) if root.is_dir() else ():
        if path.is_symlink() and not path.exists():
            raise _dangling(path, "download it again")


def _dangling(path: Path, remedy: str) -> CheckpointError:
    return CheckpointError(
        f"'{path}' is a link to '{os.readlink(path)}', which does not exist; repair the link or {remedy}"
    )


def read_index(location: Path, path: str, weights: set[str]) -> dict[str, str]:
    """Return the ``weight_map`` of an index file, with shard paths relative to the checkpoint.

    Args:
        location: the index file.
        path: its path relative to the checkpoint.
        weights: relative paths of the checkpoint's safetensors files.

    Raises:
        CheckpointError: it has no ``weight_map``, or names a shard that does not exist.
    """
    try:
        index = parse_json(location.read_bytes(), f"'{location}'")
    except FormatError as error:
        raise CheckpointError(str(error)) from error
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"'{location}' has no weight_map; repair it or leave it out")
    result = {}
    for name, shard in weight_map.items():
        plain = isinstance(shard, str) and not path_problem(shard)
        found = shard_path(shard, path) if plain else None
        if found not in weights:
            check_links(location.parent)
            raise CheckpointError(
                f"'{location}' places tensor {name!r} in {shard!r}, which is not a safetensors file"
                " beside it; the checkpoint is incomplete: download or copy the rest"
            )
        result[name] = found
    return result


def _complete_sets(files: Mapping[str, Path], weights: set[str]) -> dict[str, dict[str, str]]:
    """Return the ``weight_map`` of each index file in ``files``, once no shard is missing; see ``check_sets``."""
    paths = [path for path in files if path.endswith(INDEX_SUFFIX)]
    indexes = {path: read_index(files[path], path, weights) for path in paths}
    check_sets(weights, indexes)
    return indexes


def check_sets(weights: set[str], indexes: dict[str, dict[str, str]]) -> None:
    """Check that no shard is missing and that each is named by at most one index file.

    Args:
        weights: relative paths of the safetensors files.
        indexes: the ``weight_map`` of each index file, as ``read_index`` returns it.

    Raises:
        CheckpointError: a file is in two indexes, or a numbered shard without an index is missing.
    """
    claimed: dict[str, str] = {}
    for index, weight_map in indexes.items():
        for path in set(weight_map.values()):
            if claimed.setdefault(path, index) != index:
                raise CheckpointError(f"'{path}' is a shard of both {claimed[path]} and {index}")
    for path in sorted(weights - claimed.keys()):
        shard = SHARD.fullmatch(path)
        if shard and shard["stem"] + INDEX_SUFFIX not in indexes:
            _check_numbers(path, shard, weights)


def read_exactly(fd: int, buffer: memoryview, offset: int, what: str) -> None:
    """Fill ``buffer`` from a file at ``offset``; ``what`` names it in the error.

    Raises:
        CheckpointError: the file ends before the buffer is full.
    """
    while len(buffer):
        n_read = read_into(fd, buffer, offset)
        if not n_read:
            raise CheckpointError(f"{what!r}: its file became shorter while it was read")
        buffer = buffer[n_read:]
        offset += n_read


def _check_utf8(path: str, location: Path) -> None:
    try:
        path.encode("utf-8")
    except UnicodeEncodeError:
        shown = os.fsencode(location).decode("utf-8", "backslashreplace")
        raise CheckpointError(
            f"the name of the weight file '{shown}' is not UTF-8; rename it or leave it out"
            " (exclude=, --exclude)"
        ) from None


def _check_numbers(path: str, shard: re.Match[str], weights: set[str]) -> None:
    count = int(shard["count"])
    first = next((n for n in range(1, count + 1) if _numbered(shard, n) not in weights), None)
    if first is not None:
        raise CheckpointError(
            f"'{path}' is one of {count} shards, but shard {first} is missing; copy or download it"
        )


def _numbered(shard: re.Match[str], number: int) -> str:
    return f"{shard['stem']}-{number:05d}-of-{shard['count']}{WEIGHT_SUFFIX}"


def _tensors(path: str, header: Header, fd: int, offset: int, location: Path) -> tuple[Tensor, ...]:
    """Return the tensors of a weight file whose data begin at ``offset``."""
    tensors = []
    end = 0
    for entry in header.entries:
        if entry.begin != end:
            raise CheckpointError(
                f"'{location}': tensor {entry.name!r} begins at byte {entry.begin}, expected {end}"
            )
        end = entry.end
        tensors.append(Tensor(path, entry.name, _spec(entry, location), fd, offset + entry.begin))
    return tuple(tensors)


def _read_header(fd: int, location: Path) -> bytes:
    file_bytes = os.fstat(fd).st_size
    if file_bytes < 8:
        raise CheckpointError(f"'{location}' is not a safetensors file: it has {file_bytes} bytes")
    start = read_at(fd, min(file_bytes, START_BYTES), 0)
    other = stand_in(start)
    if other:
        raise CheckpointError(f"'{location}' {other}")
    size = int.from_bytes(start[:8], "little")
    if size > MAX_HEADER_BYTES:
        raise CheckpointError(f"'{location}' is not a safetensors file; {way_out(start, location)}")
    if size > file_bytes - 8:
        raise CheckpointError(
            f"'{location}' is incomplete: it has {file_bytes} bytes, its header alone {size}; copy or download"
            " it again"
        )
    raw = bytearray(size)
    read_exactly(fd, memoryview(raw), 8, str(location))
    return bytes(raw)


def _parse_header(raw: bytes, location: Path) -> Header:
    try:
        return parse_header(raw, f"'{location}'")
    except FormatError as error:
        raise CheckpointError(str(error)) from error


def _spec(entry: HeaderEntry, location: Path) -> TensorSpec:
    n_bytes = entry.end - entry.begin
    try:
        spec = TensorSpec(dtype_of(entry.dtype, entry.shape, n_bytes), entry.shape)
        expected = spec.n_bytes
    except FormatError as error:
        raise CheckpointError(f"'{location}': tensor {entry.name!r}: {error}") from error
    if n_bytes != expected:
        raise CheckpointError(
            f"'{location}': tensor {entry.name!r} has {n_bytes} bytes, expected {expected} by its shape"
            " and dtype"
        )
    return spec
