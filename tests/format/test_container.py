"""The ``.sd`` file: its bytes as FORMAT §2 lays them out, and what a reader refuses."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import safetensors
from blake3 import blake3
from helpers import Raw, compact, noise, with_header, write, write_file

import sparsedelta
from sparsedelta.codecs.zstd import compress_text, decompress
from sparsedelta.errors import (
    BadMagic,
    Corrupt,
    FormatError,
    LimitExceeded,
    Truncated,
    UnsupportedVersion,
)
from sparsedelta.format import container
from sparsedelta.format.container import decompress_text
from sparsedelta.format.delta import load

W = noise("BF16", 200)


def pretty(fields: dict[str, Any]) -> bytes:
    return json.dumps(fields, indent=1).encode()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Return a delta with entries of every kind."""
    base = {"sparsedelta:x": W, "w": W, "ones": Raw("U8", (4,), bytes(4)), "same": W}
    target = {
        "w": W.changed(4, 5, 90),
        "sparsedelta:x": W.changed(7),
        "ones": Raw("U8", (4,), b"\0" * 4),
        "zeros": Raw("U8", (4,), bytes(4)),
        "same": W,
    }
    for name, tensors in (("base", base), ("target", target)):
        write_file(tmp_path / name / "model.safetensors", tensors, spell=pretty)
        write(tmp_path / name / "same.json", "same")
        write(tmp_path / name / "b.json", name)
        write(tmp_path / name / "a/c.json", name)
    with sparsedelta.diff(tmp_path / "base", tmp_path / "target", info={"step": 7}) as delta:
        delta.save(tmp_path / "delta.sd")
    return tmp_path / "delta.sd"


def parts(path: Path) -> tuple[dict[str, Any], bytes, bytes]:
    """Return header, header bytes and data section."""
    raw = path.read_bytes()
    n = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + n]), raw[8 : 8 + n], raw[8 + n :]


def test_bytes_of_the_file(path: Path) -> None:
    fields, header, data = parts(path)
    assert header == compact(fields)
    assert len(header) % 8 == 0
    assert list(fields) == [
        "__metadata__",
        "sparsedelta:manifest",
        "sparsedelta:file/a/c.json",
        "sparsedelta:file/b.json",
        "sparsedelta:header/model.safetensors",
        "w",
        "sparsedelta:tensor/sparsedelta:x",
    ]
    metadata, end = fields.pop("__metadata__"), 0
    for entry in fields.values():
        n = entry["shape"][0]
        assert entry == {"dtype": "U8", "shape": [n], "data_offsets": [end, end + n]}
        end += n
    assert end == len(data)
    n_manifest = fields["sparsedelta:manifest"]["shape"][0]
    assert metadata == {
        "format": "sparsedelta",
        "format_version": "1",
        "manifest_digest": blake3(data[:n_manifest]).hexdigest(),
    }
    manifest = json.loads(decompress_text(data[:n_manifest], "it"))
    assert manifest["payload_digest"] == blake3(data[n_manifest:]).hexdigest()
    assert manifest["info"] == {"step": 7}
    begin, end = fields["sparsedelta:file/b.json"]["data_offsets"]
    assert decompress(data[begin:end], 6) == b"target"


def test_safetensors_opens_it(path: Path) -> None:
    with safetensors.safe_open(path, framework="numpy") as file:
        assert file.metadata()["format"] == "sparsedelta"
        assert "sparsedelta:manifest" in file.keys()  # noqa: SIM118 - no mapping


def test_tensor_whose_streams_are_all_empty_has_no_entry(tmp_path: Path) -> None:
    # Every element changes from the bits 1 to 0: `target` codes of zero, at all positions.
    base = write_file(tmp_path / "base", {"w": Raw("U8", (4,), b"\1" * 4)})
    target = write_file(tmp_path / "target", {"w": Raw("U8", (4,), bytes(4))})
    with sparsedelta.diff(base, target, values="target") as delta:
        delta.save(tmp_path / "delta.sd")
    assert list(parts(tmp_path / "delta.sd")[0]) == ["__metadata__", "sparsedelta:manifest"]
    sparsedelta.apply(base, tmp_path / "delta.sd", tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == target.read_bytes()


def test_loaded_is_what_was_saved(path: Path, tmp_path: Path) -> None:
    made = sparsedelta.diff(tmp_path / "base", tmp_path / "target", info={"step": 7})
    with made, load(path) as loaded:
        assert loaded.base == made.base
        assert loaded.target == made.target
        assert loaded.tensors == made.tensors
        assert loaded.info == made.info
        assert (loaded.nnz, loaded.numel) == (made.nnz, made.numel) == (3, 200 * 3 + 8)
        loaded.save(tmp_path / "again.sd")
    assert (tmp_path / "again.sd").read_bytes() == path.read_bytes()


def test_saving_refuses_what_is_there_unless_told(path: Path, tmp_path: Path) -> None:
    before = path.read_bytes()
    with load(path) as delta:
        with pytest.raises(FileExistsError):
            delta.save(path)
        assert path.read_bytes() == before
        delta.save(path, overwrite=True)
    assert path.read_bytes() == before
    assert "delta.sd" in os.listdir(tmp_path)
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".partial")]


