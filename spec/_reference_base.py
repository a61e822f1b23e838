"""Read the base and find the base tensors of rows, for the reference decoder (FORMAT §10)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from _reference_structure import Layout, Row
from blake3 import blake3


class Tensor(NamedTuple):
    """A tensor of the base."""

    dtype: str
    shape: list[int]
    data: bytes

    def has_layout(self, layout: Layout) -> bool:
        """Return whether the tensor has the dtype, shape and size of a layout."""
        same = (self.dtype, self.shape) == (layout.dtype, layout.shape)
        return same and 8 * len(self.data) == layout.n_bits

    def digest(self) -> bytes:
        """Return the first 16 bytes of the BLAKE3 hash of the data."""
        return blake3(self.data).digest()[:16]


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file, by name."""
    raw = path.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    out = {}
    for name, entry in json.loads(raw[8:end]).items():
        if name != "__metadata__":
            begin, stop = entry["data_offsets"]
            out[name] = Tensor(entry["dtype"], entry["shape"], raw[end + begin : end + stop])
    return out


class Base:
    """A checkpoint: `files` has all files by path, `weights` the tensors by file and name."""

    def __init__(self, root: Path) -> None:
        self.is_file = root.is_file()
        paths = [] if self.is_file else sorted(p for p in root.rglob("*") if p.is_file())
        self.files = {path.relative_to(root).as_posix(): path for path in paths}
        weights = {"": root} if self.is_file else self.files
        self.weights = {
            name: read_safetensors(path)
            for name, path in weights.items()
            if self.is_file or name.endswith(".safetensors")
        }

    def at(self, file: str | None, name: str, layout: Layout) -> Tensor | None:
        """Return the tensor with that file, name and layout; None if there is none."""
        path = "" if self.is_file else file or ""
        tensor = self.weights.get(path, {}).get(name)
        return tensor if tensor and tensor.has_layout(layout) else None

    def find(self, row: Row) -> Tensor | None:
        """Return the base tensor of a row (§10, step 2); None if there is none."""
        exact = self.at(row.base_file, row.base_name, row.base_layout)
        same_name = [self.at(file, row.base_name, row.base_layout) for file in self.weights]
        others = [tensor for tensor in same_name if tensor is not None]
        right = [tensor for tensor in others if tensor.digest() == row.base_digest]
        return exact or next(iter(right + others), None)
