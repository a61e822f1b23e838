"""Tests of SIFT; each checks one documented property."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from train_helpers import make_inputs, make_net, same_bits, snapshot, square_loss

from sift_train import SIFT, Rule

Optimize = Callable[[list[nn.Parameter]], torch.optim.Optimizer]

OPTIMIZERS: dict[str, Optimize] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, foreach=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-1, momentum=0.9, weight_decay=0.1),
}


def sgd(sift: SIFT, lr: float = 0.1) -> torch.optim.Optimizer:
    optimizer = torch.optim.SGD(sift.parameters_in_optimizer(), lr=lr)
    sift.attach(optimizer)
    return optimizer


def step(model: nn.Module, optimizer: torch.optim.Optimizer, *batches: Tensor) -> None:
    optimizer.zero_grad()
    for batch in batches:
        square_loss(model, batch).backward()
    optimizer.step()


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_at_rate_one_it_is_the_plain_optimizer(name: str, accumulation: int) -> None:
    plain, ours = make_net(), make_net()
    plain_optimizer = OPTIMIZERS[name](list(plain.parameters()))
    inputs = make_inputs(5 * accumulation)
    with SIFT(ours, 1.0, ["weight", "bias"], grad_acc=accumulation) as sift:
        optimizer = OPTIMIZERS[name](sift.parameters_in_optimizer())
        sift.attach(optimizer)
        for at in range(0, len(inputs), accumulation):
            step(plain, plain_optimizer, *inputs[at : at + accumulation])
            step(ours, optimizer, *inputs[at : at + accumulation])
            for (key, left), right in zip(plain.named_parameters(), ours.parameters(), strict=True):
                assert same_bits(left, right), (key, at)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_unattached_the_next_forward_sees_every_step(name: str) -> None:
    plain, ours = make_net(), make_net()
    plain_optimizer = OPTIMIZERS[name](list(plain.parameters()))
    with SIFT(ours, 1.0, ["weight", "bias"]) as sift:
        optimizer = OPTIMIZERS[name](sift.parameters_in_optimizer())
        for batch in make_inputs(4):
            assert same_bits(plain(batch), ours(batch))
            step(plain, plain_optimizer, batch)
            step(ours, optimizer, batch)
        assert all(same_bits(v, ours.state_dict()[k]) for k, v in plain.state_dict().items())
        step(ours, optimizer, batch)
        step(plain, plain_optimizer, batch)
    assert all(same_bits(p, q) for p, q in zip(plain.parameters(), ours.parameters(), strict=True))


def test_exactly_the_selected_positions_change() -> None:
    model = make_net()
    before = snapshot(model)
    with SIFT(model, 0.1, ["first.weight", "last.weight"]) as sift:
        optimizer = sgd(sift)
        for batch in make_inputs(4):
            step(model, optimizer, batch)
        selected = {name: part.flat_index.long() for name, part in sift.sparse_mapping.items()}
    after = model.state_dict()
    for name, value in before.items():
        changed = (value != after[name]).flatten().nonzero().flatten()
        assert changed.tolist() == selected.get(name, torch.empty(0)).tolist()


def test_every_update_is_in_the_model_as_soon_as_the_step_is_done() -> None:
    model = make_net()
    with SIFT(model, 0.1, "first.weight") as sift:
        optimizer = sgd(sift)
        part = sift.sparse_mapping["first.weight"]
        for batch in make_inputs(3):
            step(model, optimizer, batch)
            assert same_bits(model.first.weight.flatten()[part.flat_index], part.master)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_batches_that_select_are_trained_on(accumulation: int) -> None:
    plain, ours = make_net(), make_net()
    inputs = make_inputs(accumulation)
    for batch in inputs:
        square_loss(plain, batch).backward()
    with SIFT(ours, 0.2, "weight", grad_acc=accumulation) as sift:
        step(ours, sgd(sift), *inputs)
        for name, part in sift.sparse_mapping.items():
            dense = plain.get_parameter(name).grad
            assert dense is not None
            assert part.master.grad is not None
            assert same_bits(part.master.grad, dense.flatten()[part.flat_index])
            assert torch.count_nonzero(part.master.grad) == part.train_num


def test_selection_ranks_by_the_mean_of_absolute_gradients() -> None:
    model, probe = make_net(), make_net()
    inputs = make_inputs(3)
    total = torch.zeros(16 * 12)
    for batch in inputs:
        (gradient,) = torch.autograd.grad(square_loss(probe, batch), probe.first.weight)
        total += gradient.abs().flatten()
    with SIFT(model, 0.1, "first.weight", selection="gradient") as sift:
        with sift.selecting():
            for batch in inputs:
                square_loss(model, batch).backward()
        part = sift.sparse_mapping["first.weight"]
        assert part.flat_index.tolist() == total.topk(part.train_num).indices.sort().values.tolist()
        assert part.master.grad is None
        assert same_bits(model.first.weight, probe.first.weight)


def test_selecting_leaves_running_statistics_alone() -> None:
    model = nn.Sequential(nn.Linear(12, 6), nn.BatchNorm1d(6))
    before = snapshot(model)
    with SIFT(model, 0.5, "0.weight") as sift, sift.selecting():
        square_loss(model, make_inputs(1)[0]).backward()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())


def test_non_finite_gradients_do_not_select() -> None:
    model = make_net()
    bad = [3, 50, 120]

    def poison(gradient: Tensor) -> Tensor:
        poisoned = gradient.clone()
        poisoned.view(-1)[bad] = torch.tensor([torch.inf, torch.nan, -torch.inf])
        return poisoned

    model.first.weight.register_hook(poison)
    with SIFT(model, 0.3, "first.weight") as sift:
        square_loss(model, make_inputs(1)[0]).backward()
        assert set(bad).isdisjoint(sift.sparse_mapping["first.weight"].flat_index.tolist())


def test_a_tensor_waits_for_its_first_usable_gradient() -> None:
    model = make_net()
    factor = torch.tensor(0.0)
    model.first.weight.register_hook(lambda gradient: gradient * factor)
    before = model.first.weight.detach().clone()
    with SIFT(model, 0.1, ["first.weight", "last.weight"], selection="gradient") as sift:
        optimizer = sgd(sift)
        part = sift.sparse_mapping["first.weight"]
        step(model, optimizer, make_inputs(1)[0])
        assert not part.is_selected
        assert sift.sparse_mapping["last.weight"].is_selected
        factor.fill_(torch.nan)
        step(model, optimizer, make_inputs(1)[0])
        assert not part.is_selected
        assert same_bits(before, model.first.weight)
        factor.fill_(1.0)
        step(model, optimizer, make_inputs(1)[0])
        assert part.is_selected
        assert int((before != model.first.weight).sum()) == part.train_num


def test_bf16_updates_below_the_rounding_step_add_up() -> None:
    model = nn.Linear(8, 8, bias=False).to(torch.bfloat16)
    nn.init.ones_(model.weight)
    with SIFT(model, 1.0, "weight") as sift:
        optimizer = torch.optim.SGD(sift.parameters_in_optimizer(), lr=1e-4)
        sift.attach(optimizer)
        for _ in range(100):
            optimizer.zero_grad()
            model.weight.sum().backward()
            optimizer.step()
        assert torch.allclose(sift.parameters_in_optimizer()[0], torch.tensor(0.99))
    assert model.weight.dtype == torch.bfloat16
    assert model.weight.unique().tolist() == [0.98828125]  # bf16 nearest to 0.99


def test_gradients_accumulate_in_fp32() -> None:
    model = nn.Linear(4, 1, bias=False).to(torch.bfloat16)
    with SIFT(model, 1.0, "weight") as sift:
        for scale in (1.0, 2.0**-10):
            (model.weight.sum() * scale).backward()
        gradient = sift.parameters_in_optimizer()[0].grad
        assert gradient is not None
        assert gradient.tolist() == [1.0 + 2.0**-10] * 4


def test_the_model_holds_no_dense_gradient_after_backward() -> None:
    model = make_net()
    with SIFT(model, 0.1, "weight", grad_acc=2):
        square_loss(model, make_inputs(1)[0]).backward()
        assert all(p.grad is None for p in model.parameters())


def test_a_gradient_from_before_is_not_trained_on() -> None:
    model, fresh = make_net(), make_net()
    square_loss(model, make_inputs(1, seed=9)[0]).backward()
    for each in (model, fresh):
        with SIFT(each, 1.0, "weight") as sift:
            step(each, sgd(sift), make_inputs(1)[0])
    assert all(same_bits(p, q) for p, q in zip(model.parameters(), fresh.parameters(), strict=True))


def test_the_state_dict_keeps_its_keys() -> None:
    model = make_net()
    keys = list(model.state_dict())
    with SIFT(model, 0.1, "weight") as sift:
        step(model, sgd(sift), make_inputs(1)[0])
        assert list(model.state_dict()) == keys
        assert len(list(model.parameters())) == len(list(make_net().parameters()))


def test_close_removes_all_hooks() -> None:
    model = make_net()
    sift = SIFT(model, 0.1, "weight")
    optimizer = sgd(sift)
    step(model, optimizer, make_inputs(1)[0])
    sift.close()
    sift.close()
    square_loss(model, make_inputs(1)[0]).backward()
    assert all(p.grad is not None for p in model.parameters())
    assert not model._forward_pre_hooks
    assert not model._state_dict_pre_hooks
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    before = snapshot(model)
    optimizer.step()
    model(make_inputs(1)[0])
    assert all(same_bits(value, model.state_dict()[name]) for name, value in before.items())


def test_what_is_not_trained_is_frozen_until_close() -> None:
    model = make_net()
    model.norm.bias.requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    with SIFT(model, 0.1, "first.weight", "last"):
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        assert trained == {"first.weight", "last.weight", "last.bias"}
    assert [p.requires_grad for p in model.parameters()] == flags


def test_an_exception_is_trained_densely() -> None:
    model = make_net()
    before = snapshot(model)
    with SIFT(model, 0.1, "weight", "last") as sift:
        step(model, sgd(sift), make_inputs(1)[0])
        assert sift.sparse_mapping["last.weight"].train_num == model.last.weight.numel()
        assert sift.sparse_mapping["last.weight"].flat_index.tolist() == list(range(64))
    assert bool((before["last.weight"] != model.last.weight).all())


def test_tied_weights_are_trained_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(10, 6)
            self.head = nn.Linear(6, 10, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(self.embed(x))
            return out

    plain, ours = Tied(), Tied()
    ours.load_state_dict(plain.state_dict())
    batch = torch.arange(10)
    plain_optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    with SIFT(ours, 1.0, ["head.weight"]) as sift:
        assert list(sift.sparse_mapping) == ["embed.weight"]
        optimizer = sgd(sift)
        for _ in range(3):
            step(plain, plain_optimizer, batch)
            step(ours, optimizer, batch)
    assert same_bits(plain.embed.weight, ours.embed.weight)
    assert ours.head.weight is ours.embed.weight


class Shapes(nn.Module):
    """A convolution, a stack of matrices, a vector and a scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 2, bias=False)
        self.experts = nn.Parameter(torch.randn(2, 12, 5))
        self.vector = nn.Parameter(torch.randn(5))
        self.scalar = nn.Parameter(torch.tensor(1.5))

    def forward(self, x: Tensor) -> Tensor:
        mixed = (x @ self.experts).sum(0) * self.vector * self.scalar
        out: Tensor = mixed.sum(1) + self.conv(x.view(-1, 1, 3, 4)).flatten(1).sum(1)
        return out


