"""``invert``: what the delta alone tells, what the base has to tell, and who is not the base."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from helpers import Raw, assert_same_files, noise, write, write_file, write_sharded

import sparsedelta
from sparsedelta import Delta
from sparsedelta.errors import (
    BaseMismatch,
    BaseNeeded,
    CheckpointError,
    Corrupt,
    StructureMismatch,
)

RAW = noise("BF16", 6, 4)
NEW = noise("F32", 7)
GROWN = Raw("BF16", (8, 4), RAW.changed(0).data + noise("BF16", 2, 4).data)


def checkpoint(path: Path, tensors: dict[str, Raw], files: dict[str, str] | None = None) -> Path:
    write_file(path / "model.safetensors", tensors, {"format": "pt"})
    for name, text in (files or {}).items():
        write(path / name, text)
    return path


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return checkpoint(tmp_path / "base", {"v": RAW, "w": RAW}, {"c": "0"})


def check(inverse: Delta, target: Path, base: Path, out: Path) -> None:
    path = out.with_suffix(".sd")
    inverse.save(path)
    sparsedelta.apply(target, path, out)
    assert_same_files(base, out)


def test_differences_without_the_base(base: Path, tmp_path: Path) -> None:
    target = checkpoint(tmp_path / "target", {"v": RAW, "w": RAW.changed(0, 8)}, {"c": "0"})
    with (
        sparsedelta.diff(base, target, info={"lr": 1}) as delta,
        sparsedelta.invert(delta, base_id="org/tuned") as inverse,
    ):
        assert inverse.base.id == "org/tuned"
        assert inverse.base_fingerprint == delta.target_fingerprint
        assert inverse.target_fingerprint == delta.base_fingerprint
        assert inverse.info == {"inverted": {"lr": 1}}
        assert inverse.tensors[0].is_copied
        (change,), (undone,) = delta.tensors[1].chunks, inverse.tensors[1].chunks
        assert undone.touched == (change.touched or ())[::-1]
        check(inverse, target, base, tmp_path / "out")


def test_from_a_file(base: Path, tmp_path: Path) -> None:
    target = checkpoint(tmp_path / "target", {"v": RAW, "w": RAW.changed(0)}, {"c": "0"})
    with sparsedelta.diff(base, target) as delta:
        delta.save(tmp_path / "delta.sd")
    with sparsedelta.invert(tmp_path / "delta.sd") as inverse:
        check(inverse, target, base, tmp_path / "out")


def test_single_files_of_any_name(tmp_path: Path) -> None:
    base = write_file(tmp_path / "base.safetensors", {"v": RAW, "w": RAW})
    target = write_file(tmp_path / "tuned.safetensors", {"v": RAW, "w": RAW.changed(0)})
    with sparsedelta.diff(base, target) as delta, sparsedelta.invert(delta) as inverse:
        assert [file.path for file in inverse.target.weight_files] == ["base.safetensors"]
        check(inverse, target, base, tmp_path / "out")
        with sparsedelta.invert(inverse) as again:
            assert (again.tensors, again.target) == (delta.tensors, delta.target)


def test_grown_and_added_tensors_are_cut(base: Path, tmp_path: Path) -> None:
    target = checkpoint(tmp_path / "target", {"n": NEW, "v": GROWN, "w": RAW}, {"c": "0"})
    with sparsedelta.diff(base, target) as delta, sparsedelta.invert(delta) as inverse:
        assert [row.name for row in inverse.tensors] == ["v", "w"]
        assert inverse.base.n_unused == 1
        row = inverse.tensors[0]
        (chunk,) = row.chunks
        assert (row.keep, row.nnz, chunk.touched) == (24, 1, None)
        check(inverse, target, base, tmp_path / "out")
    with sparsedelta.diff(base, target) as delta, sparsedelta.invert(delta, base=base) as inverse:
        assert inverse.base.n_unused == 1
        (chunk,) = inverse.tensors[0].chunks
        assert chunk.touched
        check(inverse, target, base, tmp_path / "out-2")


@pytest.mark.parametrize(
    ("tensors", "files", "options", "reason"),
    [
        ({"v": RAW}, {"c": "0"}, {}, "it leaves out tensors of its base"),
        ({"v": RAW, "w": noise("F16", 6, 4)}, {"c": "0"}, {}, "it leaves out tensors of its base"),
        ({"m.v": RAW, "m.w": RAW.changed(0)}, {"c": "0"}, {}, "it renames or moves tensor 'v'"),
        ({"v": RAW, "w": RAW, "x": RAW}, {"c": "0"}, {}, "it renames or moves tensor 'v'"),
        ({"x": RAW, "w": RAW.changed(0)}, {"c": "0"}, {}, "it renames or moves tensor 'v'"),
        ({"v": RAW, "w": noise("BF16", 5, 4)}, {"c": "0"}, {}, "it cuts tensor 'w'"),
        ({"v": RAW, "w": RAW.changed(0)}, {"c": "0"}, {"values": "target"}, "it holds new values"),
        ({"v": RAW, "w": RAW.changed(0)}, {"c": "1"}, {}, "it carries file 'c'"),
    ],
)
def test_what_only_the_base_tells(
    base: Path,
    tmp_path: Path,
    tensors: dict[str, Raw],
    files: dict[str, str],
    options: dict[str, str],
    reason: str,
) -> None:
    target = checkpoint(tmp_path / "target", tensors, files)
    with sparsedelta.diff(base, target, **options) as delta:  # type: ignore[arg-type]
        with pytest.raises(BaseNeeded, match=rf"{reason}.*; give the base \(base=, --base\)"):
            sparsedelta.invert(delta)
        with sparsedelta.invert(delta, base=base) as inverse:
            check(inverse, target, base, tmp_path / "out")


def test_several_tensors_made_from_one(base: Path, tmp_path: Path) -> None:
    """Where several tensors were made from one, the one of its name gives it back."""
    target = checkpoint(
        tmp_path / "t", {"a": RAW, "v": RAW.changed(0), "w": RAW.changed(4), "x": RAW}, {"c": "0"}
    )
    with sparsedelta.diff(base, target) as delta, sparsedelta.invert(delta, base=base) as inverse:
        made = {row.name: row.base.name for row in inverse.tensors if row.base}
        assert made == {"v": "v", "w": "w"}
        assert inverse.base.n_unused == 2
        check(inverse, target, base, tmp_path / "out")


def test_moved_tensors(tmp_path: Path) -> None:
    """Other shards, the tensors of one changed."""
    base = write_sharded(tmp_path / "base", [{"v": RAW}, {"w": RAW, "x": NEW}])
    target = write_sharded(tmp_path / "target", [{"v": RAW, "w": RAW.changed(0)}, {"x": NEW}])
    with sparsedelta.diff(base, target) as delta:
        with pytest.raises(BaseNeeded, match="it renames or moves tensor 'w'"):
            sparsedelta.invert(delta)
        with sparsedelta.invert(delta, base=base) as inverse:
            assert inverse.nnz == 1
            assert all(row.base for row in inverse.tensors)
            check(inverse, target, base, tmp_path / "out")


def test_tensors_that_the_target_is_not_made_from(tmp_path: Path) -> None:
    """They are in the inverse whole, those of files that the target lacks too."""
    base = checkpoint(tmp_path / "base", {"v": RAW, "w": RAW, "x": NEW}, {"c": "0"})
    write_file(base / "more" / "other.safetensors", {"y": noise("F32", 9)})
    target = checkpoint(
        tmp_path / "target", {"w": RAW.changed(0), "z": noise("I64", 3)}, {"c": "0"}
    )
    with sparsedelta.diff(base, target) as delta, sparsedelta.invert(delta, base=base) as inverse:
        assert (delta.base.n_unused, inverse.base.n_unused) == (3, 1)
        assert {row.name: row.base is None for row in inverse.tensors} == {
            "v": True, "w": False, "x": True, "y": True,
        }  # fmt: skip
        check(inverse, target, base, tmp_path / "out")


def test_a_shard_of_added_tensors(tmp_path: Path) -> None:
    base = write_file(tmp_path / "base" / "model.safetensors", {"w": RAW}).parent
    target = tmp_path / "target"
    write_file(target / "model.safetensors", {"w": RAW})
    write_file(target / "other.safetensors", {"n": NEW})
    with sparsedelta.diff(base, target) as delta:
        with pytest.raises(BaseNeeded, match=r"adds all tensors of file 'other\.safetensors'"):
            sparsedelta.invert(delta)
        with sparsedelta.invert(delta, base=base) as inverse:
            check(inverse, target, base, tmp_path / "out")


def test_a_stored_header_of_another_shape(base: Path, tmp_path: Path) -> None:
    import json

    def spell(fields: dict[str, object]) -> bytes:
        return json.dumps(fields).encode()

    target = tmp_path / "target"
    write_file(target / "model.safetensors", {"v": GROWN, "w": RAW}, spell=spell)
    write(target / "c", "0")
    with sparsedelta.diff(base, target) as delta:
        with pytest.raises(BaseNeeded, match="stores the header"):
            sparsedelta.invert(delta)
        with sparsedelta.invert(delta, base=base) as inverse:
            check(inverse, target, base, tmp_path / "out")


def test_a_stored_header_of_the_same_shape(tmp_path: Path) -> None:
    import json

    def spell(fields: dict[str, object]) -> bytes:
        return json.dumps(fields).encode()

    base = write_file(tmp_path / "b" / "model.safetensors", {"w": RAW}, spell=spell).parent
    target = write_file(tmp_path / "t" / "model.safetensors", {"w": RAW.changed(0)}, spell=spell)
    with sparsedelta.diff(base, target.parent) as delta, sparsedelta.invert(delta) as inverse:
        check(inverse, target.parent, base, tmp_path / "out")


def test_an_unknown_target_is_made_known(base: Path, tmp_path: Path) -> None:
    target = checkpoint(tmp_path / "t", {"v": RAW, "w": RAW.changed(0, 4)}, {"c": "0"})
    with sparsedelta.diff(base, target) as delta:
        row = delta.tensors[1]
        open_row = dataclasses.replace(row, target=row.target.with_digest(None))
        unknown = dataclasses.replace(delta, tensors=(delta.tensors[0], open_row))
        with pytest.raises(BaseNeeded, match="it does not know the digests of its target"):
            sparsedelta.invert(unknown)
        with sparsedelta.invert(unknown, base=base) as inverse:
            check(inverse, target, base, tmp_path / "out")
            with sparsedelta.diff(target, base) as direct:
                assert inverse.tensors == direct.tensors
                assert inverse.base == direct.base


class TestWrongBase:
    def test_content(self, base: Path, tmp_path: Path) -> None:
        target = checkpoint(tmp_path / "t", {"v": RAW, "w": RAW.changed(0)})
        wrong = checkpoint(tmp_path / "x", {"v": RAW, "w": RAW.changed(4)})
        with (
            sparsedelta.diff(base, target, values="target") as delta,
            pytest.raises(BaseMismatch, match="'w'"),
        ):
            sparsedelta.invert(delta, base=wrong)

    def test_structure(self, base: Path, tmp_path: Path) -> None:
        target = checkpoint(tmp_path / "t", {"v": RAW, "w": RAW.changed(0)})
        with sparsedelta.diff(base, target) as delta, pytest.raises(StructureMismatch):
            sparsedelta.invert(delta, base=checkpoint(tmp_path / "x", {"v": RAW}))

    def test_weights_the_delta_does_not_know(self, base: Path, tmp_path: Path) -> None:
        """A tensor that was put there since comes back with the base, or is left out by its file."""
        target = checkpoint(tmp_path / "t", {"v": RAW, "w": RAW.changed(0)}, {"c": "0"})
        with sparsedelta.diff(base, target) as delta:
            write_file(base / "sub" / "extra.safetensors", {"z": NEW})
            with sparsedelta.invert(delta, base=base) as inverse:
                check(inverse, target, base, tmp_path / "out")
            with sparsedelta.invert(delta, base=base, exclude=["extra.safetensors"]) as inverse:
                assert [file.path for file in inverse.target.weight_files] == ["model.safetensors"]

    def test_a_file_that_cannot_be_carried(self, base: Path, tmp_path: Path) -> None:
        target = checkpoint(tmp_path / "t", {"v": RAW, "w": RAW.changed(0)}, {"c": "0"})
        with sparsedelta.diff(base, target) as delta:
            write(base / "pytorch_model.bin", "b")
            with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
                sparsedelta.invert(delta, base=base)
            with sparsedelta.invert(delta, base=base, exclude=["*.bin"]) as inverse:
                check(inverse, target, target_less_bin(base), tmp_path / "out")


def target_less_bin(base: Path) -> Path:
    (base / "pytorch_model.bin").unlink()
    return base


def test_an_inconsistent_delta(base: Path, tmp_path: Path) -> None:
    target = checkpoint(tmp_path / "t", {"v": RAW, "w": RAW.changed(0)})
    with sparsedelta.diff(base, target, values="target") as delta:
        row = delta.tensors[1]
        lie = dataclasses.replace(row, target=row.target.with_digest(bytes(16)))
        with pytest.raises(Corrupt, match="'w'"):
            sparsedelta.invert(
                dataclasses.replace(delta, tensors=(delta.tensors[0], lie)), base=base
            )


def test_a_file_that_is_only_named_as_those_of_convert(base: Path, tmp_path: Path) -> None:
    target = checkpoint(tmp_path / "t", {"v": RAW, "w": RAW.changed(0)}, {"c": "0"})
    for folder in (base, target):
        write(folder / "bones.skeleton", "x")
    with sparsedelta.diff(base, target) as delta, sparsedelta.invert(delta) as inverse:
        check(inverse, target, base, tmp_path / "out")
