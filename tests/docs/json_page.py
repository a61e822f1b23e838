"""The members that docs/json.md documents, and those of a printed object."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PAGE = (Path(__file__).parents[2] / "docs" / "json.md").read_text(encoding="utf-8")


def documented(command: str) -> tuple[set[str], set[str]]:
    """Return the paths of the members of a command's output, and those among them that are maps."""
    members: set[str] = set()
    maps: set[str] = set()
    for title, text in re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE):
        if command in title.split(", "):
            for names, kind in re.findall(r"^\| (`.*?) \| (.*?) \|", text, re.MULTILINE):
                paths = set(re.findall(r"`(.+?)`", names))
                members |= paths
                maps |= paths if "map" in kind or kind == "list of objects" else set()
    return members, maps


def printed(value: Any, maps: set[str], prefix: str = "") -> Iterator[str]:
    """Yield the paths of the members of an object. Lists and maps without members have one path."""
    for name, inner in value.items():
        path = f"{prefix}{name}"
        if isinstance(inner, dict) and path not in maps:
            yield from printed(inner, maps, f"{path}.")
        elif isinstance(inner, list) and inner and isinstance(inner[0], dict) and path not in maps:
            for one in inner:
                yield from printed(one, maps, f"{path}[].")
        else:
            yield path


def compare(command: str, *objects: Any) -> None:
    """Check that objects that a command printed have the documented members, and together all of them."""
    members, maps = documented(command)
    assert members, command
    found = {path for one in objects for path in printed(one, maps)}
    # An object that is null has no members; its path is documented by that of its members.
    nulls = {path for path in found if any(name.startswith(f"{path}.") for name in members)}
    assert found - nulls == members, command
