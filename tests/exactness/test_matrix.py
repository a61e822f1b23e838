"""Exact, for every input: diff, save, load, apply leaves the target byte for byte and the base alone."""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import (
    BITS,
    UNKNOWN_BITS,
    Raw,
    Spell,
    Tensors,
    assert_same_files,
    compact,
    file_bytes,
    header_fields,
    noise,
    of_array,
    roundtrip,
    small_chunks,
    state,
    write,
    write_file,
    write_sharded,
)

import sparsedelta
from sparsedelta.errors import CheckpointError

each_encoding = pytest.mark.parametrize("values", ["ulp", "target"])
BOTH_WAYS = pytest.mark.parametrize("forth", [True, False], ids=["forth", "back"])

W = noise("BF16", 40, 3)
V = noise("F32", 7)
U = noise("I64", 2, 2)
BASE = {"w": W, "v": V, "u": U}
CHANGED = {"w": W.changed(0, 100, 239), "v": V, "u": U.changed(8)}

Layout = Callable[[Path, Tensors], Path]


def shards(*numbers: int) -> Layout:
    """Return a layout that puts the i-th tensor into the shard of that number."""

    def lay_out(path: Path, tensors: Tensors) -> Path:
        parts: list[dict[str, Raw]] = [{} for _ in range(max(numbers) + 1)]
        for number, (name, tensor) in zip(numbers, tensors.items(), strict=True):
            parts[number][name] = tensor
        return write_sharded(path, parts)

    return lay_out


def single(path: Path, tensors: Tensors) -> Path:
    return write_file(path, tensors, {"format": "pt"})


def in_folder(path: Path, tensors: Tensors) -> Path:
    write_file(path / "model.safetensors", tensors, {"format": "pt"})
    return path


def reversed_in_folder(path: Path, tensors: Tensors) -> Path:
    return in_folder(path, dict(reversed(list(tensors.items()))))


LAYOUTS = {
    "file": single,
    "folder": in_folder,
    "reversed": reversed_in_folder,
    "two shards": shards(0, 0, 1),
    "two other shards": shards(1, 0, 0),
    "three shards": shards(0, 1, 2),
    "an empty shard": shards(0, 2, 2),
}


@each_encoding
@pytest.mark.parametrize(("old", "new"), list(itertools.product(LAYOUTS, LAYOUTS)))
def test_layouts(old: str, new: str, values: str, tmp_path: Path) -> None:
    base = LAYOUTS[old](tmp_path / "base", BASE)
    target = LAYOUTS[new](tmp_path / "target", CHANGED)
    (tmp_path / "scratch").mkdir()
    delta = roundtrip(base, target, tmp_path / "scratch", values=values)
    # However the files are cut, only what changed is stored.
    assert {row.name for row in delta.tensors if not row.is_copied} == {"w", "u"}
    assert delta.nnz == 4


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    (tmp_path / "scratch").mkdir()
    return tmp_path / "scratch"


def check(
    tmp_path: Path, base: Tensors | bytes, target: Tensors | bytes, **options: Any
) -> sparsedelta.Delta:
    """Check that a single file can be made of another; return the delta."""
    scratch = tmp_path / "scratch"
    scratch.mkdir(exist_ok=True)
    for name, content in (("base", base), ("target", target)):
        raw = content if isinstance(content, bytes) else file_bytes(content)
        write(tmp_path / name, raw)
    return roundtrip(tmp_path / "base", tmp_path / "target", scratch, **options)


METADATA: list[dict[str, str] | None] = [
    None,
    {},
    {"format": "pt"},
    {"format": "pt", "é\n": '"\\\x00\U0001f642'},
    {"z": "", "a": "", "m": "x" * 100_000},
]


@pytest.mark.parametrize(("old", "new"), list(itertools.permutations(range(len(METADATA)), 2)))
def test_other_metadata(old: int, new: int, tmp_path: Path) -> None:
    base, target = file_bytes(BASE, METADATA[old]), file_bytes(CHANGED, METADATA[new])
    delta = check(tmp_path, base, target)
    assert not any(file.stored for file in delta.target.weight_files)


