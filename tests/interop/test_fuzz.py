"""Damaged files of every form: each gives an error of this package, or a result; nothing else."""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from helpers import of_array, write, write_file
from interop.interop_helpers import ADDITIVE, EXACT, plain_pair
from onnx import TensorProto, helper, numpy_helper

import sparsedelta
from sparsedelta.errors import SparseDeltaError
from sparsedelta.interop.mergekit import read_configuration

N_DAMAGED = int(os.environ.get("SPARSEDELTA_MUTANTS", 60))
INTERESTING = (0, 1, 0x20, 0x22, 0x2C, 0x30, 0x39, 0x5B, 0x7B, 0x7D, 0x7F, 0x80, 0xFF)


def damaged(content: bytes, draw: random.Random) -> bytes:
    """Return a content with one part changed, removed, repeated or cut off."""
    data = bytearray(content)
    at = draw.randrange(len(data))
    match draw.randrange(5):
        case 0:
            data[at] = draw.choice(INTERESTING)
        case 1:
            data[at] ^= 1 << draw.randrange(8)
        case 2:
            del data[at : at + draw.randrange(1, 9)]
        case 3:
            data[at:at] = data[at : at + draw.randrange(1, 9)]
        case _:
            del data[at:]
    return bytes(data)


@pytest.mark.parametrize("case", [*EXACT, *ADDITIVE], ids=str)
def test_damaged_files(case: tuple[str, dict[str, str]], tmp_path: Path) -> None:
    given = plain_pair(tmp_path)
    whole = tmp_path / "whole"
    sparsedelta.convert(given.delta, whole, base=given.base, write_as=case[0], settings=case[1])
    draw = random.Random(str(case))
    n_refused = 0
    for number in range(N_DAMAGED):
        copy = tmp_path / f"copy-{number}"
        (shutil.copytree if whole.is_dir() else shutil.copy)(whole, copy)
        file = draw.choice(sorted(copy.rglob("*"))) if copy.is_dir() else copy
        file.write_bytes(damaged(file.read_bytes(), draw))
        try:
            sparsedelta.apply(given.base, copy, tmp_path / f"out-{number}")
        except (SparseDeltaError, OSError):
            n_refused += 1
            assert not (tmp_path / f"out-{number}").exists()
    assert n_refused >= N_DAMAGED // 4


def save_pt(path: Path, numbers: np.ndarray) -> None:
    torch.save({"a": {"w": torch.from_numpy(numbers)}, "b": torch.ones(20).bfloat16()}, path)


def save_onnx(path: Path, numbers: np.ndarray) -> None:
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [60]) for n in "xy"]
    node = helper.make_node("Add", ["x", "w"], ["y"])
    weights = [numpy_helper.from_array(numbers, "w"), numpy_helper.from_array(numbers * 2, "v")]
    onnx.save(helper.make_model(helper.make_graph([node], "g", ends[:1], ends[1:], weights)), path)


def save_gguf(path: Path, numbers: np.ndarray) -> None:
    info = b"".join(
        struct.pack("<Q1sIQIQ", 1, name, 1, 60, 0, offset)
        for name, offset in ((b"v", 0), (b"w", 256))
    )
    texts = struct.pack("<Q1sIIQ", 1, b"t", 9, 8, 2) + struct.pack("<Q3sQ2s", 3, b"abc", 2, b"de")
    header = b"GGUF" + struct.pack("<IQQ", 3, 2, 1) + texts + info
    rest = numbers.tobytes() + bytes(16) + (numbers * 2).tobytes()
    path.write_bytes(header + bytes(-len(header) % 32) + rest)


