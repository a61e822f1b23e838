"""Masters that exist during a step only: rounding, exact resume, and what is kept."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_helpers import RankPool
from test_loop import N_STATISTICS, check_resumed
from test_matrix import OPTIMIZERS, make, train
from test_trainer import LAYERS, Rows, SiftTrainer, arguments, load
from torch import Tensor, nn
from train_helpers import make_bert, make_inputs, make_net, same_bits, snapshot, square_loss

from sift_train import SIFT, FitConfig, SiftConfig, plan
from sift_train.lean import stochastic_bfloat16

LEAN = ["stochastic", "kahan"]


def bf16_loss(model: nn.Module, batch: Tensor) -> Tensor:
    return square_loss(model, batch.bfloat16())


def trained(masters: str, n_steps: int = 5, lr: float = 1e-3, **more: Any) -> SIFT:
    sift = SIFT(
        make_net().bfloat16(), 0.2, exception="norm", lr_transfer=False, masters=masters, **more
    )
    optimizer = torch.optim.AdamW(sift.parameters_in_optimizer(), lr=lr)
    for batch in make_inputs(n_steps):
        bf16_loss(sift.model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    return sift


def test_stochastic_rounding_is_to_a_neighbour_and_right_on_average() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(64, generator=generator)
    below = (values.view(torch.int32) & (-1 << 16)).view(torch.float32)
    above = ((values.view(torch.int32) & (-1 << 16)) + (1 << 16)).view(torch.float32)
    drawn = torch.stack([stochastic_bfloat16(values, generator).float() for _ in range(4000)])
    assert bool(((drawn == below) | (drawn == above)).all())
    share = ((values - below) / (above - below)).double()
    found = (drawn == above).double().mean(0)
    assert bool(((found - share).abs() < 5 * (share * (1 - share) / 4000).sqrt() + 1e-3).all())
    fixed = torch.tensor([0.0, -0.0, 1.5, -2.0, torch.inf, -torch.inf])
    assert same_bits(stochastic_bfloat16(fixed, generator), fixed.bfloat16())
    assert bool(stochastic_bfloat16(torch.tensor([torch.nan]), generator).isnan())


@pytest.mark.parametrize("masters", LEAN)
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize(
    ("kind", "names"),
    [("net", ["weight"]), ("experts", ["up", "down"]), ("tied", ["embed", "twice"])],
)
def test_weights_in_fp32_train_with_the_same_bits(
    masters: str, name: str, kind: str, names: list[str]
) -> None:
    found = []
    for each in ("fp32", masters):
        model = make(kind)
        sift = SIFT(model, 0.3, names, grad_acc=2, lr_transfer=False, masters=each)
        train(model, OPTIMIZERS[name](sift.parameters_in_optimizer()), make_inputs(6), grad_acc=2)
        found.append(snapshot(model))
    assert all(same_bits(value, found[1][name]) for name, value in found[0].items())


@pytest.mark.parametrize("masters", LEAN)
def test_between_the_steps_a_master_takes_no_memory(masters: str) -> None:
    sift = trained(masters)
    for part in sift.sparse_mapping.values():
        assert part.master.untyped_storage().nbytes() == 4
        assert part.master.isnan().all()
        assert part.lean is not None
        assert (part.lean.compensation is None) == (masters == "stochastic")
        weights = part.parameter.detach().flatten()[part.flat_index.long()]
        assert same_bits(part.data.bfloat16(), weights)
    assert sift.memory_report().master_bytes == (2 * sift.n_trained if masters == "kahan" else 0)


def test_kahan_keeps_what_rounding_cuts_off() -> None:
    """Its masters follow fp32 masters, where plain bf16 loses every update."""
    exact, ours = trained("fp32", 40, 1e-5), trained("kahan", 40, 1e-5)
    for name, part in exact.sparse_mapping.items():
        other = ours.sparse_mapping[name]
        torch.testing.assert_close(other.change, part.change, atol=5e-6, rtol=0.0)
        assert float(other.change.median()) > 5e-5
        assert other.lean is not None
        assert other.lean.compensation is not None
        assert other.lean.compensation.any()


def test_stochastic_rounding_moves_weights_by_small_updates() -> None:
    ours = trained("stochastic", 40, 1e-5)
    moved = torch.cat([part.change for part in ours.sparse_mapping.values() if not part.is_dense])
    plain = make_net().bfloat16()
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-5, weight_decay=0.0)
    before = snapshot(plain)
    for batch in make_inputs(40):
        bf16_loss(plain, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    first = (plain.first.weight - before["first.weight"]).ne(0).float().mean()
    assert float((moved > 0).float().mean()) > 3 * float(first)


@pytest.mark.parametrize("masters", LEAN)
@pytest.mark.parametrize("at", [1, 3])
def test_a_state_resumes_with_the_same_bits(masters: str, at: int, tmp_path: Path) -> None:
    def run(sift: SIFT, optimizer: Any, batches: list[Tensor]) -> None:
        for batch in batches:
            bf16_loss(sift.model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()

    def start() -> tuple[SIFT, torch.optim.Optimizer]:
        sift = SIFT(
            make_net().bfloat16(), 0.2, exception="norm", selection="gradient", masters=masters
        )
        return sift, torch.optim.AdamW(sift.parameters_in_optimizer(), lr=1e-4)

    batches = make_inputs(6)
    whole, optimizer = start()
    run(whole, optimizer, batches[:at])
    whole.save(tmp_path / "state")
    state = copy.deepcopy(optimizer.state_dict())
    held = snapshot(whole.model)
    run(whole, optimizer, batches[at:])
    for with_weights in (False, True):  # into the base, and into the trained weights
        other, optimizer = start()
        if with_weights:
            other.model.load_state_dict(held)
        other.load(tmp_path / "state")
        optimizer.load_state_dict(copy.deepcopy(state))
        assert all(same_bits(v, held[n]) for n, v in snapshot(other.model).items())
        run(other, optimizer, batches[at:])
        for name, value in snapshot(whole.model).items():
            assert same_bits(value, other.model.state_dict()[name]), name
        other.close()


@pytest.mark.parametrize("reselection", [None, {"every": 2, "share": 0.4, "until": 1.0}])
@pytest.mark.parametrize("masters", LEAN)
@pytest.mark.parametrize("stop_at", [1, 2, 4])
def test_a_resumed_fit_ends_in_the_same_bits(
    tmp_path: Path, masters: str, stop_at: int, reselection: Any
) -> None:
    config = FitConfig(
        sparse_rate=0.2, sparse_module=["weight"], exception="bias", accumulation=2, lr=1e-3, weight_decay=0.1,
        decay_to="base", epochs=2, save_every=1, masters=masters, reselection=reselection,
    )  # fmt: skip

    result = check_resumed(tmp_path, config, stop_at, own_generator=False)
    assert 0 < result.nnz <= result.n_trained + N_STATISTICS


@pytest.mark.parametrize("masters", LEAN)
def test_the_mixin_resumes_bit_for_bit(tmp_path: Path, masters: str) -> None:
    base = make_bert(tmp_path / "base", torch.bfloat16)
    config = SiftConfig(
        sparse_rate=0.1, sparse_module=LAYERS, exception=["classifier"], masters=masters
    )

    def make_trainer() -> SiftTrainer:
        args = arguments(
            tmp_path / "out", max_steps=4, save_strategy="steps", save_steps=2, learning_rate=1e-3
        )
        model = load(base, torch.bfloat16)
        return SiftTrainer(model, args, train_dataset=Rows(8), sift=config, base=base)

    whole = make_trainer()
    whole.train()
    resumed = make_trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    other: Any = resumed.model
    for name, value in snapshot(whole.sift.model).items():
        assert same_bits(value, other.state_dict()[name]), name


@pytest.mark.parametrize("masters", LEAN)
def test_what_something_else_writes_is_trained_on(masters: str) -> None:
    sift = trained(masters)
    base = snapshot(make_net().bfloat16())
    written = {name: value + 0.25 for name, value in sift.model.state_dict().items()}
    sift.model.load_state_dict(written)
    bf16_loss(sift.model, make_inputs(1)[0])
    for name, part in sift.sparse_mapping.items():
        assert same_bits(part.parameter.detach(), written[name])
        held = written[name].flatten()[part.flat_index.long()].float()
        assert same_bits(part.data, held)  # no old rounding error is added
    sift.revert()
    for part in sift.sparse_mapping.values():
        assert not part.is_trained
    chosen = sift.sparse_mapping["first.weight"].flat_index.long()
    assert same_bits(
        sift.model.state_dict()["first.weight"].flatten()[chosen],
        base["first.weight"].flatten()[chosen],
    )


def rank_loop(rank: int, masters: str) -> dict[str, Tensor]:
    model = make_net().bfloat16()
    with SIFT(model, 0.2, exception=["norm"], masters=masters) as sift:
        optimizer = torch.optim.AdamW(sift.parameters_in_optimizer(), lr=1e-3)
        for batch in make_inputs(6)[rank::2]:
            bf16_loss(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
        sift.check_ranks()
        return {**sift.state_dict(), **model.state_dict()}


@pytest.mark.parametrize("masters", LEAN)
def test_ranks_round_alike(pool: RankPool, masters: str) -> None:
    first, second = pool.results(rank_loop, masters)
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize("masters", LEAN)
def test_a_bad_loss_changes_nothing(masters: str) -> None:
    sift = trained(masters)
    optimizer = torch.optim.SGD(sift.parameters_in_optimizer(), lr=1.0)
    before, data = snapshot(sift.model), {n: p.data.clone() for n, p in sift.sparse_mapping.items()}
    sift.may_write = torch.tensor(False)
    bf16_loss(sift.model, make_inputs(1)[0]).backward()
    optimizer.step()
    assert all(same_bits(value, before[n]) for n, value in snapshot(sift.model).items())
    for name, part in sift.sparse_mapping.items():
        assert same_bits(part.data, data[name])


def test_what_cannot_be_lean_is_refused() -> None:
    with pytest.raises(ValueError, match="masters is 'bf16'; choose one of fp32, stochastic"):
        SIFT(make_net(), masters="bf16")
    with pytest.raises(ValueError, match="masters is 'bf16'; choose one of fp32, stochastic"):
        FitConfig(masters="bf16")
    with pytest.raises(ValueError, match=r"float16, and only bfloat16 is rounded at random"):
        SIFT(make_net().half(), masters="stochastic")
    sift = trained("kahan")
    master = sift.sparse_mapping["first.weight"].master
    with pytest.raises(RuntimeError, match="refers to a single memory location"):
        master.data.add_(1.0)
    master.data = torch.zeros_like(master.data)
    with pytest.raises(ValueError, match=r"the master of 'first\.weight' was replaced between two"):
        bf16_loss(sift.model, make_inputs(1)[0])


@pytest.mark.parametrize(("masters", "lasting"), [("fp32", 4), ("stochastic", 0), ("kahan", 2)])
def test_plan_counts_the_bytes(masters: str, lasting: int) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).bfloat16()
    found = plan(model, 0.1, masters=masters)
    assert found.master_bytes == lasting * found.n_trained
    assert found.gradient_bytes == 4 * found.n_trained
    live = SIFT(model, 0.1, masters=masters).memory_report()
    assert (live.master_bytes, live.peak_bytes) == (found.master_bytes, found.peak_bytes)
    default = plan(model, 0.1)
    assert found.trained_bytes - default.trained_bytes == (lasting - 4) * found.n_trained