def test_any_order_of_entries_and_any_spelling_is_read(path: Path, tmp_path: Path) -> None:
    fields, _, data = parts(path)
    manifest = fields["sparsedelta:manifest"]["data_offsets"][1]
    # The payload's digest covers the data, so only the header's order may differ freely.
    turned = dict(reversed(fields.items()))
    write(tmp_path / "other.sd", with_header(pretty(turned) + b" " * 5, data))
    with load(path) as one, load(tmp_path / "other.sd") as other:
        assert one.tensors == other.tensors
        other.payload.check()
    assert manifest > 0


def spoil(path: Path, header: bytes, data: bytes) -> None:
    write(path, with_header(header, data))


def refused(path: Path, error: type[FormatError], problem: str | None = None) -> None:
    n_open = len(os.listdir("/dev/fd"))
    with pytest.raises(error, match=problem) as caught:
        load(path)
    assert caught.value.code == error.code
    assert len(os.listdir("/dev/fd")) == n_open


@pytest.mark.parametrize("content", [b"", b"\0", b"PK\x03\x04", b"\x80\x02}q\0" * 99])
def test_other_files_are_no_deltas(content: bytes, tmp_path: Path) -> None:
    write(tmp_path / "delta.sd", content)
    with pytest.raises(FormatError):
        load(tmp_path / "delta.sd")


def test_a_checkpoint_is_no_delta(tmp_path: Path) -> None:
    refused(write_file(tmp_path / "f", {"w": W}, {"format": "pt"}), BadMagic, "does not say format")
    refused(write_file(tmp_path / "f", {"w": W}), BadMagic, "does not say format")


def test_header_of_another_version(path: Path) -> None:
    fields, _, data = parts(path)
    fields["__metadata__"]["format_version"] = "2"
    spoil(path, compact(fields), data)
    refused(path, UnsupportedVersion, "a newer sparsedelta may read it")


def test_header_too_large(path: Path) -> None:
    write(path, (100_000_001).to_bytes(8, "little") + b"{")
    refused(path, LimitExceeded, "is not a delta")


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda f: f["__metadata__"].update(more="x"), Corrupt),
        (lambda f: f["__metadata__"].pop("format_version"), Corrupt),
        (lambda f: f["__metadata__"].update(manifest_digest="00" * 32), Corrupt),
        (lambda f: f["__metadata__"].update(format="Sparsedelta"), BadMagic),
        (lambda f: f.pop("__metadata__"), BadMagic),
        (lambda f: f["w"].update(dtype="I8"), Corrupt),
        (lambda f: f["w"].update(shape=[1, *f["w"]["shape"]]), Corrupt),
        (lambda f: f["w"].update(shape=[0]), Corrupt),
        (lambda f: f["w"].update(more=1), Corrupt),
        (lambda f: f.update(v=f.pop("w")), Corrupt),
        (lambda f: f.pop("w"), Corrupt),
        (lambda f: f.update(e={"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}), Corrupt),
    ],
)
def test_spoilt_headers(change: Any, error: type[FormatError], path: Path) -> None:
    fields, _, data = parts(path)
    change(fields)
    spoil(path, compact(fields), data)
    refused(path, error)


def test_one_byte_more_or_less(path: Path) -> None:
    whole = path.read_bytes()
    write(path, whole + b"\0")
    refused(path, Corrupt, "1 bytes after its last entry")
    write(path, whole[:-1])
    refused(path, Truncated, "ends early")


def test_payload_is_checked_before_it_is_used_and_once(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    with load(path) as right:
        right.payload.check()
        right.payload.check()
        monkeypatch.setattr(container, "blake3", None)
        right.payload.check()  # reads nothing again
    monkeypatch.undo()
    write(path, bytes(raw))
    with load(path) as damaged, pytest.raises(Corrupt, match="does not match its digest"):
        damaged.payload.check()


def test_text_beyond_its_limit_is_refused() -> None:
    frame = compress_text(bytes((1 << 27) + 1))
    with pytest.raises(LimitExceeded, match="it has 134217729 bytes"):
        decompress_text(frame, "it")


def test_closed_delta_cannot_be_read(path: Path) -> None:
    delta = load(path)
    delta.close()
    delta.close()
    with pytest.raises(ValueError, match="is closed; load the delta again"):
        delta.payload.read("w", 0, 1)
