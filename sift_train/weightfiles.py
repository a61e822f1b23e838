"""Finds the weight files of a model's folder, also those of a variant such as ``fp16``."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

_SUFFIX = ".safetensors"
_INDEX = re.compile(
    r"^(model|diffusion_pytorch_model)(\.(?P<early>\w+))?"
    r"\.safetensors\.index(\.(?P<variant>\w+))?\.json$"
)
_FILE = re.compile(
    r"^(?P<role>model|diffusion_pytorch_model)(\.(?P<variant>\w+))?"
    r"(-\d+-of-\d+(\.(?P<late>\w+))?)?\.safetensors$"
)
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


@dataclass(frozen=True, slots=True)
class Weights:
    """The weight files that a model is loaded from.

    Attributes:
        variant: the variant in their names, such as ``fp16``; None if there is none.
        files: the files.
        indexes: index files that list them.
    """

    variant: str | None
    files: Sequence[Path]
    indexes: Sequence[Path] = ()


def weights_of(folder: Path, dtype: torch.dtype | None = None) -> Weights:
    """Return the weight files of a model's folder.

    If there are several variants, the one with the model's dtype is taken, else the one without a name. If no
    file has a name that transformers or diffusers use, all safetensors files are taken.

    Args:
        folder: a model's folder.
        dtype: the model's dtype; None if it does not matter.
    """
    found = _by_variant(folder)
    if not found:
        return Weights(None, sorted(folder.glob(f"*{_SUFFIX}")))
    order = sorted(found, key=lambda variant: (variant is not None, variant or ""))
    fitting = [variant for variant in order if dtype and _dtype(found[variant].files) == dtype]
    return found[(fitting or order)[0]]


def dtype_of(model: nn.Module) -> torch.dtype | None:
    """Return the dtype of a model's first float parameter; None if it has none."""
    floats = (p.dtype for p in model.parameters() if p.dtype.is_floating_point)
    return next(floats, None)


def _by_variant(folder: Path) -> dict[str | None, Weights]:
    """Return the weight files of a folder by variant: a single file, else the shards of the index, else all shards."""
    files: dict[str | None, list[Path]] = defaultdict(list)
    for path in sorted(folder.glob(f"*{_SUFFIX}")):
        name = _FILE.match(path.name)
        if name:
            files[name["variant"] or name["late"]].append(path)
    indexes: dict[str | None, list[Path]] = defaultdict(list)
    for path in sorted(folder.glob(f"*{_SUFFIX}.index*.json")):
        name = _INDEX.match(path.name)
        if name:
            indexes[name["variant"] or name["early"]].append(path)
    return {
        variant: Weights(variant, _chosen(files[variant], indexes[variant]), indexes[variant])
        for variant in {*files, *indexes}
    }


def _chosen(files: list[Path], indexes: list[Path]) -> list[Path]:
    single = [path for path in files if "-of-" not in path.name]
    if single:
        return single[-1:]  # `model` rather than `diffusion_pytorch_model`
    listed = [json.loads(path.read_text("utf-8"))["weight_map"].values() for path in indexes]
    shards = {shard for values in listed for shard in values}
    return sorted(path.parent / shard for path in indexes[:1] for shard in shards) or files


def _dtype(paths: Sequence[Path]) -> torch.dtype | None:
    """Return the dtype of the first float tensor in files."""
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - not a mapping
                    dtype = _DTYPES.get(file.get_slice(name).get_dtype())
                    if dtype is not None:
                        return dtype
        except SafetensorError:
            return None  # reported by whoever reads the tensors
    return None
