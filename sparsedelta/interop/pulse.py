"""PULSEPT1 patches of Basilica: a JSON header with digests, and one zstd frame of positions and BF16 values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import zstandard

from sparsedelta._typing import JSON
from sparsedelta.codecs.values import Bits
from sparsedelta.errors import Corrupt, StructureMismatch, UnsupportedVersion
from sparsedelta.files.checkpoint import Checkpoint
from sparsedelta.format.records import TensorSpec
from sparsedelta.format.safetensors_header import read_shape
from sparsedelta.format.strict_json import integer, items, parse_json, text
from sparsedelta.interop.abilities import Abilities
from sparsedelta.interop.digests import check_digest, new_xxh3_128
from sparsedelta.interop.files import exactly_unpacked, write_new
from sparsedelta.interop.form import Form, Reading, Setting, Settings
from sparsedelta.interop.scatter import Scatter
from sparsedelta.interop.source import Source
from sparsedelta.interop.transition import Changed, Transition
from sparsedelta.interop.view import PatchedCheckpoint, bits_of

_MAGIC = b"PULSEPT1"
_PREFIX = "xxh3_128:"
_ENCODING = "delta-u16-esc"
_ESCAPE = 0xFFFF
_HEADER_BYTES = 64 << 20
_MAX_ELEMENTS = 1 << 32
_LEVEL = 1


class PulsePatch(Form):
    """New BF16 values, with a digest of each tensor and one of the whole state."""

    name = "pulsept1"
    title = "PULSEPT1 patch (Basilica), format version 1"
    source = "basilica-sdk 0.36.8, basilica._pulse.codec"
    abilities = Abilities(dtypes=frozenset({"BF16"}), proof="all tensors")
    settings: ClassVar[Settings] = {"step": 1, "base_step": 0, "model_id": ""}

    def recognise(self, source: Source) -> bool:
        """Return whether the file begins with the magic."""
        return source.start.startswith(_MAGIC)

    def read(self, source: Source, base: Checkpoint) -> Reading:
        """Return the delta, opened with its base; see ``Form.read``."""
        n_elements = sum(t.spec.n_elements for t in base.tensors.values())
        data = source.read_bytes(_HEADER_BYTES + 10 * n_elements)
        begin = len(_MAGIC) + 4
        end = begin + int.from_bytes(data[begin - 4 : begin], "little")
        if len(data) < end:
            raise Corrupt(f"'{source.path}' ends within its header; the delta is damaged")
        header = _object(parse_json(data[begin:end], "the header"), "the header")
        version = header.get("formatVersion")
        if version != 1:
            raise UnsupportedVersion(
                f"'{source.path}' has format version {str(version)[:20]}, expected 1; write the patch again with"
                " format_version=1"
            )
        entries = [_Entry(one) for one in items(header.get("tensors"), "tensors")]
        names = [entry.name for entry in entries]
        if names != sorted({*names}):
            raise Corrupt(
                "the tensors in the header are not unique and in order; the delta is damaged"
            )
        _check_base(base, names)
        total = sum(entry.idx_bytes + entry.val_bytes for entry in entries)
        if total > 8 * n_elements:
            raise Corrupt(
                f"the header states {total} bytes of changes, more than the base can have"
            )
        raw = exactly_unpacked(data[end:], total, f"'{source.path}'") if total else b""
        patches = _patches(entries, memoryview(raw))
        target = PatchedCheckpoint(base, patches)
        _check_state(entries, header.get("stateDigest"))
        says: dict[str, JSON] = {
            key: header[key] for key in ("step", "baseStep") if isinstance(header.get(key), int)
        }

        def check() -> None:
            for entry in entries:
                for tensor in target.tensors.values():
                    if tensor.name == entry.name:
                        check_digest(entry.name, _digest(bits_of(tensor)), entry.digest)

        return Reading(target, "all tensors", says, check)

    def write(self, change: Transition, out: Path, settings: Mapping[str, Setting]) -> None:
        """Write the form; see ``Form.write``."""
        changed = {one.name: _coded(one) for one in change.changed()}
        if any(tensor.spec.dtype.name != "BF16" for tensor in change.target.tensors.values()):
            change.lose(
                "the digests of tensors that are not BF16; readers accept only BF16 checkpoints"
            )
        entries, blocks = [], []
        for tensor in change.all_tensors():
            if tensor.spec.dtype.name != "BF16":
                continue
            indices, values = changed.get(tensor.name, (b"", b""))
            blocks += [indices, values]
            entries.append(
                _entry(tensor.name, tensor.spec, indices, values, _digest(bits_of(tensor)))
            )
        old = [
            _digest(bits_of(t))
            for t in sorted(change.base.tensors.values(), key=lambda t: t.name)
            if t.spec.dtype.name == "BF16"
        ]
        header = {
            "formatVersion": 1,
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

    def __init__(self, value: Any) -> None:
        entry = _object(value, "an item of tensors")
        self.name = text(entry.get("name"), "name")
        where = f"tensor {self.name!r}"
        self.shape = read_shape(entry.get("shape"), where)
        self.changed = integer(entry.get("changed"), f"{where}, changed")
        self.idx_bytes = integer(entry.get("idxBytes"), f"{where}, idxBytes")
        self.val_bytes = integer(entry.get("valBytes"), f"{where}, valBytes")
        self.digest = text(entry.get("tensorDigest"), f"{where}, tensorDigest")
        numel = integer(entry.get("numel"), f"{where}, numel")
        if entry.get("dtype") != "bf16" or entry.get("idxEnc") != _ENCODING or "valEnc" in entry:
            raise UnsupportedVersion(
                f"{where} has dtype {str(entry.get('dtype'))[:20]!r} and index encoding"
                f" {str(entry.get('idxEnc'))[:40]!r}, expected 'bf16' and {_ENCODING!r} without valEnc"
            )
        if (
            numel != math.prod(self.shape)
            or self.val_bytes != 2 * self.changed
            or self.changed > numel
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


def _patches(entries: list[_Entry], data: memoryview) -> dict[str, Scatter]:
    patches, at = {}, 0
    for entry in entries:
        middle = at + entry.idx_bytes
        end = middle + entry.val_bytes
        indices = _decoded(data[at:middle], entry)
        values = np.frombuffer(data[middle:end], "<u2")
        patches[entry.name] = Scatter(entry.name, "BF16", indices, values, entry.shape)
        at = end
    return patches


def _decoded(data: memoryview, entry: _Entry) -> npt.NDArray[np.int64]:
    """Return flat indices: the first as u32, then gaps as u16, or as the escape 0xFFFF and a u32."""
    damaged = Corrupt(
        f"tensor {entry.name!r}: the indices are damaged, or are not as many as stated",
        tensor=entry.name,
    )
    if not entry.changed:
        if len(data):
            raise damaged
        return np.empty(0, np.int64)
    if len(data) < 4 or len(data) % 2:
        raise damaged
    cells = np.frombuffer(data[4:], "<u2")
    parts, at = [np.frombuffer(data[:4], "<u4").astype(np.int64)], 0
    for mark in np.flatnonzero(cells == _ESCAPE).tolist():
        if mark < at:  # the half of an escaped gap, not a mark
            continue
        if mark + 3 > len(cells):
            raise damaged
        wide = int(cells[mark + 1]) | int(cells[mark + 2]) << 16
        parts += [cells[at:mark].astype(np.int64), np.array([wide], np.int64)]
        at = mark + 3
    parts.append(cells[at:].astype(np.int64))
    indices = np.cumsum(np.concatenate(parts))
    if len(indices) != entry.changed:
        raise damaged
    return indices


def _coded(one: Changed) -> tuple[bytes, bytes]:
    """Return the streams of indices and values of a changed tensor."""
    if one.spec.n_elements >= _MAX_ELEMENTS:
        raise ValueError(
            f"tensor {one.name!r} has 2^32 elements or more, which PULSEPT1 does not allow"
        )
    gaps = np.diff(one.indices)
    wide = gaps >= _ESCAPE
    cells = np.zeros((len(gaps), 3), "<u2")
    cells[:, 0] = np.where(wide, _ESCAPE, gaps)
    cells[:, 1], cells[:, 2] = gaps & 0xFFFF, gaps >> 16
    used = np.ones((len(gaps), 3), np.bool_)
    used[~wide, 1:] = False
    first = one.indices[:1].astype("<u4").tobytes()
    return first + cells[used].tobytes(), one.values.tobytes()


def _entry(
    name: str, spec: TensorSpec, indices: bytes, values: bytes, digest: str
) -> dict[str, Any]:
    return {
        "name": name,
        "shape": list(spec.shape),
        "numel": spec.n_elements,
        "dtype": "bf16",
        "changed": len(values) // 2,
        "idxEnc": _ENCODING,
        "idxBytes": len(indices),
        "valBytes": len(values),
        "tensorDigest": digest,
    }


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
