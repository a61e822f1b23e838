"""Entries: what is written is read back, and each of the rules C1 to C5 broken alone is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from sparsedelta.channel.entry import Anchor, AnchorBase, Entry, Object, check_follows, parse_entry
from sparsedelta.errors import BadVersion
from sparsedelta.format.strict_json import compact_json

DELTA = Object(bytes([1]) * 32, 10)
ANCHOR = Anchor(bytes([2]) * 32, 20, AnchorBase("org/model", bytes([3]) * 32))
FIRST = Entry(1, None, "run", 100, None, bytes([4]) * 32, 1, None, ANCHOR, {})
SECOND = Entry(2, FIRST.digest, "run", 200, 7, bytes([5]) * 32, 1, DELTA, None, {"a": [1, 0.5]})


@pytest.mark.parametrize("entry", [FIRST, SECOND])
def test_an_entry_is_read_back(entry: Entry) -> None:
    found = parse_entry(entry.raw, entry.version)
    assert found == entry
    assert found.digest == entry.digest


def changed(**members: Any) -> bytes:
    """Return the second entry with other members."""
    return compact_json(json.loads(SECOND.raw) | members)


def reordered() -> bytes:
    members = json.loads(SECOND.raw)
    return compact_json({"info": members.pop("info")} | members)


BROKEN: dict[str, tuple[Callable[[], bytes], str]] = {
    "C1: spaces": (lambda: SECOND.raw.replace(b",", b", ", 1), "C1"),
    "C1: other order": (reordered, "entry of version 2"),
    "C1: another member": (lambda: changed(more=1), "more"),
    "C1: no JSON": (lambda: b"{", "damaged"),
    "C1: info is no object": (lambda: changed(info=[]), "info"),
    "C1: a digest of 31 bytes": (lambda: changed(target="04" * 31), "target"),
    "C2: another version": (lambda: replace(SECOND, version=3).raw, "C2"),
    "C3: nothing before": (lambda: changed(previous=None), "C3"),
    "C4: a segment without anchor": (lambda: changed(segment=2), "C4"),
    "C4: no segment": (lambda: changed(segment=0), "C4"),
    "C4: a later segment": (lambda: changed(segment=3), "C4"),
    "C5: neither delta nor anchor": (lambda: changed(delta=None), "C5"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_rule_that_is_broken_alone(name: str) -> None:
    raw, words = BROKEN[name]
    with pytest.raises(BadVersion, match=words):
        parse_entry(raw(), 2)


def test_rules_of_the_first_entry() -> None:
    with pytest.raises(BadVersion, match="C5"):
        parse_entry(replace(FIRST, delta=DELTA).raw, 1)
    with pytest.raises(BadVersion, match="C3"):
        parse_entry(replace(FIRST, previous=bytes(32)).raw, 1)


def test_rules_between_two_entries() -> None:
    check_follows(SECOND, FIRST)
    with pytest.raises(BadVersion, match="another entry before it"):
        check_follows(replace(SECOND, previous=bytes(32)), FIRST)
    third = replace(SECOND, version=3, previous=SECOND.digest, segment=2)
    with pytest.raises(BadVersion, match="segment"):
        check_follows(third, SECOND)