def pretty(fields: dict[str, Any]) -> bytes:
    return json.dumps(fields, indent=4).encode()


def padded(fields: dict[str, Any]) -> bytes:
    return compact(fields) + b" " * 1000


def unaligned(fields: dict[str, Any]) -> bytes:
    raw = compact(fields).rstrip()
    return raw + b" " * (len(raw) % 2 == 0)


def escaped(fields: dict[str, Any]) -> bytes:
    raw = compact(fields).replace(b'"w"', b'"\\u0077"')
    return raw.replace(b"BF16", b"\\u0042F16").replace(b"/", b"\\/")


def metadata_last(fields: dict[str, Any]) -> bytes:
    return compact(dict(reversed(fields.items())))


def null_metadata(fields: dict[str, Any]) -> bytes:
    return compact(fields | {"__metadata__": None})


def members_turned(fields: dict[str, Any]) -> bytes:
    turned = {
        name: dict(reversed(f.items())) if name != "__metadata__" else f
        for name, f in fields.items()
    }
    return compact(turned)


def further_members(fields: dict[str, Any]) -> bytes:
    fields["w"]["comment"] = {"nested": [1.5, None, {"deep": True}]}
    return compact(fields)


SPELLINGS: list[Spell] = [
    compact,
    pretty,
    padded,
    unaligned,
    escaped,
    metadata_last,
    members_turned,
]


@pytest.mark.parametrize("spell", SPELLINGS, ids=lambda spell: spell.__name__)
@BOTH_WAYS
def test_header_spelling(spell: Spell, forth: bool, tmp_path: Path) -> None:
    usual = file_bytes(BASE, {"format": "pt"})
    unusual = file_bytes(CHANGED, {"format": "pt"}, spell=spell)
    delta = check(tmp_path, *((usual, unusual) if forth else (unusual, usual)))
    (file,) = delta.target.weight_files
    assert (file.stored is not None) == (forth and spell is not compact)


@pytest.mark.parametrize("spell", SPELLINGS, ids=lambda spell: spell.__name__)
def test_unchanged_file_with_any_spelling(spell: Spell, tmp_path: Path) -> None:
    same = file_bytes(BASE, {"format": "pt"}, spell=spell)
    assert all(row.is_copied for row in check(tmp_path, same, same).tensors)


def test_further_members_of_a_header(tmp_path: Path) -> None:
    """A base may have them; of a target they would have to be described."""
    for spell in (further_members, null_metadata):
        further = write(tmp_path / "further", file_bytes(BASE, spell=spell))
        check(tmp_path, further.read_bytes(), file_bytes(CHANGED))
        with pytest.raises(CheckpointError, match="members other than dtype"):
            sparsedelta.diff(further, further)
        shutil.rmtree(tmp_path / "scratch")


def test_tensors_of_no_bytes_share_an_offset(tmp_path: Path) -> None:
    empty = {name: noise("F32", 0, n) for n, name in enumerate("zyx")}
    base = {"w": W, **empty, "v": V}
    target = {"v": V, **dict(reversed(empty.items())), "w": W}
    check(tmp_path, base, target)
    shutil.rmtree(tmp_path / "scratch")
    check(tmp_path, file_bytes(base, spell=metadata_last), file_bytes(target, spell=pretty))


@BOTH_WAYS
@pytest.mark.parametrize("spell", [compact, pretty])
def test_tensors_of_no_bytes_in_several_files(
    spell: Spell, forth: bool, tmp_path: Path, scratch: Path
) -> None:
    names = ["w", "m:w", "x:m:w"] if forth else ["x:m:w", "m:w", "w"]
    empty = dict.fromkeys(names, noise("F32", 0))
    for root, tensors in (("base", {"v": V}), ("target", {"v": V, **empty})):
        write_file(tmp_path / root / "model.safetensors", {"v": V, "w": V}, spell=spell)
        write_file(tmp_path / root / "x.safetensors", tensors, spell=spell)
    roundtrip(tmp_path / "base", tmp_path / "target", scratch)
    with sparsedelta.load(scratch / "delta.sd") as delta:
        sparsedelta.verify(delta)


