"""Evaluation, checkpoints, resuming, weight decay and trackers of ``fit``."""

from __future__ import annotations

import math
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from train_helpers import make_inputs, make_net, same_bits, snapshot, square_loss

import sparsedelta
from sift_train import SIFT, FitConfig, FitResult, StepReport, fit, grouped_parameters
from sift_train.batches import BatchWindows
from sparsedelta.ops.scores import recorded_scores


class Stop(Exception):
    """Simulates a crash."""


class Noisy(Dataset[Tensor]):
    """Data that draws from every random generator for each item."""

    def __len__(self) -> int:
        return 22

    def __getitem__(self, at: int) -> Tensor:
        noise = torch.randn(12) + float(np.random.randn()) + random.random()
        return torch.full((12,), at / 10) + noise


N_STATISTICS = 2 * 16 + 1  # of a DropoutNet


class DropoutNet(nn.Module):
    """A net with running statistics and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 16)
        self.norm = nn.BatchNorm1d(16)
        self.drop = nn.Dropout(0.3)
        self.last = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.drop(self.norm(self.first(x))))
        return out


def make_noisy(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return DropoutNet().to(dtype)


def check_resumed(
    folder: Path, config: FitConfig, stop_at: int, *, own_generator: bool,
    dtype: torch.dtype = torch.bfloat16, evaluate: Callable[[nn.Module], float] | None = None,
    resumed_config: FitConfig | None = None,
) -> FitResult:  # fmt: skip
    """Check that a training that was cut after a step and resumed ends in the bits of a whole one; return its result."""

    def run(output: str, model: nn.Module, config: FitConfig = config, **more: Any) -> FitResult:
        data = loader(own_generator=own_generator)
        return fit(
            model, data, output=folder / output, loss=typed_loss, config=config, evaluate=evaluate, **more
        )  # fmt: skip

    def fail(report: StepReport) -> None:
        if report.step == stop_at + 1:
            raise Stop

    whole = make_noisy(dtype)
    expected = run("whole.sd", whole, run_dir=folder / "other")
    with pytest.raises(Stop):
        run("cut.sd", make_noisy(dtype), run_dir=folder / "run", on_step=fail)
    torch.manual_seed(99)
    resumed = make_noisy(dtype)
    own = resumed_config or config
    result = run("resumed.sd", resumed, own, run_dir=folder / "run", resume=True)
    assert result.losses == expected.losses
    assert all(same_bits(v, resumed.state_dict()[n]) for n, v in snapshot(whole).items())
    if resumed_config is None:  # a delta names the settings of its run
        assert (folder / "resumed.sd").read_bytes() == (folder / "whole.sd").read_bytes()
    return result


def loader(*, own_generator: bool) -> DataLoader[Tensor]:
    generator = torch.Generator().manual_seed(5) if own_generator else None
    return DataLoader(Noisy(), batch_size=4, shuffle=True, generator=generator)


def typed_loss(model: nn.Module, batch: Tensor) -> Tensor:
    dtype = next(model.parameters()).dtype
    loss: Tensor = model(batch.to(dtype)).float().square().mean()
    return loss


@pytest.mark.parametrize("stop_at", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_run_ends_in_the_same_bits(
    tmp_path: Path, dtype: torch.dtype, stop_at: int
) -> None:
    """Three windows per pass, four micro-batches peeked, a checkpoint at every step."""
    config = FitConfig(
        sparse_rate=0.2,
        sparse_module=["weight"],
        exception="bias",
        accumulation=2,
        lr=1e-2,
        weight_decay=0.1,
        max_steps=6,
        save_every=1,
        eval_every=2,
    )
    result = check_resumed(
        tmp_path, config, stop_at, own_generator=stop_at % 2 == 0, dtype=dtype,
        evaluate=lambda model: float(torch.randn(())),
    )  # fmt: skip
    assert [e.step for e in result.evaluations] == [2, 4, 6]
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["step-00000006"]
    mask = os.umask(0)
    os.umask(mask)
    for path in (tmp_path / "run").rglob("*"):  # others can resume where the umask lets them read
        assert path.stat().st_mode & 0o444 == 0o444 & ~mask, path


def test_a_checkpoint_of_other_settings_or_another_base_is_refused(tmp_path: Path) -> None:
    def run(model: nn.Module, lr: float) -> None:
        config = FitConfig(lr=lr, save_every=2)
        places: dict[str, Any] = {"output": tmp_path / "d.sd", "run_dir": tmp_path / "run"}
        fit(
            model,
            make_inputs(2),
            loss=square_loss,
            config=config,
            resume=True,
            overwrite=True,
            **places,
        )

    run(make_net(), 1e-2)  # no checkpoint yet: starts from the beginning
    with pytest.raises(ValueError, match=r"has lr 0\.01, this one 0\.02"):
        run(make_net(), 2e-2)
    with pytest.raises(
        ValueError, match="does not hold the weights with which the saved run began"
    ):
        run(make_net(seed=1), 1e-2)


@pytest.mark.parametrize(("selection", "n_read"), [("random", [1, 2, 3]), ("gradient", [2, 2, 3])])
def test_only_a_choice_by_gradients_reads_ahead(
    tmp_path: Path, selection: str, n_read: list[int]
) -> None:
    given: list[Tensor] = []

    class Counted(list[Tensor]):
        def __iter__(self) -> Iterator[Tensor]:
            for batch in super().__iter__():
                given.append(batch)
                yield batch

    seen: list[int] = []
    fit(
        make_net(), Counted(make_inputs(3)), output=tmp_path / "d.sd", loss=square_loss,
        config=FitConfig(selection=selection, selection_batches=2), on_step=lambda _: seen.append(len(given)),
    )  # fmt: skip
    assert seen == n_read


def test_resume_and_save_every_need_a_folder(tmp_path: Path) -> None:
    for given, name in (({"resume": True}, "resume"), ({}, "save_every")):
        config = FitConfig(save_every=None if given else 1)
        arguments: dict[str, Any] = {"output": tmp_path / "d.sd", "loss": square_loss, **given}
        with pytest.raises(ValueError, match=f"{name} needs a folder"):
            fit(make_net(), make_inputs(1), config=config, **arguments)


def test_an_evaluation_before_the_first_step_is_that_of_the_base(tmp_path: Path) -> None:
    def run(name: str, model: nn.Module, *, before: bool) -> FitResult:
        return fit(
            model,
            make_inputs(4),
            output=tmp_path / name,
            loss=square_loss,
            config=FitConfig(eval_before=before),
            evaluate=lambda m: {"norm": sum(float(p.square().sum()) for p in m.parameters())},
        )

    model = make_net()
    base = sum(float(p.detach().square().sum()) for p in model.parameters())
    result = run("with.sd", model, before=True)
    plain = run("without.sd", make_net(), before=False)
    assert [e.step for e in result.evaluations] == [0, 4]
    assert result.evaluations[0].first == base != result.evaluations[1].first
    assert result.evaluations[1:] == plain.evaluations
    assert result.losses == plain.losses
    info = sparsedelta.inspect(tmp_path / "with.sd").info
    scores = recorded_scores(info)
    assert scores is not None
    assert (scores.before_step, scores.after_step) == (0, 4)
    assert scores.values == (("norm", base, result.evaluations[1].first),)


def test_evaluation_is_without_gradients_dropout_and_traces(tmp_path: Path) -> None:
    def run(evaluate: Callable[[nn.Module], float] | None) -> tuple[float, ...]:
        config = FitConfig(eval_every=1 if evaluate else None)
        return fit(
            make_noisy(torch.float32),
            loader(own_generator=False),
            output=tmp_path / "d.sd",
            loss=typed_loss,
            config=config,
            evaluate=evaluate,
            overwrite=True,
        ).losses

    def look(model: nn.Module) -> float:
        assert not torch.is_grad_enabled()
        assert not any(module.training for module in model.modules())
        return random.random() + float(np.random.rand()) + float(torch.rand(()))

    assert run(look) == run(None)


@pytest.mark.parametrize("rate", [0.2, 1.0])
def test_decay_toward_the_base_forgets_the_training(rate: float) -> None:
    """With lr x decay of 1 the step leaves original + AdamW's own move."""
    model, plain = make_net(), make_net()
    batch = make_inputs(1)[0]
    with SIFT(model, rate, "first.weight", lr_transfer=False) as sift:
        optimizer = torch.optim.AdamW(grouped_parameters(sift, 1.0, decay_to="base"), lr=1e-2)
        for _ in range(2):
            optimizer.zero_grad()
            square_loss(model, batch).backward()
            optimizer.step()
        part = sift.sparse_mapping["first.weight"]
        moved = part.master.detach().clone()
        for group in optimizer.param_groups:
            group["lr"], group["base_decay"] = 1e-12, 1e12
        optimizer.step()
        original = plain.first.weight.detach().flatten()[part.flat_index]
        assert not torch.allclose(moved, original, atol=1e-4)
        assert torch.allclose(part.master, original, atol=1e-7)


