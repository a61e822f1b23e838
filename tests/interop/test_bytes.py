"""The bytes of each form, worked out by hand from its description, and files that break a rule of the form."""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
import zstandard
from blake3 import blake3
from helpers import Raw, file_bytes, of_array, write, write_file

import sparsedelta
from sparsedelta.errors import (
    BadMagic,
    CheckpointError,
    Corrupt,
    FormatError,
    LimitExceeded,
    SparseDeltaError,
    StructureMismatch,
    UnsupportedFeature,
    UnsupportedVersion,
)

# A BF16 tensor of shape (3, 4), and a second one. Elements 1, 6 and 11 of the first change.
W = of_array("BF16", np.arange(0x3F80, 0x3F8C, dtype=np.uint16).reshape(3, 4))
V = of_array("BF16", np.array([0x4000, 0x4040], np.uint16))
NEW = {1: 0x1111, 6: 0x8000, 11: 0x7FC1}
INDICES = np.array([*NEW], np.int32)
VALUES = np.array([*NEW.values()], np.uint16)


def target_of(base: Raw) -> Raw:
    bits = np.frombuffer(base.data, np.uint16).copy()
    bits[INDICES] = VALUES
    return base.with_data(bits.tobytes())


T = target_of(W)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_file(tmp_path / "base.safetensors", {"w": W, "v": V}, {"format": "pt"})


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return write_file(tmp_path / "target.safetensors", {"w": T, "v": V}, {"format": "pt"})


def rebuilt(base: Path, foreign: Path) -> bytes:
    out = base.parent / "out.safetensors"
    sparsedelta.apply(base, foreign, out, overwrite=True)
    return out.read_bytes()


def raw(dtype: str, array: Any) -> Raw:
    return of_array(dtype, np.asarray(array))


def frame(data: bytes) -> bytes:
    return zstandard.ZstdCompressor(level=1).compress(data)


def u8(data: bytes) -> Raw:
    return Raw("U8", (len(data),), data)


def opened(path: Path) -> tuple[dict[str, Any], bytes]:
    """Return the header and the data of a safetensors file."""
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def part(header: dict[str, Any], data: bytes, name: str) -> bytes:
    begin, end = header[name]["data_offsets"]
    return data[begin:end]


# --- TRL


def trl_v1(**metadata: str) -> bytes:
    digest = hashlib.sha256(V.data + T.data).hexdigest()  # sorted by name
    fields = {
        "format": "sparse_weight_patch", "version": "1", "model_version": "3",
        "checksum_sha256": digest, "changed_params": '["w"]', **metadata,
    }  # fmt: skip
    tensors = {"w.indices": raw("I32", INDICES), "w.values": raw("BF16", VALUES)}
    return file_bytes(tensors, fields)


def test_trl_v1(base: Path, target: Path, tmp_path: Path) -> None:
    foreign = write(tmp_path / "f", trl_v1())
    assert rebuilt(base, foreign) == target.read_bytes()
    sparsedelta.convert(
        target, tmp_path / "ours", base=base, write_as="trl-v1", settings={"model_version": 3}
    )
    header, data = opened(tmp_path / "ours")
    assert part(header, data, "w.indices") == INDICES.tobytes()
    assert part(header, data, "w.values") == VALUES.tobytes()
    metadata = header["__metadata__"]
    assert metadata["checksum_sha256"] == hashlib.sha256(V.data + T.data).hexdigest()
    assert metadata["total_changed_elements"] == "3"
    assert metadata["total_elements"] == "14"
    assert json.loads(metadata["changed_params"]) == ["w"]


