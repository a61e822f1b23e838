"""Checkpoints for the vectors: tensors, safetensors files and folders, held in memory."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from blake3 import blake3

WEIGHTS = "model.safetensors"
SHARDS = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
FLOATS = ("F8_E5M2", "F8_E4M3", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F16", "BF16", "F32", "F64")

BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E8M0", *FLOATS[:4]), 8),
    **{"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U16": 16, "I16": 16, "F16": 16, "BF16": 16},
    **{"U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "C64": 64, "F64": 64},
}

Place = tuple[str, str]  # the path of a weight file and the name of a tensor in it


def compact(value: object) -> bytes:
    """Return compact JSON (FORMAT §1.2)."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


@dataclass(frozen=True)
class Tensor:
    """A tensor with its bytes; bits per value and element type of a dtype that is not known."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes
    own: tuple[int, str] | None = None

    @property
    def layout(self) -> list[Any]:
        """Dtype, bits, element type and shape, as a delta states them."""
        letter, width = "f" if self.dtype in FLOATS else "i", max(BITS.get(self.dtype, 8) // 8, 1)
        n_bits, element = self.own or (BITS[self.dtype], f"{letter}{width}")
        return [self.dtype, n_bits, element, list(self.shape)]

    @property
    def element(self) -> str:
        """The element type."""
        return str(self.layout[2])

    @property
    def width(self) -> int:
        """The size of an element in bytes."""
        return int(self.element[1])

    def elements(self) -> Sequence[int]:
        """Return the bits of all elements."""
        if self.width == 1:
            return self.data
        w = self.width
        return [int.from_bytes(self.data[i : i + w], "little") for i in range(0, len(self.data), w)]

    def digest(self) -> bytes:
        """Return the digest of its bytes."""
        return blake3(self.data).digest()[:16]


def tensor(dtype: str, elements: Sequence[int], shape: Sequence[int] | None = None) -> Tensor:
    """Return a tensor of the given bits, of one dimension unless a shape is given."""
    width = max(BITS[dtype] // 8, 1)
    data = b"".join(bits.to_bytes(width, "little") for bits in elements)
    return Tensor(dtype, tuple((len(data) * 8 // BITS[dtype],) if shape is None else shape), data)


@dataclass
class WeightFile:
    """A safetensors file: tensors by name in data order; `header` replaces the canonical one."""

    path: str
    tensors: dict[str, Tensor]
    metadata: dict[str, str] | None = None
    header: bytes | None = None

    def content(self) -> bytes:
        """Return the bytes of the file."""
        data = b"".join(tensor.data for tensor in self.tensors.values())
        return len(self.own_header()).to_bytes(8, "little") + self.own_header() + data

    def own_header(self) -> bytes:
        """Return the header that the file has."""
        return self.canonical() if self.header is None else self.header

    def canonical(self) -> bytes:
        """Return the canonical header."""
        out: dict[str, Any] = {} if self.metadata is None else {"__metadata__": self.metadata}
        begin = 0
        for name, one in self.tensors.items():
            end = begin + len(one.data)
            out[name] = {"dtype": one.dtype, "shape": one.shape, "data_offsets": [begin, end]}
            begin = end
        text = compact(out)
        return text + b" " * (-len(text) % 8)


@dataclass
class Checkpoint:
    """A base or target; one of kind `file` has one weight file and nothing else."""

    weight_files: list[WeightFile]
    side_files: dict[str, bytes] = field(default_factory=dict)
    empty_folders: list[str] = field(default_factory=list)
    kind: str = "folder"

    def files(self) -> dict[str, bytes]:
        """Return the content of every file by path."""
        return {file.path: file.content() for file in self.weight_files} | self.side_files

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by name; names that several files have are the last one's."""
        return {name: one for (_, name), one in self.places().items()}

    def places(self) -> dict[Place, Tensor]:
        """Return the tensors by file and name, in the order of a delta's rows."""
        files = self.weight_files
        return {(file.path, name): one for file in files for name, one in file.tensors.items()}


def one_file(
    tensors: dict[str, Tensor], metadata: dict[str, str] | None = None, path: str = WEIGHTS
) -> Checkpoint:
    """Return a checkpoint that is a single file."""
    return Checkpoint([WeightFile(path, tensors, metadata)], kind="file")


def folder(*files: WeightFile, side: dict[str, bytes] | None = None) -> Checkpoint:
    """Return a checkpoint that is a folder."""
    return Checkpoint(list(files), side or {})


def noise(dtype: str, n: int, seed: int, shape: Sequence[int] | None = None) -> Tensor:
    """Return a tensor of n elements of random bits; the same for the same seed."""
    draw = random.Random(f"{dtype} {n} {seed}")
    return tensor(dtype, [draw.getrandbits(8 * max(BITS[dtype] // 8, 1)) for _ in range(n)], shape)


def nudged(one: Tensor, positions: Sequence[int], by: int = 1) -> Tensor:
    """Return a tensor with the bits at some positions moved."""
    data, w = bytearray(one.data), one.width
    for p in positions:
        bits = int.from_bytes(data[p * w : (p + 1) * w], "little") + by
        data[p * w : (p + 1) * w] = (bits % (1 << 8 * w)).to_bytes(w, "little")
    return Tensor(one.dtype, one.shape, bytes(data), one.own)
