"""Writes base/ and tuned/, two checkpoints of a small Llama, to try sparsedelta with; needs no torch and no network.

    python examples/two_checkpoints.py [--folder .]

tuned/ differs from base/ in about one value in a hundred, as after a small training step.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "bfloat16",
    "vocab_size": 256,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
SHARE = 0.01  # of the values that change

Weights = dict[str, np.ndarray]


def make_base(rng: np.random.Generator) -> Weights:
    """Return random weights by name, as uint16 arrays that hold the bits of bf16."""
    wide, narrow = (768, 256), (256, 768)
    projections = {f"self_attn.{name}_proj": (256, 256) for name in "qkvo"}
    mlp = {"mlp.gate_proj": wide, "mlp.up_proj": wide, "mlp.down_proj": narrow}
    weights = {}
    for layer in range(6):
        for name, shape in (projections | mlp).items():
            weights[f"model.layers.{layer}.{name}.weight"] = bf16(rng.normal(0, 0.02, shape))
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"model.layers.{layer}.{name}.weight"] = bf16(np.ones(256))
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = bf16(rng.normal(0, 0.02, (256, 256)))
    return weights | {"model.norm.weight": bf16(np.ones(256))}


def bf16(values: np.ndarray) -> np.ndarray:
    """Return the upper 16 bits of each float32: bf16, rounded toward zero."""
    return (values.astype("<f4").view("<u4") >> 16).astype("<u2")


def tune(weights: Weights, rng: np.random.Generator) -> Weights:
    """Return the weights with a random share of the values moved to a neighbouring bf16 value."""
    return {
        name: np.where(rng.random(bits.shape) < SHARE, bits ^ 1, bits).astype("<u2")
        for name, bits in weights.items()
    }


def save(folder: Path, weights: Weights) -> None:
    """Write a checkpoint folder: model.safetensors and config.json. A model of somebody else is not overwritten."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, bits in weights.items():
        begin, end = end, end + bits.nbytes
        header[name] = {"dtype": "BF16", "shape": bits.shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    parts = [len(text).to_bytes(8, "little"), text, *(bits.tobytes() for bits in weights.values())]
    content, path = b"".join(parts), folder / "model.safetensors"
    if path.exists() and path.read_bytes() != content:
        sys.exit(f"error: '{path}' is not what this script writes; choose another --folder")
    folder.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Write both folders."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path(), help="where to write; default: here")
    folder = parser.parse_args().folder
    rng = np.random.default_rng(0)
    base = make_base(rng)
    save(folder / "base", base)
    save(folder / "tuned", tune(base, rng))
    print(f"written: {folder / 'base'} and {folder / 'tuned'}")


if __name__ == "__main__":
    main()
