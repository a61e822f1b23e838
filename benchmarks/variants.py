"""Writes a base that transformers can load, and variants of it; all are fixed by a seed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
from synthetic import CHANGED, ULP_SUCCESS, make_pair, transformer_tensors

from sparsedelta.files.checkpoint import Checkpoint

_BLOCK_ELEMENTS = 1 << 22


def make_base(folder: Path, n_bytes: int) -> Path:
    """Write a Llama-like model of about ``n_bytes`` in bf16 and return its folder."""
    base, target = make_pair(folder, n_bytes)
    shutil.rmtree(target)
    shapes = dict(transformer_tensors(n_bytes))
    vocabulary, hidden = shapes["model.embed_tokens.weight"]
    inner = shapes["model.layers.0.mlp.gate_proj.weight"][0]
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "max_position_embeddings": 2048,
        "num_attention_heads": hidden // 32,
        "num_hidden_layers": sum(name.endswith("q_proj.weight") for name in shapes),
        "num_key_value_heads": hidden // 128,
        "tie_word_embeddings": False,
        "vocab_size": vocabulary,
    }
    (base / "config.json").write_text(json.dumps(config, indent=2))
    return base


def make_variant(base: Path, folder: Path, seed: int, *, changed: float = CHANGED) -> Path:
    """Write a copy of a base of which a share of the values is changed by a few ulps."""
    shutil.copytree(base, folder)
    draw = np.random.default_rng(seed)
    with Checkpoint(folder) as checkpoint:
        places = {
            folder / file.path: [(t.offset, t.spec.n_elements) for t in file.tensors]
            for file in checkpoint.weight_files
        }
    for path, tensors in places.items():
        for offset, n_elements in tensors:
            bits = np.memmap(path, np.uint16, "r+", offset, (n_elements,))
            for start in range(0, n_elements, _BLOCK_ELEMENTS):
                block = bits[start : start + _BLOCK_ELEMENTS]
                where = np.flatnonzero(draw.random(len(block), np.float32) < changed)
                steps = draw.geometric(ULP_SUCCESS, len(where)) * draw.choice([-1, 1], len(where))
                block[where] += steps.astype(np.uint16)
            bits.flush()
    return folder
