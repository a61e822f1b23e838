"""A file or folder of unknown form: what ``recognise`` may look at, read once and within limits."""

from __future__ import annotations

import os
from functools import cached_property
from pathlib import Path
from typing import Any

from sparsedelta.errors import CheckpointError, Corrupt, FormatError, LimitExceeded
from sparsedelta.files.checkpoint import Checkpoint
from sparsedelta.format.container import START_BYTES
from sparsedelta.format.safetensors_header import MAX_HEADER_BYTES
from sparsedelta.format.strict_json import parse_json
from sparsedelta.fs import open_regular
from sparsedelta.system import read_at

_MAX_JSON_BYTES = MAX_HEADER_BYTES


class Source:
    """A file or folder to recognise and read.

    Attributes:
        path: where it is.
        is_folder: whether it is a folder.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Prepare. Raises FileNotFoundError if there is nothing at ``path``."""
        self.path = Path(path)
        self.is_folder = self.path.is_dir()
        if not self.is_folder:
            os.close(open_regular(self.path))

    @cached_property
    def start(self) -> bytes:
        """The first bytes of a file; none of a folder."""
        if self.is_folder:
            return b""
        fd = open_regular(self.path)
        try:
            return read_at(fd, START_BYTES, 0)
        finally:
            os.close(fd)

    @cached_property
    def names(self) -> frozenset[str]:
        """The names of the files in a folder; none of a file."""
        if not self.is_folder:
            return frozenset()
        return frozenset(path.name for path in self.path.iterdir() if path.is_file())

    @cached_property
    def tensors(self) -> frozenset[str]:
        """The names of the tensors, if it is a safetensors file."""
        return self._header[0]

    @cached_property
    def metadata(self) -> dict[str, str]:
        """The metadata, if it is a safetensors file."""
        return self._header[1]

    @cached_property
    def _header(self) -> tuple[frozenset[str], dict[str, str]]:
        if self.is_folder or self.start[8:9] != b"{":
            return frozenset(), {}
        try:
            with Checkpoint(self.path) as opened:
                (file,) = opened.weight_files
                return frozenset(t.name for t in file.tensors), file.header.metadata or {}
        except CheckpointError:
            return frozenset(), {}

    def json(self, name: str) -> Any:
        """Return the JSON in a file of the folder; None if there is no such file or it is not strict JSON."""
        if name not in self.names:
            return None
        try:
            return self.required_json(name)
        except FormatError:
            return None

    def required_json(self, name: str) -> Any:
        """Return the JSON in a file of the folder. Raises FormatError if it is damaged or too large."""
        path = self.path / name
        size = path.stat().st_size
        if size > _MAX_JSON_BYTES:
            raise LimitExceeded(f"'{path}' has {size} bytes, the limit is {_MAX_JSON_BYTES}")
        return parse_json(path.read_bytes(), f"'{path}'")

    def read_bytes(self, limit: int) -> bytes:
        """Return the content of a file.

        Raises:
            LimitExceeded: it has more than ``limit`` bytes.
        """
        size = self.path.stat().st_size
        if size > limit:
            raise LimitExceeded(
                f"'{self.path}' has {size} bytes, but a delta of this base has at most {limit}"
            )
        data = self.path.read_bytes()
        if len(data) != size:
            raise Corrupt(f"'{self.path}' changed while it was read; try again")
        return data
