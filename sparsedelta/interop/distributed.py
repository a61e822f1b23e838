"""The names of the objects in a checkpoint of torch.distributed, from its ``.metadata``, which is read as data."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from sparsedelta.interop.inert_pickle import MAX_BYTES, Made, PickleRefused, children, read_inert


def object_names(location: Path) -> dict[str, dict[int, str]]:
    """Return the names of objects in a torch.distributed checkpoint by file and position, as far as known."""
    if location.stat().st_size > MAX_BYTES:
        return {}
    try:
        root = read_inert(location.read_bytes())
    except PickleRefused:
        return {}
    stored = root.get("storage_data") if isinstance(root, Made) else None
    if not isinstance(stored, Made):
        return {}
    found: dict[str, dict[int, str]] = defaultdict(dict)
    for index, place in stored.pairs or ():
        if isinstance(index, Made) and isinstance(place, Made):
            path, begin = place.get("relative_path"), place.get("offset")
            if isinstance(path, str) and isinstance(begin, int):
                found[path][begin] = _name_of(index)
    return found


def _name_of(index: Made) -> str:
    offsets = [str(n) for _, part in children(index.get("offset")) for n in _numbers(part)]
    suffix = "@" + ",".join(offsets) if any(n != "0" for n in offsets) else ""
    return f"{index.get('fqn')}{suffix}"


def _numbers(part: object) -> list[int]:
    if isinstance(part, tuple):
        return [n for one in part for n in _numbers(one)]
    return [part] if isinstance(part, int) else []
