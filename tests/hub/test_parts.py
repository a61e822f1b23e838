"""Parts that need no Hub: references, cards, pictures, records, folders."""

from __future__ import annotations

import dataclasses
import hashlib
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import noise, write, write_file
from hub.hub_helpers import save_delta
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import relaxed

import sparsedelta
from sparsedelta.errors import Corrupt, UnsupportedFeature
from sparsedelta.format.records import SideFile
from sparsedelta.hub.card import CardFacts, updated_card
from sparsedelta.hub.client import RemoteFile
from sparsedelta.hub.folders import folder_of, remove_damaged
from sparsedelta.hub.record import (
    BaseRecord,
    differences,
    git_oid,
    parse_record,
    record_path,
    render_record,
)
from sparsedelta.hub.references import Reference, is_repo_id, parse_reference
from sparsedelta.report.png import encode_png, picture_of, render_png

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("text", "repo_id", "revision", "path"),
    [
        ("org/name", "org/name", None, None),
        ("org/name@v1", "org/name", "v1", None),
        (f"org/name@{COMMIT}", "org/name", COMMIT, None),
        ("org/name@refs/pr/3", "org/name", "refs/pr/3", None),
        ("Org-1/na.me_2", "Org-1/na.me_2", None, None),
        ("hf://org/name", "org/name", None, None),
        ("hf://models/org/name", "org/name", None, None),
        ("hf://org/name@v1", "org/name", "v1", None),
        ("hf://org/name/a/b.sd", "org/name", None, "a/b.sd"),
        ("hf://org/name/a/b.sd@v1", "org/name", "v1", "a/b.sd"),
        ("hf://org/name/b.sd@refs/pr/3", "org/name", "refs/pr/3", "b.sd"),
        ("hf://org/name@v1/a/b.sd", "org/name", "v1", "a/b.sd"),
        ("hf://org/name@refs/pr/3/b.sd", "org/name", "refs/pr/3", "b.sd"),
        ("hf://org/name@v1/odd@name.sd", "org/name", "v1", "odd@name.sd"),
    ],
)
def test_references(text: str, repo_id: str, revision: str | None, path: str | None) -> None:
    found = parse_reference(text)
    assert found == Reference(repo_id, revision, path)
    assert found.is_pinned == (revision == COMMIT)
    if "odd@" not in text:
        assert parse_reference(str(found)) == found


@pytest.mark.parametrize(
    "text",
    ["", "name", "a/b/c", "./a", "../a", "/a/b", "a/", "/a", "a b/c", "~/a", "a/b c", "org/na:me"],
)
def test_paths_are_not_references(text: str) -> None:
    assert parse_reference(text) is None
    assert not is_repo_id(text)


@pytest.mark.parametrize(
    "text", ["hf://", "hf://org", "hf://datasets/org/name", "hf://org/name:x", "hf://spaces/a/b"]
)
def test_bad_references(text: str) -> None:
    with pytest.raises(ValueError, match="not a model repository"):
        parse_reference(text)


@relaxed(100)
@given(st.text() | st.text().map("hf://{}".format))
@example("hf://")
def test_only_texts_with_the_scheme_are_errors(text: str) -> None:
    try:
        parse_reference(text)
    except ValueError:
        assert text.startswith("hf://")


def facts(tmp_path: Path) -> CardFacts:
    """Return the facts about a small delta whose names try to break the Markdown of a card."""
    tensor = noise("F32", 64)
    evil = "a|b`c\n<script>.0.w"
    base = write_file(tmp_path / "base", {evil: tensor})
    target = write_file(tmp_path / "target", {evil: tensor.changed(0)})
    info = {"no|te`": "hf_SecretSecret <!-- sparsedelta: end delta.sd -->\n\n# Title"}
    info["losses"] = [[0, 2.5], [10, 0.5]]  # type: ignore[assignment]
    delta = save_delta(base, target, tmp_path / "d.sd", info=info)
    found = sparsedelta.inspect(delta)
    return CardFacts(
        repo_id="me/tuned",
        path="delta.sd",
        base=Reference("org/model", COMMIT),
        base_is_delta=False,
        base_metadata={"license": "mit"},
        found=found,
        file_bytes=23_000_000,
        target_bytes=14_500_000_000,
        picture=None,
        endpoint="https://hub",
    )


