"""Early stopping: when a run ends, and the weights of the best evaluation that it keeps."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_loop import check_resumed, loader, make_noisy, typed_loss
from torch import Tensor, nn
from train_helpers import make_inputs, make_net, same_bits, snapshot, square_loss

import sparsedelta
from sift_train import Evaluation, FitConfig, StepReport, fit


@pytest.mark.parametrize(("name", "higher"), [("loss", True), ("loss", False), ("accuracy", True)])
def test_patience_warns_of_a_loss_that_should_rise(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, higher: bool
) -> None:
    fit(
        make_net(),
        make_inputs(2),
        output=tmp_path / "d.sd",
        loss=square_loss,
        config=FitConfig(eval_every=1, patience=2, higher_is_better=higher),
        evaluate=lambda model: {name: 1.0},
    )
    warned = [each for each in caplog.messages if "higher_is_better" in each]
    assert len(warned) == (name == "loss" and higher)


@pytest.mark.parametrize(
    ("found", "higher", "n_steps"),
    [
        ([1.0, 2.0, 2.0, 1.5, 9.0], True, 4),
        ([5.0, 4.0, 4.5, 4.0, 1.0], False, 4),
        ([1.0, 2.0, 1.0, 3.0, 1.0, 1.0, 1.0], True, 6),
    ],
)
def test_patience(tmp_path: Path, found: list[float], higher: bool, n_steps: int) -> None:
    values = iter(found)
    seen: list[Evaluation] = []
    held: list[dict[str, Tensor]] = []

    def evaluate(model: nn.Module) -> dict[str, float]:
        held.append(snapshot(model))
        return {"score": next(values), "other": 0.0}

    model = make_net()
    result = fit(
        model,
        make_inputs(9),
        output=tmp_path / "d.sd",
        loss=square_loss,
        config=FitConfig(eval_every=1, patience=2, higher_is_better=higher),
        evaluate=evaluate,
        on_evaluation=seen.append,
    )
    assert (result.stopped, result.n_steps) == ("patience", n_steps)
    assert [e.values["score"] for e in result.evaluations] == found[:n_steps]
    assert tuple(seen) == result.evaluations
    best = n_steps - 2
    assert result.kept_step == best
    assert not same_model(model, held[-1])
    assert same_model(model, held[best - 1])
    with sparsedelta.load(result.delta) as delta:
        info: Any = delta.info
    assert (info["steps"], info["kept_step"]) == (n_steps, best)
    assert [e["step"] for e in info["evaluations"]] == list(range(1, best + 1))


def same_model(model: nn.Module, held: dict[str, Tensor]) -> bool:
    return all(same_bits(value, held[name]) for name, value in model.state_dict().items())


def scored(held: list[dict[str, Tensor]], *scores: float) -> Callable[[nn.Module], float]:
    """Return a function that copies a model's weights and returns the next score."""

    def evaluate(model: nn.Module) -> float:
        held.append(snapshot(model))
        return scores[len(held) - 1]

    return evaluate


