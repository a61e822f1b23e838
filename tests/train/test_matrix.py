"""Many models and optimizers against plain torch: equal bits at rate 1, a subset below."""

from __future__ import annotations

import copy
import functools
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from train_helpers import make_inputs, make_net, same_bits, snapshot, square_loss

from sift_train import SIFT

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class Experts(nn.Module):
    """A router with experts in one 3-D parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(12, 3)
        self.up = nn.Parameter(torch.randn(3, 12, 8) * 0.3)
        self.down = nn.Parameter(torch.randn(3, 8, 4) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        shares = self.router(x).softmax(-1)
        each = torch.relu(torch.einsum("bi,eih->beh", x, self.up))
        out: Tensor = torch.einsum("beh,eho,be->bo", each, self.down, shares)
        return out


class Tied(nn.Module):
    """A net whose input and output share one weight; the layer between is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(12, 16, bias=False)
        self.twice = nn.Linear(16, 16)
        self.head = nn.Linear(12, 16, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        states = torch.tanh(self.twice(torch.tanh(self.twice(self.embed(x)))))
        out: Tensor = states @ self.head.weight
        return out


class Convolutions(nn.Module):
    """1-D, 2-D and transposed convolutions with norms between them."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv1d(1, 4, 3)
        self.norm = nn.GroupNorm(2, 4)
        self.two = nn.Conv2d(1, 2, (2, 3))
        self.back = nn.ConvTranspose2d(2, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        states = self.norm(self.one(x[:, None]))
        out: Tensor = self.back(self.two(states[:, None])).flatten(1)
        return out


KINDS: dict[str, Callable[[], nn.Module]] = {
    "net": make_net,
    "experts": Experts,
    "tied": Tied,
    "convolutions": Convolutions,
}

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, foreach=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-1, momentum=0.9),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=1e-2, max_iter=3),
}


def make(kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return KINDS[kind]().to(dtype)


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, batches: list[Tensor], grad_acc: int = 1
) -> None:
    dtype = next(model.parameters()).dtype
    if not isinstance(optimizer, torch.optim.LBFGS):
        for at in range(0, len(batches), grad_acc):
            optimizer.zero_grad()
            for batch in batches[at : at + grad_acc]:
                square_loss(model, batch.to(dtype)).backward()
            optimizer.step()
        return
    for at in range(0, len(batches), grad_acc):

        def closure(window: list[Tensor]) -> Tensor:
            optimizer.zero_grad()
            losses = [square_loss(model, batch.to(dtype)) for batch in window]
            for loss in losses:
                loss.backward()
            return sum(losses, torch.zeros(()))

        optimizer.step(functools.partial(closure, batches[at : at + grad_acc]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grad_acc", [1, 2])
def test_at_rate_one_every_kind_trains_as_plain_torch(kind: str, grad_acc: int) -> None:
    plain, ours = make(kind), make(kind)
    train(plain, OPTIMIZERS["adamw"](plain.parameters()), make_inputs(4), grad_acc)
    with SIFT(ours, 1.0, "re:.", grad_acc=grad_acc) as sift:
        train(ours, OPTIMIZERS["adamw"](sift.parameters_in_optimizer()), make_inputs(4), grad_acc)
    for (name, p), q in zip(plain.named_parameters(), ours.parameters(), strict=True):
        assert same_bits(p, q), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_below_rate_one_an_sgd_step_is_a_subset_of_the_full_step(
    kind: str, dtype: torch.dtype
) -> None:
    plain, ours = make(kind, dtype).float(), make(kind, dtype)
    batch = make_inputs(1)[0].to(dtype)
    reference = make(kind, dtype)
    square_loss(reference, batch).backward()
    with torch.no_grad():
        for p, r in zip(plain.parameters(), reference.parameters(), strict=True):
            assert r.grad is not None
            p.sub_(r.grad.float(), alpha=0.1)  # in fp32, rounded once
    before = snapshot(ours)
    with SIFT(
        ours, 0.2, "re:weight|up|down", "bias", selection="gradient", lr_transfer=False
    ) as sift:
        optimizer = torch.optim.SGD(sift.parameters_in_optimizer(), lr=0.1)
        square_loss(ours, batch).backward()
        optimizer.step()
        for name, part in sift.sparse_mapping.items():
            mask = torch.zeros(part.parameter.numel(), dtype=torch.bool)
            mask[part.flat_index] = True
            full = plain.get_parameter(name).to(dtype).flatten()
            expected = torch.where(mask, full, before[name].flatten())
            assert same_bits(expected, part.parameter.flatten()), name
            assert part.train_num == (len(mask) if "bias" in name else int(len(mask) * 0.2) + 1)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_sees_its_own_steps(name: str) -> None:
    """All parameters are 1-D, since Adafactor treats matrices differently."""
    plain, ours = make("net"), make("net")
    vectors = ["first.bias", "norm.weight", "norm.bias", "last.bias"]
    train(plain, OPTIMIZERS[name]([plain.get_parameter(n) for n in vectors]), make_inputs(3))
    with SIFT(ours, 1.0, vectors) as sift:
        train(ours, OPTIMIZERS[name](sift.parameters_in_optimizer()), make_inputs(3))
    assert all(same_bits(p, q) for p, q in zip(plain.parameters(), ours.parameters(), strict=True))


class ByHand:
    """An optimizer that is not a torch ``Optimizer``."""

    def __init__(self, parameters: list[nn.Parameter], *, through_data: bool) -> None:
        self.parameters = parameters
        self.through_data = through_data

    def step(self) -> None:
        with torch.no_grad():
            for p in self.parameters:
                assert p.grad is not None
                (p.data if self.through_data else p).sub_(p.grad, alpha=0.1)
                p.grad = None


@pytest.mark.parametrize("through_data", [False, True])
def test_an_optimizer_that_is_not_torch_s_is_noticed_in_the_next_forward(
    through_data: bool,
) -> None:
    plain, ours = make("net"), make("net")
    reference = torch.optim.SGD(plain.parameters(), lr=0.1)
    with SIFT(ours, 1.0, "re:.") as sift:
        by_hand = ByHand(sift.parameters_in_optimizer(), through_data=through_data)
        for batch in make_inputs(3):
            assert same_bits(plain(batch), ours(batch))
            reference.zero_grad()
            square_loss(plain, batch).backward()
            square_loss(ours, batch).backward()
            reference.step()
            by_hand.step()
        sift.write_back()
        assert all(
            same_bits(p, q) for p, q in zip(plain.parameters(), ours.parameters(), strict=True)
        )


def test_an_optimizer_over_the_model_is_refused_at_its_first_step() -> None:
    model = make_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with SIFT(model, 0.1, "weight"):
        square_loss(model, make_inputs(1)[0]).backward()
        with pytest.raises(ValueError, match="whose gradients go to the masters"):
            optimizer.step()
    optimizer.step()


def test_another_model_s_optimizer_is_left_alone() -> None:
    model, other = make_net(), make_net(seed=1)
    with SIFT(model, 0.1, "weight") as sift:
        square_loss(model, make_inputs(1)[0]).backward()
        gradients = [p.grad for p in sift.parameters_in_optimizer()]
        before = snapshot(model)
        train(other, torch.optim.SGD(other.parameters(), lr=0.1), make_inputs(1))
        assert all(same_bits(value, model.state_dict()[name]) for name, value in before.items())
        assert [p.grad for p in sift.parameters_in_optimizer()] == gradients


class Checkpointed(nn.Module):
    """One layer used twice, recomputed in the backward pass."""

    def __init__(self, *, reentrant: bool | None) -> None:
        super().__init__()
        self.start = nn.Linear(12, 8)
        self.layer = nn.Linear(8, 8)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        states = self.start(x)
        for _ in range(2):
            block: Any = lambda s: torch.tanh(self.layer(s))  # noqa: E731
            if self.reentrant is None:
                states = block(states)
            else:
                states = checkpoint(block, states, use_reentrant=self.reentrant)
        out: Tensor = states
        return out


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("grad_acc", [1, 2])
def test_both_kinds_of_checkpointing(reentrant: bool, grad_acc: int) -> None:
    """With re-entrant checkpointing the hook of a layer used twice runs twice per backward pass."""
    torch.manual_seed(0)
    plain = Checkpointed(reentrant=None)
    ours = copy.deepcopy(plain)
    ours.reentrant = reentrant
    train(plain, torch.optim.SGD(plain.parameters(), lr=0.1), make_inputs(4), grad_acc)
    with SIFT(ours, 1.0, "re:.", grad_acc=grad_acc) as sift:
        train(
            ours, torch.optim.SGD(sift.parameters_in_optimizer(), lr=0.1), make_inputs(4), grad_acc
        )
    for (name, p), q in zip(plain.named_parameters(), ours.named_parameters(), strict=True):
        assert torch.allclose(p, q[1], atol=1e-7), name
    fragments = ["start.weight", "layer.weight"]  # re-entrant: inputs must need gradients
    with SIFT(ours, 0.2, fragments, grad_acc=grad_acc) as sift:
        train(
            ours, torch.optim.SGD(sift.parameters_in_optimizer(), lr=0.1), make_inputs(2), grad_acc
        )
        assert sift.sparse_mapping["layer.weight"].is_trained


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch's compiler hides its own warning
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_layers_compiled_one_by_one(backend: str) -> None:
    plain, ours = make("net"), make("net")
    train(plain, torch.optim.SGD(plain.parameters(), lr=0.1), make_inputs(3))
    for layer in ours.children():
        layer.compile(backend=backend)
    with SIFT(ours, 1.0, "re:.") as sift:
        train(ours, torch.optim.SGD(sift.parameters_in_optimizer(), lr=0.1), make_inputs(3))
    assert all(same_bits(p, q) for p, q in zip(plain.parameters(), ours.parameters(), strict=True))


def test_one_dense_gradient_lives_at_a_time() -> None:
    """When a layer's gradient arrives, no other parameter still has one."""
    model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(8)))
    held: list[int] = []
    with SIFT(model, 0.2, "weight", "bias"):
        for p in model.parameters():
            p.register_hook(
                lambda g: held.append(sum(q.grad is not None for q in model.parameters()))
            )
        model(torch.ones(2, 6)).sum().backward()
    assert held == [0] * 16