@each_encoding
@pytest.mark.parametrize("dtype", [*BITS, *UNKNOWN_BITS])
def test_every_dtype(dtype: str, values: str, tmp_path: Path) -> None:
    before = noise(dtype, 64, 8)
    few = before.changed(0, len(before.data) // 2, len(before.data) - 1)
    for after in (before, few, noise(dtype, 64, 8, seed="other")):
        shutil.rmtree(tmp_path / "scratch", ignore_errors=True)
        check(tmp_path, {"t": before, "kept": V}, {"t": after, "kept": V}, values=values)


FLOATS = {
    "F16": (
        "<u2",
        [0x0000, 0x8000, 0x0001, 0x8001, 0x03FF, 0x7C00, 0xFC00, 0x7C01, 0x7E00, 0xFFFF],
    ),
    "BF16": ("<u2", [0x0000, 0x8000, 0x0001, 0x807F, 0x7F80, 0xFF80, 0x7F81, 0x7FC0, 0xFFFF]),
    "F32": ("<u4", [0, 1 << 31, 1, 0x807FFFFF, 0x7F800000, 0xFF800000, 0x7F800001, 0x7FC01234]),
    "F64": ("<u8", [0, 1 << 63, 1, (1 << 63) + 1, 0x7FF << 52, 0xFFF << 52, (0x7FF << 52) + 1]),
    "C64": ("<u8", [0, 1 << 63, 1 << 31, 0x7F800001_7F800001, 0xFF800000_80000000]),
    "F8_E4M3": ("u1", list(range(256))),
    "F8_E5M2": ("u1", list(range(256))),
    "F8_E4M3FNUZ": ("u1", list(range(256))),
    "F8_E8M0": ("u1", list(range(256))),
}


@each_encoding
@pytest.mark.parametrize("dtype", FLOATS)
def test_special_values_become_each_other(dtype: str, values: str, tmp_path: Path) -> None:
    view, bits = FLOATS[dtype]
    before, after = np.meshgrid(np.array(bits, view), np.array(bits, view))
    base, target = of_array(dtype, before), of_array(dtype, after)
    delta = check(tmp_path, {"t": base}, {"t": target}, values=values)
    # What differs in bits only (0 and -0, two NaNs) is changed; what is the same NaN is not.
    assert delta.nnz == len(bits) ** 2 - len(bits)


@pytest.mark.parametrize(
    ("before", "after"),
    [(0.0, -0.0), (math.nan, -math.nan), (1.0, math.nan), (math.inf, -math.inf), (5e-324, 0.0)],
)
def test_one_special_value(before: float, after: float, tmp_path: Path) -> None:
    base, target = (Raw("F64", (), struct.pack("<d", x)) for x in (before, after))
    assert check(tmp_path, {"x": base}, {"x": target}).nnz == 1


NONE: dict[str, Raw] = {}
STRUCTURE: dict[str, tuple[Tensors, Tensors]] = {
    "added": ({"v": V}, {"v": V, "w": W}),
    "all added": (NONE, BASE),
    "two files without tensors": (NONE, NONE),
    "retyped": ({"w": W}, {"w": Raw("F16", W.shape, W.data)}),
    "retyped, other width": ({"w": W}, {"w": Raw("F32", (20, 3), W.data)}),
    "reshaped": ({"w": W}, {"w": Raw("BF16", (3, 40), W.data)}),
    "reshaped and changed": ({"w": W}, {"w": Raw("BF16", (120,), W.changed(7).data)}),
    "grown": ({"w": W}, {"w": Raw("BF16", (41, 3), W.data + b"123456")}),
    "grown by zeros": ({"w": W}, {"w": Raw("BF16", (41, 3), W.data + bytes(6))}),
    "grown and changed": ({"w": W}, {"w": Raw("BF16", (41, 3), W.changed(9).data + b"123456")}),
    "grown in another dimension": ({"w": W}, {"w": noise("BF16", 40, 4)}),
    "0-d becomes 1-d": ({"x": noise("F32")}, {"x": Raw("F32", (1,), noise("F32").data)}),
    "0-d changed": ({"x": noise("F32")}, {"x": noise("F32").changed(1)}),
    "0-d becomes empty": ({"x": noise("F32")}, {"x": noise("F32", 0)}),
    "empty added": ({"v": V}, {"v": V, "e": noise("F32", 0)}),
    "empty of other shape": ({"e": noise("F32", 0, 3)}, {"e": noise("F32", 5, 0)}),
    "empty retyped": ({"e": noise("F32", 0)}, {"e": noise("I8", 0)}),
    "empty becomes full": ({"e": noise("F32", 0, 3)}, {"e": noise("F32", 2, 3)}),
    "zeros added": ({"v": V}, {"v": V, "z": Raw("F32", (9,), bytes(36))}),
    "zeros become ones": ({"z": Raw("U8", (9,), bytes(9))}, {"z": Raw("U8", (9,), b"\1" * 9)}),
    "sub-byte resized": ({"f": noise("F4", 6, 8)}, {"f": noise("F4", 7, 8)}),
    "sub-byte reshaped": (
        {"f": noise("F6_E2M3", 4, 3)},
        {"f": Raw("F6_E2M3", (12,), noise("F6_E2M3", 4, 3).data)},
    ),
    "names swapped": ({"w": W, "v": W.changed(1)}, {"w": W.changed(1), "v": W}),
    "everything at once": (
        {"gone": U, "w": W, "v": V, "shape": U},
        {"new": U, "v": V.changed(3), "w": noise("F64", 3), "shape": Raw("I64", (4,), U.data)},
    ),
    "64 dimensions": ({"d": noise("U8", *[1] * 64)}, {"d": noise("U8", *[1] * 63, 2)}),
}


@each_encoding
@BOTH_WAYS
@pytest.mark.parametrize("name", STRUCTURE)
def test_structure(name: str, forth: bool, values: str, tmp_path: Path) -> None:
    one, other = STRUCTURE[name]
    check(tmp_path, *((one, other) if forth else (other, one)), values=values)


def test_grown_tensor_keeps_its_rows(tmp_path: Path) -> None:
    base, target = STRUCTURE["grown and changed"]
    (row,) = check(tmp_path, base, target).tensors
    assert (row.keep, row.nnz) == (120, 4)


def test_nothing_changed(tmp_path: Path) -> None:
    delta = check(tmp_path, BASE, BASE)
    assert delta.nnz == 0
    assert all(row.is_copied for row in delta.tensors)


@each_encoding
def test_everything_changed(values: str, tmp_path: Path) -> None:
    inverted = {
        name: t.with_data(bytes(byte ^ 0xFF for byte in t.data)) for name, t in BASE.items()
    }
    delta = check(tmp_path, BASE, inverted, values=values)
    assert delta.nnz == delta.numel == 40 * 3 + 7 + 4


def test_delta_no_smaller_than_its_target(tmp_path: Path) -> None:
    base, target = ({"w": noise("U8", 50_000, seed=seed)} for seed in (1, 2))
    delta = check(tmp_path, base, target)
    n_target = (tmp_path / "target").stat().st_size
    assert (tmp_path / "scratch/delta.sd").stat().st_size > n_target
    assert delta.nnz > 0.99 * delta.numel


NAMES = [
    "",
    " ",
    ".",
    "..",
    "/",
    "a/b/../c",
    "../../etc/passwd",
    "model.layers.0.weight",
    "é",
    "e\u0301",
    "名前\U0001f642",
    "\u202eright-to-left",
    "\ufeffbom",
    "\x00",
    "\x00\x01\x1f\x7f\x80",
    "new\nline\ttab\r",
    '"quoted\\"',
    "\\u0041",
    "\u2028\u2029",
    "x" * 1024,
    "\U0001f642" * 256,
    "manifest",
    "payload",
    "__manifest__",
    "__metadata",
    "__METADATA__",
    "x",
    ":x",
    "a:b",
    "null",
    "C:\\windows",
]


@pytest.mark.parametrize("name", NAMES, ids=lambda name: ascii(name)[:40])
def test_name(name: str, tmp_path: Path) -> None:
    (row,) = check(tmp_path, {name: W}, {name: W.changed(5)}).tensors
    assert row.name == name


@BOTH_WAYS
def test_all_names_at_once(forth: bool, tmp_path: Path) -> None:
    base = {name: noise("U8", 9, seed=name) for name in NAMES}
    target = {name: tensor.changed(4) for name, tensor in reversed(base.items())}
    half = dict(list(target.items())[::2])
    check(tmp_path, *((base, target) if forth else (base, half)))


def test_all_names_in_a_folder(tmp_path: Path, scratch: Path) -> None:
    base = {name: noise("U8", 9, seed=name) for name in NAMES}
    target = {name: tensor.changed(4) for name, tensor in base.items()}
    names = list(NAMES)
    write_sharded(tmp_path / "base", [base])
    parts = [{n: target[n] for n in names[::2]}, {n: target[n] for n in names[1::2]}]
    write_sharded(tmp_path / "target", parts)
    write(tmp_path / "target/config.json", "{}")
    roundtrip(tmp_path / "base", tmp_path / "target", scratch)


def test_name_that_is_too_long(tmp_path: Path) -> None:
    name = "n" * 1025
    base, target = (write_file(tmp_path / f"{n}", {name: W.changed(n)}) for n in (0, 1))
    with (
        sparsedelta.diff(base, target) as delta,
        pytest.raises(sparsedelta.SparseDeltaError, match="1025 bytes of the name"),
    ):
        delta.save(tmp_path / "delta.sd")
    assert not (tmp_path / "delta.sd").exists()


SIDE: dict[str, tuple[dict[str, str | bytes], dict[str, str | bytes]]] = {
    "changed": ({"config.json": "1"}, {"config.json": "2"}),
    "added": ({}, {"config.json": "{}", "tokenizer/vocab.txt": "x\ny"}),
    "same": ({"config.json": "1", "a/b/c": "x"}, {"config.json": "1", "a/b/c": "x"}),
    "emptied": ({"config.json": "1"}, {"config.json": ""}),
    "moved": ({"a/vocab.txt": "x"}, {"b/vocab.txt": "x"}),
    "file becomes folder": ({"a": "x"}, {"a/b": "x"}),
    "names that sort oddly": ({}, {"a": "1", "a-": "2", "a.b/c": "3", "a0": "4", "é/é": "5"}),
    "hidden": ({}, {".gitattributes": "x", ".config/x": "y"}),
    "long": ({}, {"/".join(["d" * 200] * 4) + "/" + "f" * 255: "x"}),
    "binary": ({"tokenizer.model": bytes(range(256)) * 99}, {"tokenizer.model": b"\0" * 70_000}),
    "weights that are the base's": ({"old.bin": "x" * 99}, {"old.bin": "x" * 99}),
    "a delta": ({}, {"delta.sd": "x", "model.safetensors.bak": "y"}),
}


@BOTH_WAYS
@pytest.mark.parametrize("name", SIDE)
def test_side_files(name: str, forth: bool, tmp_path: Path, scratch: Path) -> None:
    pair = SIDE[name] if forth else SIDE[name][::-1]
    for root, tensors, files in zip(("base", "target"), (BASE, CHANGED), pair, strict=True):
        in_folder(tmp_path / root, tensors)
        for path, content in files.items():
            write(tmp_path / root / path, content)
    roundtrip(tmp_path / "base", tmp_path / "target", scratch)


def test_carried_is_only_what_the_base_lacks(tmp_path: Path, scratch: Path) -> None:
    for root, vocabulary in (("base", "x"), ("target", "y")):
        in_folder(tmp_path / root, BASE)
        write(tmp_path / root / "config.json", "{}")
        write(tmp_path / root / "vocab.txt", vocabulary)
    delta = roundtrip(tmp_path / "base", tmp_path / "target", scratch)
    assert {file.path: file.stored is not None for file in delta.target.side_files} == {
        "config.json": False,
        "vocab.txt": True,
    }


@BOTH_WAYS
def test_empty_folders(forth: bool, tmp_path: Path, scratch: Path) -> None:
    for root in ("base", "target"):
        in_folder(tmp_path / root, BASE)
    folders = ["empty", "a/b/c", "a/b-", "é"]
    for folder in folders:
        (tmp_path / ("target" if forth else "base") / folder).mkdir(parents=True)
    delta = roundtrip(tmp_path / "base", tmp_path / "target", scratch)
    wanted = sorted(folders, key=os.fsencode) if forth else []
    assert list(delta.target.empty_folders) == wanted


def test_index_with_other_spelling_and_members(tmp_path: Path, scratch: Path) -> None:
    for root, tensors in (("base", BASE), ("target", CHANGED)):
        shards(0, 0, 1)(tmp_path / root, tensors)
    index = tmp_path / "target/model.safetensors.index.json"
    content = json.loads(index.read_bytes())
    content["metadata"] = {"total_size": 1.5, "note": "é"}
    write(index, json.dumps(content, indent=7, sort_keys=True))
    roundtrip(tmp_path / "base", tmp_path / "target", scratch)


@each_encoding
def test_linked_files(values: str, tmp_path: Path, scratch: Path) -> None:
    """A Hub cache: snapshots of links into a folder of blobs."""
    for root, tensors in (("base", BASE), ("target", CHANGED)):
        plain = shards(0, 1, 0)(tmp_path / "plain" / root, tensors)
        write(plain / "sub/config.json", root)
        for n, path in enumerate(p for p in plain.rglob("*") if p.is_file()):
            blob = tmp_path / "blobs" / f"{root}{n}"
            blob.parent.mkdir(exist_ok=True)
            shutil.copy(path, blob)
            link = tmp_path / "snapshots" / root / path.relative_to(plain)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(blob, link.parent))
    before = state(tmp_path / "blobs")
    roundtrip(tmp_path / "snapshots/base", tmp_path / "snapshots/target", scratch, values=values)
    assert_same_files(tmp_path / "plain/target", scratch / "out")
    assert state(tmp_path / "blobs") == before


