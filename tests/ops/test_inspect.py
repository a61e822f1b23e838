"""What ``inspect`` says of a delta, held against the checkpoints it was made from and the file's own bytes."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from helpers import Raw, Tensors, noise, small_chunks, write, write_file, write_sharded

import sparsedelta
from sparsedelta import Inspection
from sparsedelta.ops.inspect import STATES

VECTORS = sorted((Path(__file__).parents[2] / "spec" / "vectors" / "valid").glob("*/*.sd"))


def made(scratch: Path, base: Tensors, target: Tensors, **options: Any) -> Inspection:
    """Return the inspection of a delta between two files, read from a file."""
    paths = [
        write_file(scratch / "base.safetensors", base),
        write_file(scratch / "target.safetensors", target),
    ]
    with sparsedelta.diff(*paths, **options) as delta:
        delta.save(scratch / "delta.sd", overwrite=True)
    return sparsedelta.inspect(scratch / "delta.sd")


def states(found: Inspection) -> dict[str, str]:
    return {tensor.name: tensor.state for tensor in found.tensors}


def container(path: Path) -> tuple[int, dict[str, int], dict[str, Any]]:
    """Return the size of a delta's header with its length, that of manifest and payload, and the structure."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header.pop("__metadata__")
    raw_bytes, stored_bytes = struct.unpack_from("<II", content, 8 + length)
    stored = content[8 + length + 16 :][:stored_bytes]
    raw = stored
    if stored_bytes != raw_bytes:
        raw = zstandard.ZstdDecompressor().decompress(stored, max_output_size=raw_bytes)
    sizes = {key: entry["shape"][0] for key, entry in header.items()}
    return 8 + length, sizes, json.loads(raw)


def test_every_state(tmp_path: Path) -> None:
    grid, content = noise("F32", 4, 6), noise("F32", 9)
    base = {
        "same": grid,
        "bits": grid,
        "type": grid,
        "type and shape": grid,
        "rows": grid,
        "fewer rows": grid,
        "columns": grid,
        "flat": grid,
        "old name": content,
        "gone": grid,
    }
    target = {
        "same": grid,
        "bits": grid.changed(3),
        "type": noise("F16", 4, 6),
        "type and shape": noise("U8", 7),
        "rows": noise("F32", 5, 6),
        "fewer rows": noise("F32", 2, 6),
        "columns": noise("F32", 4, 5),
        "flat": noise("F32", 24),
        "name": content,
        "new": noise("F32", 7),
    }
    found = made(tmp_path, base, target)
    assert states(found) == {
        "same": "unchanged",
        "bits": "changed",
        "type": "added",
        "type and shape": "added",
        "rows": "resized",
        "fewer rows": "resized",
        "columns": "reshaped",
        "flat": "reshaped",
        "name": "renamed",
        "new": "added",
    }
    assert found.states == {
        "changed": 1,
        "added": 3,
        "resized": 2,
        "reshaped": 2,
        "renamed": 1,
        "unchanged": 1,
    }
    assert tuple(found.states) == STATES
    assert found.n_unused == 3  # of another type, twice, and gone


def test_what_a_tensor_is_made_from(tmp_path: Path) -> None:
    grid, other = noise("F32", 4, 6), noise("I64", 3)
    base = {"model.a": grid, "model.b": other, "gone": noise("I64")}
    target = {
        "a": Raw("F32", (5, 6), grid.data + grid.data[:24]),
        "b": other,
        "c": noise("BOOL", 3),
    }
    a, b, c = made(tmp_path, base, target).tensors
    assert (a.dtype, a.shape, a.state) == ("F32", (5, 6), "resized")
    assert (a.base_file, a.base_name, a.base_shape) == ("base.safetensors", "model.a", (4, 6))
    assert (b.state, b.base_name, b.nnz, b.payload_bytes) == ("renamed", "model.b", 0, 0)
    assert (c.dtype, c.shape, c.state) == ("BOOL", (3,), "added")
    assert (c.base_file, c.base_name, c.base_shape) == (None, None, None)
    assert {one.file for one in (a, b, c)} == {"target.safetensors"}


def test_a_tensor_in_another_file_is_unchanged(tmp_path: Path) -> None:
    a, b = noise("F32", 4), noise("F32", 5)
    base = write_sharded(tmp_path / "base", [{"a": a}, {"b": b}])
    target = write_sharded(tmp_path / "target", [{"b": b}, {"a": a}])
    with sparsedelta.diff(base, target) as delta:
        found = sparsedelta.inspect(delta)
    assert states(found) == {"a": "unchanged", "b": "unchanged"}
    assert found.tensors[0].file != found.tensors[0].base_file


