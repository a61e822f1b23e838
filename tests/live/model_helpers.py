"""Helpers: tiny transformers models of several kinds, to change and to save."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from live.live_helpers import VIEWS

SIZES = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2,
}  # fmt: skip
GROUPED = SIZES | {"num_key_value_heads": 1}
QWEN = GROUPED | {
    "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8, "num_experts": 4,
    "num_experts_per_tok": 2,
}  # fmt: skip
T5 = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", GROUPED),
    "tied llama": ("LlamaForCausalLM", "LlamaConfig", GROUPED | {"tie_word_embeddings": True}),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", GROUPED | {"num_local_experts": 4}),
    "tied qwen2-moe": (
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        QWEN | {"tie_word_embeddings": True},
    ),
    "bert": ("BertForSequenceClassification", "BertConfig", SIZES),
    "t5": ("T5ForConditionalGeneration", "T5Config", T5),
}


def make(kind: str, *, dtype: torch.dtype = torch.bfloat16) -> Any:
    """Return a model of one of ``KINDS`` with random weights."""
    model, config, sizes = KINDS[kind]
    torch.manual_seed(0)
    return getattr(transformers, model)(getattr(transformers, config)(**sizes)).to(dtype)


def change(model: torch.nn.Module, *, every: int = 7, skip: str = "norm") -> None:
    """Flip the lowest bit of some elements of all parameters, except those with ``skip`` in their names."""
    for name, parameter in model.named_parameters():
        if skip not in name:
            bits = parameter.detach().view(VIEWS[parameter.element_size()])
            bits.view(-1)[::every] ^= 1


def saved(model: Any, path: Path, **options: Any) -> Path:
    model.save_pretrained(path, **options)
    return path
