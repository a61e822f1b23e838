"""Helpers: small random models of families whose checkpoints differ from the module in names, shapes or layout."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
import transformers

# From a class to what its conversion does.
FAMILIES = {
    "MixtralForCausalLM": "experts merged and fused",
    "Qwen2MoeForCausalLM": "experts merged and fused",
    "Qwen3MoeForCausalLM": "experts merged and fused",
    "PhimoeForCausalLM": "experts merged and fused, renamed",
    "OlmoHybridForCausalLM": "convolutions joined",
    "NomicBertForMaskedLM": "qkv split",
    "Kimi_K25ForConditionalGeneration": "qkv split and permuted",
    "GPTNeoXForCausalLM": "renamed",
    "ViTForImageClassification": "renamed",
    "Gemma3ForConditionalGeneration": "renamed",
    "PaliGemmaForConditionalGeneration": "renamed",
    "LlavaForConditionalGeneration": "renamed",
    "Qwen2VLForConditionalGeneration": "renamed",
    "Mistral3ForConditionalGeneration": "renamed",
    "ShieldGemma2ForImageClassification": "prefixes of a model inside another",
}

SIZES: dict[str, int | tuple[int, ...]] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "embedding_size"), 64),
    **dict.fromkeys(("encoder_hidden_size", "word_embed_proj_dim", "out_hidden_size"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "d_ff"), 96),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 96),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth"), 2),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    "num_key_value_heads": 2, "head_dim": 16, "d_kv": 16, "projection_dim": 32, "vocab_size": 160,
    "moe_intermediate_size": 48, "shared_expert_intermediate_size": 48,
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    "num_experts_per_tok": 2, "moe_k": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    "max_position_embeddings": 64, "n_positions": 64, "q_lora_rank": 16, "kv_lora_rank": 16,
    "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16, "image_size": 28, "patch_size": 14,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "state_size": 8, "mamba_d_state": 8, "mamba_expand": 2,
    "num_nextn_predict_layers": 0, "num_feat_extract_layers": 2, "conv_dim": (32, 32),
    "conv_kernel": (3, 3), "conv_stride": (2, 2), "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "image_token_id": 5, "image_token_index": 5, "video_token_id": 6, "video_token_index": 6,
    "audio_token_id": 7, "vocab_size_per_layer_input": 160, "hidden_size_per_layer_input": 16,
}  # fmt: skip


# Sizes that depend on others in a way of the architecture's own.
OWN_SIZES: dict[str, dict[str, Any]] = {
    "BambaForCausalLM": {"mamba_n_heads": 8, "mamba_d_head": 16},
    "GraniteMoeHybridForCausalLM": {"mamba_n_heads": 8, "mamba_d_head": 16},
    "EsmcForMaskedLM": {"num_key_value_heads": 4},
    "GPTNeoForCausalLM": {"attention_types": [[["global", "local"], 1]], "attention_layers": ["global", "local"]},
    "LagunaForCausalLM": {"num_attention_heads_per_layer": [4, 4]},
    "Mamba2ForCausalLM": {"num_heads": 8},
    "XLNetLMHeadModel": {"d_head": 16},
    "ZayaForCausalLM": {"num_experts_per_tok": 1},
}  # fmt: skip
# Whole configurations, of architectures whose layers differ.
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "Gemma4ForCausalLM": {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "global_head_dim": 32, "vocab_size": 160,
        "vocab_size_per_layer_input": 160, "hidden_size_per_layer_input": 16, "num_kv_shared_layers": 0,
        "layer_types": ["sliding_attention", "full_attention"],
    },
}  # fmt: skip
_ALSO_IF_NONE = ("vocab_size", "head_dim", "num_key_value_heads")


def make_small(name: str, **sizes: int) -> Any:
    """Return a model of a class of transformers in bfloat16, with random weights and few of them."""
    torch.manual_seed(0)
    cls = getattr(transformers, name)
    if given := CONFIGURATIONS.get(name):
        config = cls.config_class(**given, **sizes)
    else:
        config = _shrink(cls.config_class(), SIZES | OWN_SIZES.get(name, {}) | sizes)
    model = cls(config).to(torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            # Norms and biases, or memory that was never written.
            if not parameter.float().std() > 0:
                parameter.copy_(torch.rand(parameter.shape) + 0.5)
    return model


def _shrink(config: Any, sizes: Mapping[str, Any]) -> Any:
    vars(config).pop("_heterogeneity_spec", None)  # sizes of layers that are not there
    for key in {"_out_features", "_out_indices"} & vars(config).keys():  # likewise
        setattr(config, key, None)
    for key, size in sizes.items():
        with suppress(Exception):  # a size that is computed from others, or differs between layers
            given = getattr(config, key)
            if isinstance(given, tuple | list) and isinstance(size, int):
                setattr(config, key, [size] * len(given))
            elif isinstance(given, int | tuple | list) or (given is None and key in _ALSO_IF_NONE):
                setattr(config, key, size)
    for key in ("layer_types", "mlp_layer_types"):
        kinds = getattr(config, key, None)
        if isinstance(kinds, list):
            with suppress(Exception):
                setattr(config, key, [*dict.fromkeys(kinds), kinds[0]][:2])
    for inner in vars(config).values():
        if isinstance(inner, transformers.PretrainedConfig):
            _shrink(inner, sizes)
    return config


def step(model: torch.nn.Module, *, share: float = 2e-4) -> None:
    """Add noise to all parameters, of a share of their standard deviation, as a small training step does."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(parameter.float() + noise * parameter.float().std() * share)
