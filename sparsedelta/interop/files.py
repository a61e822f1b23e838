"""Files of other projects: safetensors files with a few tensors, and zstd frames with a limit."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zstandard

from sparsedelta.codecs.zstd import MAX_WINDOW_BYTES
from sparsedelta.dtypes import DTYPES
from sparsedelta.errors import CheckpointError, Corrupt, LimitExceeded
from sparsedelta.files.checkpoint import Checkpoint, Tensor
from sparsedelta.format.safetensors_header import HeaderEntry, render_header
from sparsedelta.interop.view import bits_of

_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Array:
    """A tensor to write.

    Attributes:
        dtype: a dtype of safetensors.
        shape: its shape.
        data: its elements; only the bytes matter.
    """

    dtype: str
    shape: tuple[int, ...]
    data: npt.NDArray[Any]


def vector(dtype: str, data: npt.NDArray[Any]) -> Array:
    """Return a tensor of one dimension."""
    return Array(dtype, (data.nbytes // DTYPES[dtype].width,), data)


def write_safetensors(
    path: Path, tensors: Mapping[str, Array], metadata: Mapping[str, str] | None
) -> None:
    """Write a new safetensors file, with the tensors in the order in which the safetensors library writes them."""
    order = sorted(tensors, key=lambda name: (-DTYPES[tensors[name].dtype].width, name))
    edges = pairwise(accumulate((tensors[name].data.nbytes for name in order), initial=0))
    entries = [
        HeaderEntry(name, tensors[name].dtype, tensors[name].shape, begin, end)
        for name, (begin, end) in zip(order, edges, strict=True)
    ]
    header = render_header(metadata, entries)
    blocks = (np.ascontiguousarray(tensors[name].data).view(np.uint8).tobytes() for name in order)
    write_new(path, _joined(header, blocks))


def _joined(header: bytes, blocks: Iterator[bytes]) -> Iterator[bytes]:
    yield len(header).to_bytes(8, "little") + header
    yield from blocks


def write_new(path: Path, blocks: Iterator[bytes] | list[bytes]) -> None:
    """Write a new file and sync it."""
    with open(path, "xb") as file:
        for block in blocks:
            file.write(block)
        file.flush()
        os.fsync(file.fileno())


def write_json(path: Path, value: Any) -> None:
    """Write a new JSON file and sync it."""
    write_new(path, [json.dumps(value, indent=2, ensure_ascii=False).encode("utf-8") + b"\n"])


class TensorFile:
    """An open safetensors file of another project, whose tensors are the parts of a delta."""

    def __init__(self, path: Path) -> None:
        """Open the file. Raises Corrupt if it is not a valid safetensors file."""
        try:
            self._opened = Checkpoint(path)
        except CheckpointError as error:
            raise Corrupt(str(error)) from error
        (file,) = self._opened.weight_files
        self.metadata: dict[str, str] = file.header.metadata or {}
        self.tensors: dict[str, Tensor] = {tensor.name: tensor for tensor in file.tensors}

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, *exc: object) -> None:
        self._opened.close()

    def bits(self, name: str, *dtypes: str, n_dimensions: int | None = 1) -> npt.NDArray[Any]:
        """Return the elements of a tensor as unsigned integers.

        Args:
            name: its name.
            dtypes: the dtypes that it may have.
            n_dimensions: how many dimensions it must have; None for any number.

        Returns:
            (n,) for one dimension, else in the tensor's shape.

        Raises:
            Corrupt: there is no such tensor, or it has another dtype or number of dimensions.
        """
        tensor = self.tensors.get(name)
        if tensor is None:
            raise Corrupt(f"'{self._opened.path}' has no tensor {name!r}; the delta is damaged")
        spec = tensor.spec
        if spec.dtype.name not in dtypes or n_dimensions not in (None, len(spec.shape)):
            raise Corrupt(
                f"'{self._opened.path}': tensor {name!r} is {spec.dtype.name} {list(spec.shape)}, expected"
                f" {n_dimensions or 'any number of'} dimensions of {' or '.join(dtypes)}"
            )
        return bits_of(tensor).reshape(spec.shape)

    def dtype(self, name: str) -> str:
        """Return the dtype of a tensor; an empty text if there is none."""
        tensor = self.tensors.get(name)
        return tensor.spec.dtype.name if tensor else ""


def unpacked(frame: bytes | memoryview, limit: int, what: str) -> bytes:
    """Return the content of one zstd frame.

    Args:
        frame: the frame, with nothing after it. It need not state its size.
        limit: how many bytes it may hold.
        what: what it is, for messages.

    Raises:
        Corrupt: it is damaged.
        LimitExceeded: it holds more than ``limit`` bytes, or needs a larger window than this package allows.
    """
    try:
        stated = zstandard.frame_content_size(frame)
        if stated > limit:
            raise LimitExceeded(f"{what} holds {stated} bytes, but at most {limit} are possible")
        decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES)
        data = bytearray()
        with decompressor.stream_reader(io.BytesIO(frame), read_across_frames=False) as reader:
            while block := reader.read(_BLOCK_BYTES):
                data += block
                if len(data) > limit:
                    raise LimitExceeded(
                        f"{what} holds more than the {limit} bytes that are possible"
                    )
    except zstandard.ZstdError as error:
        raise Corrupt(f"{what} is not an intact zstd frame: {error}") from error
    if stated >= 0 and len(data) != stated:
        raise Corrupt(f"{what} holds {len(data)} bytes, but states {stated}; the delta is damaged")
    return bytes(data)


def exactly_unpacked(frame: bytes | memoryview, n_bytes: int, what: str) -> bytes:
    """Return the content of one zstd frame, which must hold ``n_bytes`` bytes.

    Raises:
        Corrupt: it is damaged, or holds another number of bytes.
        LimitExceeded: it holds more bytes.
    """
    data = unpacked(frame, n_bytes, what)
    if len(data) != n_bytes:
        raise Corrupt(f"{what} holds {len(data)} bytes, expected {n_bytes}; the delta is damaged")
    return data


def packed(data: bytes | memoryview, level: int) -> bytes:
    """Return one zstd frame that states its size."""
    return zstandard.ZstdCompressor(level=level).compress(data)
