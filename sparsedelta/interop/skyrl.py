"""The delta folders of SkyRL: the XOR of each changed tensor in a zstd frame, and a manifest in JSON."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from sparsedelta._typing import JSON
from sparsedelta.errors import Corrupt, UnsupportedFeature
from sparsedelta.files.checkpoint import Checkpoint
from sparsedelta.format.paths import path_problem
from sparsedelta.interop.abilities import Abilities
from sparsedelta.interop.digests import DIGESTS
from sparsedelta.interop.files import (
    Array,
    TensorFile,
    packed,
    vector,
    write_json,
    write_safetensors,
)
from sparsedelta.interop.form import Form, Reading, Setting, Settings
from sparsedelta.interop.slime import Bytes, xored
from sparsedelta.interop.source import Source
from sparsedelta.interop.transition import Transition
from sparsedelta.interop.view import PatchedCheckpoint

MANIFEST = "manifest.json"
_PAYLOAD = "delta-rank00000-file000000.safetensors"
_CHECKSUMS = ("xxh3-128", "sha256")
_LEVEL = 1
_DTYPES = {
    "BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64", "BOOL": "bool",
    "U8": "uint8", "U16": "uint16", "U32": "uint32", "U64": "uint64",
    "I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
}  # fmt: skip


class SkyRL(Form):
    """XOR of each changed tensor, with a digest of its new bytes."""

    name = "skyrl"
    title = "SkyRL, delta folder"
    source = (
        "NovaSky-AI/SkyRL at a9564572e and 823470d6d: weight_sync/delta_checkpoint.py and"
        " delta/checkpoint.py"
    )
    is_folder = True
    abilities = Abilities(dtypes=frozenset(_DTYPES), proof="changed tensors")
    settings: ClassVar[Settings] = {"checksum": _CHECKSUMS, "version": 1, "base_version": 0}

    def recognise(self, source: Source) -> bool:
        """Return whether the folder's manifest lists payload files."""
        manifest = source.json(MANIFEST)
        return isinstance(manifest, dict) and {"payload_files", "base_version", "tensors"} <= {
            *manifest
        }

    def read(self, source: Source, base: Checkpoint) -> Reading:
        """Return the delta, opened with its base; see ``Form.read``."""
        manifest = source.required_json(MANIFEST)
        records = manifest["tensors"]
        if not isinstance(records, list) or not all(isinstance(one, dict) for one in records):
            raise Corrupt(f"the tensors in {MANIFEST} are not a list of objects")
        by_file: dict[str, list[dict[str, Any]]] = {}
        for record in records:
            by_file.setdefault(_text(record, "payload_file"), []).append(record)
        patches: dict[str, Bytes] = {}
        for path, held in by_file.items():
            if "/" in path or path_problem(path):
                raise Corrupt(
                    f"{MANIFEST} names the file {path[:80]!r}, which is not a file beside it"
                )
            _add(source.path / path, held, patches)
        says: dict[str, JSON] = {
            key: str(manifest[key])[:200] for key in ("version", "base_version") if key in manifest
        }
        return Reading(PatchedCheckpoint(base, patches), "changed tensors", says)

    def write(self, change: Transition, out: Path, settings: Mapping[str, Setting]) -> None:
        """Write the form; see ``Form.write``."""
        checksum = str(settings["checksum"])
        tensors: dict[str, Array] = {}
        records: list[dict[str, JSON]] = []
        for one in change.changed():
            raw = xored(one)
            frame = packed(raw, _LEVEL)
            tensors[one.name] = vector("U8", np.frombuffer(frame, np.uint8))
            records.append(
                {
                    "name": one.name,
                    "dtype": _DTYPES[one.spec.dtype.name],
                    "shape": [*one.spec.shape],
                    "uncompressed_num_bytes": len(raw),
                    "compressed_num_bytes": len(frame),
                    "payload_file": _PAYLOAD,
                    "payload_key": one.name,
                    "checksum": DIGESTS[checksum](one.new.view(np.uint8).data),
                    "checksum_algorithm": checksum,
                }
            )
        out.mkdir()
        if tensors:
            write_safetensors(out / _PAYLOAD, tensors, None)
        manifest: dict[str, Any] = {
            "version": int(settings["version"]),
            "base_version": int(settings["base_version"]),
            "tensors": records,
            "total_uncompressed_num_bytes": _total(records, "uncompressed_num_bytes"),
            "total_compressed_num_bytes": _total(records, "compressed_num_bytes"),
            "payload_files": [_PAYLOAD] if tensors else [],
        }
        write_json(out / MANIFEST, manifest)


def _total(records: list[dict[str, JSON]], key: str) -> int:
    return sum(int(str(record[key])) for record in records)


def _text(record: Mapping[str, Any], key: str) -> str:
    found = record.get(key)
    if not isinstance(found, str):
        raise Corrupt(f"a tensor in {MANIFEST} has no {key}")
    return found


def _add(path: Path, records: list[dict[str, Any]], patches: dict[str, Bytes]) -> None:
    if not path.is_file():
        raise Corrupt(f"{MANIFEST} names the file '{path.name}', which does not exist")
    frames: dict[str, npt.NDArray[np.uint8]] = {}  # by key: several records may name the same one
    with TensorFile(path) as file:
        for record in records:
            name = _text(record, "name")
            # A version before the first release wrote SHA-256 digests under another key.
            old = "checksum" not in record
            checksum = "sha256" if old else record.get("checksum_algorithm", _CHECKSUMS[0])
            if not isinstance(checksum, str) or checksum not in _CHECKSUMS:
                raise UnsupportedFeature(
                    f"checksum_algorithm of {name[:80]!r} is {str(checksum)[:40]!r}, expected one of"
                    f" {', '.join(_CHECKSUMS)}"
                )
            if name in patches:
                raise Corrupt(f"{MANIFEST} lists tensor {name[:80]!r} twice")
            key = _text(record, "payload_key")
            if key not in frames:
                frames[key] = file.bits(key, "U8")
            digest = _text(record, "sha256" if old else "checksum")
            patches[name] = Bytes(name, frames[key], "xor", checksum, digest)
