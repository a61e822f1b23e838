"""Loads a transformers model from a folder, in the class and the dtype in which it was saved."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from sift_train.basecheck import check_weights

_POSITION_TABLES = ("position_embeddings", "positions_embed", "embed_positions", "wpe")
_FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


@contextmanager
def hidden_progress_bars() -> Iterator[None]:
    """Hide the progress bars of transformers inside the block, if transformers is imported."""
    if "transformers" not in sys.modules:
        yield
        return
    from transformers.utils import logging

    bars: Any = logging  # untyped
    was_shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if was_shown:
            bars.enable_progress_bar()


def check_model_folder(folder: Path) -> None:
    """Check that a folder has the files of a model.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it is a file, or has no ``config.json`` or no safetensors file.
    """
    if not folder.exists():
        raise FileNotFoundError(
            f"the model folder '{folder}' does not exist; give the folder of a model, or a loaded model"
        )
    if not folder.is_dir():
        raise ValueError(f"model '{folder}' is a file; give the folder of a model")
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise ValueError(
            f"'{folder}' is a PEFT adapter; merge it into its model (merge_and_unload) and save that, or give the model"
        )
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"'{folder}' has no config.json, so it is not a model folder; "
            "give a local folder that has one, or a loaded model"
        )
    check_weights(folder)


def check_has_no_code(folder: Path) -> None:
    """Check that transformers knows the model of a folder without the code that the folder brings.

    Raises:
        ValueError: the folder brings code for its model, which is not run.
    """
    import transformers

    known: Any = transformers.CONFIG_MAPPING
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError):
        return  # transformers says what is wrong with it
    if config.get("auto_map") and config.get("model_type") not in known:
        raise ValueError(
            f"the model in '{folder}' needs code that comes with it, which is not run; if you trust it, load the model yourself"
            " with trust_remote_code=True, and give it to sift_train.fit, with base"
        )


def load_model(path: str | PathLike[str]) -> nn.Module:
    """Return the model of a checkpoint folder.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: as ``check_model_folder``, or its config names an architecture that transformers does not have.
    """
    folder = Path(path)
    check_model_folder(folder)
    import transformers  # takes seconds

    check_has_no_code(folder)

    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    names = config.architectures or []
    model_class: Any = getattr(transformers, names[0], None) if names else None
    if model_class is None:
        raise ValueError(
            f"'{folder / 'config.json'}' names the architecture {names[:1]}, which this version "
            "of transformers does not have; load the model yourself and give it to fit"
        )
    dtype = checkpoint_dtype(folder) or "auto"
    model: nn.Module = model_class.from_pretrained(folder, dtype=dtype, local_files_only=True)
    return model


def checkpoint_dtype(folder: Path) -> torch.dtype | None:
    """Return the float dtype of a folder's safetensors files, None if there is none or several."""
    found = set()
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                found.add(_FLOATS.get(file.get_slice(name).get_dtype()))
    found.discard(None)
    return found.pop() if len(found) == 1 else None


def check_positions(model: nn.Module, max_tokens: int) -> None:
    """Check that a model with a table of positions has one for each token.

    Raises:
        ValueError: it has fewer.
    """
    config: Any = model.config
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and name.rpartition(".")[2] in _POSITION_TABLES:
            first = 0 if module.padding_idx is None else module.padding_idx + 1
            most = min(
                module.num_embeddings - first,
                getattr(config, "max_position_embeddings", module.num_embeddings),
            )
            if max_tokens > most:
                raise ValueError(
                    f"max_tokens is {max_tokens}, and the model reads at most {most} tokens, as its table of positions"
                    f" {name!r} has no more; give a smaller number"
                )
