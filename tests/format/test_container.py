"""The ``.sd`` file: its bytes as FORMAT §2 lays them out, and what a reader refuses."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
from blake3 import blake3
from helpers import Raw, compact, noise, with_header, write, write_file

import sparsedelta
from sparsedelta.errors import (
    BadMagic,
    Corrupt,
    FormatError,
    LimitExceeded,
    Truncated,
    UnsupportedVersion,
)
from sparsedelta.format.delta import load, read_delta
from sparsedelta.format.manifest import read_text

W = noise("BF16", 200)


def pretty(fields: dict[str, Any]) -> bytes:
    return json.dumps(fields, indent=1).encode()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Return a delta with something of every kind in its payload."""
    base = {"x": W, "w": W, "ones": Raw("U8", (4,), bytes(4)), "same": W}
    target = {
        "w": W.changed(4, 5, 90),
        "x": W.changed(7),
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


def test_bytes_of_the_file(path: Path, tmp_path: Path) -> None:
    fields, header, data = parts(path)
    assert header == compact(fields)
    assert len(header) % 8 == 0
    m = fields["manifest"]["shape"][0]
    manifest, payload = data[:m], data[m:]
    assert fields == {
        "__metadata__": {
            "format": "sparsedelta",
            "format_version": "1",
            "manifest_digest": blake3(manifest).hexdigest(),
        },
        "manifest": {"dtype": "U8", "shape": [m], "data_offsets": [0, m]},
        "payload": {"dtype": "U8", "shape": [len(payload)], "data_offsets": [m, len(data)]},
    }
    # Side files in their order, then stored headers, then chunks.
    assert payload.startswith(b"target" * 2)
    with load(path) as delta:
        stored = [file.stored for file in delta.target.side_files]
        assert [one and (one.offset, one.stored_bytes) for one in stored] == [(0, 6), (6, 6), None]
        place = delta.target.weight_files[0].stored
        assert place is not None
        assert place.offset == 12
        coded = payload[12 : 12 + place.stored_bytes]
        model = (tmp_path / "target/model.safetensors").read_bytes()
        assert model[8:].startswith(read_text(coded, place.n_bytes))
        chunks = [chunk for row in delta.tensors for chunk in row.chunks]
        assert [chunk.nnz for chunk in chunks] == [2, 1]
        end = place.offset + place.stored_bytes
        for chunk in chunks:
            assert chunk.offset == end
            end += chunk.stored_bytes
            assert chunk.digest == blake3(payload[chunk.offset : end]).digest()[:16]
        assert end == len(payload)


def test_safetensors_opens_it(path: Path) -> None:
    with safetensors.safe_open(path, framework="numpy") as file:
        assert file.metadata()["format"] == "sparsedelta"
        assert sorted(file.keys()) == ["manifest", "payload"]


def test_nothing_in_the_payload(tmp_path: Path) -> None:
    base = write_file(tmp_path / "base", {"w": W})
    with sparsedelta.diff(base, base) as delta:
        delta.save(tmp_path / "delta.sd")
    fields, _, data = parts(tmp_path / "delta.sd")
    assert fields["payload"]["shape"] == [0]
    assert fields["manifest"]["shape"] == [len(data)]
    sparsedelta.apply(base, tmp_path / "delta.sd", tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == base.read_bytes()


def test_loaded_is_what_was_saved(path: Path, tmp_path: Path) -> None:
    made = sparsedelta.diff(tmp_path / "base", tmp_path / "target", info={"step": 7})
    with made, load(path) as loaded:
        assert loaded.base == made.base
        assert loaded.target == made.target
        assert loaded.tensors == made.tensors
        assert loaded.info == made.info
        assert loaded.base_fingerprint == made.base_fingerprint
        assert loaded.target_fingerprint == made.target_fingerprint
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
    names = {f"layers.{n}.weight": W for n in range(20)}
    for tensors in ({"w": W}, names):
        for metadata in ({"format": "pt"}, None):
            path = write_file(tmp_path / "f", tensors, metadata)
            refused(path, BadMagic, "is a model, not a delta")
    with pytest.raises(BadMagic, match="not a sparsedelta file"):
        sparsedelta.Delta.from_bytes(write_file(tmp_path / "f", {"w": W}).read_bytes())
    with pytest.raises(LimitExceeded, match="is not a delta"):
        sparsedelta.Delta.from_bytes(write_file(tmp_path / "f", names).read_bytes())


@pytest.mark.parametrize("version", ["0", "2", "10", "01", "1.0", "", "x" * 90])
def test_header_of_another_version(version: str, path: Path) -> None:
    fields, _, data = parts(path)
    fields["__metadata__"]["format_version"] = version
    spoil(path, compact(fields), data)
    refused(path, UnsupportedVersion, "a newer sparsedelta may read it")
    # Whatever else a later version may have changed.
    fields["__metadata__"]["more"] = "x"
    spoil(path, compact(fields | {"index": fields.pop("payload")}), data)
    refused(path, UnsupportedVersion)


def test_header_too_large(path: Path) -> None:
    write(path, (1025).to_bytes(8, "little") + b"{")
    refused(path, LimitExceeded, "is not a delta")
    write(path, (1024).to_bytes(8, "little") + b"{")
    refused(path, Truncated)


class InMemory:
    """A file's bytes as a source."""

    name = "delta.sd"

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.n_bytes = len(content)

    def read(self, offset: int, n_bytes: int) -> bytes:
        return self.content[offset : offset + n_bytes]

    def close(self) -> None:
        pass


Change = Callable[[dict[str, Any]], object]


@pytest.mark.parametrize(
    "change",
    [
        lambda f: f["__metadata__"].update(more="x"),
        lambda f: f["__metadata__"].pop("format_version"),
        lambda f: f["__metadata__"].update(format_version=1),
        lambda f: f["__metadata__"].update(format="Sparsedelta"),
        lambda f: f.update(__metadata__=dict(reversed(f["__metadata__"].items()))),
        lambda f: f["__metadata__"].update(manifest_digest="AB" * 32),
        lambda f: f["__metadata__"].update(manifest_digest="00" * 31),
        lambda f: f.pop("__metadata__"),
        lambda f: f.pop("payload"),
        lambda f: f["manifest"].update(dtype="I8"),
        lambda f: f["payload"].update(shape=[1, *f["payload"]["shape"]]),
        lambda f: f["payload"].update(shape=[float(f["payload"]["shape"][0])]),
        lambda f: f["payload"].update(more=1),
        lambda f: f["manifest"]["data_offsets"].reverse(),
        lambda f: f.update(payload=f.pop("manifest"), manifest=f.pop("payload")),
        lambda f: f.update(e={"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}),
    ],
)
def test_spoilt_headers(change: Change, path: Path) -> None:
    fields, _, data = parts(path)
    change(fields)
    spoil(path, compact(fields), data)
    with pytest.raises((BadMagic, UnsupportedVersion)):
        load(path)


@pytest.mark.parametrize(
    "spell",
    [
        lambda h: h + b" " * 8,
        lambda h: h.rstrip(b" "),
        lambda h: h.rstrip(b" ") + b"\n" * (-len(h.rstrip(b" ")) % 8),
        lambda h: h.replace(b'"U8"', b'"\\u00558"', 1),
        lambda h: h.replace(b":[", b": [", 1),
        lambda h: h.replace(b"[0,", b"[-0,"),
        lambda h: pretty(json.loads(h)),
    ],
)
def test_a_header_has_one_spelling(spell: Callable[[bytes], bytes], path: Path) -> None:
    _, header, data = parts(path)
    changed = spell(header)
    if changed != header:
        spoil(path, changed, data)
        refused(path, BadMagic)


def test_any_other_byte_of_the_header_is_refused(path: Path) -> None:
    whole = path.read_bytes()
    n = 8 + int.from_bytes(whole[:8], "little")
    for position in range(n):
        for other in (whole[position] ^ 1, ord("0"), ord(" ")):
            if other != whole[position]:
                changed = whole[:position] + bytes([other]) + whole[position + 1 :]
                with pytest.raises(FormatError):
                    read_delta(InMemory(changed))


def test_manifest_of_another_digest(path: Path) -> None:
    fields, _, data = parts(path)
    fields["__metadata__"]["manifest_digest"] = "00" * 32
    spoil(path, compact(fields), data)
    refused(path, Corrupt, "manifest does not match its digest")


def test_manifest_too_large(path: Path) -> None:
    # Refused by its size, before it is read: there is no such file behind it.
    fields, _, data = parts(path)
    m, p = (1 << 27) + 1, fields["payload"]["shape"][0]
    fields["manifest"] |= {"shape": [m], "data_offsets": [0, m]}
    fields["payload"]["data_offsets"] = [m, m + p]
    spoil(path, compact(fields), data)
    refused(path, LimitExceeded, "manifest of 134217729 bytes")


def test_one_byte_more_or_less(path: Path) -> None:
    whole = path.read_bytes()
    write(path, whole + b"\0")
    refused(path, Corrupt, "1 bytes after its payload")
    write(path, whole[:-1])
    refused(path, Truncated, "ends early")


def test_files_that_never_were_deltas(path: Path) -> None:
    write(path, b"")
    refused(path, Truncated, "' is empty; copy or download it again")
    write(path, b"Not a delta, but a text of some length")
    refused(path, LimitExceeded, "is not a delta: it does not begin as an .sd file does")
    write(path, b"<!DOCTYPE html><html></html>")
    refused(path, BadMagic, "is a web page, not the file itself")


def test_payload_is_checked_where_it_is_read(path: Path, tmp_path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1  # of the last chunk, that of "x"
    write(path, bytes(raw))
    with load(path) as damaged:
        with pytest.raises(Corrupt, match="'x': a chunk of the delta is damaged") as caught:
            sparsedelta.verify(damaged)
        assert caught.value.tensor == "x"
        with pytest.raises(Corrupt, match="a chunk of the delta is damaged"):
            sparsedelta.apply(tmp_path / "base", damaged, tmp_path / "out", verify="none")
    assert not (tmp_path / "out").exists()


def test_file_that_becomes_shorter(path: Path) -> None:
    with load(path) as delta:
        os.truncate(path, path.stat().st_size - 1)
        with pytest.raises(Truncated, match="ends early"):
            sparsedelta.verify(delta)


def test_closed_delta_cannot_be_read(path: Path) -> None:
    delta = load(path)
    delta.close()
    delta.close()
    with pytest.raises(ValueError, match="is closed; load the delta again"):
        delta.payload.read(0, 1)