def test_a_copied_model_is_independent() -> None:
    model = make_net()
    with SIFT(model, 0.1, "weight") as sift:
        train(model, torch.optim.SGD(sift.parameters_in_optimizer(), lr=0.1), make_inputs(1))
        copied, without = copy.deepcopy((model, sift))
        assert without is None
        assert all(
            same_bits(p, q) for p, q in zip(model.parameters(), copied.parameters(), strict=True)
        )
        square_loss(copied, make_inputs(1)[0]).backward()
        assert copied.first.weight.grad is not None
        assert model.first.weight.grad is None
        square_loss(model, make_inputs(1)[0]).backward()
        copied.zero_grad()
        assert copied.first.weight.grad is None
        assert all(p.grad is not None for p in sift.parameters_in_optimizer())


def test_hooks_are_freed_with_the_model() -> None:
    from sift_train.steps import _listeners

    gc.collect()  # free the garbage of other tests first
    before = len(_listeners)
    model = make_net()
    sift = SIFT(model, 0.1, "weight")
    gone = weakref.ref(sift)
    del model, sift
    gc.collect()
    assert gone() is None
    assert len(_listeners) == before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("kind", KINDS)
def test_on_a_gpu_with_half_precision_and_a_scaler(kind: str) -> None:
    model = make(kind).cuda()
    before = snapshot(model)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**40)
    with SIFT(model, 0.2, "re:weight|up|down", grad_acc=1) as sift:
        optimizer = torch.optim.AdamW(sift.parameters_in_optimizer(), lr=1e-2, fused=True)
        for batch in make_inputs(40):
            optimizer.zero_grad()
            with torch.autocast("cuda", torch.float16):
                loss = square_loss(model, batch.cuda())
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        for name, part in sift.sparse_mapping.items():
            changed = (before[name] != model.state_dict()[name]).flatten().nonzero().flatten()
            assert set(changed.tolist()) <= set(part.flat_index.tolist()), name
            assert len(changed) > 0, name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_a_gpu_the_peak_is_what_the_report_says() -> None:
    torch.manual_seed(0)
    torch.ones(8, 8, device="cuda").matmul(torch.ones(8, 8, device="cuda"))  # takes a workspace
    held = torch.cuda.memory_allocated()
    model = nn.Sequential(*(nn.Linear(2048, 2048, bias=False) for _ in range(12))).cuda()
    x = torch.randn(8, 2048, device="cuda")
    with SIFT(model, 0.05, "weight") as sift:
        optimizer = torch.optim.AdamW(sift.parameters_in_optimizer(), fused=True)
        for _ in range(3):
            torch.cuda.reset_peak_memory_stats()
            optimizer.zero_grad()
            square_loss(model, x).backward()
            optimizer.step()
        limit = sift.memory_report().peak_bytes
        assert torch.cuda.max_memory_allocated() - held <= limit * 1.05 + (8 << 20)