def test_linked_single_file(tmp_path: Path, scratch: Path) -> None:
    for root, tensors in (("base", BASE), ("target", CHANGED)):
        write_file(tmp_path / f"{root}-blob", tensors)
        (tmp_path / root).symlink_to(f"{root}-blob")
    roundtrip(tmp_path / "base", tmp_path / "target", scratch)


def diffusers(root: Path, tensors: Tensors) -> Path:
    write_file(root / "unet/diffusion_pytorch_model.safetensors", tensors, {"format": "pt"})
    write_file(root / "vae/diffusion_pytorch_model.safetensors", {"w": V, "v": W})
    write_sharded(root / "text_encoder", [{"w": tensors["u"]}, {"x": V}])
    write(root / "model_index.json", "{}")
    write(root / "unet/config.json", "{}")
    (root / "feature_extractor").mkdir()
    return root


def test_several_models_in_a_folder(tmp_path: Path, scratch: Path) -> None:
    base, target = (
        diffusers(tmp_path / root, tensors)
        for root, tensors in (("base", BASE), ("target", CHANGED))
    )
    delta = roundtrip(base, target, scratch)
    assert {row.key for row in delta.tensors if not row.is_copied} == {
        ("text_encoder/model-00001-of-00002.safetensors", "w"),
        ("unet/diffusion_pytorch_model.safetensors", "u"),
        ("unet/diffusion_pytorch_model.safetensors", "w"),
    }
    assert all(row.base and row.base.key == row.key for row in delta.tensors)


