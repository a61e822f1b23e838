"""What a SIFT says of a model or a loop that would train something else than meant, or nothing."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from train_helpers import make_inputs, make_net, square_loss

from sift_train import SIFT, export_delta


@pytest.fixture
def trained(tmp_path: Path) -> Iterator[tuple[SIFT, Path]]:
    """A SIFT after a step, and the base of its model."""
    model, base = make_net(), tmp_path / "base.safetensors"
    save_file(model.state_dict(), base)
    with SIFT(model, 0.5) as sift:
        optimizer = adamw(sift)
        square_loss(model, make_inputs(1)[0]).backward()
        optimizer.step()
        yield sift, base


def adamw(sift: SIFT) -> torch.optim.Optimizer:
    return torch.optim.AdamW(sift.parameters_in_optimizer(), lr=0.01)


@pytest.mark.parametrize(("frozen", "n_warned"), [("first", 1), ("", 0), ("every", 0)])
def test_parameters_that_were_frozen(
    caplog: pytest.LogCaptureFixture, frozen: str, n_warned: int
) -> None:
    """A model that someone froze as a whole, as for adapters, is trained without a word."""
    model = make_net()
    if frozen:
        (model.first if frozen == "first" else model).requires_grad_(False)
    with SIFT(model, 0.5):
        pass
    assert caplog.text.count("of the 2 parameters that are trained were frozen") == n_warned
    assert ("'first.weight'" in caplog.text) == bool(n_warned)


def test_steps_before_any_gradient_are_said(caplog: pytest.LogCaptureFixture) -> None:
    with SIFT(make_net(), 0.5, selection="gradient") as sift:
        optimizer, other = adamw(sift), make_net()
        for _ in range(3):
            square_loss(other, make_inputs(1)[0]).backward()
            optimizer.step()
    assert caplog.text.count("the last two steps changed nothing") == 1


@pytest.mark.parametrize("freezes", [True, False])
def test_a_step_without_any_gradient_is_said_once(
    caplog: pytest.LogCaptureFixture, *, freezes: bool
) -> None:
    model, other = make_net(), make_net()
    batch = make_inputs(1)[0]
    with SIFT(model, 0.5) as sift:
        optimizer = adamw(sift)
        square_loss(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert "changed nothing" not in caplog.text
        if freezes:
            sift.model.requires_grad_(False)
            model.norm.requires_grad_(True)
        for number in range(4):
            assert caplog.text.count("the last two steps changed nothing") == (number > 1)
            square_loss(model if freezes else other, batch).backward()
            optimizer.step()
    assert caplog.text.count("the last two steps changed nothing") == 1
    said = "2 of 2, such as 'first.weight', were frozen" if freezes else "compute the loss with the"
    assert said in caplog.text


def test_steps_that_are_not_idle_are_not_called_so(caplog: pytest.LogCaptureFixture) -> None:
    """A step before the first gradient, one that clears gradients itself, closures, and an optimizer for each parameter."""

    class Clearing(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            result = super().step(closure)
            self.zero_grad()
            return result

    model, batches = make_net(), make_inputs(3)
    with SIFT(model, 0.5, lr_transfer=False) as sift:
        masters = sift.parameters_in_optimizer()
        optimizer: Any = Clearing(masters, lr=0.01)
        optimizer.step()
        for batch in batches:
            square_loss(model, batch).backward()
            optimizer.step()
        optimizer = torch.optim.LBFGS(masters, max_iter=2)
        for batch in batches:

            def closure(batch: Any = batch) -> Any:
                model.zero_grad()
                loss = square_loss(model, batch)
                loss.backward()
                return loss

            optimizer.step(closure)
        several = [torch.optim.SGD([master], lr=0.01) for master in masters]
        for batch in batches:
            model.first(batch).sum().backward()
            for one in several:
                one.step()
                one.zero_grad()
    assert not caplog.records


@pytest.mark.parametrize(("block", "is_large"), [((1000, 1000), True), ((2, 2), False)])
def test_blocks_that_fill_the_matrix(
    caplog: pytest.LogCaptureFixture, block: tuple[int, int], *, is_large: bool
) -> None:
    with SIFT(make_net(), 0.1, block=block):
        pass
    assert ("give smaller blocks" in caplog.text) == is_large
    assert ("so 100 % of the components are trained in place of 10 %" in caplog.text) == is_large


@pytest.mark.parametrize(
    ("given", "kind", "said"),
    [
        ({"seed": "a"}, ValueError, "seed is 'a'; it must be an integer"),
        ({"grad_acc": 1.5}, ValueError, "grad_acc is 1.5; it must be an integer of at least 1"),
        ({"process_group": 3}, TypeError, "process_group is of type int, expected a process group"),
        ({"sparse_module": None}, ValueError, "sparse_module is None; it must be a name fragment"),
    ],
)
def test_arguments_of_another_type(given: dict[str, Any], kind: type, said: str) -> None:
    model = make_net()
    with pytest.raises(kind, match=re.escape(said)):
        SIFT(model, **given)
    assert SIFT.of(model) is None


def test_a_model_in_another_dtype_is_not_exported(
    trained: tuple[SIFT, Path], tmp_path: Path
) -> None:
    sift, base = trained
    sift.model.half()
    for given in (base, None):
        with pytest.raises(ValueError, match=r"had torch\.float32 .* now has torch\.float16"):
            export_delta(sift.model, tmp_path / "out.sd", sift=sift, base=given)
    sift.model.float()
    assert not (tmp_path / "out.sd").exists()


def test_a_training_as_it_should_be(caplog: pytest.LogCaptureFixture) -> None:
    """Nothing is said of a training as it should be."""
    with caplog.at_level(logging.WARNING), SIFT(make_net(), 0.5) as sift:
        optimizer = adamw(sift)
        square_loss(sift.model, make_inputs(1)[0]).backward()
        optimizer.step()
    assert not caplog.records


def test_a_copy_is_not_exported_as_the_model(trained: tuple[SIFT, Path], tmp_path: Path) -> None:
    """An average of the weights, for example; without the SIFT its delta is made as any other."""
    sift, base = trained
    copied = copy.deepcopy(sift.model)
    for given in (base, None):
        with pytest.raises(ValueError, match="sift trains another Net than the model that is"):
            export_delta(copied, tmp_path / "out.sd", sift=sift, base=given)
    assert export_delta(copied, tmp_path / "out.sd", base=base) > 0


def test_integers_of_numpy() -> None:
    with SIFT(make_net(), 0.5, seed=np.int64(3), grad_acc=np.int64(2)) as sift:  # type: ignore[arg-type]
        assert sift.settings["seed"] == 3
        assert sift.grad_acc == 2
