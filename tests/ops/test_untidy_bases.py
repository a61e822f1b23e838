"""Bases as people have them: in other shards, in a folder below, half downloaded, or a page in place of the file."""

from __future__ import annotations

import shutil
from itertools import product
from pathlib import Path

import pytest
from helpers import Tensors, assert_same_files, noise, write, write_file, write_sharded

import sparsedelta
from sparsedelta.errors import (
    AlreadyApplied,
    BadMagic,
    BaseMismatch,
    CheckpointError,
    ConflictError,
)

A, B, C = noise("BF16", 6, 4), noise("BF16", 6, 5), noise("F32", 9)
BASE: Tensors = {"a": A, "b": B, "c": C}
LAYOUTS = {"one": ["abc"], "two": ["a", "bc"], "others": ["ab", "c"]}
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 123\n"
PAGE = "\n<!DOCTYPE html>\n<html><head>"


def saved(path: Path, tensors: Tensors, layout: str = "one") -> Path:
    shards = [{name: tensors[name] for name in names} for names in LAYOUTS[layout]]
    if len(shards) == 1:
        return write_file(path / "model.safetensors", shards[0]).parent
    return write_sharded(path, shards)


@pytest.fixture
def targets(tmp_path: Path) -> list[Path]:
    """Two targets that change different elements, and one with the changes of both."""
    one = {"a": A.changed(0), "b": B, "c": C.changed(0)}
    two = {"a": A, "b": B.changed(2), "c": C.changed(4)}
    both = {"a": A.changed(0), "b": B.changed(2), "c": C.changed(0, 4)}
    return [saved(tmp_path / f"target{n}", of) for n, of in enumerate((one, two, both))]


@pytest.mark.parametrize(("first", "second"), [*product(LAYOUTS, repeat=2)])
def test_deltas_of_one_base_in_several_layouts(
    tmp_path: Path, targets: list[Path], first: str, second: str
) -> None:
    bases = {layout: saved(tmp_path / layout, BASE, layout) for layout in LAYOUTS}
    with (
        sparsedelta.diff(bases[first], targets[0]) as one,
        sparsedelta.diff(bases[second], targets[1]) as two,
    ):
        for layout, base in bases.items():
            with sparsedelta.stack(one, two, base=base) as both:
                sparsedelta.apply(base, both, tmp_path / f"{layout}-stacked")
            assert_same_files(targets[2], tmp_path / f"{layout}-stacked")
            with sparsedelta.merge(base, one, two, method="task-arithmetic") as merged:
                sparsedelta.apply(base, merged, tmp_path / f"{layout}-merged")
            held = {"a": A.changed(0), "b": B.changed(2), "c": C.changed(0, 4)}
            assert_same_files(
                saved(tmp_path / f"{layout}-held", held, layout), tmp_path / f"{layout}-merged"
            )


def test_merged_targets_in_other_shards(tmp_path: Path) -> None:
    """A target in shards takes the index of its base, which another base need not have."""
    changed = {**BASE, "a": A.changed(0)}
    one, two = saved(tmp_path / "one", BASE), saved(tmp_path / "two", BASE, "two")
    with (
        sparsedelta.diff(two, saved(tmp_path / "tuned", changed, "two")) as delta,
        sparsedelta.merge(one, delta) as merged,
    ):
        sparsedelta.apply(one, merged, tmp_path / "out")
    assert_same_files(saved(tmp_path / "held", changed), tmp_path / "out")


def test_names_in_several_files_are_told_apart(tmp_path: Path) -> None:
    """Where one name is in several files, the file counts: these bases differ."""
    deltas = []
    for name, (u, v) in {"x": (A, C), "y": (C, A)}.items():
        for kind, own in (("base", u), ("target", u.changed(0))):
            write_file(tmp_path / name / kind / "unet" / "model.safetensors", {"w": own})
            write_file(tmp_path / name / kind / "vae" / "model.safetensors", {"w": v})
        deltas.append(sparsedelta.diff(tmp_path / name / "base", tmp_path / name / "target"))
    with pytest.raises(ConflictError, match="made from different bases: tensor 'w'"):
        sparsedelta.merge(tmp_path / "x" / "base", *deltas)


