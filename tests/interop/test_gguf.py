"""Deltas between GGUF files: the exact file comes back, and damaged files are refused."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import pytest

import sparsedelta
from sparsedelta.errors import CheckpointError, SparseDeltaError
from sparsedelta.interop.regions import RegionFiles

F32, Q8_0 = 0, 8


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def gguf(
    tensors: list[tuple[bytes, int, tuple[int, ...], bytes]], *, name: bytes = b"m", align: int = 32
) -> bytes:
    """Return a GGUF file, version 3, with padding of zeros."""
    values = [
        text(b"general.alignment") + struct.pack("<II", 4, align),
        text(b"general.name") + struct.pack("<I", 8) + text(name),
        text(b"tokens") + struct.pack("<IIQ", 9, 8, 2) + text(b"a") + text(b"bc"),
        text(b"scores") + struct.pack("<IIQ2f", 9, 6, 2, 0.5, 1.5),
        text(b"flag") + struct.pack("<IB", 7, 1),
    ]
    infos, data = b"", b""
    for key, kind, shape, content in tensors:
        infos += text(key) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, len(data))
        data += content + bytes(-len(content) % align)
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(values)) + b"".join(values) + infos
    return head + bytes(-len(head) % align) + data


def pair(path: Path) -> tuple[Path, Path]:
    blocks = bytearray(random.Random(0).randbytes(34 * 8))  # Q8_0: 34 bytes for 32 values
    norm = struct.pack("<8f", *range(8))
    old = gguf([(b"blk.0.weight", Q8_0, (64, 4), bytes(blocks)), (b"norm", F32, (8,), norm)])
    blocks[5] ^= 1
    blocks[200] ^= 0x80
    new = gguf(
        [(b"blk.0.weight", Q8_0, (64, 4), bytes(blocks)), (b"norm", F32, (8,), norm)],
        name=b"tuned model",
    )
    base, target = path / "base.gguf", path / "target.gguf"
    base.write_bytes(old)
    target.write_bytes(new)
    return base, target


def test_the_exact_file_comes_back(tmp_path: Path) -> None:
    base, target = pair(tmp_path)
    report = sparsedelta.convert(target, tmp_path / "x.sd", base=base)
    assert (report.n_changed, report.nnz) == (1, 2)
    found = sparsedelta.inspect(tmp_path / "x.sd")
    assert {(t.name, t.dtype, t.shape, t.nnz) for t in found.tensors} == {
        ("blk.0.weight", "U8", (288,), 2),
        ("norm", "F32", (8,), 0),
    }
    sparsedelta.convert(tmp_path / "x.sd", tmp_path / "out.gguf", base=base)
    assert (tmp_path / "out.gguf").read_bytes() == target.read_bytes()
    with pytest.raises(SparseDeltaError):
        sparsedelta.convert(tmp_path / "x.sd", tmp_path / "wrong.gguf", base=target)
    assert not (tmp_path / "wrong.gguf").exists()


def test_only_deltas_of_gguf_files_become_gguf(tmp_path: Path) -> None:
    from interop.interop_helpers import plain_pair

    given = plain_pair(tmp_path)
    with pytest.raises(ValueError, match="was not made from files of GGUF"):
        sparsedelta.convert(given.delta, tmp_path / "out.gguf", base=given.base)


def test_damaged_files_are_refused_or_read_whole(tmp_path: Path) -> None:
    """Every prefix of the header is refused; a damaged byte gives an error, or a file that is copied exactly."""
    base, _ = pair(tmp_path)
    content = base.read_bytes()
    damaged = tmp_path / "damaged.gguf"
    with RegionFiles(base) as opened:
        header_bytes = next(iter(opened.tensors.values())).offset
    for end in range(4, header_bytes + 1, 3):
        damaged.write_bytes(content[:end])
        with pytest.raises(CheckpointError):
            RegionFiles(damaged)
    for at in range(4, header_bytes, 5):
        damaged.write_bytes(content[:at] + bytes([content[at] ^ 0x81]) + content[at + 1 :])
        try:
            sparsedelta.convert(damaged, tmp_path / "x.sd", base=base, overwrite=True)
        except SparseDeltaError:
            continue
        sparsedelta.convert(tmp_path / "x.sd", tmp_path / "o.gguf", base=base, overwrite=True)
        assert (tmp_path / "o.gguf").read_bytes() == damaged.read_bytes()
