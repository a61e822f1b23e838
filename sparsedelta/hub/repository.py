"""A repository at one commit: finds its delta, or the files that a delta needs from it as the base.

A repository with weights is a base. A repository with a delta and no weights is a delta repository. Weight
files that a delta does not refer to, such as the same weights in another layout, are not downloaded.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from sparsedelta.dtypes import dtype_of
from sparsedelta.errors import BaseMismatch, CheckpointError, FormatError, RemoteNotFound
from sparsedelta.files import junk
from sparsedelta.format.delta import Delta, read_delta
from sparsedelta.format.paths import DELTA_SUFFIX, WEIGHT_SUFFIX
from sparsedelta.format.records import BaseTensor, TensorSpec
from sparsedelta.format.safetensors_header import MAX_HEADER_BYTES, HeaderEntry, parse_header
from sparsedelta.hub.client import Hub, RemoteFile
from sparsedelta.hub.references import DELTA_NAME, Reference
from sparsedelta.stores.base import ByteSource
from sparsedelta.stores.local import OpenFile

_MAX_LISTED = 8


@dataclass(frozen=True)
class Repository:
    """A repository at a commit, with the list of its files.

    Attributes:
        hub: the Hub.
        reference: the repository, pinned to a commit, and the path in it that was named, if any.
        files: its files by path.
    """

    hub: Hub
    reference: Reference
    files: Mapping[str, RemoteFile]
    _tensors: dict[str, tuple[BaseTensor, ...]] = field(
        default_factory=dict, init=False, repr=False
    )

    @property
    def name(self) -> str:
        """The repository and commit, for messages."""
        return str(Reference(self.reference.repo_id, self.reference.revision))

    @property
    def is_listed(self) -> bool:
        """Whether ``files`` is the Hub's complete list, not that of the cache."""
        return all(file.sha256 or file.git_oid for file in self.files.values())

    @property
    def has_weights(self) -> bool:
        """Whether it holds safetensors files."""
        return bool(self._weights())

    @property
    def is_delta_repository(self) -> bool:
        """Whether the reference means a delta: its path names one, or the repository has deltas but no weights.

        Raises:
            RemoteNotFound: it has a path, which names no delta.
        """
        path = self.reference.path
        if path is None:
            return not self.has_weights and bool(self._deltas_below(""))
        if not path.endswith(DELTA_SUFFIX) and not self._deltas_below(path):
            what = f"'{path}/*'"
            if path in self.files:
                what = f"'{path}'"
            elif not any(file.startswith(f"{path}/") for file in self.files):
                raise RemoteNotFound(
                    f"repository '{self.name}' has neither a file nor a folder {path!r}"
                )
            raise RemoteNotFound(
                f"'{path}' in repository '{self.name}' is no delta and has none, and a checkpoint is a whole repository; leave"
                f" out the path, or download it (`hf download {self.reference.repo_id} --include {what} --local-dir DIR`) and"
                " give the local copy"
            )
        return True

    def delta_file(self) -> RemoteFile:
        """Return the delta that the reference means: the one at its path, ``delta.sd``, or the only one.

        Raises:
            RemoteNotFound: there is no delta, or there are several and the reference names none of them.
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
            if self.reference in self.hub.unlisted:
                raise self.hub.unlisted[self.reference]  # the cache has only a part
            raise RemoteNotFound(f"repository {where} holds no delta ({DELTA_SUFFIX} file)")
        listed = ", ".join(found[:_MAX_LISTED]) + (", …" if len(found) > _MAX_LISTED else "")
        holds = (
            "holds several deltas" if self.is_listed else "is not listed offline; the cache holds"
        )
        raise RemoteNotFound(
            f"repository {where} {holds}: {listed}; choose one, such as"
            f" hf://{self.reference.repo_id}/{found[0]}"
        )

    def read_delta(self) -> Delta:
        """Return the delta that the reference means; only its header and manifest are downloaded."""
        return read_delta(self.hub.source(self.reference, self.delta_file()))

    def download(self, paths: Iterable[str]) -> dict[str, Path]:
        """Download the files that are not in the cache; return the local path of each file."""
        return self.hub.download(self.reference, paths)

    def download_one(self, path: str) -> Path:
        """Return the local path of a file, downloaded if it is not in the cache."""
        return self.download([path])[path]

    def base_files(self, delta: Delta) -> list[str]:
        """Return the files that a delta needs from its base: weight files, and side files it does not carry.

        Raises:
            BaseMismatch: the repository lacks a side file.
        """
        side_files = {f.path for f in delta.target.side_files if not f.stored}
        missing = sorted(side_files - self.files.keys())
        if not self.is_listed and (missing or not self.has_weights):
            raise self.hub.unlisted[self.reference]  # the cache has only a part
        if missing:
            raise BaseMismatch(
                f"repository '{self.name}' has no file {missing[0]!r}, which the delta takes from its"
                " base; name the right base"
            )
        return sorted({*self.weight_files(delta), *side_files})

    def weight_files(self, delta: Delta) -> list[str]:
        """Return the safetensors files that hold the tensors that a delta was made from.

        These are the files that the delta names. If the repository lacks one of them, all other files that
        have a tensor of the same name are added.
        """
        wanted = [row.base for row in delta.tensors if row.base]
        weights = self._weights()
        named = weights & {tensor.file for tensor in wanted}
        moved = {tensor.name for tensor in wanted if tensor.file not in named}
        others = weights - named if moved else set()
        holding = {path for path in others if any(t.name in moved for t in self.tensors(path))}
        return sorted(named | holding)

    def tensors(self, path: str) -> tuple[BaseTensor, ...]:
        """Return the tensors of a safetensors file. Only its header is downloaded, if it is not in the cache.

        Raises:
            CheckpointError: the file is not a safetensors file.
            RemoteError: the file is not available.
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
        return {path for path in self.files if junk.is_weights(path, WEIGHT_SUFFIX)}

    def _deltas_below(self, folder: str) -> list[str]:
        start = f"{folder}/" if folder else ""
        return sorted(p for p in self.files if p.startswith(start) and p.endswith(DELTA_SUFFIX))


def open_repository(hub: Hub, reference: Reference) -> Repository:
    """Return a repository at the current commit of a reference.

    Raises:
        RemoteError: the repository or revision does not exist, or the Hub cannot be reached.
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