@pytest.mark.parametrize("rate", [0.3, 1.0])
def test_any_shape_is_trained(rate: float) -> None:
    torch.manual_seed(0)
    plain, ours = Shapes(), Shapes()
    ours.load_state_dict(plain.state_dict())
    batch = make_inputs(1)[0]
    step(plain, torch.optim.SGD(plain.parameters(), lr=0.1), batch)
    before = snapshot(ours)
    with SIFT(ours, rate, ["conv", "experts", "vector", "scalar"], lr_transfer=False) as sift:
        step(ours, sgd(sift), batch)
        for name, part in sift.sparse_mapping.items():
            mask = torch.zeros(before[name].numel(), dtype=torch.bool)
            mask[part.flat_index] = True
            dense = plain.get_parameter(name).flatten()
            expected = torch.where(mask, dense, before[name].flatten())
            assert same_bits(expected, ours.get_parameter(name).flatten())


def test_revert_and_reverted_restore_every_bit() -> None:
    model = make_net().to(torch.bfloat16)
    before = snapshot(model)
    batch = make_inputs(1)[0].to(torch.bfloat16)
    with SIFT(model, 0.2, "weight", "last") as sift:
        step(model, sgd(sift), batch)
        trained = snapshot(model)
        with sift.reverted():
            assert all(same_bits(v, model.state_dict()[k]) for k, v in before.items())
        assert all(same_bits(v, model.state_dict()[k]) for k, v in trained.items())
        assert not all(same_bits(v, before[k]) for k, v in trained.items())
        sift.revert()
    assert all(same_bits(v, model.state_dict()[k]) for k, v in before.items())