def test_trl_v1_empty(base: Path, tmp_path: Path) -> None:
    metadata = {"format": "sparse_weight_patch", "version": "1", "changed_params": "[]"}
    tensors = {"__empty_delta__": raw("I32", np.zeros(1, np.int32))}
    foreign = write(tmp_path / "f", file_bytes(tensors, metadata))
    assert rebuilt(base, foreign) == base.read_bytes()


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"checksum_sha256": "0" * 64}, "rebuilt with digest"),
        ({"changed_params": '["w", "v"]'}, "lists other tensors"),
        ({"changed_params": "{"}, "is not JSON"),
        ({"changed_params": "[" * 100_000}, "is not JSON"),
    ],
)
def test_trl_v1_damaged(metadata: dict[str, str], message: str, base: Path, tmp_path: Path) -> None:
    foreign = write(tmp_path / "f", trl_v1(**metadata))
    with pytest.raises(Corrupt, match=message):
        rebuilt(base, foreign)


@pytest.mark.parametrize(
    ("indices", "values", "message"),
    [
        ([1, 6, 12], VALUES, "has 12 elements, but the delta changes element 12"),
        ([-1, 6, 11], VALUES, "changes element -1"),
        ([6, 1, 11], VALUES, "not strictly increasing"),
        ([1, 1, 11], VALUES, "not strictly increasing"),
        ([1, 6], VALUES, "2 indices and 3 values"),
    ],
)
@pytest.mark.parametrize("version", ["v1", "v2"])
def test_trl_indices(
    version: str, indices: list[int], values: Any, message: str, base: Path, tmp_path: Path
) -> None:
    one, other = (".indices", ".values") if version == "v1" else (".idx", ".val")
    tensors = {f"w{one}": raw("I32", np.array(indices, np.int32)), f"w{other}": raw("BF16", values)}
    metadata = {"format": "sparse_weight_patch", "encoding": "raw", "changed_params": '["w"]'}
    foreign = write(tmp_path / "f", file_bytes(tensors, metadata))
    with pytest.raises(Corrupt, match=message):
        rebuilt(base, foreign)


@pytest.mark.parametrize("dtype", ["U16", "U32"])
def test_trl_v2_gaps(dtype: str, base: Path, target: Path, tmp_path: Path) -> None:
    gaps = np.array([1, 4, 4], {"U16": np.uint16, "U32": np.uint32}[dtype])  # 1−0, 6−1−1, 11−6−1
    tensors = {"w.idx": raw(dtype, gaps), "w.val": raw("BF16", VALUES)}
    metadata = {"format": "sparse_weight_patch", "version": "1", "encoding": "gap_delta"}
    foreign = write(tmp_path / "f", file_bytes(tensors, metadata))
    assert rebuilt(base, foreign) == target.read_bytes()


def test_trl_v2_wide_gap_is_written_with_32_bits(tmp_path: Path) -> None:
    w = raw("BF16", np.zeros(70_000, np.uint16))
    base = write_file(tmp_path / "a.safetensors", {"w": w})
    target = write_file(tmp_path / "b.safetensors", {"w": w.changed(0, 2 * 65_537)})
    sparsedelta.convert(target, tmp_path / "ours", base=base, write_as="trl-v2")
    header, data = opened(tmp_path / "ours")
    assert header["w.idx"]["dtype"] == "U32"
    assert part(header, data, "w.idx") == struct.pack("<2I", 0, 65_536)
    assert rebuilt(base, tmp_path / "ours") == target.read_bytes()


def test_trl_v2_unknown_encoding(base: Path, tmp_path: Path) -> None:
    tensors = {"w.idx": u8(b"abc"), "w.val": raw("BF16", VALUES)}
    metadata = {"format": "sparse_weight_patch", "encoding": "nvcomp_cascaded"}
    foreign = write(tmp_path / "f", file_bytes(tensors, metadata))
    with pytest.raises(UnsupportedFeature, match="nvCOMP"):
        rebuilt(base, foreign)


