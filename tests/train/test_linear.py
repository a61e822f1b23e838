"""Linear layers whose backward pass computes the gradients of the trained components only."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sift_train import SIFT, linear
from sift_train.linear import SparseLinear
from sift_train.ranks.shard import local_gradient

N_TOKENS = 300  # more than one block of tokens
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 2e-2}


def make_layer(dtype: torch.dtype = torch.float64, *, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(24, 40, bias=bias).to(dtype)


def make_inputs(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def loss_of(outputs: Tensor) -> Tensor:
    return outputs.float().tanh().mul(torch.arange(outputs.shape[-1])).sum()


@contextmanager
def layouts(parameter: Tensor) -> Iterator[list[bool]]:
    """Give a list of whether each gradient of a parameter is sparse."""
    found: list[bool] = []

    def note(given: Tensor) -> Tensor | None:
        if given is parameter and given.grad is not None:
            found.append(given.grad.is_sparse)
        return local_gradient(given)

    with mock.patch("sift_train.sift.sift.local_gradient", note):
        yield found


def dense_gradients(layer: nn.Linear, run: Callable[[nn.Module], Tensor]) -> dict[str, Tensor]:
    plain = copy.deepcopy(layer).double()
    loss_of(run(plain)).backward()
    return {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}


def check_gradient(sift: SIFT, name: str, wanted: Tensor, dtype: torch.dtype) -> None:
    part = sift.sparse_mapping[name]
    assert part.master.grad is not None
    expected = wanted.reshape(-1)[part.flat_index.long()]
    scale = wanted.abs().max()
    assert ((part.master.grad - expected).abs() <= TOLERANCE[dtype] * scale).all()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(N_TOKENS,), (5, 60), (3, 4, 25)])
def test_gradient_is_that_of_the_dense_layer(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    layer, inputs = make_layer(dtype), make_inputs(*shape, 24, dtype=dtype)
    inputs.requires_grad_()
    wanted = dense_gradients(layer, lambda each: each(inputs.detach().double()))
    plain = copy.deepcopy(layer)
    loss_of(plain(inputs)).backward()
    of_inputs, inputs.grad = inputs.grad, None
    with SIFT(layer, 0.04, "weight", "bias") as sift, layouts(layer.weight) as are_sparse:
        loss_of(layer(inputs)).backward()
        assert are_sparse == [True]
        check_gradient(sift, "weight", wanted["weight"], dtype)
        check_gradient(sift, "bias", wanted["bias"], dtype)
    assert inputs.grad is not None
    assert of_inputs is not None
    assert torch.equal(inputs.grad, of_inputs)


@pytest.mark.parametrize(
    ("rate", "n_tokens", "rule", "dtype"),
    [
        (0.2, N_TOKENS, "random", torch.float64),
        (0.1, N_TOKENS, "random", torch.bfloat16),
        (0.1, 8, "random", torch.float64),
        (0.1, N_TOKENS, "gradient", torch.float64),
    ],
    ids=["many components", "many of 16 bits", "few tokens", "not chosen yet"],
)
def test_where_the_whole_gradient_is_computed(
    rate: float, n_tokens: int, rule: str, dtype: torch.dtype
) -> None:
    layer, inputs = make_layer(dtype), make_inputs(n_tokens, 24, dtype=dtype)
    wanted = dense_gradients(layer, lambda each: each(inputs.double()))
    with SIFT(layer, rate, "weight", selection=rule) as sift, layouts(layer.weight) as are_sparse:
        loss_of(layer(inputs)).backward()
        sift.finish_selection()
        assert are_sparse == [False]
        check_gradient(sift, "weight", wanted["weight"], dtype)


def test_share_of_the_learning_rate_is_measured_by_whole_gradients() -> None:
    layer, inputs = make_layer(), make_inputs(N_TOKENS, 24)
    mask = torch.zeros(40, 24, dtype=torch.bool)
    mask[5] = True
    with SIFT(layer, selection={"weight": mask}) as sift, layouts(layer.weight) as are_sparse:
        optimizer = torch.optim.AdamW(sift.parameters_in_optimizer(), lr=1e-3)
        for _ in range(3):
            loss_of(layer(inputs)).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert sift.lr_share is not None
        assert are_sparse == [False, True, True]


def test_a_layer_that_is_used_twice_and_outside_itself() -> None:
    layer, inputs = make_layer(bias=False), make_inputs(N_TOKENS, 24)

    def twice(each: Any) -> Tensor:
        return torch.cat([each(inputs), each(2 * inputs)])

    def also_outside(each: Any) -> Tensor:
        return torch.cat([each(inputs), inputs @ each.weight.mT])

    for run, is_sparse in ((twice, True), (also_outside, False)):
        wanted = dense_gradients(layer, run)
        with SIFT(layer, 0.1, "weight") as sift, layouts(layer.weight) as are_sparse:
            loss_of(run(layer)).backward()
            assert are_sparse == [is_sparse]
            check_gradient(sift, "weight", wanted["weight"], torch.float64)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant: bool) -> None:
    layer, inputs = make_layer(), make_inputs(N_TOKENS, 24).requires_grad_()
    wanted = dense_gradients(layer, lambda each: each(inputs.detach()).relu_())
    with SIFT(layer, 0.1, "weight") as sift, layouts(layer.weight) as are_sparse:
        outputs = checkpoint(lambda x: layer(x).relu_(), inputs, use_reentrant=reentrant)
        loss_of(outputs).backward()
        assert are_sparse == [True]
        check_gradient(sift, "weight", wanted["weight"], torch.float64)


@pytest.mark.parametrize("shape", [(24,), (2, 50, 24), (50, 2, 24)])
def test_outputs_can_be_changed_in_place(shape: tuple[int, ...]) -> None:
    layer, inputs = make_layer(), make_inputs(*shape)
    if shape[0] == 50:
        inputs = inputs.transpose(0, 1)  # not contiguous
    wanted = dense_gradients(layer, lambda each: each(inputs).relu_())
    with SIFT(layer, 0.1, "weight") as sift:
        loss_of(layer(inputs).relu_()).backward()
        check_gradient(sift, "weight", wanted["weight"], torch.float64)


def test_a_forward_pass_that_something_has_kept_goes_on_after_close() -> None:
    layer, inputs = make_layer(), make_inputs(N_TOKENS, 24)
    wanted = layer(inputs)
    with SIFT(layer, 0.1, "weight"):
        kept = layer.forward
        holder: Any = layer
        holder.forward = lambda each: kept(each)  # as the hooks of accelerate do
        assert torch.equal(layer(inputs), wanted)
    assert torch.equal(layer(inputs), wanted)


def test_a_backward_pass_after_close_is_that_of_the_plain_layer() -> None:
    layer, inputs = make_layer(), make_inputs(N_TOKENS, 24)
    wanted = dense_gradients(layer, lambda each: each(inputs))["weight"]
    with SIFT(layer, 0.1, "weight"):
        loss = loss_of(layer(inputs))
    loss.backward()
    assert layer.weight.grad is not None
    assert not layer.weight.grad.is_sparse
    assert torch.allclose(layer.weight.grad, wanted)


def test_a_layer_whose_class_something_has_changed_keeps_nothing_after_close() -> None:
    class Own(SparseLinear):
        pass

    layer = make_layer()
    with SIFT(layer, 0.1, "weight"):
        layer.__class__ = Own
    assert vars(layer).keys() == vars(nn.Linear(1, 1)).keys()


def test_a_gradient_that_is_returned_is_dense_and_one_that_nothing_asks_for_is_not_computed() -> (
    None
):
    layer, inputs = make_layer(), make_inputs(N_TOKENS, 24).requires_grad_()
    wanted = dense_gradients(layer, lambda each: each(inputs.detach()))["weight"]
    calls = mock.Mock(wraps=linear._of_weight)
    with SIFT(layer, 0.1, "weight"), mock.patch("sift_train.linear._of_weight", calls):
        found = torch.autograd.grad(loss_of(layer(inputs)), [layer.weight, inputs])
        assert torch.allclose(found[0], wanted)
        calls.reset_mock()
        torch.autograd.grad(loss_of(layer(inputs)), inputs)
        loss_of(layer(inputs)).backward(inputs=[inputs])
        calls.assert_not_called()
        loss_of(layer(inputs)).backward(inputs=[layer.weight])
        calls.assert_called_once()


def test_fx_keeps_layers_whole() -> None:
    model = nn.Sequential(make_layer(), nn.ReLU())
    with SIFT(model, 0.1, "weight"):
        nodes = torch.fx.symbolic_trace(model).graph.find_nodes(op="call_module", target="0")
        assert len(nodes) == 1


def test_hooks_of_others_get_the_dense_gradient() -> None:
    layer, inputs = make_layer(), make_inputs(N_TOKENS, 24)
    wanted = dense_gradients(layer, lambda each: each(inputs))["weight"]
    with SIFT(layer, 0.1, "weight") as sift:
        layer.weight.register_hook(lambda gradient: gradient / gradient.norm())
        loss_of(layer(inputs)).backward()
        check_gradient(sift, "weight", wanted / wanted.norm(), torch.float64)


def test_a_step_between_two_forward_passes_and_their_backward_passes() -> None:
    """The gradient of a first layer does not depend on its weight, which may change meanwhile."""
    layer, inputs = make_layer(), make_inputs(N_TOKENS, 24)
    with SIFT(layer, 0.1, "weight") as sift:
        optimizer = torch.optim.SGD(sift.parameters_in_optimizer(), lr=1e-3)
        first, second = loss_of(layer(inputs)), loss_of(layer(2 * inputs))
        first.backward()
        optimizer.step()
        second.backward()


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # by torch itself
def test_batched_and_forward_mode_gradients() -> None:
    layer, inputs = make_layer(), make_inputs(N_TOKENS, 24).requires_grad_()
    plain = copy.deepcopy(layer)
    with SIFT(layer, 0.1, "weight"):
        for each in (inputs, layer.weight):
            own = plain.weight if each is layer.weight else each
            found, wanted = (
                torch.autograd.grad(
                    one(inputs)[:4].sum(1), at, torch.eye(4).double(), is_grads_batched=True
                )[0]
                for one, at in ((layer, each), (plain, own))
            )
            assert torch.allclose(found, wanted)
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(inputs, torch.ones_like(inputs))
            found, wanted = (
                torch.autograd.forward_ad.unpack_dual(one(dual)).tangent for one in (layer, plain)
            )
            assert torch.equal(found, wanted)


def test_gradient_of_a_gradient() -> None:
    layer, inputs = make_layer(), make_inputs(N_TOKENS, 24).requires_grad_()

    def penalty(each: nn.Module) -> Tensor:
        (slope,) = torch.autograd.grad(loss_of(each(inputs)), inputs, create_graph=True)
        return slope.square().sum(dim=1, keepdim=True)

    wanted = dense_gradients(layer, penalty)
    with SIFT(layer, 0.1, "weight") as sift:
        loss_of(penalty(layer)).backward()
        check_gradient(sift, "weight", wanted["weight"], torch.float64)


def test_autocast_and_inference_use_the_plain_layer() -> None:
    layer, inputs = make_layer(torch.float32), make_inputs(N_TOKENS, 24, dtype=torch.float32)
    plain = copy.deepcopy(layer)
    with SIFT(layer, 0.1, "weight"), layouts(layer.weight) as are_sparse:
        with torch.autocast("cpu", torch.bfloat16):
            outputs = layer(inputs)
            assert torch.equal(outputs, plain(inputs))
        loss_of(outputs).backward()
        assert are_sparse == [False]
        with torch.no_grad():
            assert torch.equal(layer(inputs), plain(inputs))
        assert torch.equal(torch.func.vmap(layer)(inputs[None])[0], plain(inputs))


def test_only_plain_linear_layers_are_replaced_and_close_restores_them() -> None:
    class Own(nn.Linear):
        pass

    patched: Any = nn.Linear(8, 8)
    patched.forward = lambda inputs: 2 * inputs
    model = nn.Sequential(nn.Linear(8, 8), Own(8, 8), patched)
    names = [str(each) for each in model]
    with SIFT(model, 0.1, "weight"):
        assert [type(each) for each in model] == [SparseLinear, Own, nn.Linear]
        assert len(model(torch.ones(40, 8))) == 40
    assert [type(each) for each in model] == [nn.Linear, Own, nn.Linear]
    assert [str(each) for each in model] == names
    assert "_trained_part" not in vars(model[0])


def test_copies_are_plain_layers() -> None:
    model, inputs = nn.Sequential(make_layer()), make_inputs(N_TOKENS, 24)
    with SIFT(model, 0.1, "weight"):
        saved = io.BytesIO()
        torch.save(model, saved)
        saved.seek(0)
        loaded = torch.load(saved, weights_only=False)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded):
            assert type(other[0]) is nn.Linear
            assert vars(other[0]).keys() == vars(nn.Linear(1, 1)).keys()
            assert torch.equal(other(inputs), model(inputs))


def test_a_training_equals_one_that_masks_dense_gradients() -> None:
    torch.manual_seed(3)
    ours = nn.Sequential(nn.Linear(24, 40), nn.ReLU(inplace=True), nn.Linear(40, 24)).double()
    plain = copy.deepcopy(ours)
    batches = [make_inputs(N_TOKENS, 24, seed=seed) for seed in range(5)]
    with SIFT(ours, 0.1, "weight", lr_transfer=False) as sift:
        masks = {}
        for name, part in sift.sparse_mapping.items():
            masks[name] = torch.zeros(part.numel, dtype=torch.float64)
            masks[name][part.flat_index.long()] = 1
        optimizer = torch.optim.AdamW(sift.parameters_in_optimizer(), lr=1e-2, weight_decay=0)
        weights = [p for name, p in plain.named_parameters() if name in masks]
        other = torch.optim.AdamW(weights, lr=1e-2, weight_decay=0)
        for batch in batches:
            loss_of(ours(batch)).backward()
            loss_of(plain(batch)).backward()
            for name, parameter in plain.named_parameters():
                if name in masks and parameter.grad is not None:
                    parameter.grad *= masks[name].view_as(parameter)
            for each in (optimizer, other):
                each.step()
                each.zero_grad()
    for p, q in zip(ours.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=0, atol=1e-10)
