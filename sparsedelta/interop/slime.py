"""The version folders of slime, miles and SGLang: one zstd frame of changed bytes for each changed tensor."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from sparsedelta._typing import JSON
from sparsedelta.codecs.values import Bits
from sparsedelta.errors import Corrupt, UnsupportedFeature
from sparsedelta.files.checkpoint import Checkpoint
from sparsedelta.format.paths import path_problem
from sparsedelta.format.records import TensorSpec
from sparsedelta.interop.abilities import Abilities
from sparsedelta.interop.digests import DIGESTS, check_digest
from sparsedelta.interop.files import (
    Array,
    TensorFile,
    exactly_unpacked,
    packed,
    unpacked,
    vector,
    write_json,
    write_safetensors,
)
from sparsedelta.interop.form import Form, Reading, Setting, Settings
from sparsedelta.interop.source import Source
from sparsedelta.interop.transition import Changed, Transition
from sparsedelta.interop.view import PatchedCheckpoint

INDEX = "model.safetensors.index.json"
_SHARD = "model-00000-of-00001.safetensors"
_SHARD_NAME = re.compile(r"[^/\\]+\.safetensors")
_MAX_BYTES = 1 << 32  # byte positions of the overwrite encoding have 32 bits
_LEVEL = 3
_CHECKSUMS = ("blake3", "xxh3-128", "adler32")


class Slime(Form):
    """XOR or overwritten bytes of each changed tensor, with a digest of its new bytes."""

    name = "slime"
    title = "slime, miles and SGLang, version folder"
    source = (
        "THUDM/slime at 6b5b07a6a and 474861aaf, radixark/miles at 31f1ca961: utils/disk_delta.py"
    )
    is_folder = True
    abilities = Abilities(proof="changed tensors")
    settings: ClassVar[Settings] = {
        "encoding": ("xor", "overwrite"),
        "checksum": _CHECKSUMS,
        "version": 1, "base_version": 0,
    }  # fmt: skip

    def recognise(self, source: Source) -> bool:
        """Return whether the folder's index names a delta encoding."""
        index = source.json(INDEX)
        metadata = index.get("metadata") if isinstance(index, dict) else None
        return isinstance(metadata, dict) and "delta_encoding" in metadata

    def read(self, source: Source, base: Checkpoint) -> Reading:
        """Return the delta, opened with its base; see ``Form.read``."""
        index = source.required_json(INDEX)
        metadata = index["metadata"]
        encoding = _known(metadata, "delta_encoding", ("xor", "overwrite"))
        _known(metadata, "compression_format", ("zstd",))
        checksum = _known(metadata, "checksum_format", _CHECKSUMS)
        patches: dict[str, Bytes] = {}
        for shard in _shards(index):
            _add(source.path / shard, encoding, checksum, patches)
        weight_map = index.get("weight_map")
        if not isinstance(weight_map, dict) or weight_map.keys() != patches.keys():
            raise Corrupt(
                f"'{source.path / INDEX}' lists other tensors than its shards hold; the delta is incomplete"
            )
        says: dict[str, JSON] = {
            key: str(metadata[key])[:200] for key in ("version", "base_version") if key in metadata
        }
        says |= {"encoding": encoding, "checksum": checksum}
        return Reading(PatchedCheckpoint(base, patches), "changed tensors", says)

    def write(self, change: Transition, out: Path, settings: Mapping[str, Setting]) -> None:
        """Write the form; see ``Form.write``."""
        encoding, checksum = str(settings["encoding"]), str(settings["checksum"])
        tensors: dict[str, Array] = {}
        digests: dict[str, str] = {}
        for one in change.changed():
            raw = _overwritten(one) if encoding == "overwrite" else xored(one)
            tensors[one.name] = vector("U8", np.frombuffer(packed(raw, _LEVEL), np.uint8))
            digests[one.name] = DIGESTS[checksum](one.new.view(np.uint8).data)
        out.mkdir()
        if tensors:
            write_safetensors(out / _SHARD, tensors, digests)
        metadata = {
            "version": f"{settings['version']:06d}",
            "base_version": f"{settings['base_version']:06d}",
            "delta_encoding": encoding,
            "compression_format": "zstd",
            "checksum_format": checksum,
        }
        weight_map = dict.fromkeys(tensors, _SHARD)
        write_json(out / INDEX, {"metadata": metadata, "weight_map": weight_map})