def test_trl_values_of_another_dtype(tmp_path: Path) -> None:
    numbers = np.array([1.5, 2, 3], np.float32)
    f32 = write_file(tmp_path / "f32.safetensors", {"w": raw("F32", numbers)})
    f16 = write_file(tmp_path / "f16.safetensors", {"w": raw("F16", numbers.astype(np.float16))})
    tensors = {
        "w.idx": raw("I32", np.array([1], np.int32)),
        "w.val": raw("BF16", np.array([0x4100], np.uint16)),
    }
    metadata = {"format": "sparse_weight_patch", "encoding": "raw"}
    foreign = write(tmp_path / "f", file_bytes(tensors, metadata))
    assert rebuilt(f32, foreign)[-12:] == np.array([1.5, 8, 3], np.float32).tobytes()
    with pytest.raises(Corrupt, match="is F16 in the base, but the delta holds BF16"):
        rebuilt(f16, foreign)


# --- slime

DIGESTS = {
    "blake3": blake3(T.data).hexdigest(),
    "xxh3-128": xxhash.xxh3_128(T.data).hexdigest(),
    "adler32": f"{zlib.adler32(T.data):08x}",
}
XOR = bytes(a ^ b for a, b in zip(W.data, T.data, strict=True))
PLACES = [i for i, byte in enumerate(XOR) if byte]
OVERWRITE = struct.pack(f"<I{len(PLACES)}I", len(PLACES), *PLACES) + bytes(
    T.data[i] for i in PLACES
)


def slime(
    path: Path, payload: bytes, *, shard: str = "model-00000-of-00001.safetensors", **metadata: str
) -> Path:
    fields = {
        "version": "000002", "base_version": "000001", "delta_encoding": "xor", "compression_format": "zstd",
        "checksum_format": "blake3", **metadata,
    }  # fmt: skip
    digest = DIGESTS.get(fields["checksum_format"], "")
    write_file(path / "model-00000-of-00001.safetensors", {"w": u8(payload)}, {"w": digest})
    index = {"metadata": fields, "weight_map": {"w": shard}}
    write(path / "model.safetensors.index.json", json.dumps(index))
    return path


@pytest.mark.parametrize("checksum", [*DIGESTS])
@pytest.mark.parametrize("encoding", ["xor", "overwrite"])
def test_slime(encoding: str, checksum: str, base: Path, target: Path, tmp_path: Path) -> None:
    content = XOR if encoding == "xor" else OVERWRITE
    options = {"delta_encoding": encoding, "checksum_format": checksum}
    assert rebuilt(base, slime(tmp_path / "f", frame(content), **options)) == target.read_bytes()
    settings: dict[str, str | int] = {
        "encoding": encoding,
        "checksum": checksum,
        "version": 2,
        "base_version": 1,
    }
    sparsedelta.convert(target, tmp_path / "ours", base=base, write_as="slime", settings=settings)
    header, data = opened(tmp_path / "ours" / "model-00000-of-00001.safetensors")
    assert header["__metadata__"] == {"w": DIGESTS[checksum]}
    assert zstandard.ZstdDecompressor().decompress(part(header, data, "w")) == content
    index = json.loads((tmp_path / "ours" / "model.safetensors.index.json").read_text())
    expected = json.loads((tmp_path / "f" / "model.safetensors.index.json").read_text())
    assert index == expected


