"""Which safetensors files of a folder belong together: shards of a model, variants, index files."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from sparsedelta.format.paths import WEIGHT_SUFFIX

INDEX_SUFFIX = ".safetensors.index.json"
SHARD = re.compile(r"(?P<stem>.+)-(?P<number>[0-9]{5})-of-(?P<count>[0-9]{5})\.safetensors")
_NUMBERS = re.compile(r"-[0-9]{5}-of-[0-9]{5}")


def roles(paths: Iterable[str], indexes: Mapping[str, Iterable[str]]) -> dict[str, str]:
    """Return the role of each safetensors file, by path.

    Files with the same role hold the same model: in one file, in shards, or in a variant. For example,
    ``unet/model.safetensors``, ``unet/model.fp16.safetensors`` and
    ``unet/model-00001-of-00002.safetensors`` all have the role ``unet/model``.

    Args:
        paths: paths of the safetensors files.
        indexes: for each index file, by path, the paths of the shards it names.
    """
    result = {path: _role(path.removesuffix(WEIGHT_SUFFIX)) for path in paths}
    for index, shards in indexes.items():
        result |= dict.fromkeys(shards, _role(index.removesuffix(INDEX_SUFFIX)))
    return result


def _role(stem: str) -> str:
    folder, slash, name = _NUMBERS.sub("", stem).rpartition("/")
    return folder + slash + name.partition(".")[0]


def shard_path(shard: str, index: str) -> str:
    """Return the path of a shard that the index file at path ``index`` names ``shard``."""
    folder = index.rpartition("/")[0]
    return f"{folder}/{shard}" if folder else shard
