"""Files of other formats as checkpoints, the exact files back: GGUF, ONNX, and what ``torch.save`` writes.

One file, or a folder of them, such as a checkpoint of torch.distributed. Each file becomes a weight file with its
tensors, and a side file (the skeleton) with all bytes between them. No pickle is executed.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import BinaryIO

from sparsedelta.errors import CheckpointError, Corrupt
from sparsedelta.files.checkpoint import Checkpoint, Tensor, WeightFile, list_folder
from sparsedelta.files.shards import roles
from sparsedelta.files.unread import (
    GGUF,
    PICKLED_SUFFIXES,
    SKELETON_SUFFIX,
    ZIP,
    stand_in,
)
from sparsedelta.format.container import START_BYTES
from sparsedelta.format.paths import WEIGHT_SUFFIX, path_problem
from sparsedelta.format.safetensors_header import Header, HeaderEntry, render_header
from sparsedelta.fs import open_regular
from sparsedelta.interop.archive import archive_regions
from sparsedelta.interop.distributed import object_names
from sparsedelta.interop.gguf import gguf_regions
from sparsedelta.interop.onnx import onnx_regions
from sparsedelta.interop.region import Region
from sparsedelta.interop.source import Source
from sparsedelta.interop.view import bits_of
from sparsedelta.system import allow_open_files, read_at

_OF_ARCHIVES = (*PICKLED_SUFFIXES, ".distcp")
_METADATA = ".metadata"  # of a checkpoint of torch.distributed
_ALONE = "file"  # the name of a file that is not in a folder
_MAX_SKELETON_BYTES = 64 << 20
_BLOCK_BYTES = 1 << 20


def has_regions(source: Source) -> bool:
    """Return whether a file, or a file in a folder without safetensors files, has one of these formats."""
    if not source.is_folder:
        return _kind(source.path) is not None
    if any(name.endswith(WEIGHT_SUFFIX) for name in source.names):
        return False
    return any(_kind(source.path / name) for name in sorted(source.names))


def _kind(location: Path) -> str | None:
    """Return the suffix of the format that a file has; None if it has none of these formats."""
    suffix = location.suffix.lower()
    fd = open_regular(location)
    try:
        start = read_at(fd, min(START_BYTES, os.fstat(fd).st_size), 0)
    finally:
        os.close(fd)
    if suffix == ".onnx":
        other = stand_in(start)
        if other:
            raise CheckpointError(f"'{location}' {other}")
        return suffix
    if start.startswith(GGUF):
        return ".gguf"
    return ".pt" if start.startswith(ZIP) and suffix in _OF_ARCHIVES else None


class RegionFiles(Checkpoint):
    """A file of another format, or a folder of them, as a folder of weight files and side files."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        exclude: Sequence[str] = (),
        include: Sequence[str] | None = (),
    ) -> None:
        """Find the tensors in all files.

        Raises:
            CheckpointError: a file is damaged.
        """
        self.path = Path(path)
        self.is_folder = True
        self._fds = []
        self._folder = TemporaryDirectory(prefix="sparsedelta-")
        self.weight_files, self.side_files = (), {}
        self.empty_folders = self.left_out = ()
        try:
            self._open(exclude, include)
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

    def location(self, file: str) -> Path:
        """Return the path of the file that a weight file stands for."""
        path = file.removesuffix(WEIGHT_SUFFIX)
        return self.path / path if self.path.is_dir() else self.path

    def _open(self, exclude: Sequence[str], include: Sequence[str] | None) -> None:
        if not self.path.is_dir():
            self._open_file()
            return
        files, folders, left_out = list_folder(self.path, exclude, include, whole=False)
        self.empty_folders, self.left_out = tuple(folders), tuple(left_out)
        names = object_names(files[_METADATA]) if _METADATA in files else {}
        allow_open_files(len(files))
        found: dict[str, list[Region]] = {}
        for path, location in files.items():
            match _kind(location):
                case ".onnx":
                    found.setdefault(path, [])
                    for beside, regions in onnx_regions(self._open_fd(location), location).items():
                        found[str(PurePosixPath(path).parent / beside) if beside else path] = (
                            regions
                        )
                case ".gguf":
                    found[path] = gguf_regions(self._open_fd(location), location)
                case ".pt":
                    fd = self._open_fd(location)
                    found[path] = archive_regions(fd, location, names.get(path, {}))
        for path, location in files.items():
            if path in found:
                self._add(path, location, found[path])
            else:
                self.side_files[path] = location

    def _open_file(self) -> None:
        fd, kind = self._open_fd(self.path), _kind(self.path)
        if kind == ".onnx":
            by_file = onnx_regions(fd, self.path)
            regions = by_file.pop("", [])
            if by_file:
                raise CheckpointError(
                    f"'{self.path}' keeps tensors in the file {min(by_file)!r}; give the folder of both"
                )
        elif kind == ".gguf":
            regions = gguf_regions(fd, self.path)
        else:
            regions = archive_regions(fd, self.path, {})
        self._add(_ALONE, self.path, regions)

    def _open_fd(self, location: Path) -> int:
        self._fds.append(open_regular(location))
        return self._fds[-1]

    def _add(self, path: str, location: Path, regions: Sequence[Region]) -> None:
        """Add a file as a weight file and a side file."""
        fd, inner = self._open_fd(location), path + WEIGHT_SUFFIX
        _check_apart(regions, os.fstat(fd).st_size, location)
        tensors = tuple(Tensor(inner, one.name, one.spec, fd, one.offset) for one in regions)
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
        skeleton.write_bytes(_skeleton(fd, location, regions))
        self.side_files[path + SKELETON_SUFFIX] = skeleton

    def close(self) -> None:
        """Close the files, and remove the temporary copies of what lies between the tensors."""
        super().close()
        self._folder.cleanup()


