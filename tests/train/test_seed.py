"""The names of the original SIFT code work as its README says, without its eleven defects."""

from __future__ import annotations

import copy
import tracemalloc
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from train_helpers import Net, make_inputs, make_net, same_bits, snapshot, square_loss

from sift_train import SIFT


def run(model: nn.Module, optimizer: torch.optim.Optimizer, batches: list[Tensor]) -> None:
    """Train as in that README, with ``zero_grad`` instead of ``zero_``."""
    for batch in batches:
        loss = square_loss(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_the_readme_by_position_and_by_name() -> None:
    model = make_net()
    sift = SIFT(model, 0.1, ["first", "last.weight"], ["last.bias"], 2, False)
    named = list(sift.named_parameters_in_optimizer())
    assert [name for name, _ in named] == ["first.weight", "first.bias", "last.weight", "last.bias"]
    assert [id(p) for _, p in named] == [id(p) for p in sift.parameters_in_optimizer()]
    trained = list(sift.named_trainable_parameters())
    assert [name for name, _ in trained] == [name for name, _ in named]
    assert all(p is model.get_parameter(name) for name, p in trained)
    assert [id(p) for p in sift.trainable_parameters()] == [id(p) for _, p in trained]
    # min(int(rate * numel) + 1, numel) each, all of the exception
    assert sift.get_trainable_num() == 20 + 2 + 7 + 4
    sift.close()
    again = SIFT(
        model, sparse_rate=0.1, sparse_module=["first"], exception=[], grad_acc=1,
        gradient_checkpointing=False,
    )  # fmt: skip
    assert again.get_trainable_num() == 22


def test_print_trainable_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    SIFT(make_net(), 0.1, ["first.weight"]).print_trainable_parameters()
    shown = capsys.readouterr().out
    assert shown == "trainable params: 20 || all params: 308 || trainable%: 6.4935\n"


def test_the_readme_s_groups_train_all_there_is() -> None:
    model = make_net()
    sift = SIFT(model, 0.1, ["weight", "bias"])
    no_decay = ["bias", "norm.weight"]
    named = list(sift.named_parameters_in_optimizer())
    groups = [
        {
            "params": [p for n, p in named if not any(nd in n for nd in no_decay)],
            "weight_decay": 0.1,
        },
        {"params": [p for n, p in named if any(nd in n for nd in no_decay)], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    before = snapshot(model)
    run(model, optimizer, make_inputs(2))
    for name, part in sift.sparse_mapping.items():
        changed = int((before[name] != model.state_dict()[name]).sum())
        assert changed == part.train_num, name


@pytest.mark.parametrize("form", ["coordinates", "flat", "tensor", "before"])
def test_your_own_indices(form: str) -> None:
    """The README: ``sparse_param.idx = np.stack(np.unravel_index(sparse_idx, p.shape))``."""
    model = make_net()
    # Rules by weights have chosen already; rules by gradients have not.
    selection = "gradient" if form == "before" else "magnitude"
    sift = SIFT(model, 0.1, ["first.weight"], selection=selection)
    part = sift.sparse_mapping["first.weight"]
    p = model.first.weight
    order = torch.flatten(abs(p)).topk(part.train_num, largest=False).indices
    sparse_idx = order.cpu().numpy()
    if form in ("coordinates", "before"):
        part.idx = np.stack(np.unravel_index(sparse_idx, p.shape))
    else:
        part.idx = sparse_idx if form == "flat" else order
    expected = sorted(sparse_idx.tolist())
    assert part.flat_index.tolist() == expected
    assert part.idx.tolist() == np.stack(np.unravel_index(expected, p.shape)).tolist()
    assert torch.equal(p[tuple(part.idx)], part.data)
    before = snapshot(model)
    run(model, torch.optim.SGD(sift.parameters_in_optimizer(), lr=0.1), make_inputs(2))
    changed = (before["first.weight"] != model.first.weight).flatten().nonzero().flatten()
    assert changed.tolist() == expected
    stored = torch.sparse_coo_tensor(part.idx, part.data, p.shape, check_invariants=True).to_dense()
    assert torch.equal(stored[stored != 0], p[stored != 0])


def test_an_index_outside_is_refused() -> None:
    part = SIFT(make_net(), 0.1, ["first.weight"]).sparse_mapping["first.weight"]
    for bad in (np.array([[0, 16], [0, 0]]), np.array([[0, -1], [0, 0]])):
        with pytest.raises(ValueError, match="outside the parameter"):
            part.idx = bad
    with pytest.raises(ValueError, match="not strictly increasing"):
        part.idx = np.array([3, 3])


# One test for each of the eleven defects of the original code.


def test_1_it_runs_on_this_torch_and_idx_indexes() -> None:
    model = make_net()
    sift = SIFT(model, 0.1, ["weight"])
    run(model, torch.optim.AdamW(sift.parameters_in_optimizer()), make_inputs(2))
    part = sift.sparse_mapping["last.weight"]
    assert part.idx.shape == (2, part.train_num)
    assert torch.equal(model.last.weight[tuple(part.idx)], part.data)


def test_2_one_backward_gives_every_tensor_its_gradient() -> None:
    """The tensor whose gradient comes last, here the first layer's, gets it in the same step."""
    model, plain = make_net(), make_net()
    sift = SIFT(model, 0.1, ["weight", "bias"])
    batch = make_inputs(1)[0]
    square_loss(model, batch).backward()
    square_loss(plain, batch).backward()
    for name, part in sift.sparse_mapping.items():
        dense: Any = plain.get_parameter(name).grad
        assert part.master.grad is not None, name
        assert same_bits(part.master.grad, dense.flatten()[part.flat_index]), name


def test_3_weights_are_new_as_soon_as_the_step_is_done_the_last_one_too() -> None:
    model, plain = make_net(), make_net()
    sift = SIFT(model, 1.0, ["weight", "bias"])
    optimizer = torch.optim.SGD(sift.parameters_in_optimizer(), lr=0.1)
    plain_optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    for batch in make_inputs(3):
        run(model, optimizer, [batch])
        run(plain, plain_optimizer, [batch])
        # Read directly, without a forward pass or a state dict.
        assert same_bits(model.first.weight, plain.first.weight)


def test_4_weight_decay_decays() -> None:
    model = make_net()
    sift = SIFT(model, 0.1, ["first.weight"], selection="gradient", lr_transfer=False)
    optimizer = torch.optim.AdamW(sift.parameters_in_optimizer(), lr=0.1, weight_decay=1.0)
    square_loss(model, make_inputs(1)[0]).backward()
    part = sift.sparse_mapping["first.weight"]
    part.master.grad = torch.zeros_like(part.master)
    before = part.data.clone()
    optimizer.step()
    assert torch.allclose(model.first.weight.flatten()[part.flat_index], before * 0.9)


@pytest.mark.parametrize("grad_acc", [1, 3])
def test_5_the_first_batch_is_trained_on(grad_acc: int) -> None:
    model, plain = make_net(), make_net()
    sift = SIFT(
        model, 0.1, ["first.weight"], grad_acc=grad_acc, selection="gradient", lr_transfer=False
    )
    optimizer = torch.optim.SGD(sift.parameters_in_optimizer(), lr=1.0)
    for batch in make_inputs(grad_acc):
        square_loss(model, batch).backward()
        square_loss(plain, batch).backward()
    optimizer.step()
    dense: Any = plain.first.weight.grad
    expected = plain.first.weight.detach() - dense
    index = sift.sparse_mapping["first.weight"].flat_index
    assert same_bits(model.first.weight.flatten()[index], expected.flatten()[index])


def test_6_the_state_dict_is_clean_and_a_resumed_run_keeps_its_choice(tmp_path: Any) -> None:
    model, batches = make_net(), make_inputs(4)
    keys = list(model.state_dict())
    sift = SIFT(model, 0.1, ["weight"])
    optimizer = torch.optim.AdamW(sift.parameters_in_optimizer(), lr=1e-2)
    run(model, optimizer, batches[:2])
    assert list(model.state_dict()) == keys
    assert [name for name, _ in model.named_parameters()] == keys
    sift.save(tmp_path / "sift.safetensors")
    saved = copy.deepcopy(optimizer.state_dict())
    resumed = make_net()
    other = SIFT(resumed, 0.1, ["weight"])
    other.load(tmp_path / "sift.safetensors")
    other_optimizer = torch.optim.AdamW(other.parameters_in_optimizer(), lr=1e-2)
    other_optimizer.load_state_dict(saved)
    for name, part in sift.sparse_mapping.items():
        assert other.sparse_mapping[name].flat_index.tolist() == part.flat_index.tolist()
    run(model, optimizer, batches[2:])
    run(resumed, other_optimizer, batches[2:])
    assert all(
        same_bits(p, q) for p, q in zip(model.parameters(), resumed.parameters(), strict=True)
    )
    other.revert()
    assert all(
        same_bits(p, q) for p, q in zip(make_net().parameters(), resumed.parameters(), strict=True)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_7_small_updates_are_not_rounded_away(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weights = torch.randn(1000) * 0.02
    model = nn.Linear(1000, 1, bias=False).to(dtype)
    with torch.no_grad():
        model.weight.copy_(weights)
    start = model.weight.detach().float().clone()
    sift = SIFT(model, 1.0, ["weight"])
    optimizer = torch.optim.SGD(sift.parameters_in_optimizer(), lr=1e-6)
    for _ in range(100):
        optimizer.zero_grad()
        model.weight.sum().backward()
        optimizer.step()
    assert same_bits(model.weight, (sift.sparse_mapping["weight"].master.view(1, -1)).to(dtype))
    moved = (start - sift.sparse_mapping["weight"].data.view(1, -1)).mean()
    assert float(moved) == pytest.approx(1e-4, rel=1e-2)


def test_8_an_index_takes_four_bytes_and_stays_with_the_weight() -> None:
    sift = SIFT(make_net(), 0.1, ["first.weight"], selection="magnitude")
    part = sift.sparse_mapping["first.weight"]
    assert part.flat_index.dtype == torch.int32
    assert part.flat_index.device == part.parameter.device
    assert part.flat_index.data_ptr() == part.flat_index.data_ptr()
    assert sift.memory_report().index_bytes == 4 * part.train_num


def test_9_random_choice_needs_no_list_of_all_positions() -> None:
    """The original code needed 2 GB of Python integers for such a tensor."""
    model = nn.Linear(3000, 1000, bias=False)
    tracemalloc.start()
    try:
        SIFT(model, 0.01, ["weight"], selection="random")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (
        peak < 3_000_000
    )  # memory of Python objects; one byte per component is less than any list


def test_10_a_hook_sees_its_own_parameter_only(capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(30)))
    sift = SIFT(model, 0.3, ["weight"])
    optimizer = torch.optim.SGD(sift.parameters_in_optimizer(), lr=0.1)
    batches = [torch.ones(2, 4)] * 3
    run(model, optimizer, batches)
    looked_up: list[str] = []
    named = model.named_parameters

    def counted(*args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        looked_up.append("named_parameters")
        return named(*args, **kwargs)

    vars(model)["named_parameters"] = counted
    square_loss(model, batches[0]).backward()
    assert looked_up == []
    assert capsys.readouterr().out == ""
    assert not sift._chooser._scores  # nothing is recorded beyond the choice


def test_11_bad_gradients_neither_choose_nor_enter_clipping() -> None:
    class Checkpointed(Net):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(9, 12)

        def forward(self, x: Tensor) -> Tensor:
            states = self.embed(x)
            out: Tensor = checkpoint(super().forward, states, use_reentrant=False)
            return out

    torch.manual_seed(0)
    model = Checkpointed()
    bad = torch.zeros(16 * 12, dtype=torch.bool)
    bad[5::7] = True

    def poison(gradient: Tensor) -> Tensor:
        return torch.where(bad.view(16, 12), torch.nan, gradient)

    handle = model.first.weight.register_hook(poison)
    sift = SIFT(model, 0.2, ["first.weight"], selection="gradient", lr_transfer=False)
    square_loss(model, torch.arange(9)).backward()
    handle.remove()
    part = sift.sparse_mapping["first.weight"]
    assert not bad[part.flat_index].any()
    assert model.embed.weight.grad is None
    norm = sift.clip_grad_norm_(1e-3)
    assert bool(norm.isfinite())
    assert part.master.grad is not None
    assert float(part.master.grad.norm()) == pytest.approx(1e-3, rel=1e-3)


def test_model_zero_grad_drops_the_masters_gradients_too() -> None:
    model = make_net()
    with SIFT(model, 0.1, "weight") as sift:
        square_loss(model, make_inputs(1)[0]).backward()
        assert all(p.grad is not None for p in sift.parameters_in_optimizer())
        model.zero_grad()
        assert all(p.grad is None for p in sift.parameters_in_optimizer())
    assert "zero_grad" not in vars(model)


def test_a_gradient_after_a_step_begins_anew() -> None:
    """Without zeroing, as Trainer does not zero masters that are not the model's."""
    forgetful, careful = make_net(), make_net()
    for model in (forgetful, careful):
        sift = SIFT(model, 0.2, "weight", grad_acc=2)
        optimizer = torch.optim.SGD(sift.parameters_in_optimizer(), lr=0.1)
        inputs = make_inputs(6)
        for at in (0, 2, 4):
            if model is careful:
                optimizer.zero_grad()
            for batch in inputs[at : at + 2]:
                square_loss(model, batch).backward()
            optimizer.step()
    pairs = zip(forgetful.parameters(), careful.parameters(), strict=True)
    assert all(same_bits(p, q) for p, q in pairs)
