"""Helpers: checkpoints for tests, and comparisons bit by bit.

Only ``roundtrip`` and ``small_chunks`` use sparsedelta. The checkpoints are written by independent code, so
that the package does not test itself.
"""

from __future__ import annotations

import json
import math
import os
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import sparsedelta

# Bits per value of every dtype of safetensors 0.8.
BITS = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}
# Dtypes that no release knows yet: their elements are bytes.
UNKNOWN_BITS = {"X24": 24, "X4": 4, "X8_NEW": 8}


@dataclass(frozen=True)
class Raw:
    """A tensor as it is stored in a file."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes

    def with_data(self, data: bytes) -> Raw:
        """Return the same tensor with other bytes."""
        return Raw(self.dtype, self.shape, data)

    def changed(self, *positions: int) -> Raw:
        """Return the tensor with the lowest bit of these bytes flipped."""
        data = bytearray(self.data)
        for position in positions:
            data[position] ^= 1
        return self.with_data(bytes(data))


Tensors = Mapping[str, Raw]
Spell = Callable[[dict[str, Any]], bytes]


def n_bytes(dtype: str, shape: Sequence[int]) -> int:
    """Return the size of a tensor in bytes."""
    return math.prod(shape) * (BITS | UNKNOWN_BITS)[dtype] // 8


def noise(dtype: str, *shape: int, seed: object = 0) -> Raw:
    """Return a tensor of random bits."""
    draw = random.Random(f"{dtype} {shape} {seed}")
    return Raw(dtype, shape, draw.randbytes(n_bytes(dtype, shape)))


def of_array(dtype: str, array: npt.NDArray[Any]) -> Raw:
    """Return a tensor with the bits of an array of the same width."""
    return Raw(dtype, array.shape, np.ascontiguousarray(array).tobytes())


def header_fields(tensors: Tensors, metadata: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Return the members of the header for a file that holds tensors in this order."""
    fields: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    begin = 0
    for name, tensor in tensors.items():
        assert len(tensor.data) == n_bytes(tensor.dtype, tensor.shape), name
        end = begin + len(tensor.data)
        fields[name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    return fields


def compact(fields: dict[str, Any]) -> bytes:
    """Return a header as safetensors writes it: compact JSON, spaces to a multiple of 8."""
    raw = json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode()
    return raw + b" " * (-len(raw) % 8)


def file_bytes(
    tensors: Tensors, metadata: Mapping[str, str] | None = None, *, spell: Spell = compact
) -> bytes:
    """Return a safetensors file whose header is formatted by ``spell``."""
    return with_header(
        spell(header_fields(tensors, metadata)), b"".join(t.data for t in tensors.values())
    )


def with_header(header: bytes, data: bytes = b"") -> bytes:
    """Return a safetensors file with these header bytes."""
    return len(header).to_bytes(8, "little") + header + data


def write_file(
    path: Path,
    tensors: Tensors,
    metadata: Mapping[str, str] | None = None,
    *,
    spell: Spell = compact,
) -> Path:
    """Write a safetensors file and return its path; missing folders are created."""
    return write(path, file_bytes(tensors, metadata, spell=spell))


def write_sharded(
    folder: Path, shards: Sequence[Tensors], *, stem: str = "model", index: bool = True
) -> Path:
    """Write numbered shards and their index into a folder and return the folder."""
    weight_map: dict[str, str] = {}
    for number, tensors in enumerate(shards, 1):
        name = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        write_file(folder / name, tensors, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, os.path.basename(name))
    if index:
        total = sum(len(t.data) for tensors in shards for t in tensors.values())
        content = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write(
            folder / f"{stem}.safetensors.index.json",
            json.dumps(content, ensure_ascii=False, indent=2).encode() + b"\n",
        )
    return folder


def write(path: Path, content: bytes | str) -> Path:
    """Write a file and return its path; missing folders are created."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def tree(root: Path) -> dict[str, bytes | None]:
    """Return the content of each file below a folder by path, and None for each folder.

    For a single file, the path is ``""``.
    """
    if not root.is_dir():
        return {"": root.read_bytes()}
    found: dict[str, bytes | None] = {}
    for path in root.rglob("*"):
        found[path.relative_to(root).as_posix()] = None if path.is_dir() else path.read_bytes()
    return found


def state(root: Path) -> dict[str, tuple[int, ...]]:
    """Return the attributes that a write to a file or folder changes: inode, mode, size and times."""
    paths = [root, *(root.rglob("*") if root.is_dir() else ())]
    stats = {str(path): os.lstat(path) for path in paths}
    return {
        path: (s.st_ino, s.st_mode, s.st_size, s.st_mtime_ns, s.st_ctime_ns)
        for path, s in stats.items()
    }


def assert_same_files(target: Path, out: Path) -> None:
    """Check that two checkpoints are equal byte for byte, including empty folders."""
    wanted, found = tree(target), tree(out)
    assert found.keys() == wanted.keys()
    for path, content in wanted.items():
        assert found[path] == content, path
    assert not any(path.is_symlink() for path in out.rglob("*"))


def assert_bit_equal(left: npt.NDArray[Any], right: npt.NDArray[Any]) -> None:
    """Check that two arrays have the same element size, shape and bits, including NaNs and signed zeros."""
    assert left.dtype.itemsize == right.dtype.itemsize
    assert left.shape == right.shape
    view = f"u{left.dtype.itemsize}"
    different = np.flatnonzero(
        np.ascontiguousarray(left).reshape(-1).view(view)
        != np.ascontiguousarray(right).reshape(-1).view(view)
    )
    assert not len(different), f"{len(different)} elements differ, the first at {different[0]}"


def roundtrip(base: Path, target: Path, scratch: Path, **options: Any) -> sparsedelta.Delta:
    """Diff, save, load and apply; check that the target is rebuilt and the base is unchanged.

    Args:
        base: path of the base.
        target: path of the target.
        scratch: an existing folder, for the delta and the output.
        options: keyword arguments of ``sparsedelta.diff``.

    Returns:
        The loaded delta.
    """
    before = state(base)
    path, out = scratch / "delta.sd", scratch / "out"
    with sparsedelta.diff(base, target, **options) as made:
        made.save(path)
    loaded = sparsedelta.load(path)
    sparsedelta.apply(base, loaded, out)
    if not options.get("exclude"):
        assert_same_files(target, out)
    assert state(base) == before
    assert sorted(os.listdir(scratch)) == ["delta.sd", "out"]
    return loaded


def small_chunks(monkeypatch: Any, n_elements: int, block_bytes: int) -> None:
    """Make the package write tiny chunks and read tiny blocks, so that small tensors have several of them.

    Chunks of any size can still be read.
    """
    sparsedelta.apply, sparsedelta.diff, sparsedelta.verify  # noqa: B018 - imports their modules
    # A tensor that is processed in a group has one chunk.
    sizes = {"MAX_SPAN": n_elements, "BLOCK_BYTES": block_bytes, "SMALL_BYTES": n_elements}
    for name, module in list(sys.modules.items()):
        if name.startswith("sparsedelta.") and name != "sparsedelta.codecs.chunk":
            for constant, value in sizes.items():
                if hasattr(module, constant):
                    monkeypatch.setattr(module, constant, value)