@dataclass(frozen=True, slots=True)
class Bytes:
    """The changed bytes of one tensor.

    Attributes:
        name: name of the tensor.
        frame: one zstd frame.
        encoding: "xor" or "overwrite".
        checksum: the name of the digest.
        digest: the digest of the new bytes.
    """

    name: str
    frame: npt.NDArray[np.uint8]
    encoding: str
    checksum: str
    digest: str

    def __call__(self, old: Bits, spec: TensorSpec) -> Bits:
        """Return the new bits; see ``Patch``."""
        data = old.view(np.uint8)
        what = f"the change of tensor {self.name!r}"
        if self.encoding == "xor":
            raw = exactly_unpacked(self.frame.data, len(data), what)
            data ^= np.frombuffer(raw, np.uint8)
        else:
            _overwrite(data, unpacked(self.frame.data, 4 + 5 * len(data), what), self.name)
        check_digest(self.name, DIGESTS[self.checksum](data.data), self.digest)
        return old


def xored(one: Changed) -> bytes:
    """Return the bytes of the XOR of base and target."""
    found: bytes = (one.old ^ one.new).tobytes()
    return found


def _overwritten(one: Changed) -> bytes:
    old, new = one.old.view(np.uint8), one.new.view(np.uint8)
    if len(new) > _MAX_BYTES:
        raise ValueError(
            f"tensor {one.name!r} has {len(new)} bytes, and the positions of the encoding overwrite have 32 bits;"
            " choose encoding=xor"
        )
    positions = np.flatnonzero(old != new).astype("<u4")
    count = np.array([len(positions)], "<u4")
    parts: list[bytes] = [count.tobytes(), positions.tobytes(), new[positions].tobytes()]
    return b"".join(parts)


def _overwrite(data: npt.NDArray[np.uint8], raw: bytes, name: str) -> None:
    count = int.from_bytes(raw[:4], "little")
    if len(raw) != 4 + 5 * count:
        raise Corrupt(
            f"tensor {name!r}: the change has {len(raw)} bytes, expected {4 + 5 * count} for {count} positions",
            tensor=name,
        )
    positions = np.frombuffer(raw, "<u4", count, 4)
    if count and int(positions.max()) >= len(data):
        raise Corrupt(
            f"tensor {name!r} has {len(data)} bytes, but the delta changes byte {int(positions.max())}; use the base"
            " that the delta was made from",
            tensor=name,
        )
    data[positions] = np.frombuffer(raw, np.uint8, count, 4 + 4 * count)


def _known(metadata: Mapping[str, object], key: str, values: tuple[str, ...]) -> str:
    found = metadata.get(key)
    if not isinstance(found, str) or found not in values:
        raise UnsupportedFeature(
            f"{key} in {INDEX} is {str(found)[:40]!r}, expected one of {', '.join(values)}"
        )
    return found


def _shards(index: Mapping[str, object]) -> list[str]:
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict):
        raise Corrupt(f"{INDEX} has no weight_map; the delta is damaged")
    shards = sorted({str(shard) for shard in weight_map.values()})
    for shard in shards:
        if not _SHARD_NAME.fullmatch(shard) or path_problem(shard):
            raise Corrupt(f"{INDEX} names the shard {shard[:80]!r}, which is not a file beside it")
    return shards


def _add(path: Path, encoding: str, checksum: str, patches: dict[str, Bytes]) -> None:
    with TensorFile(path) as file:
        for name in file.tensors:
            digest = file.metadata.get(name)
            if digest is None or name in patches:
                raise Corrupt(
                    f"tensor {name!r} in '{path}' has no digest, or is in two shards; the delta is damaged"
                )
            patches[name] = Bytes(name, file.bits(name, "U8"), encoding, checksum, digest)
