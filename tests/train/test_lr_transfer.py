"""``lr_transfer``: the share of the gradient, by hand, and the learning rate of each step."""

from __future__ import annotations

import contextlib
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_helpers import RankPool
from test_shards import global_windows, make_odd, sharded_odd
from test_trainer import Rows, SiftTrainer, arguments, load
from torch import Tensor, nn
from train_helpers import make_bert, make_inputs, make_net, same_bits, snapshot, square_loss

import sparsedelta
from sift_train import (
    SIFT,
    FitConfig,
    SiftConfig,
    StepReport,
    export_delta,
    fit,
    grouped_parameters,
    load_sharded,
    save_sharded,
)

WEIGHTS = ["first.weight", "last.weight"]


def gradients(model: nn.Module, batches: list[Tensor]) -> list[dict[str, Tensor]]:
    """Return the gradients of each micro-batch, by plain torch."""
    found = []
    for batch in batches:
        model.zero_grad()
        square_loss(model, batch).backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    model.zero_grad()
    return found


def share_by_hand(sift: SIFT, found: list[dict[str, Tensor]]) -> float:
    chosen = total = 0.0
    for each in found:
        for name in WEIGHTS:
            flat = each[name].double().abs().flatten()
            chosen += float(flat[sift.sparse_mapping[name].flat_index.long()].sum())
            total += float(flat.sum())
    return chosen / total


@pytest.mark.parametrize("budget", ["tensor", "global"])
@pytest.mark.parametrize("way", ["step", "accumulation", "selecting"])
@pytest.mark.parametrize("rule", ["gradient", "snip", "fisher", "magnitude"])
def test_the_share_is_that_of_the_gradients_that_choose(rule: str, way: str, budget: str) -> None:
    batches = make_inputs(1 if way == "step" else 3)
    expected = gradients(make_net(), batches)
    model = make_net()
    grad_acc = 3 if way == "accumulation" else 1
    sift = SIFT(
        model, 0.1, WEIGHTS, "norm", grad_acc, selection=rule, budget=budget, lr_transfer=True
    )
    if way == "selecting":
        with sift.selecting():
            for batch in batches:
                square_loss(model, batch).backward()
    else:
        for batch in batches:
            square_loss(model, batch).backward()
        sift.finish_selection()
    assert sift.lr_share == pytest.approx(share_by_hand(sift, expected), rel=1e-6)
    assert 0.01 < float(sift.lr_share or 0) < 0.9


def test_by_masks_the_share_is_measured_in_the_first_step() -> None:
    batches = make_inputs(2)
    masks = {"first.weight": torch.arange(16 * 12).view(16, 12) < 8}
    model = make_net()
    sift = SIFT(model, selection=masks, lr_transfer=True)
    optimizer = torch.optim.SGD(sift.parameters_in_optimizer(), lr=0.0)
    expected = gradients(make_net(), batches[:1])[0]["first.weight"].double().abs()
    assert sift.lr_share is None
    for batch in batches:
        square_loss(model, batch).backward()
        optimizer.step()
    assert sift.lr_share == pytest.approx(float(expected.flatten()[:8].sum() / expected.sum()))


def test_of_random_components_it_is_their_number() -> None:
    sift = SIFT(make_net(), 0.1, WEIGHTS, "norm", selection="random", lr_transfer=True)
    sift.finish_selection()
    assert sift.lr_share == (int(0.1 * 192) + 1 + int(0.1 * 64) + 1) / (192 + 64)


def test_non_finite_gradients_do_not_count() -> None:
    model = make_net()
    sift = SIFT(model, 0.1, ["first.weight"], selection="magnitude", lr_transfer=True)
    index = sift.sparse_mapping["first.weight"].flat_index.long()
    gradient = torch.ones(16 * 12)
    gradient[index[:2]] = torch.tensor([torch.inf, torch.nan])
    (model.first.weight * gradient.view(16, 12)).sum().backward()
    sift.finish_selection()
    assert sift.lr_share == (len(index) - 2) / (192 - 2)


