"""Checks that transformers loads what it has saved: for a few architectures it saves names that it does not load."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from torch import nn

from sift_train.loading import hidden_progress_bars

logger = logging.getLogger(__name__)


def check_reads_back(model: nn.Module, folder: Path, variant: str | None = None) -> None:
    """Check that a saved model can be loaded with all its weights. Only the names are read, not the weights.

    Args:
        model: the model; nothing is checked unless it is a model of transformers, not quantized: quantized weights are
            loaded from their values.
        folder: where it was saved.
        variant: with which variant.

    Raises:
        ValueError: transformers finds another tensor than those that it has saved.
    """
    import transformers

    kind: Any = type(model)
    is_quantized = getattr(model, "hf_quantizer", None) is not None
    if not isinstance(model, transformers.PreTrainedModel) or is_quantized:
        return
    try:
        with hidden_progress_bars():
            _, found = kind.from_pretrained(
                folder,
                device_map="meta",
                output_loading_info=True,
                local_files_only=True,
                variant=variant,
            )
    except Exception as error:  # of a conversion that needs the weights, or of the model's own code
        logger.info("not checked whether '%s' can be loaded: %s", folder, error)
        return
    lost = {*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"])}
    unread = {*found["unexpected_keys"]}
    if lost or unread:
        which = f"loads {min(lost)!r} at random" if lost else f"does not load {min(unread)!r}"
        raise ValueError(
            f"transformers {transformers.__version__} does not read back the {kind.__name__} that it saves: it"
            f" {which}, as {len(lost | unread)} tensors in all; make the delta between the model's own files"
            " and a state dict with their names (sparsedelta.diff)"
        )
