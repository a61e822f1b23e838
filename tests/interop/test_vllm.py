"""The patch objects of vLLM, against a receiver that does what vLLM's loader does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import of_array
from interop.interop_helpers import floats, pair, with_bits
from safetensors.torch import load_file

import sparsedelta
from sparsedelta.errors import Corrupt, LossyConversion, StructureMismatch
from sparsedelta.interop.vllm import WeightPatch, from_patches, to_patches

NAN, MINUS_ZERO = 0x7FC0, 0x8000


def loaded(path: Path, patches: list[WeightPatch]) -> dict[str, torch.Tensor]:
    """Return a checkpoint after patches, each a tensor in which NaN marks unchanged elements."""
    state = load_file(path / "model.safetensors")
    for patch in patches:
        assert patch.indices is not None
        flat = torch.full((state[patch.name].numel(),), torch.nan, dtype=patch.dtype)
        flat.index_copy_(0, patch.indices, patch.values)
        new = flat.view(patch.shape)
        old = state[patch.name]
        torch.where(new.isnan(), old, new, out=old)
    return state


def same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(a.view(torch.uint8), other[name].view(torch.uint8)) for name, a in one.items()
    )


def test_there_and_back(tmp_path: Path) -> None:
    old = {"a.weight": floats("BF16", 12, 10), "b": floats("F32", 7), "c": floats("F16", 3, 3)}
    new = dict(old)
    new["a.weight"] = with_bits(old["a.weight"], {0: MINUS_ZERO, 7: 0x3F80, 119: 0x4000})
    new["b"] = with_bits(old["b"], {3: 0x3F800000}, 4)
    given = pair(tmp_path, old, new)
    patches = to_patches(given.delta, base=given.base)
    assert [(p.name, p.dtype, p.shape, len(p.values)) for p in patches] == [
        ("a.weight", torch.bfloat16, (12, 10), 3),
        ("b", torch.float32, (7,), 1),
    ]
    assert same_bits(loaded(given.base, patches), load_file(given.target / "model.safetensors"))
    with from_patches(patches, base=given.base) as delta:
        delta.save(tmp_path / "back.sd")
    sparsedelta.apply(given.base, tmp_path / "back.sd", tmp_path / "out")
    sparsedelta.verify(given.delta, target=tmp_path / "out")


def test_a_new_nan_is_lost(tmp_path: Path) -> None:
    old = {"w": floats("BF16", 8), "i": floats("F32", 4)}
    new = old | {"w": with_bits(old["w"], {1: NAN, 2: 0x4000})}
    given = pair(tmp_path, old, new)
    with pytest.raises(LossyConversion, match="new value is NaN"):
        to_patches(given.delta, base=given.base)
    (patch,) = to_patches(given.delta, base=given.base, lossy=True)
    assert patch.indices is not None
    assert patch.indices.tolist() == [2]


def test_dense_unsorted_and_repeated_patches(tmp_path: Path) -> None:
    old = {"w": floats("BF16", 6), "v": floats("BF16", 2, 2)}
    given = pair(tmp_path, old, old | {"w": with_bits(old["w"], {0: 0x4000})})
    bf16 = torch.bfloat16
    patches = [
        WeightPatch("v", (2, 2), bf16, torch.tensor([1.0, 2, torch.nan, 4])),
        WeightPatch("w", (6,), bf16, torch.tensor([5.0, 6.0]), torch.tensor([4, 1])),
        WeightPatch("w", (6,), bf16, torch.tensor([7.0]), torch.tensor([4], dtype=torch.int32)),
    ]
    with from_patches(patches, base=given.base) as delta:
        delta.save(tmp_path / "x.sd")
    sparsedelta.apply(given.base, tmp_path / "x.sd", tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    before = load_file(given.base / "model.safetensors")
    assert torch.equal(found["v"].nan_to_num(9), torch.tensor([[1.0, 2], [9, 4]], dtype=bf16))
    expected = before["w"].clone()
    expected[1], expected[4] = 6.0, 7.0
    assert torch.equal(found["w"], expected)


def test_patches_that_do_not_fit(tmp_path: Path) -> None:
    old = {"w": floats("BF16", 6)}
    given = pair(tmp_path, old, old | {"w": with_bits(old["w"], {0: 0x4000})})
    one = torch.ones(1)

    def refused(patch: WeightPatch, error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            from_patches([patch], base=given.base)

    index = torch.zeros(1, dtype=torch.long)
    refused(WeightPatch("x", (6,), torch.bfloat16, one, index), StructureMismatch, "'x'")
    refused(WeightPatch("w", (5,), torch.bfloat16, one, index), Corrupt, "shape")
    refused(WeightPatch("w", (6,), torch.float16, one, index), Corrupt, "F16")
    refused(WeightPatch("w", (6,), torch.bfloat16, one, index + 6), Corrupt, "element 6")
    refused(WeightPatch("w", (6,), torch.bfloat16, one * torch.nan, index), Corrupt, "NaN")
    twice = torch.tensor([2, 2])
    refused(WeightPatch("w", (6,), torch.bfloat16, torch.ones(2), twice), Corrupt, "increasing")
    refused(
        WeightPatch("w", (6,), torch.bfloat16, torch.ones(2), index),
        Corrupt,
        "2 values, expected 1",
    )
    refused(WeightPatch("w", (6,), torch.bfloat16, torch.ones(5)), Corrupt, "5 values, expected 6")
    refused(WeightPatch("w", (6,), torch.bfloat16, one, index.float()), Corrupt, "float32")


def test_dense_and_sparse_patches_of_one_tensor(tmp_path: Path) -> None:
    """In order: a dense patch replaces what earlier ones wrote, NaNs included, and later ones write into it."""
    old = {"w": floats("BF16", 2, 3), "f": of_array("F8_E4M3", np.arange(4, dtype=np.uint8))}
    given = pair(tmp_path, old, old | {"w": with_bits(old["w"], {0: 0x4000})})
    bf16, fp8 = torch.bfloat16, torch.float8_e4m3fn

    def sparse(index: int, value: float) -> WeightPatch:
        return WeightPatch("w", (2, 3), bf16, torch.tensor([value]), torch.tensor([index]))

    dense = torch.tensor([1.0, torch.nan, 3, 4, -0.0, 6])
    patches = [
        sparse(0, 7.0),
        WeightPatch("w", (2, 3), bf16, dense),
        sparse(5, 8.0),
        WeightPatch("f", (4,), fp8, torch.tensor([2.0]).to(fp8), torch.tensor([1])),
    ]
    with from_patches(patches, base=given.base) as delta:
        delta.save(tmp_path / "x.sd")
    sparsedelta.apply(given.base, tmp_path / "x.sd", tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    expected = dense.to(bf16).view(2, 3)
    expected[1, 2] = 8.0
    assert torch.equal(found["w"].view(torch.int16), expected.view(torch.int16))
    assert found["f"].float().tolist()[1] == 2.0


def test_random_changes(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    old = {"w": floats("BF16", 200, 100)}
    at = draw.choice(20_000, 500, replace=False)
    values = draw.integers(0, 0x7F80, 500)
    new = {"w": with_bits(old["w"], dict(zip(at.tolist(), values.tolist(), strict=True)))}
    given = pair(tmp_path, old, new)
    patches = to_patches(given.delta, base=given.base)
    assert same_bits(loaded(given.base, patches), load_file(given.target / "model.safetensors"))