def test_clipping_covers_exactly_what_is_trained() -> None:
    model = make_net()
    with SIFT(model, 0.1, "weight") as sift:
        square_loss(model, make_inputs(1)[0]).backward()
        gradients = [p.grad for p in sift.parameters_in_optimizer() if p.grad is not None]
        expected = torch.cat(gradients).norm()
        assert torch.allclose(sift.clip_grad_norm_(1e-3), expected)
        assert torch.allclose(torch.cat(gradients).norm(), torch.tensor(1e-3))


def test_the_same_seed_selects_the_same() -> None:
    def choose(seed: int) -> list[int]:
        with SIFT(make_net(), 0.2, "first.weight", selection="random", seed=seed) as sift:
            indices: list[int] = sift.sparse_mapping["first.weight"].flat_index.tolist()
            return indices

    assert choose(0) == choose(0)
    assert choose(0) != choose(1)


def test_magnitude_selects_the_largest_weights() -> None:
    model = make_net()
    with SIFT(model, 0.1, "first.weight", selection="magnitude") as sift:
        part = sift.sparse_mapping["first.weight"]
        largest = model.first.weight.abs().flatten().topk(part.train_num).indices
        assert part.flat_index.tolist() == largest.sort().values.tolist()


def test_a_rule_of_ones_own() -> None:
    rule = Rule(from_gradient=lambda weight, gradient: (weight * gradient).abs())
    model, probe = make_net(), make_net()
    batch = make_inputs(1)[0]
    (gradient,) = torch.autograd.grad(square_loss(probe, batch), probe.last.weight)
    with SIFT(model, 0.1, "last.weight", selection=rule) as sift:
        square_loss(model, batch).backward()
        part = sift.sparse_mapping["last.weight"]
        scores = (probe.last.weight * gradient).abs().flatten()
        assert (
            part.flat_index.tolist() == scores.topk(part.train_num).indices.sort().values.tolist()
        )


