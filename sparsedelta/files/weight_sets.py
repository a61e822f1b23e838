"""Weight sets (FORMAT §4.1): which safetensors files of a folder belong together, and so how tensors are named."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from sparsedelta.errors import FormatError
from sparsedelta.format.paths import WEIGHT_SUFFIX
from sparsedelta.format.strict_json import parse_json

INDEX_SUFFIX = ".safetensors.index.json"
PRIMARY_STEM = "model"
SHARD = re.compile(r"(?P<stem>.+)-(?P<number>[0-9]{5})-of-(?P<count>[0-9]{5})\.safetensors")


def set_stems(paths: Iterable[str], indexes: Mapping[str, Iterable[str]]) -> dict[str, str]:
    """Return the stem of the set that each safetensors file belongs to, by path.

    Args:
        paths: of the safetensors files.
        indexes: of each index file the paths of the shards it names; a shard that several name
            belongs to the last of them.
    """
    stems: dict[str, str] = {}
    indexed = {index.removesuffix(INDEX_SUFFIX): shards for index, shards in indexes.items()}
    for stem, shards in sorted(indexed.items()):
        stems |= dict.fromkeys(shards, stem)
    result = {}
    for path in paths:
        shard = SHARD.fullmatch(path)
        own = path.removesuffix(WEIGHT_SUFFIX)
        numbered = shard["stem"] if shard and shard["stem"] not in indexed else own
        result[path] = stems.get(path, numbered)
    return result


def name_prefixes(stems: Mapping[str, str]) -> dict[str, str]:
    """Return what stands before the own names of each file's tensors, given its set's stem."""
    different = set(stems.values())
    primary = different.pop() if len(different) == 1 else PRIMARY_STEM
    return {path: "" if stem == primary else f"{stem}:" for path, stem in stems.items()}


def shards_of_index(raw: bytes, path: str) -> set[str]:
    """Return the paths of the shards that an index file names; none if it is no index.

    Args:
        raw: its content.
        path: of the index file; shards are relative to its folder.
    """
    try:
        weight_map = parse_json(raw, path).get("weight_map")
        return {shard_path(shard, path) for shard in weight_map.values() if isinstance(shard, str)}
    except (FormatError, AttributeError):
        return set()


def shard_path(shard: str, index: str) -> str:
    """Return the path of a shard as the index at path ``index`` names it."""
    folder = index.rpartition("/")[0]
    return f"{folder}/{shard}" if folder else shard
