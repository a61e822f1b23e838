"""Masters that are kept on the CPU: the same bits as masters on the model's device, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rank_helpers import RankPool
from test_loop import N_STATISTICS, check_resumed
from test_matrix import OPTIMIZERS, make, train
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from train_helpers import make_inputs, make_net, same_bits, snapshot, square_loss

from sift_train import SIFT, FitConfig, SiftCallback, SiftConfig, SparseParameter, gradients, plan
from sift_train import masters as masters_module


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    return square_loss(model, batch.to(next(model.parameters())))


# Adafactor treats vectors, as masters are, in another way than matrices.
@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "adafactor"])
@pytest.mark.parametrize("kind", ["net", "experts", "tied"])
def test_at_rate_1_it_is_the_plain_optimizer(name: str, kind: str) -> None:
    plain, ours = make(kind), make(kind)
    train(plain, OPTIMIZERS[name](list(plain.parameters())), make_inputs(6), grad_acc=2)
    everything = [name for name, _ in ours.named_parameters()]
    with SIFT(ours, 1.0, everything, grad_acc=2, masters_device="cpu") as sift:
        train(ours, OPTIMIZERS[name](sift.parameters_in_optimizer()), make_inputs(6), grad_acc=2)
    assert all(same_bits(value, ours.state_dict()[n]) for n, value in snapshot(plain).items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_the_training_with_masters_on_the_models_device(dtype: torch.dtype) -> None:
    """With clipping, decay to the base, a bad loss, and gradients that are dropped before and after they arrive."""
    found = []
    for device in ("model", "cpu"):
        model = make_net().to(dtype)
        with SIFT(
            model, 0.3, exception="norm", selection="gradient", masters_device=device
        ) as sift:
            assert sift.masters_device == device
            masters = sift.parameters_in_optimizer()
            optimizer = torch.optim.AdamW(
                [{"params": masters, "lr": 1e-2, "weight_decay": 0.0, "base_decay": 0.1}]
            )
            for number, batch in enumerate(make_inputs(6)):
                for _ in range(2 if number % 2 else 1):
                    loss_of(model, batch).backward()
                if number == 2:
                    sift.zero_grad()
                    loss_of(model, 2 * batch).backward()
                if number == 3:
                    optimizer.zero_grad()
                    loss_of(model, batch.square()).backward()
                sift.may_write = torch.tensor(number != 4)
                norm = sift.clip_grad_norm_(0.01)
                optimizer.step()  # the gradient is not dropped: the next one starts a new sum
            found.append({**sift.state_dict(), **snapshot(model), "norm": norm})
    assert found[0].keys() == found[1].keys()
    assert all(same_bits(value, found[1][name]) for name, value in found[0].items())


def test_a_gradient_that_has_not_arrived_cannot_be_read() -> None:
    model = make_net()
    sift = SIFT(model, 0.3, ["first.weight"], lr_transfer=False, masters_device="cpu")
    (master,) = sift.parameters_in_optimizer()
    square_loss(model, make_inputs(1)[0]).backward()
    assert master.grad is not None
    assert master.grad.isnan().all()
    with pytest.raises(RuntimeError, match="refers to a single memory location"):
        master.grad.mul_(0.5)
    with torch.no_grad():
        master.add_(1.0)  # as an optimizer does that is not torch's
    with pytest.raises(
        ValueError, match=r"'first\.weight' was changed before its gradient had arr"
    ):
        model(make_inputs(1)[0])
    sift.sync_gradients()
    assert master.grad.isfinite().all()
    model(make_inputs(1)[0])
    assert same_bits(
        master.data,
        model.first.weight.detach().flatten()[sift.sparse_mapping["first.weight"].flat_index],
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_operation_mixes_devices(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of torch's FakeTensorMode have a device and no values; an operation on two devices raises an error."""

    class Arrived:
        def __init__(self, source: Tensor) -> None:
            self._copy = source.to("cpu")

        def wait(self) -> Tensor:
            return self._copy

    monkeypatch.setattr(gradients, "Arrival", Arrived)
    monkeypatch.setattr(
        masters_module, "sent", lambda values, device, dtype: values.to(device, dtype)
    )
    with FakeTensorMode(allow_non_fake_inputs=True):
        weight = nn.Parameter(torch.empty(10, 4, device="cuda", dtype=dtype))
        part = SparseParameter("weight", weight, 5, is_on_host=True)
        part.take_up(torch.arange(5))
        optimizer = torch.optim.AdamW([part.master])
        for _ in range(2):
            part.collect(torch.empty_like(weight))
            part.collect(torch.empty_like(weight))
            part.arrive()
            part.decay_to_original(0.1)
            optimizer.step()
            part.spend()
            part.write()
            part.write(torch.empty((), dtype=torch.bool, device="cuda"))
        part.adopt()
        part.follow()
        part.revert()
        assert part.flat_index.device.type == "cuda"
        held = [part.master, part.master.grad, part.original, part.change]
        held += [optimizer.state[part.master][name] for name in ("exp_avg", "exp_avg_sq")]
        assert [each.device.type for each in held if each is not None] == ["cpu"] * 6


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_a_gpu_masters_and_states_are_on_the_host() -> None:
    found = []
    for device in ("model", "cpu"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512)).bfloat16().cuda()
        with SIFT(model, 0.5, grad_acc=2, masters_device=device) as sift:
            optimizer = torch.optim.AdamW(sift.parameters_in_optimizer(), lr=1e-4)
            generator = torch.Generator().manual_seed(1)
            for number in range(20):
                batch = torch.randn(64, 512, generator=generator).bfloat16().cuda()
                (model(batch) - batch).float().square().mean().backward()
                if number % 2:
                    sift.clip_grad_norm_(1.0)
                    optimizer.step()
                    optimizer.zero_grad()
            for part in sift.sparse_mapping.values():
                assert part.master.is_cuda == (device == "model")
                assert optimizer.state[part.master]["exp_avg"].is_cuda == (device == "model")
                held = part.parameter.detach().flatten()[part.flat_index.long()]
                assert same_bits(held.cpu(), part.master.detach().bfloat16().cpu())
            found.append(
                torch.cat([part.master.detach().cpu() for part in sift.sparse_mapping.values()])
            )
    # Rounding differs between the devices, and Adam makes whole steps of the smallest gradients.
    assert float(((found[1] - found[0]).abs() < 2e-5).float().mean()) > 0.98