def test_counts_and_densities(tmp_path: Path) -> None:
    base = {"a": noise("F32", 10, 10), "b": noise("BF16", 50), "empty": noise("F32", 0)}
    target = {**base, "a": base["a"].changed(0, 1, 40), "b": base["b"].changed(2)}
    found = made(tmp_path, base, target)
    assert [(t.nnz, t.numel, t.density) for t in found.tensors] == [
        (2, 100, 0.02),
        (1, 50, 0.02),
        (0, 0, 0.0),
    ]
    assert (found.nnz, found.numel, found.density) == (3, 150, 0.02)
    assert found.target_bytes == 500


def test_sizes_are_those_of_the_file(tmp_path: Path) -> None:
    base, target = tmp_path / "base", tmp_path / "target"
    layer = noise("F32", 100, 100)
    write_sharded(base, [{"layer": layer}, {"other": noise("F16", 9)}])
    write_file(
        target / "model.safetensors",
        {"layer": layer.changed(*range(0, 40_000, 400)), "other": noise("F16", 9)},
        spell=lambda fields: json.dumps(fields).encode(),  # spaces: the header has to be stored
    )
    for path, content in (("a.json", "a" * 5000), ("b/c.txt", "c"), ("same", "s")):
        write(target / path, content)
    write(base / "same", "s")
    (target / "hollow").mkdir()
    with sparsedelta.diff(base, target) as delta:
        delta.save(tmp_path / "delta.sd")
    found = sparsedelta.inspect(tmp_path / "delta.sd")

    header_bytes, entries, structure = container(tmp_path / "delta.sd")
    sizes = found.sizes
    a, c, same = (stored for _, _, stored in structure["target"]["side_files"])
    _, _, stored_header = structure["target"]["weight_files"][0][2]
    assert sizes.file_bytes == (tmp_path / "delta.sd").stat().st_size
    assert sizes.header_bytes == header_bytes
    assert sizes.manifest_bytes == entries["manifest"]
    assert sizes.payload_bytes == sum(structure["chunks"]["stored"])
    assert (sizes.side_file_bytes, same) == (a + c, -1)
    assert sizes.stored_header_bytes == stored_header
    assert [(f.path, f.stored is not None) for f in found.weight_files] == [
        ("model.safetensors", True)
    ]
    assert [(f.path, f.n_bytes, f.stored is not None) for f in found.side_files] == [
        ("a.json", 5000, True),
        ("b/c.txt", 1, True),
        ("same", 1, False),
    ]
    assert found.empty_folders == ("hollow",)
    assert found.target_kind == "folder"
    assert found.target_bytes == 40_018
    assert found.share == sizes.file_bytes / 40_018
    assert found.payload_bytes_per_change == sizes.payload_bytes / 100
    assert found.file_bytes_per_change == sizes.file_bytes / 100
    add_up(tmp_path / "delta.sd")


def add_up(path: Path) -> None:
    """Check that what the bytes of a delta are spent on is all of it, as its own structure says."""
    found = sparsedelta.inspect(path)
    header_bytes, entries, structure = container(path)
    sizes = found.sizes
    headers = [header for _, _, header in structure["target"]["weight_files"]]
    files = [stored for _, _, stored in structure["target"]["side_files"]]
    assert sizes.file_bytes == path.stat().st_size
    assert (sizes.header_bytes, sizes.manifest_bytes) == (header_bytes, entries["manifest"])
    assert sizes.stored_header_bytes == sum(h[2] for h in headers if h[0] == "stored")
    assert sizes.side_file_bytes == sum(stored for stored in files if stored >= 0)
    assert sizes.payload_bytes == sum(structure["chunks"]["stored"])
    assert sizes.payload_bytes == sum(tensor.payload_bytes for tensor in found.tensors)
    in_payload = sizes.stored_header_bytes + sizes.side_file_bytes + sizes.payload_bytes
    assert in_payload == entries["payload"]
    assert json.loads(json.dumps(found.as_json())) == found.as_json()


@pytest.mark.parametrize("path", VECTORS, ids=lambda path: path.parent.name)
def test_vectors_add_up(path: Path) -> None:
    add_up(path)


def test_there_are_vectors() -> None:
    assert len(VECTORS) > 20


@pytest.mark.parametrize("positions", [(0, 400), range(0, 4000, 4)], ids=["few", "all"])
def test_positions_and_values_are_told_apart(tmp_path: Path, positions: Sequence[int]) -> None:
    base = noise("F32", 1000)
    (tensor,) = made(tmp_path, {"a": base}, {"a": base.changed(*positions)}).tensors
    _, _, structure = container(tmp_path / "delta.sd")
    index_bytes, *value_bytes = structure["chunks"]["stored"]
    assert tensor.index_bytes == index_bytes > 0
    assert tensor.value_bytes == sum(value_bytes) > 0


