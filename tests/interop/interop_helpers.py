"""Small checkpoints for the tests of foreign forms, and the deltas between them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from helpers import Raw, of_array, write_file

import sparsedelta

# Forms that hold everything a change of BF16 tensors can be, with the settings to test.
EXACT: list[tuple[str, dict[str, str]]] = [
    ("trl-v1", {}),
    ("trl-v2", {"encoding": "gap_delta"}),
    ("trl-v2", {"encoding": "raw"}),
    *(
        ("slime", {"encoding": encoding, "checksum": checksum})
        for encoding in ("xor", "overwrite")
        for checksum in ("blake3", "xxh3-128", "adler32")
    ),
    ("skyrl", {"checksum": "xxh3-128"}),
    ("skyrl", {"checksum": "sha256"}),
    *(("grail", {"version": version}) for version in ("2", "3", "31")),
    *(("pulsept1", {"version": version}) for version in ("1", "2", "3")),
    ("arc2", {}),
]
# Forms that add numbers.
ADDITIVE: list[tuple[str, dict[str, str]]] = [("shira", {}), ("task-vector", {})]


def floats(dtype: str, *shape: int, seed: int = 0) -> Raw:
    """Return a tensor of normal numbers, as a model's weights have them."""
    numbers = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    if dtype == "BF16":
        return of_array(dtype, (numbers.view(np.uint32) >> 16).astype(np.uint16))
    return of_array(dtype, numbers.astype({"F16": np.float16, "F32": np.float32}[dtype]))


def with_bits(tensor: Raw, changes: dict[int, int], width: int = 2) -> Raw:
    """Return a tensor with other bits at flat indices."""
    bits = np.frombuffer(tensor.data, f"<u{width}").copy()
    for index, value in changes.items():
        bits[index] = value
    return tensor.with_data(bits.tobytes())


@dataclass(frozen=True)
class Pair:
    """A base and a target on disk, and the delta between them."""

    base: Path
    target: Path
    delta: Path


def pair(path: Path, old: dict[str, Raw], new: dict[str, Raw]) -> Pair:
    """Write a base and a target, and the delta between them, into a new folder."""
    base = write_file(path / "base" / "model.safetensors", old, {"format": "pt"}).parent
    target = write_file(path / "target" / "model.safetensors", new, {"format": "pt"}).parent
    with sparsedelta.diff(base, target) as delta:
        delta.save(path / "delta.sd")
    return Pair(base, target, path / "delta.sd")


def bf16_pair(path: Path) -> Pair:
    """Return a pair of BF16 checkpoints: a change to NaN, of zero's sign, of the first and last element."""
    w, u, v = floats("BF16", 5, 7), floats("BF16", 3, 4, 5, seed=1), floats("BF16", 9, seed=2)
    w = with_bits(w, {4: 0x0000})
    changed = with_bits(w, {0: 0x3F80, 4: 0x8000, 5: 0x7FC1, 34: 0xFF80})
    old = {"layer.weight": w, "cube": u, "bias": v}
    return pair(path, old, {**old, "layer.weight": changed, "cube": with_bits(u, {59: 1, 20: 7})})


def plain_pair(path: Path, dtype: str = "BF16") -> Pair:
    """Return a pair whose target differs by small numbers in one linear layer."""
    w = floats(dtype, 12, 10)
    width = 4 if dtype == "F32" else 2
    bits = np.frombuffer(w.data, f"<u{width}")
    changed = with_bits(w, {i: int(bits[i]) ^ 1 for i in (3, 50, 51, 119)}, width)
    old = {"proj.weight": w, "norm.weight": floats(dtype, 10, seed=3)}
    return pair(path, old, {**old, "proj.weight": changed})
