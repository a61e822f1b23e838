"""The names of the objects in a checkpoint of torch.distributed, from its ``.metadata``, which is read as data."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from sparsedelta.interop.inert_pickle import MAX_BYTES, Made, PickleRefused, children, read_inert
from sparsedelta.interop.region import MAX_NAME_BYTES

_MAX_DIMENSIONS = 16


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
    """Return the name of an object, with the offsets of its part; an empty text if it is no short name."""
    name = index.get("fqn")
    if not isinstance(name, str) or len(name) > MAX_NAME_BYTES:
        return ""
    offsets = [n for _, part in children(index.get("offset")) for n in _numbers(part)]
    return f"{name}@{','.join(map(str, offsets))}" if any(offsets) else name


def _numbers(part: object) -> list[int]:
    """Return the sizes in a part of an offset: one, or a tuple of a few."""
    found = part if isinstance(part, tuple) else (part,)
    return [n for n in found[:_MAX_DIMENSIONS] if isinstance(n, int) and 0 <= n < 1 << 48]
