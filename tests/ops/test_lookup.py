"""Finding the tensors that rows refer to: where they are said to be, in another file, by digest."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from helpers import assert_same_files, noise, write_file, write_sharded

import sparsedelta
from sparsedelta.dtypes import DTYPES
from sparsedelta.errors import BaseMismatch, StructureMismatch
from sparsedelta.format.records import BaseTensor, TensorSpec
from sparsedelta.ops.lookup import Lookup

A, B = bytes(16), b"\1" * 16


def tensor(
    file: str, name: str, digest: bytes | None = A, *shape: int, dtype: str = "BF16"
) -> BaseTensor:
    return BaseTensor(file, name, TensorSpec(DTYPES[dtype], shape, digest))


def lookup(*tensors: BaseTensor) -> Lookup[BaseTensor]:
    return Lookup(tensors, lambda one: one.spec.digest)


def test_the_tensor_of_that_file_and_name() -> None:
    here, there = tensor("a", "w", B, 3), tensor("b", "w", A, 3)
    found = lookup(here, there)
    assert found.find(tensor("a", "w", A, 3)) is here  # whatever its digest
    assert found.find(tensor("b", "w", B, 3)) is there
    assert found.find(tensor("a", "v", A, 3)) is None


def test_a_tensor_of_that_name_in_another_file() -> None:
    there = tensor("b", "w", B, 3)
    others = tensor("a", "w", A, 4), tensor("c", "w", A, 3, dtype="F16"), tensor("d", "v", A, 3)
    found = lookup(*others, there)
    for file in "azcd":
        assert found.find(tensor(file, "w", A, 3)) is there
    assert found.find(tensor("b", "w", A, 3, 1)) is None


def test_of_several_the_one_with_the_digest() -> None:
    one, other = tensor("a", "w", A, 3), tensor("b", "w", B, 3)
    for found in (lookup(one, other), lookup(other, one)):
        assert found.find(tensor("z", "w", A, 3)) is one
        assert found.find(tensor("z", "w", B, 3)) is other
    assert lookup(one, other).find(tensor("z", "w", bytes(15) + b"\7", 3)) is one  # to be refused


def test_digests_are_asked_for_only_where_there_are_several() -> None:
    asked: list[str] = []

    def digest(one: BaseTensor) -> bytes | None:
        asked.append(one.file)
        return one.spec.digest

    found = Lookup([tensor("a", "w"), tensor("b", "w", B), tensor("b", "v")], digest)
    found.find(tensor("a", "w"))
    found.find(tensor("z", "v"))
    assert not asked
    found.find(tensor("z", "w", B))
    assert asked == ["a", "b"]


def test_at_names_what_is_there_whatever_its_layout() -> None:
    here, there = tensor("a", "w", A, 3), tensor("b", "v", A, 9)
    found = lookup(here, there)
    assert found.at("a", "w") is here
    assert found.at("z", "v") is there
    assert found.at("a", "u") is None


W, V = noise("BF16", 6, 5), noise("F32", 9)


@pytest.fixture
def delta(tmp_path: Path) -> Path:
    """Return a delta from two shards to two others."""
    write_sharded(tmp_path / "base", [{"w": W}, {"v": V}], index=False)
    write_sharded(tmp_path / "target", [{"w": W.changed(1)}, {"v": V.changed(1)}], index=False)
    with sparsedelta.diff(tmp_path / "base", tmp_path / "target") as made:
        made.save(tmp_path / "delta.sd")
    return tmp_path / "delta.sd"


def test_a_base_may_be_cut_into_other_files(delta: Path, tmp_path: Path) -> None:
    one_file = write_file(tmp_path / "any name", {"v": V, "more": W, "w": W})
    folder = write_file(tmp_path / "folder/x.safetensors", {"w": W, "v": V}).parent
    write_file(folder / "y.safetensors", {"w": noise("BF16", 6, 6), "more": V})
    three = write_sharded(tmp_path / "three", [{"more": V}, {"w": W}, {"v": V}])
    for number, base in enumerate([one_file, folder, three]):
        sparsedelta.apply(base, delta, tmp_path / f"out-{number}")
        assert_same_files(tmp_path / "target", tmp_path / f"out-{number}")
        assert sparsedelta.verify(delta, base=base).base_checked


def test_of_several_of_that_name_the_right_one_is_taken(delta: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    for stem, tensors in (("a", {"w": W.changed(7)}), ("b", {"w": W, "v": V}), ("c", {"w": V})):
        write_file(folder / f"{stem}.safetensors", tensors)
    sparsedelta.apply(folder, delta, tmp_path / "out")
    assert_same_files(tmp_path / "target", tmp_path / "out")


def test_a_file_of_the_right_path_comes_first(delta: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    write_file(folder / "model-00001-of-00001.safetensors", {"w": W, "v": V})
    sparsedelta.apply(folder, delta, tmp_path / "out")
    (folder / "model-00001-of-00001.safetensors").rename(folder / "z.safetensors")
    write_sharded(folder, [{"w": W.changed(7)}, {"v": V}], index=False)
    with pytest.raises(BaseMismatch, match="'w' has digest"):
        sparsedelta.apply(folder, delta, tmp_path / "other")


def test_what_is_missing_is_named(delta: Path, tmp_path: Path) -> None:
    for number, (tensors, found) in enumerate(
        [({"w": W}, "'v' in .* is absent, expected F32"), ({"w": W, "v": W}, "'v' in .* is BF16")]
    ):
        base = write_file(tmp_path / f"f{number}", tensors)
        with pytest.raises(StructureMismatch, match=found) as caught:
            sparsedelta.apply(base, delta, tmp_path / "out")
        assert caught.value.tensor == "v"
    assert not (tmp_path / "out").exists()


def test_only_what_rows_refer_to_is_required(delta: Path, tmp_path: Path) -> None:
    with sparsedelta.load(delta) as loaded:
        fewer = replace(loaded, tensors=loaded.tensors[:1])
        target = replace(loaded.target, weight_files=loaded.target.weight_files[:1])
        replace(fewer, target=target).save(tmp_path / "fewer.sd")
    base = write_file(tmp_path / "f", {"w": W, "v": noise("I8", 3), "x": V})
    sparsedelta.apply(base, tmp_path / "fewer.sd", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [
        "model-00001-of-00002.safetensors"
    ]
