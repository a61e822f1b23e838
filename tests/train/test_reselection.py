"""Re-selection: which components are dropped and grown, what they hold, and exact resume."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_helpers import RankPool
from safetensors.torch import load_file, save_file
from test_loop import check_resumed, loader, make_noisy, typed_loss
from test_lr_transfer import gradients, share_by_hand
from test_matrix import OPTIMIZERS
from test_publish import followed
from test_shards import sharded_odd
from test_trainer import LAYERS, Rows, SiftTrainer, arguments, load
from torch import Tensor, nn
from train_helpers import make_bert, make_inputs, make_net, same_bits, snapshot, square_loss
from transformers import Trainer

import sparsedelta
from sift_train import (
    SIFT,
    FitConfig,
    Reselection,
    SiftCallback,
    SiftConfig,
    StepReport,
    export_delta,
    fit,
    save_mask,
)
from sift_train.publishing import Publishing
from sift_train.reselection import PRESETS

WEIGHTS = ["first.weight", "last.weight"]
RATE = 0.2


class Fused(nn.Module):
    """Three experts, fused into 3-D tensors."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up_proj = nn.Parameter(torch.randn(3, 8, 12) * 0.3)
        self.down_proj = nn.Parameter(torch.randn(3, 4, 8) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        states = torch.relu(torch.einsum("bi,ehi->ebh", x, self.up_proj))
        out: Tensor = torch.einsum("ebh,eoh->bo", states, self.down_proj)
        return out


def step(sift: SIFT, optimizer: torch.optim.Optimizer, batch: Tensor) -> None:
    square_loss(sift.model, batch).backward()
    optimizer.step()
    optimizer.zero_grad()


def move(sift: SIFT, optimizer: torch.optim.Optimizer, batches: list[Tensor], **more: Any) -> None:
    with sift.reselecting(optimizer, **more):
        for batch in batches:
            square_loss(sift.model, batch).backward()


def adam(sift: SIFT) -> torch.optim.AdamW:
    return torch.optim.AdamW(sift.parameters_in_optimizer(), lr=1e-2)


def trained(n_steps: int = 3, **more: Any) -> tuple[SIFT, torch.optim.AdamW]:
    sift = SIFT(make_net(), RATE, WEIGHTS, "norm", lr_transfer=False, **more)
    optimizer = adam(sift)
    for batch in make_inputs(n_steps):
        step(sift, optimizer, batch)
    return sift, optimizer


def held(sift: SIFT) -> dict[str, set[int]]:
    return {name: set(sift.sparse_mapping[name].flat_index.tolist()) for name in WEIGHTS}


def gradient_sums(model: nn.Module, batches: list[Tensor], *, signed: bool) -> dict[str, Tensor]:
    """Return |sum of g|, or the sum of |g|, by plain torch."""
    plain = make_net()
    plain.load_state_dict(model.state_dict())
    sums: dict[str, Tensor] = {}
    for batch in batches:
        plain.zero_grad()
        square_loss(plain, batch).backward()
        for name in WEIGHTS:
            gradient = plain.get_parameter(name).grad
            assert gradient is not None
            own = gradient.flatten() if signed else gradient.flatten().abs()
            sums[name] = sums.get(name, torch.zeros(())) + own
    return {name: total.abs() for name, total in sums.items()}


@pytest.mark.parametrize(("grow", "signed"), [("accumulated", True), ("gradient", False)])
def test_the_smallest_changes_are_dropped_and_the_largest_gradients_grown(
    grow: str, signed: bool
) -> None:
    sift, optimizer = trained()
    batches = make_inputs(4, seed=9)
    before = held(sift)
    sums = gradient_sums(sift.model, batches, signed=signed)
    expected = {}
    for name in WEIGHTS:
        part = sift.sparse_mapping[name]
        n = round(0.25 * part.train_num)
        dropped = part.flat_index[part.change.argsort()[:n]].tolist()
        outside = sums[name].clone()
        outside[part.flat_index.long()] = -1.0
        grown = outside.topk(n).indices.tolist()
        expected[name] = (before[name] - set(dropped)) | set(grown)
    move(sift, optimizer, batches, share=0.25, grow=grow)
    assert held(sift) == expected
    assert sift.n_reselections == 1


@pytest.mark.parametrize("dropped", ["revert", "keep"])
def test_dropped_components_get_their_original_or_keep_their_value(dropped: str) -> None:
    base = snapshot(make_net())
    sift, optimizer = trained()
    now, before = snapshot(sift.model), held(sift)
    masters = {n: sift.sparse_mapping[n].master.detach().clone() for n in WEIGHTS}
    index = {n: sift.sparse_mapping[n].flat_index.long() for n in WEIGHTS}
    move(sift, optimizer, make_inputs(2), share=0.5, dropped=dropped)
    for name, indices in held(sift).items():
        part = sift.sparse_mapping[name]
        gone = torch.tensor(sorted(before[name] - indices))
        new = torch.tensor(sorted(indices - before[name]))
        assert len(gone) == len(new) == round(0.5 * part.train_num)
        weight = part.parameter.detach().flatten()
        source = base if dropped == "revert" else now
        assert same_bits(weight[gone], source[name].flatten()[gone])
        rest = torch.ones(weight.numel(), dtype=torch.bool)
        rest[gone] = False
        assert same_bits(weight[rest], now[name].flatten()[rest])
        dense = torch.zeros(weight.numel())
        dense[index[name]] = masters[name]
        stays = torch.isin(part.flat_index.long(), index[name])
        assert same_bits(part.master.detach()[stays], dense[part.flat_index.long()][stays])
        assert part.original is not None
        assert same_bits(part.original, base[name].flatten()[part.flat_index.long()])
        assert same_bits(part.before_training, base[name])


@pytest.mark.parametrize("name", ["adamw", "sgd", "adafactor", "adamw-foreach"])
def test_states_stay_with_their_components_and_grown_ones_have_none(name: str) -> None:
    sift = SIFT(make_net(), RATE, WEIGHTS, "norm", lr_transfer=False)
    optimizer = OPTIMIZERS[name](sift.parameters_in_optimizer())
    for batch in make_inputs(3):
        step(sift, optimizer, batch)
    states = copy.deepcopy({n: optimizer.state[sift.sparse_mapping[n].master] for n in WEIGHTS})
    index = {n: sift.sparse_mapping[n].flat_index.long() for n in WEIGHTS}
    move(sift, optimizer, make_inputs(2), share=0.5)
    n_checked = 0
    for each in WEIGHTS:
        part = sift.sparse_mapping[each]
        for key, old in states[each].items():
            new = optimizer.state[part.master][key]
            if not isinstance(old, Tensor) or old.dim() == 0:
                assert new == old
                continue
            dense = torch.zeros(part.numel)
            dense[index[each]] = old
            assert same_bits(new, dense[part.flat_index.long()])
            assert old.any()
            n_checked += 1
    assert n_checked == {"adamw": 4, "sgd": 2, "adafactor": 2, "adamw-foreach": 4}[name]


@pytest.mark.parametrize("drop", ["change", "moment", "random", "score"])
@pytest.mark.parametrize("grow", ["accumulated", "proportional", "random", "principal"])
@pytest.mark.parametrize("dropped", ["revert", "keep"])
@pytest.mark.parametrize("budget", ["tensor", "row", "global"])
def test_every_combination_moves_and_keeps_the_delta_exact(
    drop: str, grow: str, dropped: str, budget: str, tmp_path: Path
) -> None:
    base = snapshot(make_net())
    sift, optimizer = trained(budget=budget)
    n = sift.n_trained
    rows = {name: row_counts(sift, name) for name in WEIGHTS}
    for number, batch in enumerate(make_inputs(6, seed=5)):
        if number % 2 == 0:
            before = held(sift)
            more: dict[str, Any] = {"drop": drop, "grow": grow, "dropped": dropped}
            move(sift, optimizer, [batch], share=0.3, **more)
            assert held(sift) != before
        step(sift, optimizer, batch)
        for part in sift.sparse_mapping.values():  # no lost or stale update
            rounded = part.master.detach().to(part.parameter.dtype)
            assert same_bits(part.parameter.detach().flatten()[part.flat_index.long()], rounded)
    assert sift.n_trained == n
    if budget == "row":
        assert {name: row_counts(sift, name) for name in WEIGHTS} == rows
    changed = {
        name: set((value != base[name]).flatten().nonzero().flatten().tolist())
        for name, value in snapshot(sift.model).items()
    }
    if dropped == "revert":
        assert all(changed[name] <= held(sift)[name] for name in WEIGHTS)
    else:
        assert any(changed[name] - held(sift)[name] for name in WEIGHTS)
    now = snapshot(sift.model)
    with sift.reverted():
        assert all(same_bits(v, base[n]) for n, v in snapshot(sift.model).items())
    assert all(same_bits(v, now[n]) for n, v in snapshot(sift.model).items())
    save_file(base, tmp_path / "base.safetensors")
    export_delta(sift.model, tmp_path / "own.sd", sift=sift, base=tmp_path / "base.safetensors")
    sparsedelta.apply(tmp_path / "base.safetensors", tmp_path / "own.sd", tmp_path / "out")
    rebuilt = load_file(tmp_path / "out")
    assert all(same_bits(rebuilt[name], now[name]) for name in now)
    sift.revert()
    assert all(same_bits(v, base[n]) for n, v in snapshot(sift.model).items())


def row_counts(sift: SIFT, name: str) -> list[int]:
    part = sift.sparse_mapping[name]
    columns = part.parameter.shape[1]
    return torch.bincount(part.flat_index.long() // columns).tolist()


def test_each_expert_keeps_its_number_and_a_mask_moves_as_a_whole(tmp_path: Path) -> None:
    sift = SIFT(Fused(), 0.1, lr_transfer=False)
    optimizer = adam(sift)
    step(sift, optimizer, make_inputs(1)[0])
    move(sift, optimizer, make_inputs(2), share=0.5)
    for part in sift.sparse_mapping.values():
        assert part.n_matrices == 3
        counts = torch.bincount(part.flat_index.long() // (part.numel // 3), minlength=3)
        assert counts.tolist() == [part.train_num // 3] * 3
    sift.close()
    mask = {"first.weight": torch.arange(5), "last.weight": torch.tensor([3, 60])}
    moved = SIFT(make_net(), selection=mask, budget="row", lr_transfer=False)
    before = held(moved)
    optimizer = adam(moved)
    step(moved, optimizer, make_inputs(1)[0])
    move(moved, optimizer, make_inputs(2), share=1.0)
    assert all(len(held(moved)[name]) == len(before[name]) for name in WEIGHTS)
    assert all(held(moved)[name].isdisjoint(before[name]) for name in WEIGHTS)
    save_mask(moved, tmp_path / "mask.safetensors")
    again = SIFT(make_net(), selection=tmp_path / "mask.safetensors")
    assert held(again) == held(moved)


def test_the_score_drops_only_what_ranks_lower() -> None:
    """With share 1 and a fixed ranking, the choice is the one that the rule makes anew."""
    sift, optimizer = trained(selection="random")
    move(sift, optimizer, [], share=1.0, drop="score", grow="magnitude", dropped="keep")
    for name in WEIGHTS:
        part = sift.sparse_mapping[name]
        largest = part.parameter.detach().flatten().abs().topk(part.train_num).indices
        assert held(sift)[name] == set(largest.tolist())
    number = sift.n_reselections
    move(sift, optimizer, [], share=1.0, drop="score", grow="magnitude")
    assert sift.n_reselections == number  # nothing ranks higher


def test_a_kept_component_that_is_grown_again_has_its_first_original() -> None:
    base = snapshot(make_net())
    sift, optimizer = trained(selection="random")
    batches = make_inputs(8, seed=4)
    ever = held(sift)
    for batch in batches:  # each moves half of the components; most come back
        move(sift, optimizer, [], share=0.5, drop="random", grow="random", dropped="keep")
        step(sift, optimizer, batch)
        for name in WEIGHTS:
            part = sift.sparse_mapping[name]
            ever[name] |= held(sift)[name]
            assert part.kept is not None
            n_touched = len(part.kept) + part.train_num
            assert n_touched == len(ever[name])  # every step moves every component
            assert same_bits(part.before_training, base[name])
    assert min(len(ever[name]) / base[name].numel() for name in WEIGHTS) > 0.6


def test_the_share_is_measured_anew() -> None:
    sift = SIFT(make_net(), RATE, WEIGHTS, "norm")
    optimizer = torch.optim.AdamW(sift.parameters_in_optimizer(), lr=1e-3)
    batches = make_inputs(9)
    step(sift, optimizer, batches[0])
    counts = [
        (part.train_num, part.numel) for part in sift.sparse_mapping.values() if not part.is_dense
    ]
    assert sift.lr_share == pytest.approx(sum(k for k, _ in counts) / sum(n for _, n in counts))
    move(sift, optimizer, batches[1:4], grow="accumulated")
    assert sift.lr_share is None
    expected = share_by_hand(sift, gradients(copy.deepcopy(sift.model), batches[4:7]))
    state = sift.state_dict()
    with sift.measuring_share():
        for batch in batches[4:7]:
            square_loss(sift.model, batch).backward()
    assert sift.lr_share == pytest.approx(expected, rel=1e-6)
    sift.close()
    other = SIFT(make_net(), RATE, WEIGHTS, "norm")
    other.load_state_dict(state)
    assert (other.lr_share, other.n_reselections) == (None, 1)
    expected = share_by_hand(other, gradients(copy.deepcopy(other.model), batches[7:8]))
    optimizer = torch.optim.AdamW(other.parameters_in_optimizer(), lr=1e-3)
    step(other, optimizer, batches[7])  # by the next step's gradient, if nothing else measures
    assert other.lr_share == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("dropped", ["revert", "keep"])
def test_a_state_can_be_loaded_into_the_base_and_across_a_reselection(dropped: str) -> None:
    sift, optimizer = trained()
    early = sift.state_dict()
    move(sift, optimizer, make_inputs(2), share=0.5, dropped=dropped)
    step(sift, optimizer, make_inputs(1)[0])
    late, now = sift.state_dict(), snapshot(sift.model)
    sift.load_state_dict(early)
    base = snapshot(make_net())
    for name in WEIGHTS:
        part = sift.sparse_mapping[name]
        assert torch.equal(part.flat_index, early[f"index:{name}"])
        assert same_bits(part.before_training, base[name])
        assert part.kept is None
    sift.load_state_dict(late)
    assert all(same_bits(v, now[n]) for n, v in snapshot(sift.model).items())
    sift.close()
    for weights in (base, now):  # the base, or the trained weights
        model = make_net()
        model.load_state_dict(weights)
        with SIFT(model, RATE, WEIGHTS, "norm", lr_transfer=False) as other:
            if weights is base:
                other.load_state_dict(late)
                assert all(same_bits(v, now[n]) for n, v in snapshot(model).items())
                again = other.state_dict()
                assert again.keys() == late.keys()
                assert all(torch.equal(again[key], late[key]) for key in late)
    damaged = {key: value + 1 if key.startswith("kept_o") else value for key, value in late.items()}
    if dropped == "keep":
        other = SIFT(make_net(), RATE, WEIGHTS, "norm")
        with pytest.raises(ValueError, match="does not hold the weights with which"):
            other.load_state_dict(damaged)


SETTINGS: dict[str, Any] = {
    "accumulated": {"every": 2, "share": 0.4, "until": 1.0, "grow": "accumulated"},
    "kept": {"every": 1, "share": 0.4, "until": 1.0, "dropped": "keep", "grow": "proportional"},
    "moment": {"every": 2, "share": 0.4, "until": 1.0, "drop": "moment", "grow": "random"},
    "lift": {**vars(PRESETS["lift"]), "every": 2},
}


@pytest.mark.parametrize("stop_at", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("name", SETTINGS)
def test_a_resumed_fit_ends_in_the_same_bits(tmp_path: Path, name: str, stop_at: int) -> None:
    config = FitConfig(
        sparse_rate=0.2, sparse_module=["weight"], exception="bias", accumulation=2, lr=1e-3, weight_decay=0.1,
        decay_to="base", epochs=2, save_every=1, reselection=SETTINGS[name], selection_batches=2,
    )  # fmt: skip

    check_resumed(tmp_path, config, stop_at, own_generator=stop_at % 2 == 0)


@pytest.mark.parametrize(
    ("rate", "reselection"),
    [(1.0, {"every": 1, "share": 0.5, "until": 1.0}), (0.2, {"every": 1, "share": 0.0})],
)
def test_at_rate_one_or_share_zero_the_training_is_the_one_without(
    tmp_path: Path, rate: float, reselection: dict[str, Any]
) -> None:
    found = []
    for given in (None, reselection):
        model = make_noisy(torch.float32)
        config = FitConfig(sparse_rate=rate, lr=1e-2, epochs=2, reselection=given)
        fit(
            model, loader(own_generator=False), output=tmp_path / "d.sd", loss=typed_loss, config=config,
            overwrite=True,
        )  # fmt: skip
        found.append(snapshot(model))
    assert all(same_bits(value, found[1][name]) for name, value in found[0].items())


def test_fit_moves_the_choice_and_the_delta_has_no_more_than_is_trained(tmp_path: Path) -> None:
    seen = []

    def run(reselection: Any) -> Any:
        config = FitConfig(lr=1e-3, epochs=3, sparse_rate=0.1, reselection=reselection)
        model = make_net()
        result = fit(
            model, make_inputs(8), output=tmp_path / "d.sd", loss=square_loss, config=config, overwrite=True,
            on_step=lambda report: seen.append(round(report.sparse_lr / report.lr, 6)),
        )  # fmt: skip
        return result, snapshot(model)

    fixed, weights = run(None)
    assert len(set(seen)) == 1
    seen.clear()
    moved, other = run({"every": 6, "share": 0.5})
    assert len(set(seen)) == 3  # it moves after 6 and 12 of 24 steps
    assert moved.n_trained == fixed.n_trained
    assert 0 < moved.nnz <= moved.n_trained
    assert not same_bits(weights["first.weight"], other["first.weight"])
    with sparsedelta.load(tmp_path / "d.sd") as delta:
        settings: Any = delta.info["settings"]
        assert settings["reselection"]["share"] == 0.5
    kept, _ = run({"every": 6, "share": 0.5, "dropped": "keep"})
    assert kept.nnz > kept.n_trained


def test_fit_publishes_with_reselection(tmp_path: Path) -> None:
    model = make_net()
    config = FitConfig(
        lr=1e-3, epochs=2, publish=tmp_path / "channel", reselection={"every": 2, "share": 0.5}
    )
    fit(model, make_inputs(4), output=tmp_path / "d.sd", loss=square_loss, config=config)
    assert len(sparsedelta.Channel(tmp_path / "channel").log()) == 8
    held = followed(tmp_path / "channel")
    assert all(same_bits(value, held[name]) for name, value in snapshot(model).items())


def rank_fit(rank: int, folder: Path, reselection: dict[str, Any], accumulation: int) -> Any:
    model = make_net().double()
    config = FitConfig(
        sparse_rate=0.2, lr=1e-3, selection_batches=3, epochs=2, accumulation=accumulation, reselection=reselection,
    )  # fmt: skip
    data = [batch.double() for batch in make_inputs(7)]
    result = fit(
        model, data, output=folder / "d.sd", config=config, loss=square_loss, overwrite=True
    )
    return result.nnz, dict(model.state_dict())


@pytest.mark.parametrize("name", ["accumulated", "kept", "moment"])
def test_two_ranks_move_as_one_process(pool: RankPool, tmp_path: Path, name: str) -> None:
    (_, first), (_, second) = pool.results(rank_fit, tmp_path, SETTINGS[name], 1)
    nnz, alone = rank_fit(0, tmp_path, SETTINGS[name], 2)
    assert nnz
    assert all(same_bits(first[each], second[each]) for each in first)
    for each, value in alone.items():
        torch.testing.assert_close(first[each], value, rtol=1e-9, atol=1e-12)


def test_what_cannot_move_is_refused() -> None:
    sift, optimizer = trained(n_steps=1)

    def check(message: str, error: type[Exception] = ValueError, **more: Any) -> None:
        with pytest.raises(error, match=message):
            move(sift, optimizer, [], **more)

    check("share is 1.5; it must be a number from 0 to 1", share=1.5)
    check("drop is 'old'; choose one of change, moment", drop="old")
    check("dropped is 'gone'; choose one of revert, keep", dropped="gone")
    check("grow is a mask or a delta; give a rule", grow={"first.weight": torch.arange(3)})
    square_loss(sift.model, make_inputs(1)[0]).backward()
    check("gradients wait for a step, and would belong to other", RuntimeError)
    sift.zero_grad()
    first = sift.sparse_mapping["first.weight"].master
    optimizer.state[first]["exp_avg"] = optimizer.state[first]["exp_avg"].to(torch.uint8)
    check("'exp_avg' of AdamW has no value of its own for each component, as 8-bit states")
    other = torch.optim.LBFGS(sift.parameters_in_optimizer())
    other.step(lambda: square_loss(sift.model, make_inputs(1)[0]).backward() or 0.0)
    with pytest.raises(ValueError, match="of LBFGS has no value of its own for each component"):
        move(sift, other, [])
    plain = torch.optim.SGD(sift.parameters_in_optimizer(), lr=0.1)
    with pytest.raises(ValueError, match="SGD has no first moment of the masters"):
        move(sift, plain, make_inputs(1), drop="moment")
    with pytest.raises(ValueError, match=r"the optimizer does not train 'first\.weight'"):
        move(sift, torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1), [])
    sift.close()
    early = SIFT(make_net(), RATE, WEIGHTS, selection="gradient")
    with pytest.raises(RuntimeError, match="the components are not chosen yet"):
        move(early, adam(early), [])
    early.close()
    rows = SIFT(make_net(), RATE, WEIGHTS, block="row")
    with pytest.raises(ValueError, match="block is 'row', but re-selection moves single"):
        move(rows, adam(rows), [])


def try_with_shards(rank: int) -> list[str]:
    messages = []
    model = sharded_odd("layers")
    with pytest.raises(ValueError, match="masters is 'kahan'") as error:
        SIFT(model, 0.1, masters="kahan")
    messages.append(str(error.value))
    sift = SIFT(model, 0.1)
    with pytest.raises(ValueError, match="is sharded, and re-selection") as error:
        sift.check_reselecting(adam(sift))
    sift.close()
    return [*messages, str(error.value)]


def test_shards_are_refused(pool: RankPool) -> None:
    first, second = pool.results(try_with_shards)
    assert first == second
    assert first[0].endswith("is sharded; use 'fp32' with shards")


def test_a_run_that_could_not_move_is_refused_before_it_trains(tmp_path: Path) -> None:
    seen: list[StepReport] = []
    config = FitConfig(reselection="spiel", block="row")
    with pytest.raises(ValueError, match="block is 'row', but re-selection moves single"):
        fit(
            make_net(), make_inputs(3), output=tmp_path / "d.sd", loss=square_loss, config=config, on_step=seen.append
        )  # fmt: skip
    assert not seen


@pytest.mark.parametrize("dropped", ["revert", "keep"])
def test_a_channel_follows_a_reselection(tmp_path: Path, dropped: str) -> None:
    sift, optimizer = trained()
    with Publishing(tmp_path / "channel", 1) as publishing:
        publishing.start(sift.model, 0, sift)
        for number, batch in enumerate(make_inputs(4)):
            if number == 2:
                move(sift, optimizer, [batch], share=0.5, dropped=dropped)
            step(sift, optimizer, batch)
            publishing.after(number + 1)
    held = followed(tmp_path / "channel")
    assert all(same_bits(value, held[name]) for name, value in snapshot(sift.model).items())
    entries = sparsedelta.Channel(tmp_path / "channel").log()
    assert (
        sum(entry.delta is None for entry in entries) == 2
    )  # the first one, and one after it moved


def test_an_error_inside_the_block_moves_nothing() -> None:
    sift, optimizer = trained()
    before, weights = held(sift), snapshot(sift.model)
    uneven = [make_inputs(1)[0], torch.zeros(1, 1)]
    with pytest.raises(RuntimeError, match="shapes"):
        move(sift, optimizer, uneven)
    assert held(sift) == before
    assert all(same_bits(v, weights[n]) for n, v in snapshot(sift.model).items())
    step(sift, optimizer, make_inputs(1)[0])
    broken = [make_inputs(1)[0] * torch.nan]
    move(sift, optimizer, broken, grow="accumulated")  # no finite gradient ranks
    assert held(sift) == before


def test_settings_are_checked_written_and_read(tmp_path: Path) -> None:
    assert FitConfig(reselection="spiel").reselection == PRESETS["spiel"]
    given = {"every": 50, "grow": "gradient"}
    for config in (FitConfig(reselection=given), SiftConfig(reselection=given)):
        assert config.reselection == Reselection(every=50, grow="gradient")
        config.to_yaml(tmp_path / "config.yaml")
        assert type(config).from_yaml(tmp_path / "config.yaml").reselection == config.reselection
    plain = FitConfig(reselection=given).as_json()
    assert json.loads(json.dumps(plain)) == plain
    for setting, message in (
        ("lyft", "reselection is 'lyft'; give a Reselection, its settings, or one of lift, spiel"),
        ({"every": 0}, "reselection: every is 0; it must be an integer of at least 1"),
        (
            {"every": 5, "often": 1},
            "reselection: Reselection has no setting 'often'; choose from every",
        ),
        ({"every": 5, "until": 2}, "until is 2; it must be a number from 0 to 1"),
        (
            {"every": 5, "decrease": "cosine"},
            "decrease is 'cosine'; choose one of linear, constant",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            FitConfig(reselection=setting)


def test_when_a_reselection_is_due() -> None:
    linear = Reselection(every=10, share=0.4, until=0.5)
    assert [linear.share_after(step, 100) for step in (0, 5, 10, 50, 60)] == pytest.approx(
        [0, 0, 0.32, 0, 0]
    )
    constant = Reselection(every=10, share=0.4, until=1.0, decrease="constant")
    assert [constant.share_after(step, 30) for step in (10, 20, 30)] == [0.4, 0.4, 0.0]


def test_a_run_in_which_the_choice_never_moves_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    message = "the choice will never move: reselection has every"
    for given, says in (
        ({"every": 4, "until": 1.0}, f"{message} 4, and the run has 4 steps; lower every"),
        (
            {"every": 3, "until": 0.5},
            f"{message} 3, and the run has 4 steps, and until 0.5 ends them at step 2",
        ),
        ({"every": 3, "until": 1.0}, ""),
    ):
        caplog.clear()
        config = FitConfig(sparse_rate=RATE, reselection={**given, "grow": "random"})
        fit(
            make_net(),
            make_inputs(4),
            output=tmp_path / "d.sd",
            loss=square_loss,
            config=config,
            overwrite=True,
        )
        assert says in caplog.text
        assert (message in caplog.text) == bool(says)


def test_a_trainer_says_that_the_choice_never_moves(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = make_bert(tmp_path / "base", torch.float32)
    moves = Reselection(every=5, grow="random")
    args = arguments(tmp_path / "out", max_steps=2)
    config = SiftConfig(sparse_rate=0.1, sparse_module=LAYERS, reselection=moves)
    SiftTrainer(load(model), args, train_dataset=Rows(8), sift=config).train()
    assert caplog.text.count("the choice will never move: reselection has every 5") == 1
    caplog.clear()
    trained = load(model)
    sift = SIFT(trained, 0.1, LAYERS)
    optimizer = torch.optim.AdamW(sift.parameters_in_optimizer())
    calls: Any = [SiftCallback(sift, reselection=moves)]
    Trainer(
        trained, args, train_dataset=Rows(8), optimizers=(optimizer, None), callbacks=calls
    ).train()
    assert caplog.text.count("the choice will never move: reselection has every 5") == 1


@pytest.mark.parametrize("name", ["accumulated", "kept", "lift"])
def test_the_mixin_moves_and_resumes_bit_for_bit(tmp_path: Path, name: str) -> None:
    base = make_bert(tmp_path / "base", torch.float32)
    settings = {**SETTINGS[name], "every": 2}
    config = SiftConfig(
        sparse_rate=0.1, sparse_module=LAYERS, exception=["classifier"], reselection=settings, selection_batches=2,
    )  # fmt: skip

    def make(folder: str) -> SiftTrainer:
        args = arguments(
            tmp_path / folder, max_steps=5, save_strategy="steps", save_steps=1, learning_rate=1e-3,
            gradient_accumulation_steps=2,
        )  # fmt: skip
        return SiftTrainer(load(base), args, train_dataset=Rows(8), sift=config, base=base)

    whole = make("out")
    whole.train()
    assert whole.sift.n_reselections == 2
    for at in (1, 2, 3):
        resumed = make("out")
        resumed.train(resume_from_checkpoint=str(tmp_path / "out" / f"checkpoint-{at}"))
        other: Any = resumed.model
        for each, value in snapshot(whole.sift.model).items():
            assert same_bits(value, other.state_dict()[each]), each


def test_the_callback_moves_without_gradients_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    base = make_bert(tmp_path / "base", torch.float32)
    settings = {**SETTINGS["lift"], "every": 1}

    def make() -> tuple[SIFT, Trainer]:
        model = load(base)
        sift = SIFT(model, 0.1, LAYERS, ["classifier"], selection="principal")
        optimizer = torch.optim.AdamW(sift.parameters_in_optimizer(), lr=1e-3)
        args = arguments(tmp_path / "out", max_steps=4, save_strategy="steps", save_steps=2)
        callback = SiftCallback(sift, reselection=settings)
        return sift, Trainer(
            model, args, train_dataset=Rows(8), optimizers=(optimizer, None), callbacks=[callback]
        )

    sift, trainer = make()
    trainer.train()
    assert sift.n_reselections > 1
    other, trainer = make()
    trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    for name, value in snapshot(sift.model).items():
        assert same_bits(value, other.model.state_dict()[name]), name
    with pytest.raises(
        ValueError, match="grow is 'accumulated', which ranks by gradients, and a callback"
    ):
        SiftCallback(sift, reselection="spiel")