@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_a_step_is_that_of_the_divided_learning_rate(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Sparse groups step as if lr were divided by the share, dense ones as stated, in a schedule."""
    make: Any = getattr(torch.optim, name)

    def run(*, by_hand: float | None) -> tuple[dict[str, Tensor], float, list[float]]:
        model = make_net()
        sift = SIFT(model, 0.1, WEIGHTS, "norm", lr_transfer=by_hand is None)
        parts = sift.sparse_mapping.values()
        share = by_hand or 1.0
        groups = [
            {"params": [p.master for p in parts if not p.is_dense], "lr": 1e-2 / share},
            {"params": [p.master for p in parts if p.is_dense], "lr": 1e-2},
        ]
        optimizer = make(groups, lr=1e-2, weight_decay=0.1)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
        seen = []
        for batch in make_inputs(4):
            square_loss(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
            seen.append(float(optimizer.param_groups[0]["lr"]))
            schedule.step()
        return snapshot(model), float(sift.lr_share or 0), seen

    ours, share, seen = run(by_hand=None)
    assert ("with SGD give lr_transfer=False" in caplog.text) == (name == "SGD")
    theirs, *_ = run(by_hand=share)
    assert seen == [1e-2, 5e-3, 2.5e-3, 1.25e-3]  # what is seen outside a step is as stated
    # 1e-2 / share * 0.5 and 1e-2 * 0.5 / share are equal, because 0.5 is a power of two.
    assert all(same_bits(ours[key], theirs[key]) for key in ours)


def test_at_rate_one_training_is_plain(tmp_path: Path) -> None:
    plain, ours = make_net(), make_net()
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    sift = SIFT(ours, 1.0, ["re:."], lr_transfer=True)
    masters = torch.optim.AdamW(sift.parameters_in_optimizer(), lr=1e-2)
    for batch in make_inputs(5):
        for model, each in ((plain, optimizer), (ours, masters)):
            square_loss(model, batch).backward()
            each.step()
            each.zero_grad()
    assert sift.lr_share == 1.0
    before, after = snapshot(plain), snapshot(ours)
    assert all(same_bits(before[key], after[key]) for key in before)


def test_decay_toward_the_base_uses_the_divided_rate_too() -> None:
    model = make_net()
    sift = SIFT(model, selection={"first.weight": [0, 5]}, lr_transfer=True)
    groups = grouped_parameters(sift, 0.5, decay_to="base")
    optimizer = torch.optim.SGD(groups, lr=0.01)
    master = sift.sparse_mapping["first.weight"].master
    gradient = torch.full((16, 12), 1.0)
    (model.first.weight * gradient).sum().backward()
    original = master.detach().clone()
    master.data += 1.0
    optimizer.step()
    lr = 0.01 / (2 / 192)
    assert sift.sparse_lr(0.01) == pytest.approx(lr)
    assert torch.allclose(master.detach(), original + 1.0 - lr * 0.5 - lr)


@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_a_group_of_both_kinds_is_trained_with_both_rates(name: str) -> None:
    def trained(*, in_one: bool) -> dict[str, Tensor]:
        model = make_net()
        sift = SIFT(model, 0.1, WEIGHTS, "norm")
        parts = sift.sparse_mapping.values()
        apart = [
            {"params": [part.master for part in parts if part.is_dense is dense]}
            for dense in (False, True)
        ]
        groups: Any = sift.parameters_in_optimizer() if in_one else apart
        optimizer = getattr(torch.optim, name)(groups, lr=1e-2, weight_decay=0.1)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
        for batch in make_inputs(3):
            square_loss(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        assert len(optimizer.param_groups) == (1 if in_one else 2)
        assert {group["lr"] for group in optimizer.param_groups} == {1e-2 / 8}
        return snapshot(model)

    one, two = trained(in_one=True), trained(in_one=False)
    assert all(same_bits(one[key], two[key]) for key in one)


def test_what_an_optimizer_keeps_in_a_group_stays() -> None:
    class Counting(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            for group in self.param_groups:
                group["n"] = group.get("n", 0) + 1
            return super().step(closure)

    model = make_net()
    sift = SIFT(model, 0.1, WEIGHTS, "norm")
    optimizer = Counting(sift.parameters_in_optimizer(), lr=1e-2)
    for batch in make_inputs(3):
        square_loss(model, batch).backward()
        optimizer.step()
    (group,) = optimizer.param_groups
    assert group["n"] == 3
    assert group["lr"] == 1e-2
    assert len(group["params"]) == len(sift.parameters_in_optimizer())


def test_an_optimizer_that_is_not_torch_s_is_refused() -> None:
    model = make_net()
    sift = SIFT(model, 0.1, WEIGHTS, lr_transfer=True)
    square_loss(model, make_inputs(1)[0]).backward()
    for master in sift.parameters_in_optimizer():
        master.data -= 1e-2
    with pytest.raises(ValueError, match="lr_transfer could not scale"):
        model(make_inputs(1)[0])


def test_a_step_that_raised_leaves_no_scaled_rate() -> None:
    model = make_net()
    sift = SIFT(model, 0.1, WEIGHTS, lr_transfer=True)
    optimizer = torch.optim.SGD(sift.parameters_in_optimizer(), lr=1e-2)
    masters = sift.parameters_in_optimizer()
    square_loss(model, make_inputs(1)[0]).backward()

    def fail() -> float:
        raise KeyError("stop")

    optimizer.step()
    share = float(sift.lr_share or 0)
    with pytest.raises(KeyError):
        optimizer.step(fail)
    before = masters[0].detach().clone()
    masters[0].grad = torch.ones_like(masters[0])
    optimizer.step()
    assert torch.allclose(before - masters[0].detach(), torch.tensor(1e-2 / share))
    assert optimizer.param_groups[0]["lr"] == 1e-2


def test_fit_reports_logs_and_writes_both_rates(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    reports: list[StepReport] = []
    config = FitConfig(
        sparse_rate=0.1, sparse_module=WEIGHTS, exception=["norm"], lr=1e-3, lr_transfer=True,
        schedule="constant", warmup=0.0, max_steps=3,
    )  # fmt: skip
    with caplog.at_level(logging.INFO, "sift_train"):
        fit(
            make_net(), make_inputs(4), output=tmp_path / "d.sd", config=config, loss=square_loss,
            on_step=reports.append,
        )  # fmt: skip
    with sparsedelta.load(tmp_path / "d.sd") as delta:
        noted: Any = delta.info["lr_transfer"]
        settings: Any = delta.info["settings"]
    assert settings["lr_transfer"] is True
    assert noted["lr"] == 1e-3
    assert noted["sparse_lr"] == 1e-3 / noted["share"]
    assert [(r.lr, r.sparse_lr) for r in reports] == [(1e-3, noted["sparse_lr"])] * 3
    message = next(text for text in caplog.messages if "lr_transfer" in text)
    assert f"{noted['share']:.4g} of the sum" in message
    assert f"from 0.001 to {noted['sparse_lr']:.4g}" in message


def test_a_resumed_run_has_the_same_bits_and_share(tmp_path: Path) -> None:
    def run(folder: str, n: int, *, resume: bool) -> None:
        config = FitConfig(
            sparse_rate=0.1, sparse_module=WEIGHTS, exception=["norm"], lr=1e-3, lr_transfer=True,
            max_steps=6, save_every=2,
        )  # fmt: skip
        seen: list[int] = []

        def stop(report: StepReport) -> None:
            seen.append(report.step)
            if report.step == n:
                raise KeyboardInterrupt

        with contextlib.suppress(KeyboardInterrupt):
            fit(
                make_net(), make_inputs(4), output=tmp_path / f"{folder}.sd", config=config,
                loss=square_loss, run_dir=tmp_path / folder, resume=resume, on_step=stop,
            )  # fmt: skip

    run("whole", 0, resume=False)
    run("parts", 5, resume=False)
    run("parts", 0, resume=True)
    assert (tmp_path / "parts.sd").read_bytes() == (tmp_path / "whole.sd").read_bytes()


def test_an_own_loop_s_delta_has_the_share(tmp_path: Path) -> None:
    model = make_net()
    sift = SIFT(model, 0.1, WEIGHTS, lr_transfer=True)
    optimizer = torch.optim.AdamW(sift.parameters_in_optimizer(), lr=1e-2)
    square_loss(model, make_inputs(1)[0]).backward()
    optimizer.step()
    export_delta(model, tmp_path / "d.sd", sift=sift)
    with sparsedelta.load(tmp_path / "d.sd") as delta:
        assert delta.info["lr_transfer"] == {"share": sift.lr_share}


def test_the_trainer_logs_both_rates_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    base = make_bert(tmp_path / "base", torch.float32)
    config = SiftConfig(
        sparse_rate=0.1,
        sparse_module=["query", "value"],
        exception=["classifier"],
        lr_transfer=True,
    )

    def make(name: str, **more: Any) -> SiftTrainer:
        args = arguments(tmp_path / name, max_steps=4, learning_rate=1e-4, **more)
        return SiftTrainer(load(base), args, train_dataset=Rows(6), sift=config, base=base)

    trainer = make("whole", save_strategy="steps", save_steps=2)
    trainer.train()
    share = float(trainer.sift.lr_share or 0)
    logged = [entry for entry in trainer.state.log_history if "learning_rate" in entry]
    assert len(logged) == 4
    for entry in logged:
        assert entry["sparse_learning_rate"] == entry["learning_rate"] / share
    second = make("again")
    second.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert second.sift.lr_share == share
    pairs = zip(trainer.sift.model.parameters(), second.sift.model.parameters(), strict=True)
    assert all(same_bits(p, q) for p, q in pairs)
    with sparsedelta.load(tmp_path / "whole" / "checkpoint-4" / "delta.sd") as delta:
        noted: Any = delta.info["lr_transfer"]
        assert noted == {"lr": 1e-4, "sparse_lr": 1e-4 / share, "share": share}
        json.dumps(delta.info)


def on_a_rank(rank: int, rule: str) -> tuple[float, dict[str, Tensor]]:
    model = make_net().double()
    with SIFT(model, 0.2, WEIGHTS, selection=rule, lr_transfer=True) as sift:
        optimizer = torch.optim.AdamW(sift.parameters_in_optimizer(), lr=1e-3)
        for step in range(3):
            square_loss(model, make_inputs(6)[2 * step + rank].double()).backward()
            optimizer.step()
            optimizer.zero_grad()
        return float(sift.lr_share or 0), snapshot(model)


@pytest.mark.parametrize("rule", ["gradient", "snip", "magnitude", "random"])
def test_two_ranks_have_one_share_and_train_as_one_process(pool: RankPool, rule: str) -> None:
    (first, weights), (second, others) = pool.results(on_a_rank, rule)
    model = make_net().double()
    with SIFT(model, 0.2, WEIGHTS, None, 2, selection=rule, lr_transfer=True) as sift:
        optimizer = torch.optim.AdamW(sift.parameters_in_optimizer(), lr=1e-3)
        for step in range(3):
            for batch in make_inputs(6)[2 * step : 2 * step + 2]:
                (square_loss(model, batch.double()) / 2).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert first == second
        assert first == pytest.approx(float(sift.lr_share or 0), rel=1e-6)
    for key, value in snapshot(model).items():
        assert same_bits(weights[key], others[key])
        assert torch.allclose(weights[key], value, rtol=1e-6, atol=1e-9)


def on_a_shard(rank: int, rule: str, folder: str) -> tuple[float, float]:
    model = sharded_odd("layers")
    with SIFT(model, 0.2, exception="norm", selection=rule, lr_transfer=True) as sift:
        optimizer = torch.optim.AdamW(grouped_parameters(sift, 0.0), lr=1e-3)
        square_loss(model, global_windows(2)[0][rank].double()).backward()
        optimizer.step()
        save_sharded(sift, folder, optimizer)
        share = float(sift.lr_share or 0)
    second = sharded_odd("layers")
    with SIFT(second, 0.2, exception="norm", selection=rule, lr_transfer=True) as sift:
        optimizer = torch.optim.AdamW(grouped_parameters(sift, 0.0), lr=1e-3)
        load_sharded(sift, folder, optimizer)
        return share, float(sift.lr_share or 0)


@pytest.mark.parametrize("rule", ["gradient", "magnitude", "random"])
def test_shards_have_the_share_of_the_whole_model(
    pool: RankPool, tmp_path: Path, rule: str
) -> None:
    shares = pool.results(on_a_shard, rule, str(tmp_path / "state"))
    model = make_odd()
    with SIFT(model, 0.2, exception="norm", selection=rule, lr_transfer=True) as sift:
        optimizer = torch.optim.AdamW(grouped_parameters(sift, 0.0), lr=1e-3)
        square_loss(model, torch.cat(global_windows(2)[0]).double()).backward()
        optimizer.step()
        expected = pytest.approx(float(sift.lr_share or 0), rel=1e-6)
    assert shares == [(expected, expected)] * 2


@pytest.mark.parametrize("rule", ["gradient", "snip", "magnitude"])
def test_the_share_is_measured_anew_on_batches_that_do_not_choose(rule: str) -> None:
    batches = make_inputs(4)
    others = gradients(make_net(), batches[1:])
    model = make_net()
    before = snapshot(model)
    sift = SIFT(model, 0.1, WEIGHTS, "norm", selection=rule, lr_transfer=True)
    with sift.selecting():
        square_loss(model, batches[0]).backward()
    fitted = float(sift.lr_share or 0)
    with sift.measuring_share():
        for batch in batches[1:]:
            square_loss(model, batch).backward()
    assert sift.lr_share == pytest.approx(share_by_hand(sift, others), rel=1e-6)
    assert sift.lr_share != pytest.approx(fitted, rel=1e-3)
    assert all(master.grad is None for master in sift.parameters_in_optimizer())
    assert all(same_bits(before[name], value) for name, value in snapshot(model).items())


def test_without_gradients_the_share_stays() -> None:
    model = make_net()
    sift = SIFT(model, 0.1, WEIGHTS, selection="gradient", lr_transfer=True)
    with pytest.raises(RuntimeError, match="not chosen yet"), sift.measuring_share():
        pass
    with sift.selecting():
        square_loss(model, make_inputs(1)[0]).backward()
    share = sift.lr_share
    with sift.measuring_share():
        pass
    assert share is not None
    assert sift.lr_share == share
    with contextlib.suppress(KeyError), sift.measuring_share():
        square_loss(model, make_inputs(2)[1]).backward()
        raise KeyError
    assert sift.lr_share == share
    square_loss(model, make_inputs(2)[1]).backward()  # is not added to a measurement
    assert sift.lr_share == share
