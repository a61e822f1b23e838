"""A repository at one commit: which of its files is the delta, and which a base for one.

A repository with weights is a base; one with a delta and no weights is a delta repository. Weight files
that a delta does not refer to, such as the same weights in another layout, are left where they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from sparsedelta.dtypes import dtype_of
from sparsedelta.errors import BaseMismatch, CheckpointError, FormatError, RemoteNotFound
from sparsedelta.format.delta import Delta, read_delta
from sparsedelta.format.paths import WEIGHT_SUFFIX
from sparsedelta.format.records import BaseTensor, TensorSpec
from sparsedelta.format.safetensors_header import MAX_HEADER_BYTES, HeaderEntry, parse_header
from sparsedelta.hub.client import Hub, RemoteFile
from sparsedelta.hub.references import DELTA_NAME, DELTA_SUFFIX, Reference
from sparsedelta.stores.base import ByteSource
from sparsedelta.stores.local import OpenFile

_MAX_LISTED = 8


@dataclass(frozen=True)
class Repository:
    """A repository at a commit, its files listed.

    Attributes:
        hub: where it is.
        reference: pinned, and the path that was asked for.
        files: by path.
    """

    hub: Hub
    reference: Reference
    files: Mapping[str, RemoteFile]
    _tensors: dict[str, tuple[BaseTensor, ...]] = field(
        default_factory=dict, init=False, repr=False
    )

    @property
    def name(self) -> str:
        """Id and commit."""
        return str(Reference(self.reference.repo_id, self.reference.revision))

    @property
    def is_listed(self) -> bool:
        """Whether the files are all that there are: the Hub's list, not what is in the cache."""
        return all(file.sha256 or file.git_oid for file in self.files.values())

    @property
    def has_weights(self) -> bool:
        """Whether it holds safetensors files."""
        return bool(self._weights())

    @property
    def is_delta_repository(self) -> bool:
        """Whether a delta in it is meant: its path is given, or it holds no weights but a delta."""
        path = self.reference.path
        if path is not None:
            return path.endswith(DELTA_SUFFIX) or bool(self._deltas_below(path))
        return not self.has_weights and bool(self._deltas_below(""))

    def delta_file(self) -> RemoteFile:
        """Return the delta that the reference means: the one named, ``delta.sd``, or the only one.

        Raises:
            RemoteNotFound: there is none, or one has to be chosen.
        """
        path = self.reference.path or ""
        if path in self.files and path.endswith(DELTA_SUFFIX):
            return self.files[path]
        usual = f"{path}/{DELTA_NAME}" if path else DELTA_NAME
        if usual in self.files:
            return self.files[usual]
        found = self._deltas_below(path)
        if len(found) == 1 and self.is_listed:
            return self.files[found[0]]
        where = f"'{self.name}'" + (f" below {path!r}" if path else "")
        if not found:
            raise RemoteNotFound(f"repository {where} holds no delta ({DELTA_SUFFIX} file)")
        listed = ", ".join(found[:_MAX_LISTED]) + (", …" if len(found) > _MAX_LISTED else "")
        several = "several deltas" if self.is_listed else "in the local cache"
        raise RemoteNotFound(
            f"repository {where} holds {several}: {listed}; choose one, such as"
            f" hf://{self.reference.repo_id}/{found[0]}"
        )

    def read_delta(self) -> Delta:
        """Return the delta meant, of which only header and manifest have been fetched."""
        return read_delta(self.hub.source(self.reference, self.delta_file()))

    def download(self, paths: Iterable[str]) -> dict[str, Path]:
        """Return where files are on disk, having downloaded those not in the cache."""
        return self.hub.download(self.reference, paths)

    def download_one(self, path: str) -> Path:
        """Return where a file is on disk, having downloaded it if it is not in the cache."""
        return self.download([path])[path]

    def base_files(self, delta: Delta) -> list[str]:
        """Return what a delta needs of this as its base: weight files and the side files it does not carry.

        Raises:
            BaseMismatch: a side file is not here.
        """
        side_files = {f.path for f in delta.target.side_files if not f.stored}
        missing = sorted(side_files - self.files.keys())
        if missing:
            raise BaseMismatch(
                f"repository '{self.name}' has no file {missing[0]!r}, which the base that the delta"
                " was made from has"
            )
        return sorted({*self.weight_files(delta), *side_files})

    def weight_files(self, delta: Delta) -> list[str]:
        """Return the safetensors files that have the tensors that a delta is made from, as names say.

        They are those that the delta names. For tensors of a file that is not here, they are all others
        with a tensor of that name.
        """
        wanted = [row.base for row in delta.tensors if row.base]
        weights = self._weights()
        named = weights & {tensor.file for tensor in wanted}
        moved = {tensor.name for tensor in wanted if tensor.file not in named}
        others = weights - named if moved else set()
        holding = {path for path in others if any(t.name in moved for t in self.tensors(path))}
        return sorted(named | holding)

    def tensors(self, path: str) -> tuple[BaseTensor, ...]:
        """Return the tensors of a safetensors file; if it is not in the cache, its header is fetched.

        Raises:
            CheckpointError: it is not a safetensors file.
            RemoteError: it is not available.
        """
        if path not in self._tensors:
            cached = self.hub.cached(self.reference, [path])
            file = self.files[path]
            source: ByteSource = (
                OpenFile(cached[path]) if cached else self.hub.source(self.reference, file)
            )
            with closing(source):
                self._tensors[path] = _read_tensors(source, path)
        return self._tensors[path]

    def _weights(self) -> set[str]:
        return {path for path in self.files if path.endswith(WEIGHT_SUFFIX)}

    def _deltas_below(self, folder: str) -> list[str]:
        start = f"{folder}/" if folder else ""
        return sorted(p for p in self.files if p.startswith(start) and p.endswith(DELTA_SUFFIX))


def open_repository(hub: Hub, reference: Reference) -> Repository:
    """Return a repository at the commit that a reference means now.

    Raises:
        RemoteError: there is none, or the Hub cannot be asked.
    """
    pinned = hub.pin(reference)
    return Repository(hub, pinned, hub.files(pinned))


def _read_tensors(source: ByteSource, path: str) -> tuple[BaseTensor, ...]:
    size = int.from_bytes(source.read(0, 8), "little")
    if size > min(source.n_bytes, MAX_HEADER_BYTES):
        raise CheckpointError(
            f"'{source.name}' is not a safetensors file: it states a header of {size} bytes"
        )
    try:
        entries = parse_header(source.read(8, size), "its header").entries
        return tuple(BaseTensor(path, entry.name, _spec(entry)) for entry in entries)
    except FormatError as error:
        raise CheckpointError(f"'{source.name}': {error}") from error


def _spec(entry: HeaderEntry) -> TensorSpec:
    return TensorSpec(dtype_of(entry.dtype, entry.shape, entry.end - entry.begin), entry.shape)
