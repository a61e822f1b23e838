"""Both decoders accept every valid vector, giving its target, and refuse every invalid one."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import make_vectors
import pytest
from decoders import DECODERS, PACKAGE, Decoder
from vector_source import Invalid, invalid_vectors
from vectors import MANIFEST, SPEC, VECTORS, assert_is_target, base_of, named, tree

import sparsedelta
from sparsedelta import Delta
from sparsedelta.errors import SparseDeltaError

VALID, INVALID = MANIFEST["valid"], MANIFEST["invalid"]
each_decoder = pytest.mark.parametrize("decoder", DECODERS, ids=lambda decoder: decoder.name)
each_valid = pytest.mark.parametrize("vector", VALID, ids=named(VALID))


@each_decoder
@each_valid
def test_valid_gives_target(decoder: Decoder, vector: dict[str, Any], tmp_path: Path) -> None:
    delta = VECTORS / vector["delta"]
    base = base_of(vector, tmp_path)
    before = tree(base)
    assert decoder.read_code(delta) == "accepted"
    decoder.apply(base, delta, tmp_path / "out")
    assert_is_target(vector, tmp_path / "out")
    assert tree(base) == before


@each_valid
def test_package_verifies_valid(vector: dict[str, Any], tmp_path: Path) -> None:
    delta, base = VECTORS / vector["delta"], base_of(vector, tmp_path)
    sparsedelta.load(delta)
    PACKAGE.apply(base, delta, tmp_path / "out")
    sparsedelta.verify(delta, base=base, target=tmp_path / "out")


@each_decoder
@pytest.mark.parametrize("vector", invalid_vectors(), ids=lambda vector: vector.name)
def test_invalid_is_refused(decoder: Decoder, vector: Invalid, tmp_path: Path) -> None:
    path, out = tmp_path / "delta.sd", tmp_path / "out"
    path.write_bytes(vector.delta)
    if vector.on_apply:
        assert decoder.read_code(path) == "accepted"
    else:
        assert decoder.read_code(path) == vector.code
    # Not every vector is of this base; where its structure tells, a decoder may stop at that.
    codes = {vector.code} if vector.on_apply else {vector.code, "structure_mismatch"}
    assert decoder.apply_code(VECTORS / "invalid/base", path, out) in codes
    assert os.listdir(tmp_path) == ["delta.sd"]


@pytest.mark.parametrize(
    "vector", [v for v in invalid_vectors() if not v.on_apply], ids=lambda vector: vector.name
)
def test_invalid_is_refused_on_a_base_of_its_structure(vector: Invalid, tmp_path: Path) -> None:
    path, base = tmp_path / "delta.sd", tmp_path / "base"
    path.write_bytes(vector.delta)
    shutil.copytree(VECTORS / "invalid/base", base)
    with suppress(SparseDeltaError), sparsedelta.load(path) as delta:
        write_zeros(base / "model.safetensors", delta)
    with pytest.raises(SparseDeltaError) as raised:
        sparsedelta.apply(base, path, tmp_path / "out", verify="none")
    assert raised.value.code == vector.code
    assert sorted(os.listdir(tmp_path)) == ["base", "delta.sd"]


def write_zeros(path: Path, delta: Delta) -> None:
    """Write a base of the delta's structure whose every byte is zero."""
    header, end = {}, 0
    for row in delta.tensors:
        if row.base:
            begin, end = end, end + row.base.n_bytes
            entry = {"dtype": row.base.dtype.name, "shape": row.base.shape}
            header[row.name] = entry | {"data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(end))


def test_every_rule_has_an_invalid_vector() -> None:
    broken = {vector["breaks"] for vector in INVALID}
    assert {f"R{n}" for n in range(1, 21)} <= broken
    assert len(INVALID) > 150


def test_invalid_members_are_true() -> None:
    made = {vector.name: vector for vector in invalid_vectors()}
    assert len(made) == len(invalid_vectors())
    for vector in INVALID:
        one = made[vector["name"]]
        assert (one.why, one.breaks, one.code) == tuple(
            vector[k] for k in ("why", "breaks", "code")
        )


def test_vectors_are_up_to_date() -> None:
    wanted = make_vectors.all_files()
    there = {path: data for path, data in tree(VECTORS).items() if path != ".gitattributes"}
    assert there.keys() == wanted.keys()
    assert {path for path in wanted if there[path] != wanted[path]} == set()
    assert max(map(len, wanted.values())) < 100_000


def test_maker_keeps_what_is_released(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(make_vectors, "VECTORS", tmp_path)
    assert make_vectors.main([]) == 0
    changed = tmp_path / "valid" / "added" / "delta.sd"
    right = changed.read_bytes()
    changed.write_bytes(right + b"x")
    (tmp_path / "valid" / "gone.sd").write_bytes(b"x")
    assert make_vectors.main([]) == 1
    assert changed.read_bytes() == right + b"x"
    assert capsys.readouterr().err.split()[-2:] == ["valid/added/delta.sd", "valid/gone.sd"]
    assert make_vectors.main(["--unreleased"]) == 0
    assert changed.read_bytes() == right
    assert not (tmp_path / "valid" / "gone.sd").exists()
    assert make_vectors.main(["--other"]) == 2


def test_reference_decoder_uses_nothing_of_the_package() -> None:
    for path in SPEC.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert "import sparsedelta" not in text, path
        assert "from sparsedelta" not in text, path
        assert "numpy" not in text, path
