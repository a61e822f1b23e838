"""What lies in a checkpoint's folder and is no part of it: left out, named, and brought back on request."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import noise, write, write_file

import sparsedelta
from sparsedelta.errors import MismatchError
from sparsedelta.files.checkpoint import Checkpoint
from sparsedelta.files.junk import is_part

W = noise("BF16", 40, 30)
TOKEN = "https://user:hf_secret@host/model"

JUNK = {
    ".git/config": TOKEN,
    ".env": "TOKEN=hf_secret",
    ".env.local": "TOKEN=hf_secret",
    ".cache/huggingface/download/config.json.metadata": "x",
    "__pycache__/model.cpython-311.pyc": "x",
    ".ipynb_checkpoints/config-checkpoint.json": "{}",
    ".DS_Store": "x",
    "sub/.DS_Store": "x",
    "config.json~": "{}",
    "runs/events.out": "x",
    "optimizer.pt": "x",
    "training_args.bin": "x",
    "rng_state_0.pth": "x",
    "checkpoint-10/config.json": "{}",
}


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    for name, tensor in (("base", W), ("target", W.changed(0, 3))):
        write_file(tmp_path / name / "model.safetensors", {"w": tensor})
        write(tmp_path / name / "config.json", "{}")
        write(tmp_path / name / "sub" / "vocab.txt", "a")
    return tmp_path / "base", tmp_path / "target"


def litter(folder: Path) -> None:
    for path, content in JUNK.items():
        write(folder / path, content)
    write_file(folder / "checkpoint-10" / "model.safetensors", {"w": W.changed(7)})


def test_junk_is_in_no_delta(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, target = pair
    litter(base)
    litter(target)
    with sparsedelta.diff(base, target) as delta:
        delta.save(tmp_path / "delta.sd")
        assert [row.name for row in delta.tensors] == ["w"]
        assert [file.path for file in delta.target.side_files] == ["config.json", "sub/vocab.txt"]
        assert [file.path for file in delta.target.weight_files] == ["model.safetensors"]
        assert delta.target.empty_folders == ()
    content = (tmp_path / "delta.sd").read_bytes()
    assert b"hf_secret" not in content
    sparsedelta.verify(tmp_path / "delta.sd", base=base, target=target)
    sparsedelta.apply(base, tmp_path / "delta.sd", tmp_path / "out")
    found = {p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*")}
    assert found == {"model.safetensors", "config.json", "sub", "sub/vocab.txt"}


@pytest.mark.parametrize("littered", ["made", "used"])
def test_delta_applies_whatever_litter_the_base_has(
    littered: str, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    base, target = pair
    if littered == "made":
        litter(base)
    sparsedelta.diff(base, target).save(tmp_path / "delta.sd")
    plain = tmp_path / "plain"
    write_file(plain / "model.safetensors", {"w": W})
    write(plain / "config.json", "{}")
    write(plain / "sub" / "vocab.txt", "a")
    if littered == "used":
        litter(plain)
    sparsedelta.apply(plain, tmp_path / "delta.sd", tmp_path / "out")
    sparsedelta.verify(tmp_path / "delta.sd", base=plain, target=target)
    with sparsedelta.invert(tmp_path / "delta.sd", base=plain) as undo:
        assert [file.path for file in undo.target.side_files] == ["config.json", "sub/vocab.txt"]


def test_include_brings_it_back(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, target = pair
    litter(target)
    with sparsedelta.diff(base, target, include=[".env", "checkpoint-*/config.json"]) as delta:
        paths = [file.path for file in delta.target.side_files]
        assert paths == [".env", "checkpoint-10/config.json", "config.json", "sub/vocab.txt"]
        sparsedelta.apply(base, delta, tmp_path / "out")
        sparsedelta.verify(delta, base=base)
    assert (tmp_path / "out" / ".env").read_text() == JUNK[".env"]


def test_empty_folder_that_was_included_is_part_of_the_target(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    base, target = pair
    (target / "runs").mkdir()
    with sparsedelta.diff(base, target, include=["runs"]) as delta:
        assert delta.target.empty_folders == ("runs",)
        sparsedelta.apply(base, delta, tmp_path / "out")
        assert (tmp_path / "out" / "runs").is_dir()
        sparsedelta.verify(delta, base=base, target=tmp_path / "out")
        (tmp_path / "out" / "runs").rmdir()
        with pytest.raises(MismatchError, match="runs"):
            sparsedelta.verify(delta, target=tmp_path / "out")


def test_what_was_left_out_is_named(pair: tuple[Path, Path]) -> None:
    _, target = pair
    litter(target)
    with Checkpoint(target, include=()) as checkpoint:
        assert {path.split("/")[0] for path in checkpoint.left_out} == {
            path.split("/")[0] for path in JUNK
        }
    with Checkpoint(target) as checkpoint:
        assert checkpoint.left_out == ()


@pytest.mark.parametrize(
    "path",
    [
        "config.json",
        ".gitattributes",
        ".gitignore",
        "checkpoint-best.json",
        "environment.yml",
        "run.py",
    ],
)
def test_ordinary_files_are_part_of_it(path: str) -> None:
    assert is_part(())(path)
