"""What ``inspect`` says of a delta, held against the checkpoints it was made from and the file's own bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers import Tensors, noise, small_chunks, write, write_file, write_sharded

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


def container(path: Path) -> tuple[int, dict[str, int]]:
    """Return the size of a safetensors file's header with its length, and of each entry."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header.pop("__metadata__")
    return 8 + length, {key: entry["shape"][0] for key, entry in header.items()}


def test_every_state(tmp_path: Path) -> None:
    grid = noise("F32", 4, 6)
    base = {
        "same": grid,
        "bits": grid,
        "type": grid,
        "type and shape": grid,
        "rows": grid,
        "fewer rows": grid,
        "columns": grid,
        "flat": grid,
        "gone": grid,
    }
    target = {
        "same": grid,
        "bits": grid.changed(3),
        "type": noise("F16", 4, 6),
        "type and shape": noise("U8", 7),
        "rows": noise("F32", 5, 6),
        "fewer rows": noise("F32", 0, 6),
        "columns": noise("F32", 4, 5),
        "flat": noise("F32", 24),
        "new": grid,
    }
    found = made(tmp_path, base, target)
    assert states(found) == {
        "same": "unchanged",
        "bits": "changed",
        "type": "retyped",
        "type and shape": "retyped",
        "rows": "resized",
        "fewer rows": "resized",
        "columns": "reshaped",
        "flat": "reshaped",
        "new": "added",
        "gone": "removed",
    }
    assert found.states == {
        "changed": 1,
        "added": 1,
        "removed": 1,
        "retyped": 2,
        "resized": 2,
        "reshaped": 2,
        "unchanged": 1,
    }
    assert tuple(found.states) == STATES


def test_dtype_and_shape_on_both_sides(tmp_path: Path) -> None:
    base = {"a": noise("F32", 4, 6), "gone": noise("I64")}
    target = {"a": noise("BF16", 5, 6), "new": noise("BOOL", 3)}
    a, new, gone = made(tmp_path, base, target).tensors
    assert (a.dtype, a.shape, a.base_dtype, a.base_shape) == ("BF16", (5, 6), "F32", (4, 6))
    assert (new.dtype, new.shape, new.base_dtype, new.base_shape) == ("BOOL", (3,), None, None)
    assert (gone.dtype, gone.shape, gone.base_dtype, gone.base_shape) == ("I64", (), "I64", ())
    assert (gone.nnz, gone.numel, gone.density, gone.payload_bytes) == (0, 0, 0.0, 0)
    assert gone.value_encoding is None


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

    header_bytes, entries = container(tmp_path / "delta.sd")
    sizes = found.sizes
    assert sizes.file_bytes == (tmp_path / "delta.sd").stat().st_size
    assert sizes.header_bytes == header_bytes
    assert sizes.manifest_bytes == entries["sparsedelta:manifest"]
    assert sizes.payload_bytes == entries["layer"]
    assert (
        sizes.side_file_bytes
        == entries["sparsedelta:file/a.json"] + entries["sparsedelta:file/b/c.txt"]
    )
    assert sizes.stored_header_bytes == entries["sparsedelta:header/model.safetensors"]
    assert [(f.path, f.stored_header) for f in found.weight_files] == [("model.safetensors", True)]
    assert [(f.path, f.n_bytes, f.carried) for f in found.side_files] == [
        ("a.json", 5000, True),
        ("b/c.txt", 1, True),
        ("same", 1, False),
    ]
    assert found.empty_folders == ("hollow",)
    assert found.target_kind == "folder"
    assert found.target_bytes == 40_018
    assert found.share == sizes.file_bytes / 40_018
    assert found.payload_bytes_per_change == entries["layer"] / 100
    assert found.file_bytes_per_change == sizes.file_bytes / 100


