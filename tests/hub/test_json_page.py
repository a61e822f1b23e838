"""docs/json.md: the members that it documents are those that the commands with a repository print."""

from __future__ import annotations

from pathlib import Path

from docs.json_page import compare
from hub.hub_helpers import BASE, TUNED, Person


def test_push_verify_pull(me: Person, delta: Path) -> None:
    compare("push", me.json("push", delta, TUNED, "--base-id", BASE))
    compare("verify", me.json("verify", TUNED))
    compare("pull", me.json("pull", TUNED, "out"))
