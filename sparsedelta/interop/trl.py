"""The two forms of TRL's asynchronous GRPO: one safetensors file of indices and BF16 values."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from sparsedelta._typing import JSON
from sparsedelta.errors import Corrupt, UnsupportedFeature
from sparsedelta.files.checkpoint import Checkpoint
from sparsedelta.interop.abilities import Abilities
from sparsedelta.interop.digests import check_digest
from sparsedelta.interop.files import Array, TensorFile, vector, write_safetensors
from sparsedelta.interop.form import Form, Reading, Setting, Settings
from sparsedelta.interop.scatter import Scatter
from sparsedelta.interop.source import Source
from sparsedelta.interop.transition import Changed, Transition
from sparsedelta.interop.view import PatchedCheckpoint, bits_of

_FORMAT = "sparse_weight_patch"
_EMPTY = "__empty_delta__"
_INT32_ELEMENTS = 1 << 31
_SAYS = ("model_version", "prev_model_version", "anchor_step", "base_model_id", "encoding")


class TrlV1(Form):
    """Flat int32 indices and BF16 values, with one SHA-256 over all BF16 tensors of the target."""

    name = "trl-v1"
    title = "TRL, sparse weight patch v1"
    source = "huggingface/trl at a46bf262d, experimental/async_grpo/weight_diff.py"
    abilities = Abilities(dtypes=frozenset({"BF16"}), proof="all tensors")
    settings: ClassVar[Settings] = {
        "model_version": 1, "prev_model_version": 0, "anchor_step": 0, "base_model_id": "",
    }  # fmt: skip

    def recognise(self, source: Source) -> bool:
        """Return whether the metadata names the format and the keys are those of v1."""
        keys = source.tensors
        return source.metadata.get("format") == _FORMAT and (
            _EMPTY in keys or any(key.endswith(".indices") for key in keys)
        )

    def read(self, source: Source, base: Checkpoint) -> Reading:
        """Return the delta, opened with its base; see ``Form.read``."""
        patches = {}
        with TensorFile(source.path) as file:
            for name in _pairs(file, ".indices", ".values"):
                indices = file.bits(f"{name}.indices", "I32").view(np.int32).astype(np.int64)
                values = file.bits(f"{name}.values", "BF16")
                patches[name] = Scatter(name, "BF16", indices, values)
            _check_listed(file.metadata, patches)
            digest = file.metadata.get("checksum_sha256", "")
            says = _says(file.metadata)
        target = PatchedCheckpoint(base, patches)
        if not digest:
            return Reading(target, "none", says)

        def check() -> None:
            check_digest("all BF16 tensors", _sha256(target), digest)

        return Reading(target, _proof(base, patches), says, check)

    def write(self, change: Transition, out: Path, settings: Mapping[str, Setting]) -> None:
        """Write the form; see ``Form.write``."""
        tensors: dict[str, Array] = {}
        names = []
        for one in change.changed():
            _check_int32(one)
            names.append(one.name)
            tensors[f"{one.name}.indices"] = vector("I32", one.indices.astype("<i4"))
            tensors[f"{one.name}.values"] = vector("BF16", one.values)
        if not tensors:
            tensors[_EMPTY] = vector("I32", np.zeros(1, "<i4"))
        metadata = {key: str(value) for key, value in settings.items()} | _counts(change)
        metadata["format"], metadata["version"] = _FORMAT, "1"
        metadata["checksum_sha256"] = _sha256(change.target)
        metadata["changed_params"] = json.dumps(names)
        write_safetensors(out, tensors, metadata)


class TrlV2(Form):
    """Coded indices and BF16 values, without digests."""

    name = "trl-v2"
    title = "TRL, sparse weight patch v2"
    source = "huggingface/trl at 019ac7357, experimental/async_grpo/delta_engine.py"
    abilities = Abilities(dtypes=frozenset({"BF16"}))
    settings: ClassVar[Settings] = {
        "encoding": ("gap_delta", "raw"), "model_version": 1,
    }  # fmt: skip

    def recognise(self, source: Source) -> bool:
        """Return whether the metadata names the format and the keys are those of v2."""
        metadata = source.metadata
        if metadata.get("format") != _FORMAT or _EMPTY in source.tensors:
            return False
        return any(key.endswith(".idx") for key in source.tensors)

    def read(self, source: Source, base: Checkpoint) -> Reading:
        """Return the delta, opened with its base; see ``Form.read``."""
        patches = {}
        with TensorFile(source.path) as file:
            encoding = file.metadata.get("encoding", "")
            if encoding not in ("raw", "gap_delta"):
                raise UnsupportedFeature(
                    f"'{source.path}' has indices in the encoding {encoding[:40]!r}, expected raw or gap_delta;"
                    " nvCOMP's encoding is undocumented and needs a GPU, so write the delta again with gap_delta"
                )
            for name in _pairs(file, ".idx", ".val"):
                dtypes = ("I32",) if encoding == "raw" else ("U16", "U32")
                coded = file.bits(f"{name}.idx", *dtypes)
                values = file.bits(f"{name}.val", "BF16")
                patches[name] = Scatter(name, "BF16", _decoded(coded, encoding), values)
            says = _says(file.metadata)
        return Reading(PatchedCheckpoint(base, patches), "none", says)

    def write(self, change: Transition, out: Path, settings: Mapping[str, Setting]) -> None:
        """Write the form; see ``Form.write``."""
        tensors: dict[str, Array] = {}
        for one in change.changed():
            _check_int32(one)
            tensors[f"{one.name}.idx"] = _coded(one.indices, str(settings["encoding"]))
            tensors[f"{one.name}.val"] = vector("BF16", one.values)
        if not tensors and change.losses:
            raise ValueError(f"trl-v2 cannot hold any of the changes: not {change.losses[0]}")
        if not tensors:
            raise ValueError(
                "base and target are equal, and a file of trl-v2 without changes cannot be told from other files;"
                " write trl-v1, which has a mark for this"
            )
        metadata = {key: str(value) for key, value in settings.items()} | _counts(change)
        metadata |= {"format": _FORMAT, "version": "1", "sparse": "True"}
        write_safetensors(out, tensors, metadata)


def _pairs(file: TensorFile, indices: str, values: str) -> list[str]:
    """Return the names of the changed tensors. Raises Corrupt if a key belongs to no pair."""
    names = {key.removesuffix(indices) for key in file.tensors if key.endswith(indices)}
    expected = {name + suffix for name in names for suffix in (indices, values)}
    odd = sorted((expected ^ file.tensors.keys()) - {_EMPTY})
    if odd:
        raise Corrupt(
            f"tensor {odd[0]!r} is missing or unexpected; the delta has a pair {indices} and {values} for each"
            " changed tensor"
        )
    return sorted(names)


def _check_listed(metadata: Mapping[str, str], patches: Mapping[str, object]) -> None:
    try:
        listed = json.loads(metadata.get("changed_params") or "[]")
    except (ValueError, RecursionError) as error:
        raise Corrupt("changed_params in the metadata is not JSON; the delta is damaged") from error
    if not isinstance(listed, list) or sorted(map(str, listed)) != sorted(patches):
        raise Corrupt("changed_params in the metadata lists other tensors than the file holds")


def _proof(base: Checkpoint, patches: Mapping[str, object]) -> str:
    """Return what a digest of the BF16 tensors proves."""
    others = [t.name for t in base.tensors.values() if t.spec.dtype.name != "BF16"]
    if not others:
        return "all tensors"
    return "none" if patches.keys() & {*others} else "changed tensors"


def _says(metadata: Mapping[str, str]) -> dict[str, JSON]:
    return {key: metadata[key][:200] for key in _SAYS if metadata.get(key)}


def _counts(change: Transition) -> dict[str, str]:
    total = sum(tensor.spec.n_elements for tensor in change.target.tensors.values())
    return {
        "num_changed_params": str(change.n_changed),
        "total_changed_elements": str(change.nnz),
        "total_elements": str(total),
        "sparsity": str(1.0 - change.nnz / max(total, 1)),
    }


def _sha256(checkpoint: Checkpoint) -> str:
    hasher = hashlib.sha256()
    for tensor in sorted(checkpoint.tensors.values(), key=lambda tensor: tensor.name):
        if tensor.spec.dtype.name == "BF16":
            hasher.update(bits_of(tensor).data)
    return hasher.hexdigest()


def _check_int32(one: Changed) -> None:
    if one.spec.n_elements > _INT32_ELEMENTS:
        raise ValueError(
            f"tensor {one.name!r} has {one.spec.n_elements} elements, but the indices of this form have 32 bits;"
            " choose another form"
        )


def _coded(indices: npt.NDArray[np.int64], encoding: str) -> Array:
    if encoding == "raw":
        return vector("I32", indices.astype("<i4"))
    gaps = np.diff(indices, prepend=-1) - 1
    if int(gaps.max()) <= 0xFFFF:
        return vector("U16", gaps.astype("<u2"))
    return vector("U32", gaps.astype("<u4"))


def _decoded(coded: npt.NDArray[np.unsignedinteger], encoding: str) -> npt.NDArray[np.int64]:
    if encoding == "raw":
        return coded.view(np.int32).astype(np.int64)
    return np.cumsum(coded.astype(np.int64) + 1) - 1