@pytest.mark.parametrize(
    "settings",
    [
        {"reselection": {"every": 1, "grow": "random", "dropped": "keep", "until": 1.0}},
        {"reselection": {"every": 2, "grow": "random", "share": 1.0, "until": 1.0}},
        {"masters": "kahan"},
        {"masters": "stochastic", "exception": "bias"},
        {"masters_device": "cpu", "eval_before": True},
    ],
)
def test_the_weights_of_the_best_evaluation_are_kept(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    """Also if all steps are done; with running statistics."""
    model, held = make_noisy(torch.bfloat16), list[dict[str, Tensor]]()
    config = FitConfig(
        sparse_rate=0.3, lr=1e-2, max_steps=4, eval_every=1, patience=9, sparse_module="weight", **settings
    )  # fmt: skip
    evaluate = scored(held, math.nan, 2.0, 5.0, 5.0, 1.0)
    data = loader(own_generator=True)
    result = fit(
        model, data, output=tmp_path / "d.sd", loss=typed_loss, config=config, evaluate=evaluate
    )
    assert (result.stopped, result.n_steps) == ("done", 4)
    assert result.kept_step == result.evaluations[2].step
    assert same_model(model, held[2])
    assert not same_model(model, held[3])
    base = make_noisy(torch.bfloat16).state_dict()
    changed = [~(value == base[name]) for name, value in model.state_dict().items()]
    assert result.nnz == sum(int(each.sum()) for each in changed)


def test_components_that_were_chosen_after_the_best_evaluation_are_not_trained(
    tmp_path: Path,
) -> None:
    model, held, n_batches = make_net(), list[dict[str, Tensor]](), 0

    def loss(net: Any, batch: Tensor) -> Tensor:
        nonlocal n_batches
        n_batches += 1
        states = net.first(batch)
        found: Tensor = (net.last(states) if n_batches > 3 else states).square().mean()
        return found

    config = FitConfig(selection="gradient", selection_batches=1, lr=1e-2, eval_every=1, patience=9)
    result = fit(
        model, make_inputs(4), output=tmp_path / "d.sd", loss=loss, config=config,
        evaluate=scored(held, 1.0, 2.0, 0.0, 1.0),
    )  # fmt: skip
    assert (result.kept_step, len(held)) == (2, 4)
    assert not same_bits(held[3]["last.weight"], held[1]["last.weight"])
    assert same_model(model, held[1])


@pytest.mark.parametrize("stop_at", [2, 4])
def test_a_resumed_run_keeps_the_weights_of_the_same_evaluation(
    tmp_path: Path, stop_at: int
) -> None:
    config = FitConfig(
        sparse_rate=0.2, sparse_module="weight", lr=1e-2, max_steps=5, save_every=1, eval_every=1, patience=9
    )  # fmt: skip
    result = check_resumed(
        tmp_path, config, stop_at, own_generator=True,
        evaluate=lambda model: -abs(float(model.get_buffer("norm.num_batches_tracked")) - 3),
    )  # fmt: skip
    assert (result.kept_step, result.n_steps) == (3, 5)


@pytest.mark.parametrize("is_interrupted", [True, False])
def test_a_run_that_has_lost_patience_is_not_trained_on_when_resumed(
    tmp_path: Path, is_interrupted: bool
) -> None:
    """It was interrupted in its last step, or killed after the checkpoint of this step."""

    def end(report: StepReport) -> None:
        if is_interrupted and report.step == 4:
            os.kill(os.getpid(), signal.SIGINT)

    held: list[dict[str, Tensor]] = []
    given: dict[str, Any] = {
        "output": tmp_path / "d.sd", "loss": square_loss, "run_dir": tmp_path / "run",
        "evaluate": scored(held, 1.0, 5.0, 3.0, 2.0, 9.0),
        "config": FitConfig(eval_every=1, patience=2, save_every=1),
    }  # fmt: skip
    first = fit(make_net(), make_inputs(9), on_step=end, **given)
    assert first.stopped == ("interrupted" if is_interrupted else "patience")
    model = make_net()
    result = fit(model, make_inputs(9), resume=True, overwrite=True, **given)
    assert (result.stopped, result.n_steps, result.kept_step) == ("patience", 4, 2)
    assert same_model(model, held[1])


def test_patience_that_begins_with_a_resumed_run_keeps_the_weights_of_the_checkpoint(
    tmp_path: Path,
) -> None:
    def end(report: StepReport) -> None:
        if report.step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    held: list[dict[str, Tensor]] = []
    given: dict[str, Any] = {
        "output": tmp_path / "d.sd", "loss": square_loss, "run_dir": tmp_path / "run", "resume": True,
        "evaluate": scored(held, 1.0, 5.0, 3.0, 2.0),
    }  # fmt: skip
    fit(make_net(), make_inputs(4), config=FitConfig(eval_every=1), on_step=end, **given)
    model = make_net()
    result = fit(model, make_inputs(4), config=FitConfig(eval_every=1, patience=2), **given)
    assert result.kept_step == 2
    assert same_model(model, held[1])


def test_weights_of_a_better_evaluation_that_are_gone_are_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def end(report: StepReport) -> None:
        if report.step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    given: dict[str, Any] = {
        "output": tmp_path / "d.sd", "loss": square_loss, "run_dir": tmp_path / "run", "resume": True,
        "evaluate": scored([], 2.0, 1.0, 1.0, 1.0),
    }  # fmt: skip
    result = fit(make_net(), make_inputs(4), config=FitConfig(eval_every=1), on_step=end, **given)
    assert (result.stopped, result.kept_step) == ("interrupted", 2)
    config = FitConfig(eval_every=1, patience=9)
    result = fit(make_net(), make_inputs(4), config=config, **given)
    assert result.kept_step == 4
    assert "those of the best evaluation, after step 1, are not in the checkpoint" in caplog.text