@pytest.mark.parametrize(
    ("payload", "options", "error"),
    [
        (frame(XOR + b"1"), {}, LimitExceeded),
        (frame(XOR[:-1]), {}, Corrupt),
        (frame(XOR)[:-2], {}, Corrupt),
        (b"not zstd", {}, Corrupt),
        (frame(bytes(len(XOR))), {}, Corrupt),  # the digest
        (frame(bytes(1 << 24)), {}, LimitExceeded),
        (frame(OVERWRITE[:-1]), {"delta_encoding": "overwrite"}, Corrupt),
        (frame(struct.pack("<II", 1, 24) + b"x"), {"delta_encoding": "overwrite"}, Corrupt),
        (frame(struct.pack("<I", 1 << 31)), {"delta_encoding": "overwrite"}, Corrupt),
        (frame(XOR), {"delta_encoding": "add"}, UnsupportedFeature),
        (frame(XOR), {"compression_format": "lz4"}, UnsupportedFeature),
        (frame(XOR), {"checksum_format": "md5"}, UnsupportedFeature),
        (frame(XOR), {"shard": "../model-00000-of-00001.safetensors"}, Corrupt),
        (frame(XOR), {"shard": "/etc/passwd"}, Corrupt),
        (frame(XOR), {"shard": "other.safetensors"}, OSError),
    ],
)
def test_slime_damaged(
    payload: bytes, options: dict[str, Any], error: type[Exception], base: Path, tmp_path: Path
) -> None:
    foreign = slime(tmp_path / "f", payload, **options)
    with pytest.raises(error):
        rebuilt(base, foreign)


def test_slime_folder_that_lacks_a_tensor(base: Path, tmp_path: Path) -> None:
    foreign = slime(tmp_path / "f", frame(XOR))
    index = json.loads((foreign / "model.safetensors.index.json").read_text())
    index["weight_map"]["v"] = index["weight_map"]["w"]
    write(foreign / "model.safetensors.index.json", json.dumps(index))
    with pytest.raises(Corrupt, match="the delta is incomplete"):
        rebuilt(base, foreign)


# --- grail


def grail(version: int, *, data: bytes | None = None, **changes: Any) -> bytes:
    values = VALUES.tobytes()
    entry: dict[str, Any] = {
        "name": "w",
        "shape": [3, 4],
        "num_nonzero": 3,
        "value_dtype": "bfloat16",
    }
    if version == 2:
        indices = struct.pack("<3i", 1, 5, 5)
    else:  # rows 0, 1, 2; a column is absolute where a row begins
        rows, columns = struct.pack("<3i", 0, 1, 1), struct.pack("<3i", 1, 2, 3)
        if version == 31:
            rows, columns = struct.pack("<3B", 0, 1, 1), struct.pack("<3H", 1, 2, 3)
            entry |= {"row_dtype": "uint8", "col_dtype": "uint16"}
        indices = rows + columns
        entry |= {"rows_size": len(rows), "cols_size": len(columns)}
    entry |= {
        "indices_offset": 0, "indices_size": len(indices), "values_offset": len(indices), "values_size": 6,
        **changes,
    }  # fmt: skip
    header = json.dumps({"version": version, "tensors": [entry]}, separators=(",", ":")).encode()
    content = indices + values if data is None else data
    return frame(struct.pack("<I", len(header)) + header + content)


@pytest.mark.parametrize("version", [2, 3, 31])
def test_grail(version: int, base: Path, target: Path, tmp_path: Path) -> None:
    foreign = write(tmp_path / "f", grail(version))
    assert rebuilt(base, foreign) == target.read_bytes()
    settings = {"version": version}
    sparsedelta.convert(target, tmp_path / "ours", base=base, write_as="grail", settings=settings)
    ours, theirs = (
        zstandard.ZstdDecompressor().decompress(path.read_bytes())
        for path in (tmp_path / "ours", foreign)
    )
    header_end = 4 + int.from_bytes(ours[:4], "little")
    assert json.loads(ours[4:header_end]) == json.loads(theirs[4:header_end])
    assert ours[header_end:] == theirs[4 + int.from_bytes(theirs[:4], "little") :]