def test_all_linear_leaves_the_rest_frozen() -> None:
    with SIFT(make_net(), 0.1) as sift:
        assert list(sift.sparse_mapping) == ["first.weight", "last.weight"]


def test_a_choice_of_ones_own_is_checked() -> None:
    with SIFT(make_net(), 0.01, "first.weight", selection="gradient") as sift:
        part = sift.sparse_mapping["first.weight"]
        with pytest.raises(ValueError, match="not selected yet"):
            _ = part.flat_index
        with pytest.raises(ValueError, match="not strictly increasing"):
            part.choose(torch.tensor([5, 5]))
        with pytest.raises(ValueError, match="not strictly increasing"):
            part.choose(torch.tensor([5, 192]))
        with pytest.raises(ValueError, match="expected one dimension of integers"):
            part.choose(torch.tensor([5.0, 6.0]))
        part.choose(torch.tensor([5, 191]))
        part.choose(torch.tensor([7, 8, 9]))  # no step yet
        assert part.train_num == 3
        part.master.data.add_(1.0)
        with pytest.raises(ValueError, match="have been trained"):
            part.choose(torch.tensor([5, 191]))


def test_an_optimizer_that_lacks_a_master_is_refused() -> None:
    model = make_net()
    with SIFT(model, 0.1, "weight") as sift:
        some = sift.parameters_in_optimizer()[1:]
        with pytest.raises(ValueError, match=r"does not train 'first.weight'"):
            sift.attach(torch.optim.SGD(some, lr=0.1))


