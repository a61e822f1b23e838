"""Checkpoints are read as people have them; what is doubtful about one is said, with a way out."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from helpers import (
    BITS,
    UNKNOWN_BITS,
    Raw,
    compact,
    file_bytes,
    header_fields,
    noise,
    with_header,
    write,
    write_file,
    write_sharded,
)

from sparsedelta.errors import CheckpointError
from sparsedelta.files import junk
from sparsedelta.files.checkpoint import Checkpoint, Tensor
from sparsedelta.files.shards import roles

W = noise("BF16", 2, 3)
V = noise("F32", 5)


def content(tensor: Tensor) -> bytes:
    buffer = bytearray(tensor.spec.n_bytes)
    tensor.read_into(memoryview(buffer), 0)
    return bytes(buffer)


def read(path: Path, **options: Any) -> dict[str, Raw]:
    """Return the tensors of a checkpoint by name, in their order."""
    with Checkpoint(path, **options) as checkpoint:
        tensors = checkpoint.tensors.values()
        assert [t.key for t in tensors] == list(checkpoint.tensors)
        return {t.name: Raw(t.spec.dtype.name, t.spec.shape, content(t)) for t in tensors}


def assert_refused(path: Path, problem: str) -> None:
    n_open = len(os.listdir("/dev/fd"))
    with pytest.raises(CheckpointError, match=problem):
        Checkpoint(path)
    assert len(os.listdir("/dev/fd")) == n_open


def test_single_file(tmp_path: Path) -> None:
    path = write_file(tmp_path / "any name", {"w": W, "v": V}, {"format": "pt"})
    with Checkpoint(path) as checkpoint:
        assert not checkpoint.is_folder
        assert checkpoint.tensor_bytes == 32
        (file,) = checkpoint.weight_files
        assert file.path == "any name"
        assert file.header.metadata == {"format": "pt"}
        assert with_header(file.raw_header, W.data + V.data) == path.read_bytes()
        assert checkpoint.tensors["any name", "w"].spec.n_elements == 6
        part = bytearray(4)
        checkpoint.tensors["any name", "v"].read_into(memoryview(part), 3)
        assert part == V.data[3:7]
    assert read(path) == {"w": W, "v": V}


def test_every_dtype(tmp_path: Path) -> None:
    tensors = {name: noise(name, 8, 1) for name in [*BITS, *UNKNOWN_BITS]}
    tensors["empty"] = noise("X24", 0, 3)
    assert read(write_file(tmp_path / "f", tensors)) == tensors
    with Checkpoint(tmp_path / "f") as checkpoint:
        dtypes = {name: checkpoint.tensors["f", name].spec.dtype for name in UNKNOWN_BITS}
    assert {name: dtype.bits for name, dtype in dtypes.items()} == UNKNOWN_BITS
    assert {dtype.element for dtype in dtypes.values()} == {"i1"}


def test_tensors_come_in_the_order_of_the_data(tmp_path: Path) -> None:
    def backwards(fields: dict[str, Any]) -> bytes:
        return compact(dict(reversed(fields.items())))

    tensors = {"w": W, "v": V, "u": W}
    assert list(read(write_file(tmp_path / "f", tensors, spell=backwards))) == ["w", "v", "u"]


def test_folder(tmp_path: Path) -> None:
    write_sharded(tmp_path, [{"w": W}, {"v": V}])
    write(tmp_path / "config.json", "{}")
    write(tmp_path / "é/vocab.txt", "x")
    (tmp_path / "empty/inner").mkdir(parents=True)
    with Checkpoint(tmp_path) as checkpoint:
        assert checkpoint.is_folder
        assert [file.path for file in checkpoint.weight_files] == [
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
        ]
        assert list(checkpoint.side_files) == [
            "config.json",
            "model.safetensors.index.json",
            "é/vocab.txt",
        ]
        assert checkpoint.empty_folders == ("empty/inner",)
        assert set(checkpoint.roles.values()) == {"model"}
    assert read(tmp_path) == {"w": W, "v": V}


ROLES = {
    "model.safetensors": "model",
    "model.fp16.safetensors": "model",
    "model.fp16-00001-of-00002.safetensors": "model",
    "model-00001-of-00002.safetensors": "model",
    "model-00001-of-00002.fp16.safetensors": "model",
    "unet/model.safetensors": "unet/model",
    "unet.v1/model.non_ema.safetensors": "unet.v1/model",
    "adapter_model.safetensors": "adapter_model",
    "model-1-of-2.safetensors": "model-1-of-2",
    "model_00001-of-00002.safetensors": "model_00001-of-00002",
}


@pytest.mark.parametrize(("path", "role"), ROLES.items())
def test_roles(path: str, role: str) -> None:
    assert roles([path], {}) == {path: role}


def test_an_index_gives_its_shards_its_role(tmp_path: Path) -> None:
    paths = ["x/a.safetensors", "x/b.safetensors", "x/c.safetensors"]
    indexes = {"x/model.fp16.safetensors.index.json": paths[:2]}
    assert roles(paths, indexes) == dict(zip(paths, ["x/model", "x/model", "x/c"], strict=True))
    for path, tensors in zip(paths, ({"w": W}, {"v": V}, {"w": W}), strict=True):
        write_file(tmp_path / path, tensors)
    weight_map = {"w": "a.safetensors", "v": "b.safetensors"}
    write(tmp_path / next(iter(indexes)), json.dumps({"weight_map": weight_map}))
    with Checkpoint(tmp_path) as checkpoint:
        assert checkpoint.roles == roles(paths, indexes)


@pytest.mark.parametrize("sharded", [False, True])
def test_files_may_have_tensors_of_the_same_name(sharded: bool, tmp_path: Path) -> None:
    for stem in ("model", "unet/model", "model.fp16"):
        if sharded:
            write_sharded(tmp_path, [{"w": W, "x:v": W}], stem=stem)
        else:
            write_file(tmp_path / f"{stem}.safetensors", {"w": W, "x:v": W})
    with Checkpoint(tmp_path) as checkpoint:
        assert len(checkpoint.tensors) == 6
        assert {name for _, name in checkpoint.tensors} == {"w", "x:v"}
        assert all(tensor.spec.shape == (2, 3) for tensor in checkpoint.tensors.values())


def test_shards_without_an_index(tmp_path: Path) -> None:
    write_sharded(tmp_path, [{"w": W}, {"v": V}], stem="weights", index=False)
    assert list(read(tmp_path)) == ["w", "v"]
    (tmp_path / "weights-00001-of-00002.safetensors").unlink()
    assert_refused(tmp_path, "one of 2 shards, but shard 1 is missing")


def test_index_may_name_shards_of_any_name_below_it(tmp_path: Path) -> None:
    write_file(tmp_path / "sub/x.safetensors", {"w": W})
    write_file(tmp_path / "a.safetensors", {"v": V})
    weight_map = {"w": "sub/x.safetensors", "v": "a.safetensors"}
    write(tmp_path / "model.safetensors.index.json", json.dumps({"weight_map": weight_map}))
    assert read(tmp_path) == {"v": V, "w": W}


def test_links_are_read(tmp_path: Path) -> None:
    blob = write_file(tmp_path / "blobs/abc", {"w": W})
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot/model.safetensors").symlink_to("../blobs/abc")
    (tmp_path / "snapshot/config.json").symlink_to(write(tmp_path / "blobs/def", "{}"))
    with Checkpoint(tmp_path / "snapshot") as checkpoint:
        assert list(checkpoint.side_files) == ["config.json"]
    assert read(tmp_path / "snapshot") == read(blob) == {"w": W}


@pytest.mark.parametrize(
    ("weight_map", "problem"),
    [
        ({"w": "model-00009-of-00009.safetensors"}, "the checkpoint is incomplete"),
        ({"w": "../secret.safetensors"}, "the checkpoint is incomplete"),
        ({"w": "/etc/passwd"}, "the checkpoint is incomplete"),
        ({"w": 1}, "the checkpoint is incomplete"),
        ({"w": "config.json"}, "the checkpoint is incomplete"),
        ({"w": "b.safetensors"}, "tensor '[wv]' is in"),
        ({"w": "a.safetensors", "v": "b.safetensors", "x": "a.safetensors"}, "'x' is in no shard"),
        ({"w": "a.safetensors", "v": "a.safetensors"}, "'v' is in no shard"),
        ([], "has no weight_map"),
        (None, "has no weight_map"),
    ],
)
def test_index_is_held_against_its_shards(weight_map: Any, problem: str, tmp_path: Path) -> None:
    write_file(tmp_path / "root/a.safetensors", {"w": W})
    write_file(tmp_path / "root/b.safetensors", {"v": V})
    write_file(tmp_path / "secret.safetensors", {"w": W})
    write(tmp_path / "root/config.json", "{}")
    index = json.dumps({"weight_map": weight_map})
    write(tmp_path / "root/model.safetensors.index.json", index)
    assert_refused(tmp_path / "root", problem)


@pytest.mark.parametrize("raw", [b"", b"[]", b"{", b'{"weight_map":{},"weight_map":{}}', b"\xff"])
def test_broken_index_is_refused(raw: bytes, tmp_path: Path) -> None:
    write_file(tmp_path / "model.safetensors", {"w": W})
    write(tmp_path / "model.safetensors.index.json", raw)
    assert_refused(tmp_path, "index.json")


def test_shard_of_two_indexes_is_refused(tmp_path: Path) -> None:
    write_file(tmp_path / "a.safetensors", {"w": W})
    for stem in ("model", "other"):
        index = json.dumps({"weight_map": {"w": "a.safetensors"}})
        write(tmp_path / f"{stem}.safetensors.index.json", index)
    assert_refused(tmp_path, "is a shard of both")


WHOLE = file_bytes({"w": W})


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "it has 0 bytes"),
        (b"\0" * 7, "it has 7 bytes"),
        (
            (1 << 63).to_bytes(8, "little"),
            "is not a safetensors file; give a .safetensors file or a folder",
        ),
        (WHOLE[:20], "is incomplete: it has 20 bytes, its header alone 64"),
        (WHOLE[:-1], "11 bytes of data, expected 12 by its header"),
        (WHOLE + b"\0", "13 bytes of data, expected 12 by its header"),
        (with_header(b"[]"), "not a JSON object"),
        (with_header(b"\x80\x02}q"), "not a JSON object"),
        (
            file_bytes({"w": Raw("BF16", (5,), bytes(10))})
            .replace(b"BF16", b"BF17")
            .replace(b"[5]", b"[3]"),
            "dtype 'BF17' is unknown",
        ),
        (WHOLE.replace(b"[2,3]", b"[2,2]"), "has 12 bytes, expected 8 by its shape and dtype"),
        (WHOLE.replace(b"[0,12]", b"[0,11]"), "has 11 bytes"),
        (with_header(compact({"w": {"dtype": "F4", "shape": [1], "data_offsets": [0, 0]}})), "F4"),
    ],
)
def test_broken_file_is_refused(content: bytes, problem: str, tmp_path: Path) -> None:
    write(tmp_path / "model.safetensors", content)
    assert_refused(tmp_path / "model.safetensors", problem)
    assert_refused(tmp_path, problem)


@pytest.mark.parametrize("begin", [8, 16])
def test_overlaps_and_holes_are_refused(begin: int, tmp_path: Path) -> None:
    fields = header_fields({"w": W, "v": V})
    fields["v"]["data_offsets"] = [begin, begin + 20]
    write(tmp_path / "f", with_header(compact(fields), bytes(begin + 20)))
    assert_refused(tmp_path / "f", f"begins at byte {begin}, expected 12")


def test_file_that_shrinks_is_noticed(tmp_path: Path) -> None:
    path = write_file(tmp_path / "f", {"w": W})
    with Checkpoint(path) as checkpoint:
        os.truncate(path, path.stat().st_size - 1)
        with pytest.raises(CheckpointError, match="'w': its file became shorter"):
            content(checkpoint.tensors["f", "w"])


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Checkpoint(tmp_path / "none")


def test_snapshot_whose_blob_is_gone_is_reported_as_a_broken_link(tmp_path: Path) -> None:
    blob = write(tmp_path / "blobs/def", "{}")
    write_file(tmp_path / "snapshot/model.safetensors", {"w": W})
    (tmp_path / "snapshot/config.json").symlink_to("../blobs/def")
    blob.unlink()
    assert_refused(
        tmp_path / "snapshot", r"config.json' is a link to '../blobs/def', which does not exist"
    )


PIPE = pytest.param(
    "pipe", marks=pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no such pipes")
)


@pytest.mark.parametrize("kind", ["dangling link", "link to a folder", PIPE])
def test_odd_things_are_refused_unless_passed_over(kind: str, tmp_path: Path) -> None:
    root = write_file(tmp_path / "root/model.safetensors", {"w": W}).parent
    write(tmp_path / "outside/x", "x")
    if kind == "pipe":
        os.mkfifo(root / "odd")
    else:
        (root / "odd").symlink_to(tmp_path / ("outside" if "folder" in kind else "none"))
    assert_refused(root, "odd.*--exclude")
    assert list(read(root, exclude=["odd"])) == ["w"]
    assert list(read(root, whole=False)) == ["w"]


def test_folder_that_cannot_be_listed_is_not_passed_over_in_silence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_file(tmp_path / "model.safetensors", {"w": W})
    write(tmp_path / "closed/config.json", "{}")
    scandir = os.scandir

    def refusing(path: Any) -> Any:
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(PermissionError, match="closed"):
        Checkpoint(tmp_path)
    with Checkpoint(tmp_path, whole=False) as checkpoint:  # as a base: it may not be needed
        assert not checkpoint.side_files


def test_weight_file_without_a_utf8_name_is_refused(tmp_path: Path) -> None:
    path = write_file(tmp_path / os.fsdecode(b"caf\xe9.safetensors"), {"w": W})
    for whole in (True, False):
        with pytest.raises(CheckpointError, match=r"caf\\xe9.safetensors' is not UTF-8"):
            Checkpoint(tmp_path, whole=whole)
    assert list(read(path)) == ["w"]


@pytest.mark.parametrize(
    ("glob", "matched"),
    [
        ("*.bin", {"a.bin", "sub/b.bin"}),
        ("sub/*", {"sub/b.bin", "sub/deep/c", "sub/deep"}),
        ("sub/b.*", {"sub/b.bin"}),
        ("deep", {"sub/deep"}),
        ("sub/", set()),
        ("A.bin", set()),
        ("[ab].bin", {"a.bin", "sub/b.bin"}),
    ],
)
def test_globs(glob: str, matched: set[str]) -> None:
    paths = ["a.bin", "sub/b.bin", "sub/deep", "sub/deep/c", "other"]
    assert {path for path in paths if junk.matches(path, ["none", glob])} == matched


def test_excluded_files_and_folders(tmp_path: Path) -> None:
    write_file(tmp_path / "model.safetensors", {"w": W})
    write(tmp_path / "optimizer/state.bin", "x")
    write(tmp_path / "README.md", "x")
    with Checkpoint(tmp_path, exclude=["optimizer/", "*.md"]) as checkpoint:
        assert not checkpoint.side_files
        assert not checkpoint.empty_folders
    with Checkpoint(tmp_path, exclude=["*.bin"]) as checkpoint:
        assert list(checkpoint.side_files) == ["README.md"]
        assert checkpoint.empty_folders == ("optimizer",)


def test_pointer_of_git_lfs_is_named(tmp_path: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 123\n"
    path = write(tmp_path / "model.safetensors", pointer)
    with pytest.raises(CheckpointError, match=r"Git LFS pointer.*git lfs pull"):
        Checkpoint(path)


def test_json_file_is_no_safetensors_file(tmp_path: Path) -> None:
    path = write(tmp_path / "config.json", '{"model_type": "bert"}')
    with pytest.raises(
        CheckpointError, match=r"'.*config\.json' is not a safetensors file; give the folder"
    ):
        Checkpoint(path)
