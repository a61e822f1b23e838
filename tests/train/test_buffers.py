"""The buffers of a trained model: kept from before the training, saved, restored."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from test_loop import loader, make_noisy, typed_loss
from test_patience import same_model, scored
from torch import Tensor, nn
from train_helpers import make_inputs, same_bits, square_loss

import sparsedelta
from sift_train import SIFT, FitConfig, fit


def test_without_a_base_the_delta_begins_with_the_first_running_statistics(tmp_path: Path) -> None:
    model = make_noisy(torch.float32)
    save_file(model.state_dict(), tmp_path / "base.safetensors")
    result = fit(
        model, loader(own_generator=True), output=tmp_path / "d.sd", loss=typed_loss,
        config=FitConfig(sparse_rate=0.1),
    )  # fmt: skip
    sparsedelta.apply(tmp_path / "base.safetensors", result.delta, tmp_path / "out.safetensors")
    assert same_model(model, load_file(tmp_path / "out.safetensors"))


def test_the_first_buffers_are_in_the_state() -> None:
    model = make_noisy(torch.float32)
    first = model.get_buffer("norm.running_mean").clone()
    with SIFT(model, 0.2, "weight", lr_transfer=False) as sift:
        square_loss(model, make_inputs(1)[0]).backward()
        buffer = model.get_buffer("norm.running_mean")
        trained = buffer.clone()
        assert not same_bits(trained, first)
        with sift.reverted():
            assert same_bits(buffer, first)  # also for what holds the buffer
            model(make_inputs(1)[0])  # writes to it
        assert model.get_buffer("norm.running_mean") is buffer
        assert same_bits(buffer, trained)
        state = sift.state_dict()
    with SIFT(model, 0.2, "weight", lr_transfer=False) as sift:  # the model holds trained buffers
        sift.load_state_dict(state)
        with sift.reverted():
            assert same_bits(model.get_buffer("norm.running_mean"), first)
        assert same_bits(model.get_buffer("norm.running_mean"), trained)


class Growing(nn.Module):
    """A layer with a buffer that becomes longer in each forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 4)
        self.seen: Tensor
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen = torch.cat([self.seen, x.mean().detach()[None]])
        out: Tensor = self.first(x)
        return out


def test_choosing_leaves_a_buffer_that_changes_its_shape(tmp_path: Path) -> None:
    model = Growing()
    config = FitConfig(selection="gradient", selection_batches=4, max_steps=2)
    fit(model, make_inputs(4), output=tmp_path / "d.sd", loss=square_loss, config=config)
    assert len(model.seen) == 1 + 2


def test_a_buffer_may_change_its_shape(tmp_path: Path) -> None:
    model, base = Growing(), tmp_path / "base.safetensors"
    save_file(model.state_dict(), base)
    config = FitConfig(eval_every=1, patience=2, lr=1e-2)
    held: list[dict[str, Tensor]] = []
    result = fit(
        model, make_inputs(9), output=tmp_path / "d.sd", loss=square_loss, config=config,
        evaluate=scored(held, 1.0, 5.0, 3.0, 2.0),
    )  # fmt: skip
    assert (result.n_steps, result.kept_step, len(model.seen)) == (4, 2, 3)
    assert same_model(model, held[1])
    sparsedelta.apply(base, tmp_path / "d.sd", tmp_path / "out.safetensors")
    assert same_bits(load_file(tmp_path / "out.safetensors")["seen"], model.seen)