def test_decay_toward_the_base_is_adamw_with_the_base_added_back() -> None:
    plain, ours = make_net(), make_net()
    start = [p.detach().clone() for p in plain.parameters() if p.dim() > 1]
    with SIFT(ours, 1.0, ["first.weight", "last.weight"]) as sift:
        optimizer = torch.optim.AdamW(grouped_parameters(sift, 0.5, decay_to="base"), lr=1e-2)
        matrices = [plain.first.weight, plain.last.weight]
        plain_optimizer = torch.optim.AdamW(matrices, lr=1e-2, weight_decay=0.5)
        for batch in make_inputs(4):
            for model, each in ((plain, plain_optimizer), (ours, optimizer)):
                each.zero_grad()
                square_loss(model, batch).backward()
                each.step()
            with torch.no_grad():
                for weight, first in zip(matrices, start, strict=True):
                    weight.add_(first, alpha=1e-2 * 0.5)
    assert torch.allclose(plain.first.weight, ours.first.weight, atol=1e-6)
    assert torch.allclose(plain.last.weight, ours.last.weight, atol=1e-6)


def test_the_trackers_get_the_reports(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]
        EventAccumulator,
    )

    result = fit(
        make_net(),
        make_inputs(3),
        output=tmp_path / "d.sd",
        loss=square_loss,
        config=FitConfig(trackers=("tensorboard",)),
        evaluate=lambda model: 0.5,
        run_dir=tmp_path / "run",
    )
    events = EventAccumulator(str(tmp_path / "run" / "sift")).Reload()
    assert [e.value for e in events.Scalars("loss")] == pytest.approx(result.losses)
    assert [e.step for e in events.Scalars("eval/value")] == [3]