def test_grail_columns_within_a_row(tmp_path: Path) -> None:
    """Elements (0, 1), (0, 3) and (2, 0) have row gaps 0, 0, 2 and columns 1, +2, 0."""
    base = write_file(tmp_path / "a.safetensors", {"w": W})
    target = write_file(tmp_path / "b.safetensors", {"w": W.changed(2, 6, 16)})
    sparsedelta.convert(target, tmp_path / "ours", base=base, write_as="grail")
    content = zstandard.ZstdDecompressor().decompress((tmp_path / "ours").read_bytes())
    data = content[4 + int.from_bytes(content[:4], "little") :]
    assert data[:9] == struct.pack("<3B3H", 0, 0, 2, 1, 2, 0)
    assert rebuilt(base, tmp_path / "ours") == target.read_bytes()


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (grail(4), UnsupportedVersion),
        (grail(2, shape=[4, 3]), Corrupt),
        (grail(2, shape=[12, "x"]), Corrupt),
        (grail(2, num_nonzero=4), Corrupt),
        (grail(2, value_dtype="int8"), Corrupt),
        (grail(2, value_dtype=None), Corrupt),
        (grail(2, indices_size=1 << 40), Corrupt),
        (grail(2, values_offset=-4), Corrupt),
        (grail(2, values_size=4), Corrupt),
        (grail(2, values_size=5), Corrupt),
        (grail(2, data=struct.pack("<3i", 1, -1, 5) + VALUES.tobytes()), Corrupt),
        (grail(2, data=struct.pack("<3i", 1, 5, 1 << 30) + VALUES.tobytes()), Corrupt),
        (grail(3, data=struct.pack("<6i", 0, 1, 1, 1, 4, 3) + VALUES.tobytes()), Corrupt),
        (grail(3, data=struct.pack("<6i", 0, 1, 2, 1, 2, 3) + VALUES.tobytes()), Corrupt),
        (grail(3, rows_size=8), Corrupt),
        (grail(31, row_dtype="float64"), Corrupt),
        (grail(31, shape=[3, 1 << 62, 1 << 62]), Corrupt),
        (grail(2, shape=[3, 1 << 62, 1 << 62]), Corrupt),
        (grail(31, name="z"), StructureMismatch),
        (grail(31)[:-3], BadMagic),
        (frame(struct.pack("<I", 1 << 31) + b'{"version":2,"tensors":[]}'), LimitExceeded),
        (frame(struct.pack("<I", 1 << 19) + b'{"version":2,"tensors":[]}'), Corrupt),
        (frame(struct.pack("<I", 26) + b'{"version":2,"tensors":{}}'), Corrupt),
        (frame(struct.pack("<I", 26) + b'{"version":2,"tensors":[' + b"[" * 200_000), Corrupt),
        (frame(struct.pack("<I", 20) + b'{"version":2,' + bytes(200 << 20)), LimitExceeded),
    ],
)  # fmt: skip
def test_grail_damaged(
    content: bytes, error: type[SparseDeltaError], base: Path, tmp_path: Path
) -> None:
    foreign = write(tmp_path / "f", content)
    with pytest.raises(error):
        rebuilt(base, foreign)


# --- PULSEPT1


def xxh(data: bytes) -> str:
    return "xxh3_128:" + xxhash.xxh3_128(data).hexdigest()


def pulse(
    *,
    payload: bytes | None = None,
    top: dict[str, Any] | None = None,
    first: dict[str, Any] | None = None,
    **changes: Any,
) -> bytes:
    entries: list[dict[str, Any]] = [
        {
            "name": "v", "shape": [2], "numel": 2, "dtype": "bf16", "changed": 0, "idxEnc": "delta-u16-esc",
            "idxBytes": 0, "valBytes": 0, "tensorDigest": xxh(V.data), **(first or {}),
        },
        {
            "name": "w", "shape": [3, 4], "numel": 12, "dtype": "bf16", "changed": 3, "idxEnc": "delta-u16-esc",
            "idxBytes": 8, "valBytes": 6, "tensorDigest": xxh(T.data), **changes,
        },
    ]  # fmt: skip
    digests = b"".join(bytes.fromhex(e["tensorDigest"][9:]) for e in entries)
    header = {
        "formatVersion": 1, "step": 1, "baseStep": 0, "model": {"id": "m", "digest": "", "paramCount": 14},
        "tensors": entries, "stateDigest": xxh(digests), **(top or {}),
    }  # fmt: skip
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    streams = struct.pack("<IHH", 1, 5, 5) + VALUES.tobytes() if payload is None else payload
    return b"PULSEPT1" + struct.pack("<I", len(text)) + text + frame(streams)