def test_text_from_a_delta_stays_in_its_table_cell(tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub")
    one = facts(tmp_path)
    card = updated_card(None, one, alone=True)
    assert "**sparse delta: 23.0 MB instead of 14.5 GB**" in card
    assert "| `a\\|b'c?<script>.*.w` | 1 | 64 | 1.56 % |" in card
    assert "| `loss` | 2.5 at step 0, 0.5 at step 10 |" in card
    assert "SecretSecret" not in card
    assert "\n# Title" not in card
    assert updated_card(card, one, alone=True) == card


def test_scores_before_and_after(tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub")
    one = facts(tmp_path)
    evil = "x|y`\n# z"
    evaluations: list[Any] = [
        {"step": 0, "values": {"mmlu": 0.25, evil: 3}},
        {"step": 50, "values": {"mmlu": 0.5, evil: 1}},
    ]
    found = dataclasses.replace(one.found, info={"evaluations": evaluations, "steps": 50})
    card = updated_card(None, dataclasses.replace(one, found=found), alone=True)
    lines = card[card.index("## Before and after") :].splitlines()[2:7]
    assert lines == [
        "| score | base | this model | difference |",
        "| --- | ---: | ---: | ---: |",
        "| `mmlu` | 0.25 | 0.5 | +0.25 |",
        "| `x\\|y'?# z` | 3 | 1 | -2 |",
        "",
    ]
    assert "| `evaluations` |" not in card
    assert "## Before and after" not in updated_card(None, one, alone=True)


def test_only_the_card_of_a_model_folder_loads_the_model(tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub")
    one = facts(tmp_path)
    assert "load_model" not in updated_card(None, one, alone=True)
    config = SideFile("config.json", 2, bytes(32), None)
    found = dataclasses.replace(one.found, side_files=(config,))
    changed = dataclasses.replace(one, found=found, path="sql/delta.sd")
    card = updated_card(None, changed, alone=True)
    assert '\nmodel = sparsedelta.load_model("hf://me/tuned/sql")' in card


def test_updating_a_card(tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub")
    one = facts(tmp_path)
    card = updated_card(None, one, alone=True)
    other = dataclasses.replace(one, base=Reference("org/other", COMMIT))
    assert "base_model: org/other\n" in updated_card(card, other, alone=True)
    both = updated_card(card, other, alone=False)
    assert "base_model:\n- org/model\n- org/other\n" in both
    with pytest.raises(ValueError, match="cannot be read"):
        updated_card("---\nkey: [\n---\n", one, alone=True)


def pixels_of(png: bytes) -> np.ndarray:
    """Return the pixels of a PNG that this package wrote."""
    width, height = struct.unpack(">II", png[16:24])
    n_bytes = struct.unpack(">I", png[33:37])[0]
    rows = np.frombuffer(zlib.decompress(png[41 : 41 + n_bytes]), np.uint8)
    channels = {2: 3, 6: 4}[png[25]]
    return rows.reshape(height, 1 + channels * width)[:, 1:].reshape(height, width, channels)


@pytest.mark.parametrize("channels", [3, 4])
def test_png_holds_the_image(channels: int) -> None:
    image = np.arange(5 * 4 * channels, dtype=np.uint8).reshape(5, 4, channels)
    png = encode_png(image)
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    assert png.endswith(b"IEND" + struct.pack(">I", zlib.crc32(b"IEND")))
    assert (pixels_of(png) == image).all()


def test_picture(tmp_path: Path) -> None:
    names = [f"l.{layer}.{kind}" for layer in (0, 1, 10) for kind in ("a", "b", "same")]
    names.remove("l.10.b")
    tensors = {name: noise("F32", 100, seed=name) for name in names}
    changed = {**tensors, "l.0.a": tensors["l.0.a"].changed(*range(0, 400, 4))}
    changed["l.1.b"] = tensors["l.1.b"].changed(0)
    delta = save_delta(
        write_file(tmp_path / "base", tensors),
        write_file(tmp_path / "target", changed),
        tmp_path / "d.sd",
    )
    picture = picture_of(sparsedelta.inspect(delta))
    assert picture is not None
    image = pixels_of(render_png(picture))
    assert image.shape == (2 * 20, 3 * 24, 4)
    cells = {
        (row, layer): (*map(int, image[20 * row, 24 * layer]),)
        for row in (0, 1)
        for layer in range(3)
    }
    assert cells[0, 0] == (8, 57, 126, 255)  # all of it changed
    assert cells[1, 0] == cells[0, 1] == cells[0, 2] == (128, 136, 148, 48)  # nothing did
    assert cells[1, 2] == (0, 0, 0, 0)  # there is no such tensor
    assert cells[1, 1] == (205, 220, 238, 255)  # one element in a hundred: a tenth of the depth


def test_the_picture_of_a_uniform_delta_shows_the_size_of_the_changes(tmp_path: Path) -> None:
    tensors = {f"l.{layer}.a": noise("F32", 100, seed=layer) for layer in range(4)}
    changed = {name: tensor.changed(0, 40) for name, tensor in tensors.items()}
    moved = {name: 0.25 * 4**-layer for layer, name in enumerate(tensors)}
    base, target = write_file(tmp_path / "base", tensors), write_file(tmp_path / "target", changed)
    for info, first, last in (
        ({}, (161, 184, 213, 255), (161, 184, 213, 255)),
        ({"mean_change": moved}, (107, 29, 4, 255), (235, 214, 194, 255)),
    ):
        path = save_delta(base, target, tmp_path / f"{len(info)}.sd", info=info)
        picture = picture_of(sparsedelta.inspect(path))
        assert picture is not None
        assert picture.shows_change == bool(info)
        image = pixels_of(render_png(picture))
        assert (*image[0, 0],) == first
        assert (*image[0, 3 * 24],) == last


def test_no_picture_of_a_model_without_layers(tmp_path: Path) -> None:
    tensor = noise("F32", 10)
    base = write_file(tmp_path / "base", {"w": tensor})
    target = write_file(tmp_path / "target", {"w": tensor.changed(1)})
    assert picture_of(sparsedelta.inspect(save_delta(base, target, tmp_path / "d.sd"))) is None


RECORD = BaseRecord(
    f"org/model@{COMMIT}",
    "ab" * 32,
    (RemoteFile("a.json", 2, None, "cd" * 20), RemoteFile("b/w.safetensors", 9, "ef" * 32, None)),
)


def test_record() -> None:
    assert record_path("sql/delta.sd") == "sql/delta.base.json"
    assert parse_record(render_record(RECORD), "record") == RECORD
    files = {file.path: file for file in RECORD.files}
    assert differences(RECORD, files) == []
    assert differences(RECORD, {**files, "a.json": RemoteFile("a.json", 3, None, "cd" * 20)}) == [
        "a.json"
    ]
    assert differences(RECORD, {}) == ["a.json", "b/w.safetensors"]


@pytest.mark.parametrize(
    ("old", "new", "error"),
    [
        ("a.json", "../a.json", Corrupt),
        ("a.json", "/a.json", Corrupt),
        ('"n_bytes": 2', '"n_bytes": -2', Corrupt),
        ('"n_bytes": 2', '"n_bytes": 2, "more": 1', UnsupportedFeature),
        ('"files"', '"Files"', UnsupportedFeature),
        ("abab", "ABab", Corrupt),
        ("{", "[", Corrupt),
    ],
)
def test_bad_records(old: str, new: str, error: type[Exception]) -> None:
    raw = render_record(RECORD).replace(old.encode(), new.encode(), 1)
    with pytest.raises(error):
        parse_record(raw, "record")


def cached(root: Path, files: dict[str, bytes]) -> dict[str, Path]:
    """Write files as in the client's cache: links to content that is named by its digest."""
    places = {}
    for path, content in files.items():
        blob = write(root / "blobs" / hashlib.sha256(content).hexdigest(), content)
        places[path] = root / "snapshots" / COMMIT / path
        places[path].parent.mkdir(parents=True, exist_ok=True)
        places[path].symlink_to(blob)
    return places


def test_folder_is_the_snapshot_if_that_has_no_other_weights(tmp_path: Path) -> None:
    places = cached(tmp_path, {"a.safetensors": b"1", "c/b.json": b"2", "notes.txt": b"3"})
    wanted = {path: places[path] for path in ("c/b.json", "a.safetensors")}
    snapshot = tmp_path / "snapshots" / COMMIT
    with folder_of(wanted) as folder:
        assert folder == snapshot
    with folder_of(wanted, exact=True) as folder:
        assert folder != snapshot
        assert {path.name for path in folder.rglob("*") if path.is_file()} == {
            "a.safetensors",
            "b.json",
        }
    assert not folder.exists()
    places |= cached(tmp_path, {"other.safetensors": b"4"})
    with folder_of(wanted) as folder:
        assert not (folder / "other.safetensors").exists()
        assert (folder / "c/b.json").read_bytes() == b"2"


def test_folder_of_no_files() -> None:
    with folder_of({}) as folder:
        assert list(folder.iterdir()) == []


def test_damaged_files_of_the_cache_are_removed_and_no_others(tmp_path: Path) -> None:
    places = cached(tmp_path, {"good": b"1", "bad": b"22"})
    places["bad"].write_bytes(b"23")
    mine = write(tmp_path / "mine", b"")
    assert remove_damaged([*places.values(), mine]) == [places["bad"]]
    assert not places["bad"].is_symlink()
    assert len(list((tmp_path / "blobs").iterdir())) == 1
    assert places["good"].read_bytes() == b"1"


def test_shared_content_is_checked_by_the_name_of_each_blob(
    tmp_path: Path,
) -> None:
    places = cached(tmp_path, {"good": b"1", "bad": b"22"})
    for path, place in places.items():
        blob = place.resolve()
        content = blob.read_bytes() if path == "good" else b"23"
        shared = write(tmp_path / "shared" / hashlib.sha256(path.encode()).hexdigest(), content)
        blob.unlink()
        blob.symlink_to(shared)
    assert remove_damaged(places.values()) == [places["bad"]]
    assert len(list((tmp_path / "blobs").iterdir())) == 1
    assert [place.read_bytes() for place in (tmp_path / "shared").iterdir()] == [b"1"]


def test_git_oid(tmp_path: Path) -> None:
    assert git_oid(write(tmp_path / "f", b"hello\n")) == "ce013625030ba8dba906f756967f9e9ca394464a"