@pytest.mark.parametrize("spell", [compact, pretty])
def test_files_come_and_go(spell: Spell, tmp_path: Path, scratch: Path) -> None:
    for root, stems in (("base", "abc"), ("target", "bcd")):
        for stem in stems:
            tensors = {"w": W if root == "base" else W.changed(ord(stem) % 9), "v": V}
            write_file(tmp_path / root / f"{stem}.safetensors", tensors, spell=spell)
    roundtrip(tmp_path / "base", tmp_path / "target", scratch)


@BOTH_WAYS
def test_files_of_other_names(forth: bool, tmp_path: Path, scratch: Path) -> None:
    write_file(tmp_path / "one/adapter_model.safetensors", BASE)
    write_file(tmp_path / "two/adapter_model.safetensors", CHANGED)
    write_file(tmp_path / "two/other.safetensors", {"v": U, "a:b": U})
    old, new = ("one", "two") if forth else ("two", "one")
    roundtrip(tmp_path / old, tmp_path / new, scratch)


def test_shards_beside_others_that_their_index_does_not_name(tmp_path: Path, scratch: Path) -> None:
    for root, tensors in (("base", BASE), ("target", CHANGED)):
        write_sharded(tmp_path / root, [tensors, {}], stem="weights")
    roundtrip(tmp_path / "base", tmp_path / "target", scratch)


