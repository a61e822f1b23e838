"""Writes a sharded bf16 checkpoint with a transformer's tensors, and a changed copy of it.

The bytes depend only on the size and a seed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from sparsedelta.format.safetensors_header import HeaderEntry, render_header

CHANGED = 0.01
N_SHARDS = 4
ULP_SUCCESS = 0.7  # share of changes by one ulp; the same share of the others by two ulps, and so on, as in training
_BLOCK_ELEMENTS = 1 << 20
_BYTES = 2

Bits = npt.NDArray[np.uint16]
Tensor = tuple[str, tuple[int, ...]]


def make_pair(folder: Path, n_bytes: int, changed: float = CHANGED) -> tuple[Path, Path]:
    """Write ``base`` and ``target`` of about ``n_bytes`` each below ``folder``, and return both.

    Args:
        folder: created if missing.
        n_bytes: size of each checkpoint.
        changed: share of the elements that differ.
    """
    base, target = folder / "base", folder / "target"
    tensors = transformer_tensors(n_bytes)
    shards = [tensors[i::N_SHARDS] for i in range(N_SHARDS)]
    for path in (base, target):
        path.mkdir(parents=True)
        _write_index(path, shards)
        config = {"architectures": ["LlamaForCausalLM"], "torch_dtype": "bfloat16"}
        (path / "config.json").write_text(json.dumps(config, indent=2))
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda i: _write_shard(base, target, i, shards[i], changed), range(N_SHARDS)))
    return base, target


def transformer_tensors(n_bytes: int) -> list[Tensor]:
    """Return names and shapes of a Llama-like model of about ``n_bytes`` in bf16."""
    hidden = 4096 if n_bytes >= 4e9 else 2048 if n_bytes >= 1e9 else 512 if n_bytes >= 1e8 else 128
    vocabulary, inner, narrow = 16 * hidden, hidden * 11 // 4, hidden // 4
    tensors: list[Tensor] = [("model.embed_tokens.weight", (vocabulary, hidden))]
    layer = {
        "self_attn.q_proj.weight": (hidden, hidden),
        "self_attn.k_proj.weight": (narrow, hidden),
        "self_attn.v_proj.weight": (narrow, hidden),
        "self_attn.o_proj.weight": (hidden, hidden),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }
    layer_bytes = _BYTES * sum(math.prod(shape) for shape in layer.values())
    outside = 2 * _BYTES * vocabulary * hidden
    for number in range(max(1, round((n_bytes - outside) / layer_bytes))):
        tensors += [(f"model.layers.{number}.{name}", shape) for name, shape in layer.items()]
    return [*tensors, ("model.norm.weight", (hidden,)), ("lm_head.weight", (vocabulary, hidden))]


def _write_index(folder: Path, shards: list[list[Tensor]]) -> None:
    total = _BYTES * sum(math.prod(shape) for shard in shards for _, shape in shard)
    weight_map = {name: _file_name(i) for i, shard in enumerate(shards) for name, _ in shard}
    index: dict[str, Any] = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def write_tensors(
    old: BinaryIO, new: BinaryIO, tensors: list[Tensor], seed: int, changed: float = CHANGED
) -> None:
    """Write two files of bf16 tensors: random values, and a copy with a share changed by some ulps."""
    rng = np.random.default_rng(seed)
    entries, end = [], 0
    for name, shape in tensors:
        begin, end = end, end + _BYTES * math.prod(shape)
        entries.append(HeaderEntry(name, "BF16", shape, begin, end))
    header = render_header({"format": "pt"}, entries)
    for file in (old, new):
        file.write(len(header).to_bytes(8, "little") + header)
    for before, after in _blocks(rng, end // _BYTES, changed):
        old.write(before.data)
        new.write(after.data)


def _write_shard(
    base: Path, target: Path, number: int, tensors: list[Tensor], changed: float
) -> None:
    name = _file_name(number)
    with open(base / name, "xb") as old, open(target / name, "xb") as new:
        write_tensors(old, new, tensors, number, changed)


def _blocks(
    rng: np.random.Generator, n_elements: int, changed: float
) -> Iterator[tuple[Bits, Bits]]:
    for start in range(0, n_elements, _BLOCK_ELEMENTS):
        n = min(_BLOCK_ELEMENTS, n_elements - start)
        values = rng.standard_normal(n, np.float32) * np.float32(0.02)
        before = (values.view(np.uint32) >> 16).astype(np.uint16)
        after = before.copy()
        positions = np.flatnonzero(rng.random(n, np.float32) < changed)
        steps = rng.geometric(ULP_SUCCESS, len(positions)) * rng.choice([-1, 1], len(positions))
        after[positions] += steps.astype(np.uint16)
        yield before, after


def _file_name(number: int) -> str:
    return f"model-{number + 1:05d}-of-{N_SHARDS:05d}.safetensors"