def test_encodings_count_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_chunks(monkeypatch, 1000, 1000)
    base = {"a": noise("F32", 3, 1000), "b": noise("F32", 4)}
    draw = np.random.default_rng(0)
    sparse, dense = (0, 400), 8000 + 4 * np.flatnonzero(draw.random(1000) < 0.5)  # chunks 0 and 2
    target = {"a": base["a"].changed(*sparse, *dense), "new": noise("F16", 4)}
    found = made(tmp_path, base, target)
    assert dict(found.tensors[0].index_encodings) == {"gaps": 1, "bitmap": 1}
    assert dict(found.tensors[0].value_encodings) == {"ulp": 2}
    assert dict(found.tensors[1].value_encodings) == {"target": 1}
    assert sum(found.index_encodings.values()) == 3
    assert found.value_encodings == {"ulp": 2, "target": 1}


def test_identity_and_info(tmp_path: Path) -> None:
    info = {"method": "sift", "settings": {"lr": 0.001}}
    tensors = {"a": noise("F32", 4)}
    found = made(tmp_path, tensors, tensors, base_id="org/model@1", info=info)
    with sparsedelta.load(tmp_path / "delta.sd") as delta:
        assert found.base_fingerprint == delta.base_fingerprint.hex()
    assert found.target_fingerprint == found.base_fingerprint
    assert (found.base_id, found.info, found.target_kind) == ("org/model@1", info, "file")


def test_nothing_changed(tmp_path: Path) -> None:
    tensors = {"a": noise("F32", 4)}
    found = made(tmp_path, tensors, tensors)
    assert (found.nnz, found.density, found.sizes.payload_bytes) == (0, 0.0, 0)
    assert (found.payload_bytes_per_change, found.file_bytes_per_change) == (None, None)
    assert (found.index_encodings, found.value_encodings) == ({}, {})
    assert found.share is not None
    empty = made(tmp_path, {}, {})
    assert (empty.numel, empty.density, empty.share) == (0, 0.0, None)


def test_delta_that_is_not_saved(tmp_path: Path) -> None:
    base = {"a": noise("F32", 100)}
    target = {"a": base["a"].changed(0)}
    saved = made(tmp_path, base, target)
    paths = [tmp_path / "base.safetensors", tmp_path / "target.safetensors"]
    with sparsedelta.diff(*paths) as delta:
        found = sparsedelta.inspect(delta)
        assert delta.payload.read(0, 1)  # still open
    assert found.tensors == saved.tensors
    assert found.sizes.payload_bytes == saved.sizes.payload_bytes
    assert (found.sizes.file_bytes, found.sizes.header_bytes) == (None, None)
    assert (found.sizes.manifest_bytes, found.share, found.file_bytes_per_change) == (None,) * 3
    assert json.loads(json.dumps(found.as_json()))["share"] is None


def test_loaded_delta_stays_open(tmp_path: Path) -> None:
    saved = made(tmp_path, {"a": noise("F32", 4)}, {"a": noise("F32", 4, seed=1)})
    with sparsedelta.load(tmp_path / "delta.sd") as delta:
        assert sparsedelta.inspect(delta) == saved
        assert delta.payload.read(0, 1)


def test_json_names_every_figure(tmp_path: Path) -> None:
    base = {"a": noise("F32", 2, 2)}
    found = made(tmp_path, base, {"a": base["a"].changed(0, 4, 8, 12)})
    whole: dict[str, Any] = found.as_json()
    (row,) = whole["tensors"]
    (tensor,) = found.tensors
    assert row == {
        "name": "a",
        "file": "target.safetensors",
        "state": "changed",
        "dtype": "F32",
        "shape": [2, 2],
        "base_name": "a",
        "base_file": "base.safetensors",
        "base_shape": [2, 2],
        "nnz": 4,
        "numel": 4,
        "density": 1.0,
        "payload_bytes": found.sizes.payload_bytes,
        "index_bytes": tensor.index_bytes,
        "value_bytes": found.sizes.payload_bytes - tensor.index_bytes,
        "index_encodings": dict(tensor.index_encodings),
        "value_encodings": {"ulp": 1},
    }
    assert whole["base"] == {"id": None, "fingerprint": found.base_fingerprint, "n_unused": 0}
    assert whole["target"] == {
        "kind": "file",
        "fingerprint": found.target_fingerprint,
        "tensor_bytes": 16,
        "weight_files": [{"path": "target.safetensors", "n_tensors": 1, "stored_header": False}],
        "side_files": [],
        "empty_folders": [],
    }
    assert whole["nnz"] == 4
    assert whole["share"] == found.share


def test_not_a_delta(tmp_path: Path) -> None:
    path = write_file(tmp_path / "x.safetensors", {"a": noise("F32", 4)})
    with pytest.raises(sparsedelta.SparseDeltaError, match="is a model, not a delta"):
        sparsedelta.inspect(path)
    with pytest.raises(FileNotFoundError):
        sparsedelta.inspect(tmp_path / "none.sd")