def test_pulse(base: Path, target: Path, tmp_path: Path) -> None:
    foreign = write(tmp_path / "f", pulse())
    assert rebuilt(base, foreign) == target.read_bytes()
    sparsedelta.convert(target, tmp_path / "ours", base=base, write_as="pulsept1")
    content = (tmp_path / "ours").read_bytes()
    end = 12 + int.from_bytes(content[8:12], "little")
    found, expected = (
        json.loads(content[12:end]),
        json.loads(foreign.read_bytes()[12:].split(b"\x28\xb5\x2f\xfd")[0]),
    )
    assert found["tensors"] == expected["tensors"]
    assert found["stateDigest"] == expected["stateDigest"]
    streams = struct.pack("<IHH", 1, 5, 5) + VALUES.tobytes()
    assert zstandard.ZstdDecompressor().decompress(content[end:]) == streams
    base_state = xxh(b"".join(xxhash.xxh3_128(t.data).digest() for t in (V, W)))
    assert found["baseStateDigest"] == found["model"]["digest"] == base_state


# Gaps less one are 1, 4, 4: quotients 0, 2, 2 as 0 110 110 and a one as padding; remainders 1, 0, 0.
RICE = b"\x01" + struct.pack("<I", 1) + bytes([0b01101101, 0b10000000])
# W has the exponent 127 throughout, and 3 of its 12 elements change.
BY_EXPONENT = struct.pack("<HBBII", 1, 127, 0, 3, len(RICE)) + RICE
# New less old bits are −11888, 16506, 16438: too large for a byte as zigzag numbers.
DIFFERENCES = b"\xff\xff\xff" + struct.pack("<HHH", 2 * 11888 - 1, 2 * 16506, 2 * 16438)
VERSIONS = {2: ("rice-gap", RICE), 3: ("exp-class-rice", BY_EXPONENT)}


def pulse_of(version: int, *, payload: bytes | None = None, **changes: Any) -> bytes:
    """Return a patch of version 2 or 3."""
    encoding, positions = VERSIONS[version]
    both = {"idxEnc": encoding, "valEnc": "zz-delta-u8esc"}
    return pulse(
        payload=positions + DIFFERENCES if payload is None else payload,
        top={"formatVersion": version},
        first=both,
        **{**both, "idxBytes": len(positions), "valBytes": len(DIFFERENCES), **changes},
    )


@pytest.mark.parametrize("version", VERSIONS)
def test_pulse_versions_2_and_3(version: int, base: Path, target: Path, tmp_path: Path) -> None:
    foreign = write(tmp_path / "f", pulse_of(version))
    assert rebuilt(base, foreign) == target.read_bytes()
    sparsedelta.convert(
        target, tmp_path / "ours", base=base, write_as="pulsept1", settings={"version": version}
    )
    content = (tmp_path / "ours").read_bytes()
    end = 12 + int.from_bytes(content[8:12], "little")
    assert (
        json.loads(content[12:end])["tensors"]
        == json.loads(foreign.read_bytes()[12:].split(b"\x28\xb5\x2f\xfd")[0])["tensors"]
    )
    assert (
        zstandard.ZstdDecompressor().decompress(content[end:]) == VERSIONS[version][1] + DIFFERENCES
    )


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"valEnc": "zz"}, UnsupportedVersion),
        ({"idxEnc": "delta-u16-esc"}, UnsupportedVersion),
        ({"valBytes": 10}, Corrupt),
        ({"changed": 2}, Corrupt),
        ({"changed": 4}, Corrupt),
        ({"idxBytes": 1 << 62}, Corrupt),
        ({"shape": [3, 1 << 62, 4], "numel": 12 << 62}, Corrupt),
        ({"shape": [1 << 16, 1 << 16], "numel": 1 << 32}, Corrupt),
        ({"payload": bytes(40)}, SparseDeltaError),
        ({"payload": bytes(1 << 24)}, LimitExceeded),
    ],
)
def test_pulse_versions_2_and_3_damaged(
    version: int,
    changes: dict[str, Any],
    error: type[SparseDeltaError],
    base: Path,
    tmp_path: Path,
) -> None:
    foreign = write(tmp_path / "f", pulse_of(version, **changes))
    with pytest.raises(error):
        rebuilt(base, foreign)


