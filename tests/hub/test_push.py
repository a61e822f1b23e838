"""``push``: one commit, after the proof of the base, with a card; never over another's work."""

from __future__ import annotations

from pathlib import Path

from helpers import assert_same_files
from hub.hub_helpers import BASE, TUNED, Person
from hub.hub_server import LoopbackHub


def test_first_push(me: Person, hub: LoopbackHub, delta: Path, base_commit: str) -> None:
    shown = me.good("push", delta, TUNED, "--base-id", BASE)
    repo = hub.state.repos[TUNED]
    head = hub.state.head(TUNED)
    assert len(repo.commits) == 2
    assert {*head.files} == {
        ".gitattributes",
        "README.md",
        "config.json",
        "delta.base.json",
        "delta.png",
        "delta.sd",
    }
    assert f"{BASE}@{base_commit}" in shown
    assert head.oid in shown
    assert b'"tuned"' in head.files["config.json"].data


def test_pull_gives_the_target(
    me: Person, other: Person, hub: LoopbackHub, delta: Path, checkpoints: tuple[Path, Path]
) -> None:
    me.good("push", delta, TUNED, "--base-id", BASE)
    other.good("pull", TUNED, "out")

    assert_same_files(checkpoints[1], other.folder / "out")