def write_regions(target: Checkpoint, out: Path) -> None:
    """Write the files of a target to a new file or folder, and sync them.

    Raises:
        Corrupt: the delta names a file that no delta may write, or states other gaps than there are tensors.
        ValueError: the target is not that of a delta between files of these formats.
    """
    weights = {file.path.removesuffix(WEIGHT_SUFFIX): file for file in target.weight_files}
    if not weights or any(path + SKELETON_SUFFIX not in target.side_files for path in weights):
        raise ValueError(
            "the delta was not made from files of GGUF, ONNX or torch.save, so no such file can be written; choose another"
            " form"
        )
    for path in weights:
        if problem := path_problem(path):
            raise Corrupt(f"the delta writes the file {path!r}: {problem}")
    if weights.keys() == {_ALONE}:
        _write(weights[_ALONE], target.side_files[_ALONE + SKELETON_SUFFIX], out)
        return
    out.mkdir()
    for folder in target.empty_folders:
        (out / folder).mkdir(parents=True, exist_ok=True)
    for path, file in weights.items():
        (out / path).parent.mkdir(parents=True, exist_ok=True)
        _write(file, target.side_files[path + SKELETON_SUFFIX], out / path)
    for path, location in target.side_files.items():
        if path.removesuffix(SKELETON_SUFFIX) not in weights:
            (out / path).parent.mkdir(parents=True, exist_ok=True)
            with open(location, "rb") as source, open(out / path, "xb") as copy:
                shutil.copyfileobj(source, copy, _BLOCK_BYTES)
                _sync(copy)


def _check_apart(regions: Sequence[Region], n_bytes: int, location: Path) -> None:
    """Check that regions lie in a file in order, without overlap."""
    end = 0
    for one in regions:
        if one.offset < end or one.end > n_bytes:
            raise CheckpointError(
                f"'{location}' is damaged: tensor {one.name!r} overlaps another one, or lies outside the file"
            )
        end = one.end


def _skeleton(fd: int, location: Path, found: Sequence[Region]) -> bytes:
    """Return the sizes of the gaps between the tensors as a line of text, then the bytes in the gaps."""
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
