"""Both decoders accept every valid vector, giving its target, and refuse every invalid one."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import check_vectors
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


INVALID_VECTORS = invalid_vectors()
RULES = sorted({vector.breaks for vector in INVALID_VECTORS}, key=lambda rule: (len(rule), rule))
each_rule = pytest.mark.parametrize("rule", RULES)


def broken(rule: str) -> list[Invalid]:
    """Return the vectors that break a rule."""
    return [vector for vector in INVALID_VECTORS if vector.breaks == rule]


@each_decoder
@each_rule
def test_invalid_is_refused(decoder: Decoder, rule: str, tmp_path: Path) -> None:
    path, out = tmp_path / "delta.sd", tmp_path / "out"
    wrong = []
    for vector in broken(rule):
        codes = {vector.code, *vector.also}
        path.write_bytes(vector.delta)
        read = decoder.read_code(path)
        if read not in codes | ({"accepted"} if vector.on_apply else set()):
            wrong.append(f"{vector.name}: reading gives {read}, not {codes}")
        # Not every vector is of this base; where its structure tells, a decoder may stop at that.
        applied = decoder.apply_code(VECTORS / "invalid/base", path, out)
        if applied not in codes | (set() if vector.on_apply else {"structure_mismatch"}):
            wrong.append(f"{vector.name}: applying gives {applied}, not {codes}")
        remove(out)
        assert os.listdir(tmp_path) == ["delta.sd"], vector.name
    assert not wrong


def remove(out: Path) -> None:
    """Remove what should not be there, so that the next vector is tested too."""
    if out.is_dir():
        shutil.rmtree(out)
    else:
        out.unlink(missing_ok=True)


@each_rule
def test_invalid_is_refused_on_a_base_of_its_structure(rule: str, tmp_path: Path) -> None:
    path, out, wrong = tmp_path / "delta.sd", tmp_path / "out", []
    for number, vector in enumerate(broken(rule)):
        if vector.on_apply:
            continue
        path.write_bytes(vector.delta)
        base = VECTORS / "invalid/base"
        with suppress(SparseDeltaError), sparsedelta.load(path) as delta:
            base = write_zeros(tmp_path / f"base-{number}", delta)
        code = PACKAGE.code_of(lambda base=base: sparsedelta.apply(base, path, out, verify="none"))  # type: ignore[misc]
        if code not in {vector.code, *vector.also}:
            wrong.append(f"{vector.name}: {code}, not {vector.code}")
        remove(out)
    assert not wrong


def write_zeros(base: Path, delta: Delta) -> Path:
    """Write a base of the delta's structure whose every byte is zero, and return it."""
    shutil.copytree(VECTORS / "invalid/base", base)
    files: dict[str, dict[str, Any]] = {}
    for row in delta.tensors:
        if row.base:
            entry = {"dtype": row.base.spec.dtype.name, "shape": row.base.spec.shape}
            files.setdefault(row.base.file, {})[row.base.name] = (entry, row.base.spec.n_bytes)
    for path, tensors in files.items():
        header, end = {}, 0
        for name, (entry, n_bytes) in tensors.items():
            header[name] = entry | {"data_offsets": [end, end + n_bytes]}
            end += n_bytes
        text = json.dumps(header).encode()
        (base / path).write_bytes(len(text).to_bytes(8, "little") + text + bytes(end))
    return base


def test_every_rule_has_an_invalid_vector() -> None:
    stored = {vector["breaks"] for vector in INVALID}
    assert {f"R{n}" for n in range(1, 22)} <= stored
    assert len(INVALID) > 150


def test_invalid_members_are_true() -> None:
    made = {vector.name: vector for vector in INVALID_VECTORS}
    assert len(made) == len(INVALID_VECTORS)
    for vector in INVALID:
        one = made[vector["name"]]
        assert (one.why, one.breaks, one.code) == tuple(
            vector[k] for k in ("why", "breaks", "code")
        )


@pytest.fixture(scope="module")
def wanted() -> dict[str, bytes]:
    """Return all files of the vectors as they are made now."""
    return make_vectors.all_files()


def test_vectors_are_up_to_date(wanted: dict[str, bytes]) -> None:
    there = {path: data for path, data in tree(VECTORS).items() if path != ".gitattributes"}
    assert there.keys() == wanted.keys()
    assert {path for path in wanted if there[path] != wanted[path]} == set()
    assert max(map(len, wanted.values())) < 100_000


def test_maker_keeps_what_is_released(
    wanted: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(make_vectors, "all_files", lambda everything: wanted)
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


def test_vectors_guard_every_check_of_the_reference_decoder() -> None:
    assert check_vectors.untested() == []
