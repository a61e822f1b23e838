"""Which base tensor each target tensor is made from: by file and name, name, prefix, content."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from helpers import Raw, Tensors, noise, roundtrip, write_file, write_sharded

from sparsedelta import Delta
from sparsedelta.ops.counterparts import common_prefix

Files = Mapping[str, Tensors]  # by path without the suffix; "" is a lone file
Key = tuple[str, str]

W, V, U = noise("BF16", 6, 5), noise("F32", 9), noise("I64", 4)
X, Y = noise("BF16", 6, 5, seed=1), noise("BF16", 6, 5, seed=2)


def lay_out(path: Path, files: Files) -> Path:
    """Write files as a folder, or a lone file."""
    if "" in files:
        return write_file(path.with_suffix(".safetensors"), files[""])
    for stem, tensors in files.items():
        write_file(path / f"{stem}.safetensors", tensors)
    return path


@pytest.fixture
def made(tmp_path: Path) -> Callable[[Files, Files], dict[Key, Key | None]]:
    """Return a function that diffs two sets of files, and checks that the delta makes the target."""
    (tmp_path / "scratch").mkdir()

    def diff(base: Files, target: Files) -> dict[Key, Key | None]:
        delta = roundtrip(
            lay_out(tmp_path / "base", base),
            lay_out(tmp_path / "target", target),
            tmp_path / "scratch",
        )
        return sources(delta)

    return diff


def sources(delta: Delta) -> dict[Key, Key | None]:
    """Return file and name of each row's base tensor, by those of the row."""
    return {
        _short(row.key): None if row.base is None else _short(row.base.key) for row in delta.tensors
    }


def _short(key: Key) -> Key:
    return key[0].removesuffix(".safetensors"), key[1]