@pytest.mark.parametrize(
    ("layout", "said"),
    [("others", "in other files"), ("order", "in another order"), ("header", "other headers")],
)
def test_siblings_without_a_common_target(
    tmp_path: Path, targets: list[Path], layout: str, said: str
) -> None:
    base, other = saved(tmp_path / "base", BASE), {**BASE, "b": B.changed(2)}
    if layout == "others":
        target = saved(tmp_path / "other", other, "others")
    else:
        order = "bac" if layout == "order" else "abc"
        target = tmp_path / "other"
        meta = {"by": "me"} if layout == "header" else None
        write_file(target / "model.safetensors", {name: other[name] for name in order}, meta)
    with (
        sparsedelta.diff(base, targets[0]) as one,
        sparsedelta.diff(base, target) as two,
        pytest.raises(ConflictError, match=rf"targets of deltas 1 and 2 have .*{said}"),
    ):
        sparsedelta.stack(one, two)


@pytest.mark.parametrize("has_index", [True, False])
def test_a_shard_is_missing_from_the_base(tmp_path: Path, *, has_index: bool) -> None:
    base = saved(tmp_path / "base", BASE, "two")
    delta, part = tmp_path / "delta.sd", tmp_path / "part"
    with sparsedelta.diff(base, saved(tmp_path / "target", {**BASE, "a": A.changed(0)})) as made:
        made.save(delta)
    shutil.copytree(base, part)
    (part / "model-00002-of-00002.safetensors").unlink()
    if not has_index:
        (part / "model.safetensors.index.json").unlink()
    said = "incomplete: download" if has_index else "shard 2 is missing"
    with pytest.raises(CheckpointError, match=said):
        sparsedelta.apply(part, delta, tmp_path / "out")
    with pytest.raises(CheckpointError, match=said):
        sparsedelta.verify(delta, base=part)


@pytest.mark.parametrize(("content", "said"), [(POINTER, "git lfs pull"), (PAGE, "a web page")])
def test_what_stands_in_place_of_a_file_is_named(tmp_path: Path, content: str, said: str) -> None:
    base = saved(tmp_path / "base", BASE)
    delta, weights = (
        write(tmp_path / "delta.sd", content),
        write(tmp_path / "m.safetensors", content),
    )
    for work in (
        lambda: sparsedelta.load(delta),
        lambda: sparsedelta.apply(base, delta, tmp_path / "out"),
        lambda: sparsedelta.stack(delta),
    ):
        with pytest.raises(BadMagic, match=said):
            work()
    with pytest.raises(CheckpointError, match=said):
        sparsedelta.diff(weights, base)


def test_the_folder_above_the_base(tmp_path: Path) -> None:
    base = saved(tmp_path / "above" / "base", BASE)
    write(base / "config.json", "{}")
    target = saved(tmp_path / "target", {**BASE, "a": A.changed(0)})
    write(target / "config.json", "{}")
    with (
        sparsedelta.diff(base, target) as delta,
        pytest.raises(BaseMismatch, match=r"such as 'config\.json', are in '.*above/base'; give"),
    ):
        sparsedelta.apply(base.parent, delta, tmp_path / "out")


def test_the_folder_of_a_training(tmp_path: Path) -> None:
    for step in (4, 12):
        saved(tmp_path / "run" / f"checkpoint-{step}", BASE)
    base = saved(tmp_path / "base", BASE)
    with pytest.raises(
        CheckpointError, match=r"checkpoints of a training; .*'.*run/checkpoint-12'"
    ):
        sparsedelta.diff(base, tmp_path / "run")


def test_another_model_of_the_same_shapes_with_another_configuration(tmp_path: Path) -> None:
    """That its tensors differ says more than that a file does."""
    base, other = (
        saved(tmp_path / "base", BASE),
        saved(tmp_path / "other", {**BASE, "a": A.changed(2), "b": B.changed(0)}),
    )
    write(base / "config.json", "{}")
    write(other / "config.json", '{"other": true}')
    target = saved(tmp_path / "target", {**BASE, "a": A.changed(0)})
    write(target / "config.json", "{}")
    with (
        sparsedelta.diff(base, target) as delta,
        pytest.raises(
            BaseMismatch, match=r"config\.json' differs .*; besides: 2 of 3 tensors differ, as in"
        ),
    ):
        sparsedelta.apply(other, delta, tmp_path / "out")


def test_the_tensors_of_the_target_without_its_files(tmp_path: Path) -> None:
    base = saved(tmp_path / "base", BASE)
    target = saved(tmp_path / "target", {**BASE, "a": A.changed(0)})
    write(target / "tokenizer.json", "{}")
    with sparsedelta.diff(base, target) as delta:
        with pytest.raises(AlreadyApplied, match="is this delta's target, not its base; there is"):
            sparsedelta.apply(target, delta, tmp_path / "out")
        write(target / "tokenizer.json", "[]")
        with pytest.raises(AlreadyApplied, match=r"but another file 'tokenizer\.json'; apply"):
            sparsedelta.apply(target, delta, tmp_path / "out")