@pytest.mark.parametrize("path", VECTORS, ids=lambda path: path.parent.name)
def test_vectors_add_up(path: Path) -> None:
    found = sparsedelta.inspect(path)
    header_bytes, entries = container(path)
    sizes = found.sizes
    manifest_bytes = entries.pop("sparsedelta:manifest")
    stored = sum(n for key, n in entries.items() if key.startswith("sparsedelta:header/"))
    carried = sum(n for key, n in entries.items() if key.startswith("sparsedelta:file/"))
    assert sizes.file_bytes == path.stat().st_size
    assert (sizes.header_bytes, sizes.manifest_bytes) == (header_bytes, manifest_bytes)
    assert (sizes.stored_header_bytes, sizes.side_file_bytes) == (stored, carried)
    assert sizes.payload_bytes == sum(entries.values()) - stored - carried
    assert sizes.payload_bytes == sum(tensor.payload_bytes for tensor in found.tensors)
    assert json.loads(json.dumps(found.as_json())) == found.as_json()


def test_there_are_vectors() -> None:
    assert len(VECTORS) > 20


def test_positions_and_values_are_told_apart(tmp_path: Path) -> None:
    base = {"few": noise("F32", 1000), "all": noise("F32", 10)}
    target = {"few": base["few"].changed(0, 400), "all": base["all"].changed(*range(0, 40, 4))}
    few, every = made(tmp_path, base, target).tensors
    assert few.index_bytes > 0
    assert few.value_bytes > 0
    assert (every.index_bytes, every.index_encodings) == (0, {"all": 1})
    assert every.value_bytes == every.payload_bytes > 0


def test_encodings_count_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_chunks(monkeypatch, 1000, 1000)
    base = {"a": noise("F32", 3, 1000), "b": noise("F32", 4)}
    sparse, dense = (0, 400), range(8000, 12_000, 4)  # in chunks 0 and 2
    target = {"a": base["a"].changed(*sparse, *dense), "new": noise("F16", 4)}
    found = made(tmp_path, base, target)
    assert dict(found.tensors[0].index_encodings) == {"gap8": 1, "all": 1}
    assert found.tensors[0].value_encoding == "ulp"
    assert found.tensors[1].value_encoding == "target"
    assert found.index_encodings == {"all": 2, "gap8": 1}
    assert found.value_encodings == {"ulp": 2, "target": 1}


def test_identity_and_info(tmp_path: Path) -> None:
    info = {"method": "sift", "settings": {"lr": 0.001}}
    tensors = {"a": noise("F32", 4)}
    found = made(tmp_path, tensors, tensors, base_id="org/model@1", info=info)
    with sparsedelta.load(tmp_path / "delta.sd") as delta:
        assert found.base_fingerprint == delta.base.fingerprint.hex()
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
        assert delta.payload.n_bytes("a")  # still open
    assert found.tensors == saved.tensors
    assert found.sizes.payload_bytes == saved.sizes.payload_bytes
    assert (found.sizes.file_bytes, found.sizes.header_bytes) == (None, None)
    assert (found.sizes.manifest_bytes, found.share, found.file_bytes_per_change) == (None,) * 3
    assert json.loads(json.dumps(found.as_json()))["share"] is None


def test_loaded_delta_stays_open(tmp_path: Path) -> None:
    saved = made(tmp_path, {"a": noise("F32", 4)}, {"a": noise("F32", 4, seed=1)})
    with sparsedelta.load(tmp_path / "delta.sd") as delta:
        assert sparsedelta.inspect(delta) == saved
        assert delta.payload.read("a", 0, 1)


def test_json_names_every_figure(tmp_path: Path) -> None:
    base = {"a": noise("F32", 2, 2)}
    found = made(tmp_path, base, {"a": base["a"].changed(0, 4, 8, 12)})
    whole: dict[str, Any] = found.as_json()
    (row,) = whole["tensors"]
    assert row == {
        "name": "a",
        "state": "changed",
        "dtype": "F32",
        "shape": [2, 2],
        "base_dtype": "F32",
        "base_shape": [2, 2],
        "nnz": 4,
        "numel": 4,
        "density": 1.0,
        "payload_bytes": found.sizes.payload_bytes,
        "index_bytes": 0,
        "value_bytes": found.sizes.payload_bytes,
        "index_encodings": {"all": 1},
        "value_encoding": "ulp",
    }
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
    with pytest.raises(sparsedelta.SparseDeltaError, match="is not a delta"):
        sparsedelta.inspect(path)
    with pytest.raises(FileNotFoundError):
        sparsedelta.inspect(tmp_path / "none.sd")