def test_an_optimizer_over_the_model_itself_is_refused() -> None:
    model = make_net()
    with SIFT(model, 0.1, "weight") as sift:
        both = [*sift.parameters_in_optimizer(), *model.parameters()]
        with pytest.raises(ValueError, match="whose gradients go to the masters"):
            sift.attach(torch.optim.SGD(both, lr=0.1))


def _transposed() -> nn.Module:
    model = make_net()
    model.first.weight.data = torch.randn(12, 16).T
    return model


def _same_memory() -> nn.Module:
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = nn.Parameter(first.weight.data)
    return nn.Sequential(first, second)


def _integers() -> nn.Module:
    model = make_net()
    model.first.weight = nn.Parameter(torch.zeros(4, dtype=torch.uint8), requires_grad=False)
    return model


@pytest.mark.parametrize(
    ("make", "fragment", "message"),
    [
        (_transposed, "first", "is not contiguous"),
        (lambda: nn.Embedding(9, 4, sparse=True), "weight", "sparse=True"),
        (lambda: nn.Linear(4, 4, device="meta"), "weight", "meta device"),
        (_integers, "first.weight", "has dtype torch.uint8"),
        (_same_memory, "weight", "share the same memory"),
        (lambda: nn.DataParallel(make_net()), "weight", "contains a DataParallel"),
        (make_net, "q_proj", "occurs in no parameter name"),
        (make_net, "Norm", "'norm.weight' differs only in upper and lower case"),
        (make_net, [], "no parameter is selected"),
        (make_net, [""], "not a non-empty string"),
        (nn.ReLU, [], "has no parameters"),
    ],
)
def test_what_cannot_be_trained_is_refused_and_left_alone(
    make: Callable[[], nn.Module], fragment: str | list[str], message: str
) -> None:
    model = make()
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match=message) as caught:
        SIFT(model, 0.1, fragment)
    assert "\n" not in str(caught.value)
    assert [p.requires_grad for p in model.parameters()] == flags


def test_a_frozen_sparse_embedding_is_fine() -> None:
    model = nn.Sequential(nn.Embedding(9, 4, sparse=True), nn.Linear(4, 4))
    with SIFT(model, 0.1, "1.weight") as sift:
        step(model, sgd(sift), torch.arange(9))
        assert sift.sparse_mapping["1.weight"].is_selected


def test_a_compiled_model_trains_the_same() -> None:
    plain, ours = make_net(), make_net()
    plain_optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    with SIFT(ours, 1.0, ["weight", "bias"]) as sift:
        optimizer = sgd(sift)
        compiled: nn.Module = torch.compile(ours, backend="eager")  # type: ignore[assignment]
        for batch in make_inputs(3):
            step(plain, plain_optimizer, batch)
            step(compiled, optimizer, batch)
    assert all(same_bits(p, q) for p, q in zip(plain.parameters(), ours.parameters(), strict=True))


def test_a_model_may_be_used_twice_in_one_loss() -> None:
    model = make_net()
    with SIFT(model, 0.2, ["first", "last"], selection="magnitude") as sift:
        optimizer = torch.optim.SGD(sift.parameters_in_optimizer(), lr=0.1)
        for x, y in zip(make_inputs(2), make_inputs(2, seed=5), strict=True):
            (model(x) * model(y)).mean().backward()
            optimizer.step()


def test_a_second_sift_over_the_same_weights_is_refused() -> None:
    model = make_net()
    first = SIFT(model, 0.1, "first.weight")
    for again in (model, model.first, nn.Sequential(model)):
        with pytest.raises(ValueError, match=r"is trained by another SIFT.*close\(\)"):
            SIFT(again, 0.1, "weight")
    SIFT(copy.deepcopy(model), 0.1, "first.weight").close()
    first.close()
    SIFT(model, 0.1, "last.weight").close()


def test_a_sift_tells_what_it_is() -> None:
    model = make_net()
    sift = SIFT(model, 0.1, ["first.weight", "last"], "last.bias", selection="gradient")
    assert repr(sift) == (
        "SIFT(Net: 31 of 308 components trained, 10.06 %; 1 of 3 parameters chosen)"
    )
    square_loss(model, make_inputs(1)[0]).backward()
    sift.close()
    assert "3 of 3 parameters chosen; closed)" in repr(sift)


