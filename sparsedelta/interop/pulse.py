"""PULSEPT1 patches of Basilica: a JSON header with digests, and one zstd frame of positions and BF16 values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import zstandard

from sparsedelta._typing import JSON
from sparsedelta.codecs.values import Bits
from sparsedelta.errors import Corrupt, StructureMismatch, UnsupportedVersion
from sparsedelta.files.checkpoint import Checkpoint, Tensor
from sparsedelta.format.records import TensorSpec
from sparsedelta.format.safetensors_header import read_shape
from sparsedelta.format.strict_json import integer, items, parse_json, text
from sparsedelta.interop.abilities import Abilities
from sparsedelta.interop.digests import check_digest, new_xxh3_128
from sparsedelta.interop.files import exactly_unpacked, write_new
from sparsedelta.interop.form import Form, Reading, Setting, Settings
from sparsedelta.interop.pulse_streams import (
    decode_by_exponent,
    decode_gaps,
    decode_rice,
    decode_values,
    encode_by_exponent,
    encode_gaps,
    encode_rice,
    encode_values,
)
from sparsedelta.interop.scatter import check_shape
from sparsedelta.interop.source import Source
from sparsedelta.interop.transition import Changed, Transition
from sparsedelta.interop.view import PatchedCheckpoint, bits_of, check_indices

_MAGIC = b"PULSEPT1"
_PREFIX = "xxh3_128:"
_ENCODINGS = {1: "delta-u16-esc", 2: "rice-gap", 3: "exp-class-rice"}  # of positions, by version
_VALUES = "zz-delta-u8esc"  # of values, except in version 1
# What the streams of an element, and those of a tensor beside its elements, take at most.
_ELEMENT_BYTES, _TENSOR_BYTES = 16, 1 << 13
_HEADER_BYTES = 64 << 20
_MAX_ELEMENTS = 1 << 32
_LEVEL = 1


class PulsePatch(Form):
    """New BF16 values, with a digest of each tensor and one of the whole state."""

    name = "pulsept1"
    title = "PULSEPT1 patch (Basilica), format version 1, 2 or 3"
    source = "basilica-sdk 0.36.8, basilica._pulse.codec"
    abilities = Abilities(dtypes=frozenset({"BF16"}), proof="all tensors")
    settings: ClassVar[Settings] = {"version": (1, 2, 3), "step": 1, "base_step": 0, "model_id": ""}

    def recognise(self, source: Source) -> bool:
        """Return whether the file begins with the magic."""
        return source.start.startswith(_MAGIC)

    def read(self, source: Source, base: Checkpoint) -> Reading:
        """Return the delta, opened with its base; see ``Form.read``."""
        n_elements = sum(t.spec.n_elements for t in base.tensors.values())
        most = _ELEMENT_BYTES * n_elements + _TENSOR_BYTES * len(base.tensors)
        data = source.read_bytes(_HEADER_BYTES + most)
        begin = len(_MAGIC) + 4
        end = begin + int.from_bytes(data[begin - 4 : begin], "little")
        if len(data) < end:
            raise Corrupt(f"'{source.path}' ends within its header; the delta is damaged")
        header = _object(parse_json(data[begin:end], "the header"), "the header")
        version = header.get("formatVersion")
        if type(version) is not int or version not in _ENCODINGS:
            raise UnsupportedVersion(
                f"'{source.path}' has format version {str(version)[:20]}, expected 1, 2 or 3; write the patch again"
                " with format_version=3"
            )
        entries = [_Entry(one, version) for one in items(header.get("tensors"), "tensors")]
        names = [entry.name for entry in entries]
        if names != sorted({*names}):
            raise Corrupt(
                "the tensors in the header are not unique and in order; the delta is damaged"
            )
        _check_base(base, names)
        total = sum(entry.idx_bytes + entry.val_bytes for entry in entries)
        if total > most:
            raise Corrupt(
                f"the header states {total} bytes of changes, more than the base can have"
            )
        raw = exactly_unpacked(data[end:], total, f"'{source.path}'") if total else b""
        target = PatchedCheckpoint(base, _changes(entries, version, memoryview(raw)))
        _check_state(entries, header.get("stateDigest"))
        says: dict[str, JSON] = {
            key: header[key]
            for key in ("formatVersion", "step", "baseStep")
            if isinstance(header.get(key), int)
        }

        def check() -> None:
            digests = {entry.name: entry.digest for entry in entries}
            for tensor in target.tensors.values():
                if tensor.name in digests:
                    found = _digest(bits_of(tensor))
                    check_digest(tensor.name, found, digests[tensor.name])

        return Reading(target, "all tensors", says, check)

    def write(self, change: Transition, out: Path, settings: Mapping[str, Setting]) -> None:
        """Write the form; see ``Form.write``."""
        version = int(settings["version"])
        changed = {one.name: (len(one.indices), *_coded(one, version)) for one in change.changed()}
        if any(tensor.spec.dtype.name != "BF16" for tensor in change.target.tensors.values()):
            change.lose(
                "the digests of tensors that are not BF16; readers accept only BF16 checkpoints"
            )
        entries, blocks = [], []
        for tensor in change.all_tensors():
            if tensor.spec.dtype.name != "BF16":
                continue
            n_changed, indices, values = changed.get(tensor.name, (0, b"", b""))
            blocks += [indices, values]
            entries.append(_entry(tensor, n_changed, version, len(indices), len(values)))
        old = [
            _digest(bits_of(t))
            for t in sorted(change.base.tensors.values(), key=lambda t: t.name)
            if t.spec.dtype.name == "BF16"
        ]
        header = {
            "formatVersion": version,
            "step": settings["step"],
            "baseStep": settings["base_step"],
            "model": {
                "id": settings["model_id"],
                "digest": _state(old),
                "paramCount": sum(entry["numel"] for entry in entries),
            },
            "tensors": entries,
            "stateDigest": _state([entry["tensorDigest"] for entry in entries]),
            "baseStateDigest": _state(old),
        }
        raw = _sorted_json(header)
        frame = zstandard.ZstdCompressor(level=_LEVEL).compress(b"".join(blocks))
        write_new(out, [_MAGIC + len(raw).to_bytes(4, "little") + raw + frame])


class _Entry:
    """One tensor of a header, checked."""

    def __init__(self, value: Any, version: int) -> None:
        entry = _object(value, "an item of tensors")
        self.name = text(entry.get("name"), "name")
        where = f"tensor {self.name!r}"
        self.shape = read_shape(entry.get("shape"), where)
        self.changed = integer(entry.get("changed"), f"{where}, changed")
        self.idx_bytes = integer(entry.get("idxBytes"), f"{where}, idxBytes")
        self.val_bytes = integer(entry.get("valBytes"), f"{where}, valBytes")
        self.digest = text(entry.get("tensorDigest"), f"{where}, tensorDigest")
        numel = integer(entry.get("numel"), f"{where}, numel")
        encoding, values = _ENCODINGS[version], None if version == 1 else _VALUES
        if (entry.get("dtype"), entry.get("idxEnc"), entry.get("valEnc")) != (
            "bf16",
            encoding,
            values,
        ):
            raise UnsupportedVersion(
                f"{where} has dtype {str(entry.get('dtype'))[:20]!r}, index encoding {str(entry.get('idxEnc'))[:40]!r}"
                f" and value encoding {str(entry.get('valEnc'))[:40]!r}, expected 'bf16', {encoding!r} and {values!r}"
            )
        least, most = (2, 2) if version == 1 else (1, 3)  # bytes of a value
        if (
            numel != math.prod(self.shape)
            or not least * self.changed <= self.val_bytes <= most * self.changed
            or not self.changed <= numel < _MAX_ELEMENTS
        ):
            raise Corrupt(f"{where}: shape, numel, changed and valBytes do not agree")


def _object(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise Corrupt(f"{what} is no JSON object; the delta is damaged")
    return value


def _check_base(base: Checkpoint, names: list[str]) -> None:
    expected = {t.name for t in base.tensors.values() if t.spec.dtype.name == "BF16"}
    odd = sorted(expected ^ {*names})
    if odd:
        raise StructureMismatch(
            f"tensor {odd[0]!r} is in only one of the delta and the base '{base.path}'; a PULSEPT1 patch lists all"
            " BF16 tensors of its base",
            tensor=odd[0],
        )


@dataclass(frozen=True, slots=True)
class _Change:
    """The streams of one tensor, decoded when the tensor is read."""

    entry: _Entry
    version: int
    positions: memoryview
    values: memoryview

    def __call__(self, old: Bits, spec: TensorSpec) -> Bits:
        """Return the new bits; see ``Patch``."""
        entry = self.entry
        check_shape(entry.shape, spec, entry.name)
        try:
            indices = self._indices(old)
            check_indices(indices, spec, entry.name)
            if self.version == 1:
                values: Bits = np.frombuffer(self.values, "<u2")
            else:
                values = decode_values(self.values, old[indices])
        except Corrupt as error:
            raise Corrupt(f"tensor {entry.name!r}: {error}", tensor=entry.name) from error
        old[indices] = values
        return old

    def _indices(self, old: Bits) -> npt.NDArray[np.int64]:
        if self.version == 3:
            return decode_by_exponent(self.positions, self.entry.changed, old)
        decode = decode_gaps if self.version == 1 else decode_rice
        return decode(self.positions, self.entry.changed, len(old))


def _changes(entries: list[_Entry], version: int, data: memoryview) -> dict[str, _Change]:
    changes, at = {}, 0
    for entry in entries:
        middle = at + entry.idx_bytes
        end = middle + entry.val_bytes
        changes[entry.name] = _Change(entry, version, data[at:middle], data[middle:end])
        at = end
    return changes


def _coded(one: Changed, version: int) -> tuple[bytes, bytes]:
    """Return the streams of indices and values of a changed tensor."""
    if one.spec.n_elements >= _MAX_ELEMENTS:
        raise ValueError(
            f"tensor {one.name!r} has 2^32 elements or more, which PULSEPT1 does not allow"
        )
    if version == 1:
        return encode_gaps(one.indices), one.values.tobytes()
    values = encode_values(one.old[one.indices], one.values)
    if version == 2:
        return encode_rice(one.indices), values
    return encode_by_exponent(one.indices, one.old), values


def _entry(
    tensor: Tensor, n_changed: int, version: int, idx_bytes: int, val_bytes: int
) -> dict[str, Any]:
    return {
        "name": tensor.name,
        "shape": list(tensor.spec.shape),
        "numel": tensor.spec.n_elements,
        "dtype": "bf16",
        "changed": n_changed,
        "idxEnc": _ENCODINGS[version],
        "idxBytes": idx_bytes,
        "valBytes": val_bytes,
        "tensorDigest": _digest(bits_of(tensor)),
    } | ({} if version == 1 else {"valEnc": _VALUES})


def _sorted_json(value: Any) -> bytes:
    import json

    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode("ascii")


def _digest(bits: Bits) -> str:
    found: str = new_xxh3_128(bits.view(np.uint8).data).hexdigest()
    return _PREFIX + found


def _state(digests: list[str]) -> str:
    raw = b"".join(bytes.fromhex(digest.removeprefix(_PREFIX)) for digest in digests)
    found: str = new_xxh3_128(raw).hexdigest()
    return _PREFIX + found


def _check_state(entries: list[_Entry], stated: Any) -> None:
    try:
        found = _state([entry.digest for entry in entries])
    except ValueError as error:
        raise Corrupt("a digest in the header is not hexadecimal; the delta is damaged") from error
    if found != stated:
        raise Corrupt(
            "the digest of the whole state does not fit those of the tensors; the delta is damaged"
        )
