"""The kernels for GPUs: on a GPU, and on a CPU by Triton's interpreter (``TRITON_INTERPRET=1``, in the nightly job)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from live.live_helpers import State, copied, same
from safetensors.torch import save_file

import sparsedelta
from sparsedelta.live import fused, patch
from sparsedelta.live.fused import Write, Writes, changed

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.param(
    "cpu",
    marks=[
        pytest.mark.nightly,
        pytest.mark.skipif(not IS_INTERPRETED, reason="needs triton and TRITON_INTERPRET=1"),
    ],
)
on_gpu = pytest.param(
    "cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
    ],
)
DTYPES = (torch.int8, torch.int16, torch.int32, torch.int64)


@pytest.fixture(params=[interpreted, on_gpu])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The device that the kernels run on."""
    if request.param == "cpu":
        from sparsedelta.live import triton_kernels

        for module in (fused, patch):
            monkeypatch.setattr(module, "kernels_for", lambda _: triton_kernels)
    found: str = request.param
    return found


def numbers(n: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(-100, 100, (n,), generator=draw).to(dtype)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_the_kernels_are_in_use() -> None:
    assert fused.kernels_for(torch.device("cuda")) is not None


def test_missing_kernels_are_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "sparsedelta.live.triton_kernels", None)
    monkeypatch.delattr("sparsedelta.live.triton_kernels", raising=False)
    with caplog.at_level("DEBUG", "sparsedelta"):
        assert fused._working_kernels.__wrapped__(torch.device("cpu")) is None
    assert "no kernels for cpu, torch does their work" in caplog.text


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 31, 2048, 2049, 9000])
@pytest.mark.parametrize("share", [0.0, 0.01, 1.0])
def test_what_has_changed(dtype: torch.dtype, n: int, share: float, device: str) -> None:
    before = numbers(n, dtype, 0)
    where = torch.rand(n, generator=torch.Generator().manual_seed(1)) < share
    now = torch.where(where, before + 1, before)
    index, values = changed(before.to(device), now.to(device))
    assert index.dtype == torch.int32
    assert torch.equal(index.cpu().long(), where.nonzero().view(-1))
    assert torch.equal(values.cpu(), now[where])


def test_the_last_bit_and_no_elements(device: str) -> None:
    before = torch.zeros(2048, dtype=torch.int64, device=device)
    now = before.clone()
    now[-1] = torch.iinfo(torch.int64).min
    index, values = changed(before, now)
    assert index.tolist() == [2047]
    assert values.tolist() == [torch.iinfo(torch.int64).min]
    assert [len(one) for one in changed(before[:0], now[:0])] == [0, 0]


@pytest.mark.parametrize("n_tensors", [1, 2, 37])
def test_writing_to_many_tensors(n_tensors: int, device: str) -> None:
    writes, expected = [], []
    for seed in range(n_tensors):
        draw = torch.Generator().manual_seed(seed)
        tensor = numbers(1 + 271 * seed, DTYPES[seed % 4], seed)
        index = torch.randperm(len(tensor), generator=draw)[: seed * 100].sort().values
        index = index if seed % 3 else index.int()
        values = numbers(len(index), tensor.dtype, seed + 1)
        expected.append(tensor.clone().index_copy_(0, index.long(), values))
        writes.append(Write(tensor.to(device), index.to(device), values.to(device)))
    together = Writes(writes, fused.kernels_for(torch.device(device)))
    for _ in range(2):
        together.run()
    assert all(
        torch.equal(write.tensor.cpu(), one) for write, one in zip(writes, expected, strict=True)
    )


def state(seed: int) -> State:
    torch.manual_seed(seed)
    return {
        "half": torch.randn(70, 70).bfloat16(),
        "single": torch.randn(3, 1000),
        "view": torch.randn(90, 50).half(),
        "empty": torch.empty(0, 3),
    }


def test_a_switch_writes_both_deltas(device: str, tmp_path: Path) -> None:
    base = state(0)
    save_file(base, tmp_path / "base.safetensors")
    targets: dict[str | None, State] = {None: base}
    for seed, name in enumerate("ab", 1):
        target = targets[name] = copied(base)
        for key, tensor in state(seed).items():  # many elements change in both deltas
            where = torch.rand(tensor.shape) < 0.4
            target[key][where] = tensor[where]
        save_file(target, tmp_path / name)
        with sparsedelta.diff(tmp_path / "base.safetensors", tmp_path / name) as delta:
            delta.save(tmp_path / f"{name}.sd")
    model: dict[str, Any] = {key: tensor.clone().to(device) for key, tensor in base.items()}
    model["view"] = base["view"].t().contiguous().to(device).t()  # not in order: no kernel
    bank = sparsedelta.DeltaBank(model)
    for name in "ab":
        bank.add(name, tmp_path / f"{name}.sd")
    for active in ("a", "b", "a", None, "b", None, "a", "b"):
        bank.activate(active)
        assert same({key: tensor.cpu() for key, tensor in model.items()}, targets[active])


@pytest.mark.nightly
def test_the_kernels_compile_for_gpus() -> None:
    """Triton compiles without a GPU; the interpreter accepts more than the compiler."""
    pytest.importorskip("triton")
    script = Path(__file__).with_name("compile_kernels.py")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(script)], env=environment, check=True, text=True, stdout=-1
    )
    assert done.stdout.split() == ["compiled"] * 32