def test_pulse_escaped_gaps(tmp_path: Path) -> None:
    """Gaps of 65,535 and more are escaped, also where half of an escaped gap looks like the escape."""
    w = raw("BF16", np.zeros(300_000, np.uint16))
    places = [5, 5 + 65_534, 5 + 65_534 + 65_535, 5 + 65_534 + 65_535 + 131_071]
    base = write_file(tmp_path / "a.safetensors", {"w": w})
    target = write_file(tmp_path / "b.safetensors", {"w": w.changed(*(2 * i for i in places))})
    sparsedelta.convert(target, tmp_path / "ours", base=base, write_as="pulsept1")
    content = (tmp_path / "ours").read_bytes()
    streams = zstandard.ZstdDecompressor().decompress(
        content[12 + int.from_bytes(content[8:12], "little") :]
    )
    assert streams[:-8] == struct.pack("<IHHIHI", 5, 65_534, 0xFFFF, 65_535, 0xFFFF, 131_071)
    assert rebuilt(base, tmp_path / "ours") == target.read_bytes()


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (pulse(top={"formatVersion": 2}), UnsupportedVersion),
        (pulse(top={"formatVersion": 4}), UnsupportedVersion),
        (pulse(top={"formatVersion": True}), UnsupportedVersion),
        (pulse(idxEnc="rice-gap"), UnsupportedVersion),
        (pulse(dtype="fp32"), UnsupportedVersion),
        (pulse(valEnc="zz"), UnsupportedVersion),
        (pulse(changed=4), Corrupt),
        (pulse(numel=13), Corrupt),
        (pulse(shape=[4, 3]), Corrupt),
        (pulse(name="a"), Corrupt),  # not in order
        (pulse(name="z"), StructureMismatch),
        (pulse(tensorDigest=xxh(b"")), Corrupt),
        (pulse(top={"stateDigest": xxh(b"")}), Corrupt),
        (pulse(idxBytes=1 << 40), Corrupt),
        (pulse(idxBytes=10), Corrupt),
        (pulse(payload=struct.pack("<IHH", 1, 5, 6) + VALUES.tobytes()), Corrupt),
        (pulse(payload=struct.pack("<IHH", 1, 0, 5) + VALUES.tobytes()), Corrupt),
        (pulse(payload=struct.pack("<IHH", 1, 0xFFFF, 5) + VALUES.tobytes()), Corrupt),
        (pulse(payload=bytes(1 << 24)), LimitExceeded),
        (pulse()[:-2], Corrupt),
        (b"PULSEPT1" + struct.pack("<I", 1 << 31), Corrupt),
        (b"PULSEPT1" + struct.pack("<I", 2) + b"[]", Corrupt),
        (b"PULSEPT1", Corrupt),
    ],
)
def test_pulse_damaged(
    content: bytes, error: type[SparseDeltaError], base: Path, tmp_path: Path
) -> None:
    foreign = write(tmp_path / "f", content)
    with pytest.raises(error):
        rebuilt(base, foreign)


# --- ARC2


