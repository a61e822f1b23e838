"""How the safetensors files of a folder belong together: shards of one model, variants, index files."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from sparsedelta.format.paths import WEIGHT_SUFFIX

INDEX_SUFFIX = ".safetensors.index.json"
SHARD = re.compile(r"(?P<stem>.+)-(?P<number>[0-9]{5})-of-(?P<count>[0-9]{5})\.safetensors")
_NUMBERS = re.compile(r"-[0-9]{5}-of-[0-9]{5}")


def roles(paths: Iterable[str], indexes: Mapping[str, Iterable[str]]) -> dict[str, str]:
    """Return what each safetensors file is for, by path: files of one role can stand for each other.

    The shards of a model, its single file and their variants have one role: ``unet/model`` is that of
    ``unet/model.safetensors``, ``unet/model.fp16.safetensors`` and ``unet/model-00001-of-00002.safetensors``.

    Args:
        paths: of the safetensors files.
        indexes: of each index file the paths of the shards it names.
    """
    result = {path: _role(path.removesuffix(WEIGHT_SUFFIX)) for path in paths}
    for index, shards in indexes.items():
        result |= dict.fromkeys(shards, _role(index.removesuffix(INDEX_SUFFIX)))
    return result


def _role(stem: str) -> str:
    folder, slash, name = _NUMBERS.sub("", stem).rpartition("/")
    return folder + slash + name.partition(".")[0]


def shard_path(shard: str, index: str) -> str:
    """Return the path of a shard as the index at path ``index`` names it."""
    folder = index.rpartition("/")[0]
    return f"{folder}/{shard}" if folder else shard
