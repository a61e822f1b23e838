"""The stored channel can be followed to each of its versions, and entries that break a rule are refused."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import make_channel_vectors
import pytest
import torch
from channel.parties import MemoryStore
from helpers import assert_same_files
from safetensors.torch import load_file

import sparsedelta
from sparsedelta.channel.entry import check_follows, parse_entry
from sparsedelta.errors import BadVersion, Behind

SPEC = Path(__file__).parents[2] / "spec"
FOLDER = SPEC / "channel"
VALID = FOLDER / "valid"
MANIFEST: dict[str, Any] = json.loads((FOLDER / "manifest.json").read_bytes())
READABLE = [one for one in MANIFEST["versions"] if one["target"]]
INVALID = MANIFEST["invalid"]


def stored() -> sparsedelta.Channel:
    """Return the valid channel, in memory: nothing is written to the folder."""
    files = (path for path in VALID.rglob("*") if path.is_file())
    return sparsedelta.Channel(
        MemoryStore({path.relative_to(VALID).as_posix(): path.read_bytes() for path in files})
    )


@pytest.mark.parametrize("one", READABLE, ids=lambda one: str(one["version"]))
def test_every_version_can_be_joined(one: dict[str, Any], tmp_path: Path) -> None:
    follower = sparsedelta.Follower(stored(), tmp_path / "out", base=FOLDER / MANIFEST["base"])
    assert follower.sync(one["version"]).anchor
    assert_same_files(FOLDER / one["target"], tmp_path / "out")


def test_versions_can_be_followed_one_after_the_other(tmp_path: Path) -> None:
    follower = sparsedelta.Follower(stored(), tmp_path / "out")
    moves = []
    for one in READABLE:
        moves.append(follower.sync(one["version"]).anchor)
        assert_same_files(FOLDER / one["target"], tmp_path / "out")
    assert moves == [True, False, True, False, False]  # version 5 has only an anchor


def test_a_model_that_is_the_base_needs_no_other() -> None:
    state = load_file(FOLDER / MANIFEST["base"] / "model.safetensors")
    assert sparsedelta.Follower(stored(), state).sync().version == 7
    wanted = load_file(FOLDER / "targets/7/model.safetensors")
    assert state.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(state[name].view(torch.uint8), tensor.view(torch.uint8)), name


def test_a_pruned_version_is_behind(tmp_path: Path) -> None:
    with pytest.raises(Behind, match=r"version 2 .* was pruned"):
        sparsedelta.Follower(stored(), tmp_path / "out").sync(2)


def test_pruning_deletes_what_the_entries_do_not_name(tmp_path: Path) -> None:
    channel = stored()
    report = channel.prune(keep=5)
    assert (report.first, report.n_closed, report.n_deleted) == (3, 0, 1)
    shutil.copytree(VALID, tmp_path / "channel")
    with sparsedelta.Channel(tmp_path / "channel") as on_disk:
        report = on_disk.prune(keep=1)
    assert (report.first, report.n_closed) == (6, 2)


def read(raw: bytes, version: int) -> None:
    """Read an entry in place of the one of its version."""
    entry = parse_entry(raw, version)
    check_follows(entry, stored().entry(version - 1))


@pytest.mark.parametrize("one", INVALID, ids=lambda one: one["name"])
def test_an_entry_that_breaks_a_rule_is_refused(one: dict[str, Any]) -> None:
    raw = (FOLDER / one["entry"]).read_bytes()
    words = "the entry of version" if one["breaks"] == "C1" else f"({one['breaks']})"
    with pytest.raises(BadVersion, match=re.escape(words)):
        read(raw, one["version"])


def test_all_rules_are_broken_by_a_vector() -> None:
    rules = set(re.findall(r"\*\*(C\d)\*\*", (SPEC / "CHANNEL.md").read_text(encoding="utf-8")))
    assert {one["breaks"] for one in INVALID} == rules


def test_the_stored_files_are_those_of_the_script() -> None:
    files = make_channel_vectors.all_files()
    found = {
        path.relative_to(FOLDER).as_posix(): path.read_bytes()
        for path in FOLDER.rglob("*")
        if path.is_file() and path.name != ".gitattributes"
    }
    assert found == files