@pytest.mark.parametrize("save", [save_pt, save_onnx, save_gguf])
def test_damaged_files_that_are_not_safetensors(
    save: Callable[[Path, np.ndarray], None], tmp_path: Path
) -> None:
    """As base, a damaged file is refused or opened; as target, it is refused or comes back exactly."""
    suffix = save.__name__.removeprefix("save_")
    base, bad, back = (tmp_path / f"{name}.{suffix}" for name in ("base", "bad", "back"))
    numbers = np.arange(60, dtype=np.float32)
    save(base, numbers)
    content = base.read_bytes()
    draw = random.Random(suffix)
    n_exact = 0
    for _ in range(N_DAMAGED):
        bad.write_bytes(damaged(content, draw))
        try:
            sparsedelta.convert(bad, tmp_path / "x.sd", base=base, overwrite=True)
        except (SparseDeltaError, OSError):
            continue
        sparsedelta.convert(tmp_path / "x.sd", back, base=base, write_as="original", overwrite=True)
        assert back.read_bytes() == bad.read_bytes()
        n_exact += 1
        sparsedelta.convert(base, tmp_path / "x.sd", base=bad, overwrite=True)
    assert 0 < n_exact < N_DAMAGED


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_damaged_checkpoints_of_torch_distributed(tmp_path: Path) -> None:
    from torch.distributed.checkpoint.state_dict_saver import save

    base, bad, back = tmp_path / "base", tmp_path / "bad", tmp_path / "back"
    save({"m": {"w": torch.arange(60.0)}}, checkpoint_id=base, no_dist=True)
    draw = random.Random(0)
    n_exact = 0
    for _ in range(N_DAMAGED):
        shutil.rmtree(bad, ignore_errors=True)
        shutil.rmtree(back, ignore_errors=True)
        shutil.copytree(base, bad)
        file = bad / draw.choice([".metadata", ".metadata", "__0_0.distcp"])
        file.write_bytes(damaged(file.read_bytes(), draw))
        try:
            sparsedelta.convert(bad, tmp_path / "x.sd", base=base, overwrite=True)
        except (SparseDeltaError, OSError):
            continue
        sparsedelta.convert(tmp_path / "x.sd", back, base=base, write_as="original")
        assert {p.name: p.read_bytes() for p in back.iterdir()} == {
            p.name: p.read_bytes() for p in bad.iterdir()
        }
        n_exact += 1
    assert n_exact > N_DAMAGED // 4


def test_damaged_adapters(tmp_path: Path) -> None:
    given = plain_pair(tmp_path)
    adapter = tmp_path / "adapter"
    ones = {"A": (2, 10), "B": (12, 2)}
    tensors = {
        f"base_model.model.proj.lora_{n}.weight": of_array("F32", np.ones(shape, "f4"))
        for n, shape in ones.items()
    }
    write_file(adapter / "adapter_model.safetensors", tensors, {"format": "pt"})
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 2, "rank_pattern": {"proj": 2}}
    write(adapter / "adapter_config.json", json.dumps(config).encode())
    draw = random.Random(0)
    n_refused = 0
    for number in range(N_DAMAGED):
        copy = tmp_path / f"copy-{number}"
        shutil.copytree(adapter, copy)
        file = draw.choice(sorted(copy.iterdir()))
        file.write_bytes(damaged(file.read_bytes(), draw))
        try:
            sparsedelta.apply(given.base, copy, tmp_path / f"out-{number}")
        except (SparseDeltaError, OSError):
            n_refused += 1
            assert not (tmp_path / f"out-{number}").exists()
    assert N_DAMAGED > n_refused > N_DAMAGED // 4


CONFIGURATION = b"""merge_method: ties
base_model: base/
parameters: {normalize: true, lambda: 0.5}
models:
  - model: a.sd
    parameters: {weight: 0.7, density: 0.5}
  - {model: "b.sd", parameters: {weight: [{value: 1e-1}]}}
dtype: !!str float32
out_dtype: bfloat16
"""


def test_damaged_configurations(tmp_path: Path) -> None:
    draw = random.Random(0)
    n_refused = 0
    for _ in range(5 * N_DAMAGED):
        (tmp_path / "merge.yml").write_bytes(damaged(damaged(CONFIGURATION, draw) or b"-", draw))
        try:
            read_configuration(tmp_path / "merge.yml")
        except ValueError:
            n_refused += 1
    assert n_refused > N_DAMAGED