@pytest.mark.parametrize("is_terminal", [True, False])
def test_steps_and_values_are_shown(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    is_terminal: bool,
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("FORCE_COLOR" if is_terminal else "NO_COLOR", "1")
    fit(
        make_net(),
        make_inputs(3),
        output=tmp_path / "d.sd",
        loss=square_loss,
        evaluate=lambda model: {"accuracy": 0.25},
        progress=True,
    )
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "accuracy 0.2500" in shown.err
    assert ("3/3" in shown.err) == is_terminal
    lines = [f"step {step} of 3: loss" in shown.err for step in (1, 2, 3)]
    assert lines == [not is_terminal, False, not is_terminal]  # not two within ten seconds


def test_an_optimizer_of_ones_own(tmp_path: Path) -> None:
    made: list[torch.optim.Optimizer] = []

    def make(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        made.append(torch.optim.NAdam(groups))
        return made[0]

    config = FitConfig(optimizer=make, lr=1e-2, schedule="constant", warmup=0.0)
    result = fit(
        make_net(), make_inputs(3), output=tmp_path / "d.sd", loss=square_loss, config=config
    )
    assert made[0].param_groups[0]["lr"] == 1e-2
    assert result.nnz > 0
    assert config.as_json()["optimizer"] == "custom"


def test_the_curve_in_the_delta_is_short(tmp_path: Path) -> None:
    config = FitConfig(max_steps=1001)
    model, data = nn.Linear(2, 2), [torch.ones(1, 2)]
    result = fit(model, data, output=tmp_path / "d.sd", loss=square_loss, config=config)
    with sparsedelta.load(result.delta) as delta:
        curve: Any = delta.info["losses"]
    assert len(curve) == math.ceil(1001 / 3)
    assert curve[-1] == [1001, pytest.approx(sum(result.losses[-2:]) / 2, abs=1e-6)]
    assert curve[0] == [3, pytest.approx(sum(result.losses[:3]) / 3, abs=1e-6)]


def test_windows_resume_at_a_saved_position() -> None:
    batches = BatchWindows(list(range(7)), 2)
    assert batches.peek(3) == [0, 1, 2]
    windows = batches.windows()
    assert [next(windows) for _ in range(2)] == [[0, 1], [2, 3]]
    again = BatchWindows(list(range(7)), 2)
    again.go_to(batches.place())
    rest = again.windows()
    assert [next(rest) for _ in range(4)] == [[4, 5], [6], [0, 1], [2, 3]]


def test_an_error_in_a_batch_names_its_step(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 2))
    batches = [torch.tensor([1, 2]), torch.tensor([3, 8])]
    with pytest.raises(IndexError) as told:
        fit(model, batches, output=tmp_path / "d.sd", loss=square_loss, config=FitConfig(lr=1e-3))
    assert told.value.__notes__ == ["This was in a batch of step 2."]