@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_closure_is_a_step_as_any_other(accumulation: int, by_name: bool) -> None:
    """The gradients are computed inside the step, also with several micro-batches at the first step."""
    plain, closed = make_net(), make_net()
    inputs = make_inputs(2 * accumulation)

    def windows() -> list[list[Tensor]]:
        return [inputs[at : at + accumulation] for at in range(0, len(inputs), accumulation)]

    with SIFT(plain, 0.1, ["first", "last"], grad_acc=accumulation) as sift:
        optimizer = sgd(sift)
        for window in windows():
            step(plain, optimizer, *window)
    with SIFT(closed, 0.1, ["first", "last"], grad_acc=accumulation) as sift:
        optimizer = sgd(sift)
        for window in windows():

            def closure(window: list[Tensor] = window) -> float:
                optimizer.zero_grad()
                for batch in window:
                    square_loss(closed, batch).backward()
                return 0.0

            if by_name:
                optimizer.step(closure=closure)
            else:
                optimizer.step(closure)
    assert all(
        same_bits(p, q) for p, q in zip(plain.parameters(), closed.parameters(), strict=True)
    )


def test_a_file_that_is_not_a_state_is_one_clear_sentence(tmp_path: Path) -> None:
    with SIFT(make_net(), 0.1, "first.weight") as sift:
        (tmp_path / "notes.txt").write_text("not a state")
        with pytest.raises(
            ValueError, match=r"notes.txt' is not a safetensors file, so it"
        ) as told:
            sift.load(tmp_path / "notes.txt")
        assert "\n" not in str(told.value)
        save_file({"a": torch.ones(1)}, tmp_path / "other.safetensors")
        with pytest.raises(ValueError, match=r"give a file that SIFT\.save wrote"):
            sift.load(tmp_path / "other.safetensors")


def test_grad_acc_is_a_count() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        SIFT(make_net(), 0.1, "weight", grad_acc=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("is_chosen", [False, True])
def test_masters_follow_a_model_that_is_moved(is_chosen: bool) -> None:
    """With Trainer, SIFT and optimizer are created first, and Trainer then moves the model."""
    moved, there = make_net(), make_net().cuda()
    inputs = [batch.cuda() for batch in make_inputs(3)]
    selection = "magnitude" if is_chosen else "gradient"
    with (
        SIFT(moved, 0.3, "weight", selection=selection) as late,
        SIFT(there, 0.3, "weight", selection=selection) as early,
    ):
        optimizers = [OPTIMIZERS["adamw"](s.parameters_in_optimizer()) for s in (late, early)]
        moved.cuda()
        for batch in inputs:
            for model, optimizer in zip((moved, there), optimizers, strict=True):
                step(model, optimizer, batch)
        assert all(master.is_cuda for master in late.parameters_in_optimizer())
    for one, other in zip(moved.parameters(), there.parameters(), strict=True):
        assert same_bits(one, other)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("accumulation", [1, 2])
def test_on_a_gpu_it_is_the_plain_optimizer_too(accumulation: int) -> None:
    plain, ours = make_net().cuda(), make_net().cuda()
    inputs = [batch.cuda() for batch in make_inputs(4 * accumulation)]
    plain_optimizer = OPTIMIZERS["adamw"](list(plain.parameters()))
    with SIFT(ours, 1.0, ["weight", "bias"], grad_acc=accumulation) as sift:
        optimizer = OPTIMIZERS["adamw"](sift.parameters_in_optimizer())
        sift.attach(optimizer)
        for at in range(0, len(inputs), accumulation):
            step(plain, plain_optimizer, *inputs[at : at + accumulation])
            step(ours, optimizer, *inputs[at : at + accumulation])
    assert all(same_bits(p, q) for p, q in zip(plain.parameters(), ours.parameters(), strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("accumulation", [1, 2])
def test_on_a_gpu_only_the_selected_positions_change(accumulation: int) -> None:
    model = make_net().cuda()
    before = snapshot(model)
    with SIFT(model, 0.1, "first.weight", grad_acc=accumulation) as sift:
        step(model, sgd(sift), *(batch.cuda() for batch in make_inputs(accumulation)))
        index = sift.sparse_mapping["first.weight"].flat_index
    changed = (before["first.weight"] != model.first.weight).flatten().nonzero().flatten()
    assert changed.tolist() == index.tolist()
