"""Builds a model without its weights from a folder, a Hub id or a config.

Only configs and safetensors headers are read. A missing folder or model raises after one request.
"""

from __future__ import annotations

import re
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sift_train.loading import checkpoint_dtype
from sift_train.targets import TRAINABLE

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_SHORT = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp64": "float64"}
_CONFIG = "config.json"


def as_dtype(value: torch.dtype | str) -> torch.dtype:
    """Return the dtype with this name, or the given dtype, if weights can be trained in it.

    Raises:
        ValueError: the name is unknown, or weights cannot be trained in this dtype.
    """
    name = str(value).removeprefix("torch.")
    found = getattr(torch, _SHORT.get(name, name), None)
    if found not in TRAINABLE:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in TRAINABLE)
        raise ValueError(
            f"dtype is {name!r}, but weights cannot be trained in it; choose one of {known}"
        )
    dtype: torch.dtype = found
    return dtype


def model_without_weights(source: Any, dtype: torch.dtype | str | None = None) -> nn.Module:
    """Return a model on the meta device.

    Args:
        source: a folder or a Hub id with a ``config.json``, or a config of transformers.
        dtype: dtype of the weights. By default that of the folder's safetensors files, else that of
            the config, else bfloat16.

    Raises:
        OSError: the folder or the model does not exist.
        ValueError: weights cannot be trained in the dtype.
    """
    import transformers  # takes seconds

    chosen = None if dtype is None else as_dtype(dtype)
    is_path_or_id = isinstance(source, str | PathLike)
    config = _config_at(source) if is_path_or_id else source
    if chosen is None and is_path_or_id and Path(source).is_dir():
        chosen = checkpoint_dtype(Path(source))
    chosen = chosen or as_dtype(getattr(config, "dtype", None) or torch.bfloat16)
    names = getattr(config, "architectures", None) or []
    model_class: Any = getattr(transformers, names[0], None) if names else None
    with torch.device("meta"):
        if model_class is not None:
            model: nn.Module = model_class._from_config(config, dtype=chosen)
        else:
            causal: Any = transformers.AutoModelForCausalLM
            model = causal.from_config(config, dtype=chosen)
    return model


def _config_at(source: str | PathLike[str]) -> Any:
    import transformers  # takes seconds

    auto: Any = transformers.AutoConfig
    folder = Path(source)
    if folder.exists():
        if not (folder / _CONFIG).is_file():
            raise FileNotFoundError(
                f"'{folder}' has no {_CONFIG}, so it is not a model folder; give one that has it"
            )
        return auto.from_pretrained(folder, local_files_only=True)
    if isinstance(source, PathLike) or not _HUB_ID.fullmatch(source):
        raise FileNotFoundError(
            f"no folder '{source}' exists, and '{source}' is not a Hub id such as org/name; check "
            "the spelling"
        )
    try:
        return auto.from_pretrained(source, local_files_only=True)
    except OSError:
        _check_hub_has_config(source)
    return auto.from_pretrained(source)


def _check_hub_has_config(repo_id: str) -> None:
    """Check with one request that the Hub has the config; loading it would make six requests."""
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError

    url = huggingface_hub.hf_hub_url(repo_id, _CONFIG)
    try:
        huggingface_hub.get_hf_file_metadata(url, timeout=10)
    except Exception as error:  # the type depends on the client's HTTP library
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        if isinstance(error, (RepositoryNotFoundError, EntryNotFoundError)):
            raise FileNotFoundError(
                f"no folder '{repo_id}' exists, and neither the local cache nor the Hub has a config "
                f"for that id ({reason}); check the spelling"
            ) from error
        raise FileNotFoundError(
            f"no folder '{repo_id}' exists, the local cache has no config for that id, and the Hub was not reached "
            f"({reason}); try again with a connection, or give a folder"
        ) from error