def test_file_in_a_folder_becomes_a_file(tmp_path: Path, scratch: Path) -> None:
    base = diffusers(tmp_path / "base", BASE)
    target = single(tmp_path / "target", CHANGED)
    roundtrip(base, target, scratch)
    shutil.rmtree(scratch)
    scratch.mkdir()
    roundtrip(target, base, scratch)


@each_encoding
@pytest.mark.parametrize("dtype", ["U8", "BF16"])
def test_chunk_edges(
    dtype: str, values: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Positions around the end of a chunk, and a chunk in which all changes."""
    chunk, width = 1 << 10, BITS[dtype] // 8
    small_chunks(monkeypatch, chunk, 256)
    before = np.arange(2 * chunk + 3).astype(f"<u{width}")
    after = before.copy()
    edges = [0, chunk - 1, 2 * chunk - 1, 2 * chunk, 2 * chunk + 2]
    after[edges] += 1
    base, target = ({"w": of_array(dtype, array)} for array in (before, after))
    delta = check(tmp_path, base, target, values=values)
    chunks = delta.tensors[0].chunks
    assert [(c.start, c.span, c.nnz) for c in chunks] == [
        (0, chunk, 2),
        (chunk, chunk, 1),
        (2 * chunk, 3, 2),
    ]
    shutil.rmtree(tmp_path / "scratch")
    after[:chunk] += 1
    delta = check(tmp_path, base, {"w": of_array(dtype, after)}, values=values)
    first = delta.tensors[0].chunks[0]
    assert (first.nnz, first.coding.index, first.stored[0]) == (chunk, "rice", 2)


def test_chunks_are_of_the_largest_span(tmp_path: Path) -> None:
    n = (1 << 24) + 3
    before = np.zeros(n, "u1")
    after = before.copy()
    after[[(1 << 24) - 1, 1 << 24, n - 1]] = 1
    base, target = ({"w": of_array("U8", array)} for array in (before, after))
    (row,) = check(tmp_path, base, target).tensors
    assert [(c.start, c.span, c.nnz) for c in row.chunks] == [(0, 1 << 24, 1), (1 << 24, 3, 2)]


def test_canonical_headers_need_no_storing(tmp_path: Path) -> None:
    assert header_fields({}) == {}
    delta = check(tmp_path, file_bytes({}), file_bytes(BASE, {"format": "pt"}))
    assert [file.stored for file in delta.target.weight_files] == [None]
