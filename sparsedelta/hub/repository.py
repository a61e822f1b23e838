"""A repository at one commit: which of its files is the delta, and which a base for one.

A repository with weights is a base; one with a delta and no weights is a delta repository. Weight sets
that a delta does not name, such as the same weights in another layout, are left where they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from sparsedelta.errors import BaseMismatch, RemoteNotFound
from sparsedelta.files.weight_sets import (
    INDEX_SUFFIX,
    PRIMARY_STEM,
    name_prefixes,
    set_stems,
    shards_of_index,
)
from sparsedelta.format.delta import Delta
from sparsedelta.format.paths import WEIGHT_SUFFIX
from sparsedelta.hub.client import Hub, RemoteFile
from sparsedelta.hub.ranges import read_remote_delta
from sparsedelta.hub.references import DELTA_NAME, DELTA_SUFFIX, Reference

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
        return any(path.endswith(WEIGHT_SUFFIX) for path in self.files)

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
        return read_remote_delta(self.hub, self.reference, self.delta_file())

    def download_delta(self) -> Path:
        """Return where the delta meant is on disk."""
        path = self.delta_file().path
        return self.download([path])[path]

    def download(self, paths: Iterable[str]) -> dict[str, Path]:
        """Return where files are on disk, having downloaded those not in the cache."""
        return self.hub.download(self.reference, paths)

    def base_files(self, delta: Delta) -> list[str]:
        """Return what a delta needs of this as its base: weights it names, side files it leaves to it.

        Raises:
            BaseMismatch: a side file is not here.
        """
        side_files = {f.path for f in delta.target.side_files if not f.carried}
        missing = sorted(side_files - self.files.keys())
        if missing:
            raise BaseMismatch(
                f"repository '{self.name}' has no file {missing[0]!r}, which the base that the delta"
                " was made from has"
            )
        return sorted({*self.weight_files(delta), *side_files})

    def weight_files(self, delta: Delta) -> list[str]:
        """Return the safetensors files of the weight sets that a delta names, with their indexes."""
        weights = [path for path in self.files if path.endswith(WEIGHT_SUFFIX)]
        stems = set_stems(weights, self._shards())
        named = _named_stems(delta, stems)
        indexes = [path for path in self.files if path.endswith(INDEX_SUFFIX)]
        return sorted(
            [path for path in weights if stems[path] in named]
            + [path for path in indexes if path.removesuffix(INDEX_SUFFIX) in named]
        )

    def prefixes(self) -> dict[str, str]:
        """Return what stands before the own names of the tensors of each safetensors file."""
        weights = [path for path in self.files if path.endswith(WEIGHT_SUFFIX)]
        return name_prefixes(set_stems(weights, self._shards()))

    def _shards(self) -> dict[str, set[str]]:
        indexes = [path for path in self.files if path.endswith(INDEX_SUFFIX)]
        places = self.download(indexes)
        return {path: shards_of_index(place.read_bytes(), path) for path, place in places.items()}

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


def _named_stems(delta: Delta, stems: Mapping[str, str]) -> set[str]:
    """Return the stems of the sets that a delta's rows name; all, if that is not certain."""
    known = set(stems.values())
    if PRIMARY_STEM not in known:
        return known  # leaving one out could make another the primary set, and rename its tensors
    named = set()
    for row in delta.tensors:
        stem = row.name.partition(":")[0]
        named.add(stem if ":" in row.name and stem in known else PRIMARY_STEM)
    return named