def test_arc2(base: Path, target: Path, tmp_path: Path) -> None:
    sums = {"w": str(zlib.adler32(T.data)), "v": str(zlib.adler32(V.data))}
    tensors = {"w": u8(frame(XOR)), "v": u8(frame(bytes(4)))}
    foreign = write_file(tmp_path / "f" / "base.safetensors", tensors, sums)
    assert rebuilt(base, foreign.parent) == target.read_bytes()
    assert rebuilt(base, foreign) == target.read_bytes()
    sparsedelta.convert(target, tmp_path / "ours", base=base, write_as="arc2")
    header, data = opened(tmp_path / "ours" / "base.safetensors")
    assert header["__metadata__"] == sums
    assert zstandard.ZstdDecompressor().decompress(part(header, data, "w")) == XOR
    assert zstandard.ZstdDecompressor().decompress(part(header, data, "v")) == bytes(4)


@pytest.mark.parametrize(
    ("tensors", "sums", "error"),
    [
        ({"w": u8(frame(XOR))}, {"w": str(zlib.adler32(T.data))}, StructureMismatch),  # lacks v
        ({"w": u8(frame(XOR)), "v": u8(frame(bytes(4)))}, {"w": "1", "v": "2"}, Corrupt),
        ({"w": u8(frame(XOR[:-1])), "v": u8(frame(bytes(4)))}, {"w": "1", "v": "2"}, Corrupt),
        (
            {"w": u8(frame(bytes(1 << 24))), "v": u8(frame(bytes(4)))},
            {"w": "1", "v": "2"},
            LimitExceeded,
        ),
    ],
)
def test_arc2_damaged(
    tensors: dict[str, Raw],
    sums: dict[str, str],
    error: type[SparseDeltaError],
    base: Path,
    tmp_path: Path,
) -> None:
    foreign = write_file(tmp_path / "f", tensors, sums)
    with pytest.raises(error):
        rebuilt(base, foreign)


# --- task vectors


def test_task_vector(tmp_path: Path) -> None:
    """1 + 0.5, 2 + 0 and 4 − 0.001, each rounded once to BF16."""
    base = write_file(
        tmp_path / "a.safetensors",
        {"w": raw("BF16", np.array([0x3F80, 0x4000, 0x4080], np.uint16))},
    )
    change = np.array([0.5, 0, -0.001], np.float32)
    foreign = write_file(tmp_path / "f", {"w": raw("F32", change)})
    sparsedelta.convert(foreign, tmp_path / "x.sd", base=base, read_as="task-vector")
    sparsedelta.apply(base, tmp_path / "x.sd", tmp_path / "out.safetensors")
    found = np.frombuffer((tmp_path / "out.safetensors").read_bytes()[-6:], np.uint16)
    assert found.tolist() == [0x3FC0, 0x4000, 0x4080]
    # Without a name it could be a checkpoint; apply refuses it, since it is no delta.
    with pytest.raises((BadMagic, LimitExceeded)):
        sparsedelta.apply(base, foreign, tmp_path / "out2.safetensors")
    short = write_file(tmp_path / "g", {"w": raw("F32", change[:2])})
    with pytest.raises(Corrupt, match="3 indices and 2 values"):
        sparsedelta.convert(short, tmp_path / "y.sd", base=base, read_as="task-vector")


def test_nothing_else_escapes(base: Path, tmp_path: Path) -> None:
    """Every prefix, and every damaged byte, gives an error of this package, or the same result or a changed value."""
    allowed = (FormatError, StructureMismatch, CheckpointError)
    for number, content in enumerate((trl_v1(), grail(31), grail(2), pulse())):
        foreign = tmp_path / f"damaged-{number}"
        for end in range(len(content)):
            foreign.write_bytes(content[:end])
            with pytest.raises(allowed):
                rebuilt(base, foreign)
        for at in range(0, len(content), 3):
            foreign.write_bytes(content[:at] + bytes([content[at] ^ 0x55]) + content[at + 1 :])
            with suppress(*allowed):
                rebuilt(base, foreign)
