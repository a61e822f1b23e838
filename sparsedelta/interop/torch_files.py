"""Files of ``torch.save`` as checkpoints: one ``.pt`` or ``.bin`` file, or a folder of them, the exact files back.

The folder may be a checkpoint of torch.distributed (``.metadata`` and ``.distcp`` files). Each file becomes a
weight file with its storages, and a side file with all bytes between them. No pickle is executed.
"""

from __future__ import annotations

import os
import shutil
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import BinaryIO

from sparsedelta.errors import CheckpointError, Corrupt
from sparsedelta.files.checkpoint import Checkpoint, Tensor, WeightFile, list_folder
from sparsedelta.files.shards import roles
from sparsedelta.files.unread import PICKLED_SUFFIXES
from sparsedelta.format.paths import WEIGHT_SUFFIX, path_problem
from sparsedelta.format.safetensors_header import Header, HeaderEntry, render_header
from sparsedelta.fs import open_regular
from sparsedelta.interop.archive import ZIP, Storage, storages
from sparsedelta.interop.inert_pickle import MAX_BYTES, Made, PickleRefused, children, read_inert
from sparsedelta.interop.source import Source
from sparsedelta.interop.view import bits_of
from sparsedelta.system import allow_open_files, read_at

SUFFIXES = (*PICKLED_SUFFIXES, ".distcp")
_METADATA = ".metadata"  # of a checkpoint of torch.distributed
_SKELETON = ".skeleton"
_ALONE = "archive"  # the name of a file that is not in a folder
_MAX_SKELETON_BYTES = 64 << 20
_BLOCK_BYTES = 1 << 20


def is_torch_files(source: Source) -> bool:
    """Return whether a file or folder was written by ``torch.save``, and holds no safetensors files."""
    if not source.is_folder:
        return source.start.startswith(ZIP)
    if any(name.endswith(WEIGHT_SUFFIX) for name in source.names):
        return False
    return any(name.endswith(SUFFIXES) and _is_zip(source.path / name) for name in source.names)


class TorchFiles(Checkpoint):
    """A file of ``torch.save``, or a folder of them, as a folder of weight files and side files."""

    def __init__(self, path: str | os.PathLike[str], *, exclude: Sequence[str] = ()) -> None:
        """Find the storages in all files.

        Raises:
            CheckpointError: a file is damaged, or was not written by ``torch.save``.
        """
        self.path = Path(path)
        self.is_folder = True
        self._fds = []
        self._folder = TemporaryDirectory(prefix="sparsedelta-")
        self.weight_files, self.side_files = (), {}
        self.empty_folders = self.left_out = ()
        try:
            self._open(exclude)
        except BaseException:
            self.close()
            raise
        self.weight_files = tuple(
            sorted(self.weight_files, key=lambda file: os.fsencode(file.path))
        )
        self.tensors = {tensor.key: tensor for file in self.weight_files for tensor in file.tensors}
        self.side_files = dict(
            sorted(self.side_files.items(), key=lambda item: os.fsencode(item[0]))
        )
        self.roles = roles([file.path for file in self.weight_files], {})

    def _open(self, exclude: Sequence[str]) -> None:
        if not self.path.is_dir():
            if not self._add(_ALONE, self.path, {}):
                raise CheckpointError(f"'{self.path}' holds no tensors that can be found")
            return
        files, folders, left_out = list_folder(self.path, exclude, (), whole=False)
        self.empty_folders, self.left_out = tuple(folders), tuple(left_out)
        names = _distributed_names(files[_METADATA]) if _METADATA in files else {}
        allow_open_files(len(files))
        for path, location in files.items():
            is_archive = path.endswith(SUFFIXES) and _is_zip(location)
            if not (is_archive and self._add(path, location, names.get(path, {}))):
                self.side_files[path] = location

    def _add(self, path: str, location: Path, names: Mapping[int, str]) -> bool:
        """Add a file as a weight file and a side file. Return whether it holds storages; else nothing is added."""
        fd = open_regular(location)
        self._fds.append(fd)
        found = storages(fd, location, names)
        if not found:
            return False
        inner = path + WEIGHT_SUFFIX
        tensors = tuple(Tensor(inner, one.name, one.spec, fd, one.offset) for one in found)
        entries, end = [], 0
        for tensor in tensors:
            begin, end = end, end + tensor.spec.n_bytes
            entries.append(
                HeaderEntry(tensor.name, tensor.spec.dtype.name, tensor.spec.shape, begin, end)
            )
        header = Header(None, tuple(entries), True)
        file = WeightFile(inner, render_header(None, header.entries), header, tensors)
        self.weight_files = (*self.weight_files, file)
        skeleton = Path(self._folder.name) / str(len(self.weight_files))
        skeleton.write_bytes(_skeleton(fd, location, found))
        self.side_files[path + _SKELETON] = skeleton
        return True

    def close(self) -> None:
        """Close the files, and remove the temporary copies of what lies between the storages."""
        super().close()
        self._folder.cleanup()