@pytest.mark.parametrize("device", ["cpu", "model"])
def test_a_resumed_fit_ends_in_the_same_bits(tmp_path: Path, device: str) -> None:
    """With a re-selection before and after; also if it resumes with masters on the model's device."""
    config = FitConfig(
        sparse_rate=0.2, sparse_module=["weight"], exception="bias", accumulation=2, lr=1e-3, epochs=2,
        save_every=1, masters_device="cpu", reselection={"every": 2, "share": 0.4, "until": 1.0},
    )  # fmt: skip
    other = None if device == "cpu" else replace(config, masters_device=device)
    result = check_resumed(tmp_path, config, 3, own_generator=False, resumed_config=other)
    assert 0 < result.nnz <= result.n_trained + N_STATISTICS


def rank_loop(rank: int, device: str) -> dict[str, Tensor]:
    model = make_net()
    with SIFT(model, 0.2, exception=["norm"], masters_device=device) as sift:
        optimizer = torch.optim.AdamW(sift.parameters_in_optimizer(), lr=1e-3)
        for batch in make_inputs(6)[rank::2]:
            square_loss(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
        sift.check_ranks()
        return {**sift.state_dict(), **model.state_dict()}


def test_ranks_train_as_with_masters_on_the_models_device(pool: RankPool) -> None:
    expected = pool.results(rank_loop, "model")
    for found in pool.results(rank_loop, "cpu"):
        assert all(same_bits(value, found[name]) for name, value in expected[0].items())


def test_what_excludes_masters_on_the_cpu_is_refused() -> None:
    with pytest.raises(ValueError, match="masters_device is 'gpu'; choose one of model, cpu"):
        SIFT(make_net(), masters_device="gpu")
    for make_one in (SIFT, plan):
        with pytest.raises(
            ValueError, match="'cpu' and masters is 'kahan', which keeps no masters"
        ):
            make_one(make_net(), 0.1, masters="kahan", masters_device="cpu")
    for config in (FitConfig, SiftConfig):
        with pytest.raises(
            ValueError, match="'cpu' and masters is 'stochastic', which keeps no mas"
        ):
            config(masters="stochastic", masters_device="cpu")
    with pytest.raises(ValueError, match="fp16 needs a gradient scaler, which cannot read"):
        FitConfig(mixed_precision="fp16", masters_device="cpu")
    with pytest.raises(ValueError, match="but sharded weights need 'model'"):
        plan(make_net(), 0.1, devices=2, sharded=True, masters_device="cpu")
    args = SimpleNamespace(fp16=True, fsdp=[], report_to=[])
    callback = SiftCallback(SIFT(make_net(), masters_device="cpu"))
    with pytest.raises(ValueError, match="fp16 needs a gradient scaler, which cannot read"):
        callback.on_train_begin(args, None, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_report_counts_what_is_on_the_host(dtype: torch.dtype) -> None:
    def n_bytes(tensors: Any) -> int:
        return sum(tensor.nbytes for tensor in tensors)

    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).to(dtype)
    sift = SIFT(model, 0.1, masters_device="cpu")
    optimizer = torch.optim.AdamW(sift.parameters_in_optimizer())
    loss: Tensor = model(torch.ones(2, 64, dtype=dtype)).square().mean()
    loss.backward()
    optimizer.step()
    report, planned = sift.memory_report(), plan(model, 0.1, masters_device="cpu")
    parts = sift.sparse_mapping.values()
    masters = [part.master for part in parts]
    states = [s[key] for s in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
    arriving = dtype.itemsize * sift.n_trained
    on_host = [*masters, *states, *(part.original for part in parts), *(m.grad for m in masters)]
    assert report.host_bytes == n_bytes(on_host) + arriving
    assert (
        report.trained_bytes == 4 * sift.n_trained + arriving
    )  # indices, and gradients that leave
    assert (report.master_bytes, report.optimizer_bytes) == (0, 0)
    assert (planned.peak_bytes, planned.host_bytes) == (report.peak_bytes, report.host_bytes)
