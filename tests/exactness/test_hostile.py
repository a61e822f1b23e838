"""Deltas of strangers through apply and verify: refused with an error of ours, whatever they say."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import Raw, assert_same_files, noise, roundtrip, write, write_file, write_sharded
from vector_source.checkpoints import WEIGHTS, Checkpoint, Tensor, WeightFile, folder, tensor
from vector_source.writer import Coding, Draft, assemble, draft

import sparsedelta
from sparsedelta.errors import BaseMismatch, CheckpointError, Corrupt, LimitExceeded

W = tensor("U8", [1, 2, 3, 4])
BASE = folder(WeightFile(WEIGHTS, {"w": W}))


def put(checkpoint: Checkpoint, path: Path) -> Path:
    """Write a folder and return its path."""
    for name, content in checkpoint.files().items():
        write(path / name, content)
    return path


def save(delta: Draft, path: Path) -> Path:
    """Write a delta and return its path."""
    path.write_bytes(assemble(delta))
    return path


def stored(tensors: dict[str, Tensor], own: dict[str, Tensor]) -> WeightFile:
    """Return a weight file whose rows have other names than its header."""
    file = WeightFile(WEIGHTS, tensors)
    file.header = WeightFile(WEIGHTS, own).canonical()
    return file


def test_stored_header_with_other_names_than_its_rows(tmp_path: Path) -> None:
    base = put(folder(WeightFile(WEIGHTS, {})), tmp_path / "base")
    delta = draft(folder(WeightFile(WEIGHTS, {})), folder(stored({"x:w": W}, {"w": W})))
    path = save(delta, tmp_path / "delta.sd")
    for read in (sparsedelta.verify, lambda path: sparsedelta.apply(base, path, tmp_path / "out")):
        with pytest.raises(Corrupt, match="describes other tensors than"):
            read(path)
    assert not (tmp_path / "out").exists()


def test_stored_header_of_many_empty_tensors(tmp_path: Path) -> None:
    empty = {f"{number}": tensor("U8", []) for number in range(2_000)}
    own = dict(reversed(empty.items()))
    path = save(
        draft(folder(WeightFile(WEIGHTS, {})), folder(stored(empty, own))), tmp_path / "delta.sd"
    )
    assert sparsedelta.verify(path).n_tensors == len(empty)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (folder(WeightFile("run.py", {"w": W})), "weight file 'run.py' does not end in"),
        (folder(WeightFile("MODEL.SAFETENSORS", {"w": W})), "does not end in .safetensors"),
        (
            folder(
                WeightFile(WEIGHTS, {"w": W}),
                side={"x.safetensors": WeightFile("x", {"v": W}).content()},
            ),
            "side file 'x.safetensors' ends in .safetensors",
        ),
        (
            folder(WeightFile(WEIGHTS, {"w": W}), side={".git/config": b"[core]"}),
            "path '.git/config' has a component '.git'",
        ),
        (folder(WeightFile(WEIGHTS, {"w": W}), side={"a": b"", "A": b""}), "that ignores case"),
    ],
    ids=["weights", "weights_case", "side", "git", "case"],
)
def test_names_that_are_not_what_they_say_are_refused(
    target: Checkpoint, message: str, tmp_path: Path
) -> None:
    base = put(BASE, tmp_path / "base")
    path = save(draft(BASE, target), tmp_path / "delta.sd")
    with pytest.raises(Corrupt, match=message):
        sparsedelta.apply(base, path, tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["base", "delta.sd"]


@pytest.mark.parametrize(
    ("name", "why"),
    [
        (".GIT", "files of git can run commands"),
        ("Aux.json", "Windows reserves"),
        ("a ", "ends with a dot or a space"),
        ("what?", "control character or one of"),
        ("Config.json", "that ignores case"),
    ],
)
def test_diff_refuses_names_that_a_delta_must_not_hold(name: str, why: str, tmp_path: Path) -> None:
    base, target = put(BASE, tmp_path / "base"), put(BASE, tmp_path / "target")
    write(target / "config.json", b"{}")
    write(target / "sub" / name, b"{}")
    write(target / name, b"{}")
    with pytest.raises(CheckpointError, match=f"{why}.*--exclude"):
        sparsedelta.diff(base, target)
    sparsedelta.diff(base, target, exclude=[name]).close()


def test_one_file_does_not_replace_a_folder(tmp_path: Path) -> None:
    base = write_file(tmp_path / "base.safetensors", {"w": noise("U8", 4)})
    write(tmp_path / "models/mine", b"precious")
    os.symlink(tmp_path / "models", tmp_path / "link")
    with sparsedelta.diff(base, base) as delta:
        for out in (tmp_path / "models", tmp_path / "link"):
            with pytest.raises(IsADirectoryError, match="the output is one file"):
                delta.save(out, overwrite=True)
            with pytest.raises(IsADirectoryError, match="the output is one file"):
                sparsedelta.apply(base, delta, out, overwrite=True)
    assert (tmp_path / "link/mine").read_bytes() == b"precious"
    assert sorted(os.listdir(tmp_path)) == ["base.safetensors", "link", "models"]


def test_room_is_looked_for_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, out = put(BASE, tmp_path / "base"), tmp_path / "out"
    system = SimpleNamespace(f_blocks=9, f_bfree=1, f_frsize=16)
    monkeypatch.setattr(os, "statvfs", lambda _: system)
    with sparsedelta.diff(base, base) as delta:
        with pytest.raises(
            OSError, match=f"takes [0-9]+ bytes, but only 16 are free.*{out}"
        ) as caught:
            sparsedelta.apply(base, delta, out)
        assert caught.value.errno == errno.ENOSPC
        assert sorted(os.listdir(tmp_path)) == ["base"]
        system.f_blocks = 0  # nothing is known
        sparsedelta.apply(base, delta, out)
    assert_same_files(base, out)


def test_touched_check_without_touched_digests_checks_everything(tmp_path: Path) -> None:
    changed = folder(WeightFile(WEIGHTS, {"w": tensor("U8", [1, 9, 3, 4])}))
    wrong = folder(WeightFile(WEIGHTS, {"w": tensor("U8", [1, 2, 3, 5])}))
    path = save(draft(BASE, changed, default=Coding(touched=False)), tmp_path / "delta.sd")
    right = put(BASE, tmp_path / "base")
    sparsedelta.apply(right, path, tmp_path / "out", verify="touched")
    assert_same_files(put(changed, tmp_path / "target"), tmp_path / "out")
    with pytest.raises(BaseMismatch, match="tensor 'w' has digest"):
        sparsedelta.apply(
            put(wrong, tmp_path / "wrong"), path, tmp_path / "again", verify="touched"
        )
    assert not (tmp_path / "again").exists()


def test_files_left_out_of_the_base_are_left_out_again(tmp_path: Path) -> None:
    one, other = noise("BF16", 8), noise("BF16", 8).changed(3)
    base = write_sharded(tmp_path / "base", [{"w": one}, {"v": one}])
    target = write_sharded(tmp_path / "target", [{"w": other}, {"v": one}])
    path, out, globs = tmp_path / "delta.sd", tmp_path / "out", ["model.safetensors"]
    write_file(base / "model.safetensors", {"w": one, "v": one})
    with sparsedelta.diff(base, target, exclude=globs) as delta:
        delta.save(path)
    for exclude in ((), globs):  # what is left out is not required
        sparsedelta.apply(base, path, out, exclude=exclude, overwrite=True)
        assert_same_files(target, out)
    report = sparsedelta.verify(path, base=base, target=out, exclude=globs[0])
    assert report.base_checked
    assert report.target_checked


def test_longest_name(tmp_path: Path) -> None:
    name = "é" * 512
    one = noise("BF16", 8)
    base = write_file(tmp_path / "base.safetensors", {name: one})
    target = write_file(tmp_path / "target.safetensors", {name: one.changed(3)})
    (tmp_path / "scratch").mkdir()
    assert roundtrip(base, target, tmp_path / "scratch").nnz == 1


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_named(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    base = put(BASE, tmp_path / "base")
    with sparsedelta.diff(base, base) as delta:
        monkeypatch.setattr(os, "pwrite", full)
        with pytest.raises(OSError, match=f"{os.strerror(number)}.*{tmp_path / 'out'}"):
            sparsedelta.apply(base, delta, tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["base"]


def large(n_elements: int) -> Draft:
    """Return a small delta that adds so many zeros to a tensor."""
    longer = tensor("U8", [1, 2, 3, 4, 0, 0, 0, 0])
    delta = draft(BASE, folder(WeightFile(WEIGHTS, {"w": longer})))
    for layout in delta.structure["layouts"]:
        if layout[3] == [8]:
            layout[3] = [n_elements]
    return delta


@pytest.mark.parametrize("n_elements", [1 << 28, 1 << 36, 1 << 59])
def test_small_files_that_make_much_are_refused(tmp_path: Path, n_elements: int) -> None:
    base = put(BASE, tmp_path / "base")
    path = save(large(n_elements), tmp_path / "delta.sd")
    assert sparsedelta.inspect(path).target_bytes == n_elements  # says what it would make
    for use in (
        lambda: sparsedelta.apply(base, path, tmp_path / "out"),
        lambda: sparsedelta.verify(path),
        lambda: sparsedelta.invert(path),
        lambda: sparsedelta.invert(path, base=base),
        lambda: sparsedelta.stack(path),
    ):
        with pytest.raises(LimitExceeded, match="such a file may be an attack"):
            use()
    assert sorted(os.listdir(tmp_path)) == ["base", "delta.sd"]


def test_what_a_person_trusts_may_be_of_any_size(tmp_path: Path) -> None:
    base = write_file(tmp_path / "base.safetensors", {"w": noise("U8", 4)})
    target = write_file(
        tmp_path / "target.safetensors", {"w": Raw("U8", (80 << 20,), bytes(80 << 20))}
    )
    with sparsedelta.diff(base, target) as delta:
        delta.save(tmp_path / "delta.sd")
    with pytest.raises(LimitExceeded):
        sparsedelta.apply(base, tmp_path / "delta.sd", tmp_path / "out.safetensors")
    sparsedelta.apply(base, tmp_path / "delta.sd", tmp_path / "out.safetensors", any_size=True)
    assert (tmp_path / "out.safetensors").read_bytes() == target.read_bytes()
    with sparsedelta.load(tmp_path / "delta.sd", any_size=True) as delta:
        delta.check_output()