def write_torch_files(target: Checkpoint, out: Path) -> None:
    """Write the files of a target to a new file or folder, and sync them.

    Raises:
        Corrupt: the delta names a file that no delta may write, or states other gaps than there are tensors.
        ValueError: the target is not that of a delta between files of ``torch.save``.
    """
    weights = {file.path.removesuffix(WEIGHT_SUFFIX): file for file in target.weight_files}
    if not weights or any(path + _SKELETON not in target.side_files for path in weights):
        raise ValueError(
            "the delta was not made from files of torch.save, so no such file can be written; choose another form"
        )
    for path in weights:
        if problem := path_problem(path):
            raise Corrupt(f"the delta writes the file {path!r}: {problem}")
    if weights.keys() == {_ALONE}:
        _write(weights[_ALONE], target.side_files[_ALONE + _SKELETON], out)
        return
    out.mkdir()
    for folder in target.empty_folders:
        (out / folder).mkdir(parents=True, exist_ok=True)
    for path, file in weights.items():
        (out / path).parent.mkdir(parents=True, exist_ok=True)
        _write(file, target.side_files[path + _SKELETON], out / path)
    for path, location in target.side_files.items():
        if path.removesuffix(_SKELETON) not in weights:
            (out / path).parent.mkdir(parents=True, exist_ok=True)
            with open(location, "rb") as source, open(out / path, "xb") as copy:
                shutil.copyfileobj(source, copy, _BLOCK_BYTES)
                _sync(copy)


def _is_zip(location: Path) -> bool:
    fd = open_regular(location)
    try:
        return read_at(fd, len(ZIP), 0) == ZIP
    finally:
        os.close(fd)


def _skeleton(fd: int, location: Path, found: Sequence[Storage]) -> bytes:
    """Return the sizes of the gaps between the storages as a line of text, then the bytes in the gaps."""
    edges = [0, *(edge for one in found for edge in (one.offset, one.end)), os.fstat(fd).st_size]
    gaps = list(zip(edges[::2], edges[1::2], strict=True))
    n_bytes = sum(end - begin for begin, end in gaps)
    if n_bytes > _MAX_SKELETON_BYTES:
        raise CheckpointError(
            f"'{location}' holds {n_bytes} bytes beside its tensors, the limit is {_MAX_SKELETON_BYTES}; save the"
            " model as safetensors"
        )
    sizes = " ".join(str(end - begin) for begin, end in gaps)
    return sizes.encode() + b"\n" + b"".join(read_at(fd, e - b, b) for b, e in gaps)


def _write(file: WeightFile, skeleton: Path, out: Path) -> None:
    line, _, between = skeleton.read_bytes().partition(b"\n")
    sizes = [int(size) for size in line.split() if size.isdigit()]
    if len(sizes) != len(file.tensors) + 1 or sum(sizes) != len(between):
        raise Corrupt(f"the delta does not say what lies between the tensors of '{out.name}'")
    with open(out, "xb") as output:
        at = 0
        for number, size in enumerate(sizes):
            output.write(between[at : at + size])
            at += size
            if number < len(file.tensors):
                output.write(bits_of(file.tensors[number]).data)
        _sync(output)


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _distributed_names(location: Path) -> dict[str, dict[int, str]]:
    """Return the names of objects in a torch.distributed checkpoint by file and position, as far as known."""
    if location.stat().st_size > MAX_BYTES:
        return {}
    try:
        root = read_inert(location.read_bytes())
    except PickleRefused:
        return {}
    stored = root.get("storage_data") if isinstance(root, Made) else None
    if not isinstance(stored, Made):
        return {}
    found: dict[str, dict[int, str]] = defaultdict(dict)
    for index, place in stored.pairs or ():
        if isinstance(index, Made) and isinstance(place, Made):
            path, begin = place.get("relative_path"), place.get("offset")
            if isinstance(path, str) and isinstance(begin, int):
                found[path][begin] = _name_of(index)
    return found


def _name_of(index: Made) -> str:
    offsets = [str(n) for _, part in children(index.get("offset")) for n in _numbers(part)]
    suffix = "@" + ",".join(offsets) if any(n != "0" for n in offsets) else ""
    return f"{index.get('fqn')}{suffix}"


def _numbers(part: object) -> list[int]:
    if isinstance(part, tuple):
        return [n for one in part for n in _numbers(one)]
    return [part] if isinstance(part, int) else []