CASES: dict[str, tuple[Files, Files, dict[Key, Key | None]]] = {
    "same file and name": (
        {"a": {"w": W}, "b": {"w": X}},
        {"a": {"w": X}, "b": {"w": W}},  # although the other has the same content
        {("a", "w"): ("a", "w"), ("b", "w"): ("b", "w")},
    ),
    "moved to another shard": (
        {"model-00001-of-00002": {"w": W}, "model-00002-of-00002": {"v": V, "u": U}},
        {
            "model-00001-of-00002": {"w": W.changed(1), "v": V.changed(2)},
            "model-00002-of-00002": {"u": U},
        },
        {
            ("model-00001-of-00002", "w"): ("model-00001-of-00002", "w"),
            ("model-00001-of-00002", "v"): ("model-00002-of-00002", "v"),
            ("model-00002-of-00002", "u"): ("model-00002-of-00002", "u"),
        },
    ),
    "shards to a single file": (
        {"model-00001-of-00002": {"w": W}, "model-00002-of-00002": {"v": V}},
        {"model": {"w": W.changed(1), "v": V.changed(1)}},
        {
            ("model", "w"): ("model-00001-of-00002", "w"),
            ("model", "v"): ("model-00002-of-00002", "v"),
        },
    ),
    "a folder to a lone file": (
        {"model": {"w": W}, "adapter": {"w": V}},
        {"": {"w": W.changed(1)}},
        {("target", "w"): ("model", "w")},
    ),
    "default to variant": (
        {"unet/m": {"w": W}, "vae/m": {"w": X}},
        {"unet/m.fp16": {"w": W.changed(1)}, "vae/m.fp16": {"w": X.changed(1)}},
        {("unet/m.fp16", "w"): ("unet/m", "w"), ("vae/m.fp16", "w"): ("vae/m", "w")},
    ),
    "a variant beside the default": (
        {"unet/m": {"w": W}, "vae/m": {"w": X}},
        {"unet/m": {"w": W}, "unet/m.ema": {"w": W.changed(1)}, "vae/m": {"w": X}},
        {
            ("unet/m", "w"): ("unet/m", "w"),
            ("unet/m.ema", "w"): ("unet/m", "w"),
            ("vae/m", "w"): ("vae/m", "w"),
        },
    ),
    "the variant of the same dtype": (
        {"m": {"w": noise("F32", 3)}, "m.fp16": {"w": noise("F16", 3)}},
        {"m.ema": {"w": noise("F16", 3, seed=1)}},
        {("m.ema", "w"): ("m.fp16", "w")},
    ),
    "another role is another tensor": (
        {"unet/m": {"w": W}, "vae/m": {"v": V}},
        {"unet/m": {"v": V.changed(1)}, "vae/m": {"w": W.changed(1)}},
        {("unet/m", "v"): None, ("vae/m", "w"): None},
    ),
    "one prefix more": (
        {"model": {"a.w": W, "b.w": X, "c.w": Y}},
        {
            "model": {
                "model.a.w": W.changed(1),
                "model.b.w": X.changed(1),
                "model.c.w": Y.changed(1),
            }
        },
        {("model", f"model.{n}.w"): ("model", f"{n}.w") for n in "abc"},
    ),
    "one prefix less, and a head that is new": (
        {"model": {"base.model.a.w": W, "base.model.b.w": X, "head.w": U}},
        {"model": {"a.w": W.changed(1), "b.w": X.changed(1), "score.w": V}},
        {
            ("model", "a.w"): ("model", "base.model.a.w"),
            ("model", "b.w"): ("model", "base.model.b.w"),
            ("model", "score.w"): None,
        },
    ),
    "renamed": (
        {"model": {"old": W, "v": V}},
        {"model": {"new": W, "v": V.changed(3)}},
        {("model", "new"): ("model", "old"), ("model", "v"): ("model", "v")},
    ),
    "moved to another role with the same content": (
        {"unet/m": {"w": W}, "vae/m": {"v": V}},
        {"unet/m": {"v": V}, "vae/m": {"x": W}},
        {("unet/m", "v"): ("vae/m", "v"), ("vae/m", "x"): ("unet/m", "w")},
    ),
    "several of one base tensor": (
        {"model": {"embed": W}},
        {"model": {"embed": W, "lm_head": W, "tied": W}},
        {("model", n): ("model", "embed") for n in ("embed", "lm_head", "tied")},
    ),
    "content of another shape is not looked for": (
        {"model": {"w": W}},
        {"model": {"x": Raw("BF16", (30,), W.data)}},
        {("model", "x"): None},
    ),
    "empty tensors are made from nothing": (
        {"model": {"w": noise("F32", 0)}},
        {"model": {"x": noise("F32", 0)}},
        {("model", "x"): None},
    ),
    "of another dtype nothing is kept, and none is named": (
        {"model": {"w": W}},
        {"model": {"w": noise("F32", 6, 5)}},
        {("model", "w"): None},
    ),
    "names with a colon": (
        {"model": {"m:w": W}, "m": {"w": X}},
        {"model": {"m:w": W.changed(1)}, "m": {"w": X.changed(1)}},
        {("model", "m:w"): ("model", "m:w"), ("m", "w"): ("m", "w")},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_counterparts(name: str, made: Callable[[Files, Files], dict[Key, Key | None]]) -> None:
    base, target, wanted = CASES[name]
    assert made(base, target) == wanted


def test_rows_of_one_base_tensor_change_each_for_itself(tmp_path: Path) -> None:
    base = write_file(tmp_path / "base/m.safetensors", {"w": W, "gone": V}).parent
    for path, tensors in (
        ("m", {"w": W.changed(0)}),
        ("m.ema", {"w": W.changed(1, 9)}),
        ("m.fp16", {"w": Raw("BF16", (7, 5), W.data + bytes(10))}),
    ):
        write_file(tmp_path / f"target/{path}.safetensors", tensors)
    (tmp_path / "scratch").mkdir()
    delta = roundtrip(base, tmp_path / "target", tmp_path / "scratch")
    assert set(sources(delta).values()) == {("m", "w")}
    assert [row.nnz for row in delta.tensors] == [2, 0, 1]
    assert delta.base.n_unused == 1


def test_an_index_tells_what_its_shards_are_for(tmp_path: Path) -> None:
    base = tmp_path / "base"
    write_sharded(base / "unet", [{"w": W}, {"v": V}])
    write_file(base / "vae/model.safetensors", {"w": X, "v": V.changed(8)})
    target = tmp_path / "target"
    write_file(target / "unet/model.safetensors", {"w": W.changed(0), "v": V})
    write_file(target / "vae/model.safetensors", {"w": X, "v": V.changed(9)})
    (tmp_path / "scratch").mkdir()
    delta = roundtrip(base, target, tmp_path / "scratch")
    assert delta.nnz == 2
    assert {row.base.file for row in delta.tensors if row.base} == {
        "unet/model-00001-of-00002.safetensors",
        "unet/model-00002-of-00002.safetensors",
        "vae/model.safetensors",
    }


@pytest.mark.parametrize("prefix", ["model.", "module.", "_orig_mod.", "base_model.model."])
def test_prefix_is_found_on_either_side(prefix: str) -> None:
    names = [f"layers.{i}.w" for i in range(4)]
    longer = [prefix + name for name in names]
    assert common_prefix(longer, names) == (prefix, "")
    assert common_prefix(names, longer) == ("", prefix)


def test_a_prefix_of_few_names_is_none() -> None:
    assert common_prefix(["model.layers.0.w", "x", "y", "z"], ["layers.0.w"]) is None
    assert common_prefix([], ["w"]) is None
    assert common_prefix(["w"], []) is None
    assert common_prefix(["modelw"], ["w"]) is None  # whole parts only
