"""A model's shape without its weights: from a folder, an id of the Hub, or a config.

Nothing but configs and headers is read, and what is not there is told at once.
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
    """Return a dtype that weights can be trained in, given as one or by name.

    Raises:
        ValueError: it is none of these.
    """
    name = str(value).removeprefix("torch.")
    found = getattr(torch, _SHORT.get(name, name), None)
    if found not in TRAINABLE:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in TRAINABLE)
        raise ValueError(f"dtype is {name!r}, which is not trained in; choose one of {known}")
    dtype: torch.dtype = found
    return dtype


def without_weights(source: Any, dtype: torch.dtype | str | None = None) -> nn.Module:
    """Return a model on the meta device.

    Args:
        source: a folder or an id of the Hub that holds a ``config.json``, or a config.
        dtype: of the weights; by default that of the folder's safetensors, else what the config
            says, else bfloat16.

    Raises:
        OSError: there is no such folder or model.
        ValueError: the dtype cannot be trained in.
    """
    import transformers  # takes seconds

    wanted = None if dtype is None else as_dtype(dtype)
    is_place = isinstance(source, str | PathLike)
    config = _config_at(source) if is_place else source
    if wanted is None and is_place and Path(source).is_dir():
        wanted = checkpoint_dtype(Path(source))
    wanted = wanted or as_dtype(getattr(config, "dtype", None) or torch.bfloat16)
    names = getattr(config, "architectures", None) or []
    model_class: Any = getattr(transformers, names[0], None) if names else None
    with torch.device("meta"):
        if model_class is not None:
            model: nn.Module = model_class._from_config(config, dtype=wanted)
        else:
            causal: Any = transformers.AutoModelForCausalLM
            model = causal.from_config(config, dtype=wanted)
    return model


def _config_at(source: str | PathLike[str]) -> Any:
    import transformers  # takes seconds

    auto: Any = transformers.AutoConfig
    folder = Path(source)
    if folder.exists():
        if not (folder / _CONFIG).is_file():
            raise FileNotFoundError(
                f"'{folder}' is not a model folder, which holds a {_CONFIG}; give one that does"
            )
        return auto.from_pretrained(folder, local_files_only=True)
    if isinstance(source, PathLike) or not _HUB_ID.fullmatch(source):
        raise FileNotFoundError(
            f"no folder '{source}' exists, and that is no name of a model on the Hub, which is "
            "like org/name; look for a typing error"
        )
    try:
        return auto.from_pretrained(source, local_files_only=True)
    except OSError:
        _ask_once(source)
    return auto.from_pretrained(source)


def _ask_once(repo_id: str) -> None:
    """Find out by one request whether the Hub has a config; its client asks six times over."""
    import huggingface_hub

    url = huggingface_hub.hf_hub_url(repo_id, _CONFIG)
    try:
        huggingface_hub.get_hf_file_metadata(url, timeout=10)
    except Exception as error:  # whatever HTTP library the client stands on
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise FileNotFoundError(
            f"no folder '{repo_id}' exists, nor is the config of such a model in the local cache "
            f"or to be had from the Hub ({reason}); look for a typing error"
        ) from error
