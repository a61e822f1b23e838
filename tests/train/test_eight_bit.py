"""An optimizer with 8-bit state trains the masters; skipped if the package is missing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from train_helpers import same_bits, snapshot

from sift_train import SIFT, FitConfig, StepReport, fit, plan

WIDTH, K = 128, 4916  # rate 0.3 of a matrix; bitsandbytes keeps state below 4096 in 32 bits

bitsandbytes: Any = pytest.importorskip("bitsandbytes")


class Stop(Exception):
    """Simulates a crash."""


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))


def make_batches(n: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(8, WIDTH, generator=generator) for _ in range(n)]


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    loss: Tensor = (model(batch) - batch).square().mean()
    return loss


def state_bytes(optimizer: torch.optim.Optimizer) -> Iterator[tuple[int, int]]:
    """Yield the bytes of the moments and the number of components of each master."""
    for master, state in optimizer.state.items():
        tensors = [v for v in state.values() if isinstance(v, Tensor) and v.numel() == K]
        yield sum(t.numel() * t.element_size() for t in tensors), master.numel()


def test_a_step_changes_the_chosen_weights_with_two_bytes_of_state() -> None:
    model = make_model()
    before = snapshot(model)
    batches = make_batches(20)
    with SIFT(model, 0.3, "weight") as sift:
        optimizer = bitsandbytes.optim.AdamW8bit(sift.parameters_in_optimizer(), lr=1e-2)
        sift.attach(optimizer)
        losses = []
        for batch in batches:
            optimizer.zero_grad()
            loss = loss_of(model, batch)
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        assert list(state_bytes(optimizer)) == [(2 * K, K)] * 2
        for name, part in sift.sparse_mapping.items():
            changed = (before[name] != model.get_parameter(name)).flatten().nonzero().flatten()
            assert set(changed.tolist()) <= set(part.flat_index.tolist())
            assert len(changed) > 0.99 * K
            assert same_bits(part.data, model.get_parameter(name).view(-1)[part.flat_index])
        assert sum(losses[-5:]) < 0.95 * sum(losses[:5])
        planned = plan(model, 0.3, sparse_module="weight", optimizer="adamw-8bit")
        assert planned.optimizer_bytes == sum(n for n, _ in state_bytes(optimizer))


def test_a_run_is_resumed_bit_for_bit(tmp_path: Path) -> None:
    config = FitConfig(
        sparse_rate=0.3,
        optimizer=lambda groups: bitsandbytes.optim.AdamW8bit(groups),
        lr=1e-2,
        weight_decay=0.1,
        max_steps=6,
        save_every=1,
    )

    def run(name: str, **more: Any) -> bytes:
        result = fit(
            make_model(),
            make_batches(3),
            output=tmp_path / name,
            loss=loss_of,
            config=config,
            **more,
        )
        return result.delta.read_bytes()

    def fail(report: StepReport) -> None:
        if report.step == 4:
            raise Stop

    whole = run("whole.sd", run_dir=tmp_path / "other")
    with pytest.raises(Stop):
        run("cut.sd", run_dir=tmp_path / "run", on_step=fail)
    assert run("resumed.sd", run_dir=tmp_path / "run", resume=True) == whole
