"""A model that others replace, convert, reload, rename, save or wrap while a SIFT trains it."""

from __future__ import annotations

import copy
import gc
import io
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from train_helpers import make_bert, make_inputs, make_net, same_bits, snapshot, square_loss

from sift_train import SIFT, export_delta


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int = 1) -> None:
    square_loss(model, make_inputs(1, seed)[0]).backward()
    optimizer.step()
    optimizer.zero_grad()


def trained(model: nn.Module, **options: Any) -> tuple[SIFT, torch.optim.Optimizer]:
    sift = SIFT(model, 0.2, ["weight"], **options)
    return sift, torch.optim.AdamW(sift.parameters_in_optimizer(), lr=1e-2)


def replace_parameter(model: Any) -> None:
    model.first.weight = nn.Parameter(model.first.weight.detach().clone())


def replace_module(model: Any) -> None:
    model.last = copy.deepcopy(model.last)


@pytest.mark.parametrize("change", [replace_parameter, replace_module])
def test_a_replaced_parameter_is_refused_before_the_first_step(change: Any) -> None:
    model = make_net()
    sift, optimizer = trained(model)
    change(model)
    with pytest.raises(ValueError, match=r"parameter '\w+\.weight' .* after its delta is written$"):
        model(make_inputs(1)[0])
    with pytest.raises(ValueError, match=r"parameter '\w+\.weight' .* after its delta is written$"):
        optimizer.step()
    sift.close()


def test_a_parameter_replaced_between_steps_is_refused(tmp_path: Path) -> None:
    model = make_net()
    sift, optimizer = trained(model)
    step(model, optimizer)
    replace_parameter(model)
    with pytest.raises(ValueError, match=r"parameter 'first\.weight' was replaced"):
        step(model, optimizer)
    with pytest.raises(ValueError, match=r"parameter 'first\.weight' was replaced"):
        export_delta(model, tmp_path / "d.sd", sift=sift)


def test_a_module_replaced_between_steps_is_found_at_the_export(tmp_path: Path) -> None:
    model = make_net()
    sift, optimizer = trained(model)
    step(model, optimizer)
    replace_module(model)
    with pytest.raises(ValueError, match=r"parameter 'last\.weight' is no longer in the model"):
        export_delta(model, tmp_path / "d.sd", sift=sift)
    with pytest.raises(ValueError, match=r"parameter 'last\.weight' is no longer in the model"):
        sift.save(tmp_path / "sift.safetensors")


def test_a_model_converted_after_sift_is_refused() -> None:
    model = make_net()
    _, optimizer = trained(model)
    model.bfloat16()
    with pytest.raises(ValueError, match=r"had torch\.float32 .* now has torch\.bfloat16"):
        model(make_inputs(1)[0].bfloat16())
    with pytest.raises(ValueError, match=r"now has torch\.bfloat16"):
        optimizer.step()


def test_resized_embeddings_are_refused(tmp_path: Path) -> None:
    import transformers

    load: Any = transformers.BertForSequenceClassification
    model = load.from_pretrained(make_bert(tmp_path / "base", torch.float32))
    SIFT(model, 0.1, ["word_embeddings"])
    model.resize_token_embeddings(70)
    with pytest.raises(ValueError, match=r"parameter 'bert\.embeddings\.word_embeddings\.weight'"):
        model(input_ids=torch.ones(1, 4, dtype=torch.long))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_are_loaded_stay(dtype: torch.dtype, tmp_path: Path) -> None:
    model = make_net().to(dtype)
    sift, optimizer = trained(model)
    before = snapshot(model)
    inputs = make_inputs(1)[0].to(dtype)
    model(inputs).square().mean().backward()
    optimizer.step()
    best = snapshot(model)
    model(inputs).square().mean().backward()
    optimizer.step()
    model.load_state_dict(best)
    assert export_delta(model, tmp_path / "d.sd", sift=sift) == sum(
        int((best[name] != before[name]).sum()) for name in best
    )
    sift.close()
    assert all(same_bits(value, best[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("moment", ["after the step", "before the step"])
def test_training_goes_on_from_weights_that_are_loaded(moment: str) -> None:
    """At rate 1 it stays equal to the plain optimizer."""
    plain, ours = make_net(), make_net()
    sift = SIFT(ours, 1.0, ["re:."])
    optimizers = [
        torch.optim.AdamW(plain.parameters(), lr=1e-2),
        torch.optim.AdamW(sift.parameters_in_optimizer(), lr=1e-2),
    ]
    start = snapshot(plain)
    for model, optimizer in zip((plain, ours), optimizers, strict=True):
        step(model, optimizer)
        if moment == "before the step":
            square_loss(model, make_inputs(1, 2)[0]).backward()
            model.load_state_dict(start)
            optimizer.step()
        else:
            model.load_state_dict(start)
            step(model, optimizer, 2)
    assert all(same_bits(p, q) for p, q in zip(plain.parameters(), ours.parameters(), strict=True))


def test_masters_keep_their_precision_where_the_loaded_weights_are_theirs() -> None:
    model = make_net().bfloat16()
    sift, optimizer = trained(model)
    model(make_inputs(1)[0].bfloat16()).square().mean().backward()
    optimizer.step()
    masters = [master.clone() for master in sift.parameters_in_optimizer()]
    model.load_state_dict(snapshot(model))
    sift.write_back()
    assert all(map(torch.equal, masters, sift.parameters_in_optimizer()))


def test_a_state_is_loaded_into_a_model_that_holds_base_and_trained_weights() -> None:
    """Trainer loads the trained weights after a rule by weights has chosen other components."""
    model = make_net()
    sift, optimizer = trained(model, selection="random", seed=1)
    step(model, optimizer)
    state, weights = sift.state_dict(), snapshot(model)
    other = make_net()
    resumed = SIFT(other, 0.2, ["weight"], selection="random", seed=2)
    other.load_state_dict(weights)
    resumed.load_state_dict(state)
    assert all(same_bits(value, other.state_dict()[name]) for name, value in weights.items())
    for name, part in sift.sparse_mapping.items():
        assert torch.equal(part.flat_index, resumed.sparse_mapping[name].flat_index)


def test_names_of_a_compiled_model_are_those_of_the_model() -> None:
    compiled: Any = torch.compile(make_net(), backend="eager")
    sift = SIFT(compiled, 0.1, ["re:^first"])
    assert list(sift.sparse_mapping) == ["first.weight", "first.bias"]


def test_a_model_can_be_saved_whole() -> None:
    model = make_net()
    sift, optimizer = trained(model)
    step(model, optimizer)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert all(same_bits(v, loaded.state_dict()[n]) for n, v in model.state_dict().items())
    loaded(make_inputs(1)[0]).sum().backward()
    loaded.zero_grad()
    assert all(p.grad is None for p in loaded.parameters())
    step(model, optimizer)  # the SIFT of the original is not affected
    assert any(part.is_trained for part in sift.sparse_mapping.values())


def test_a_sift_that_was_dropped_can_be_reached() -> None:
    model = make_net()
    assert SIFT.of(model) is None
    optimizer = trained(model)[1]
    gc.collect()
    step(model, optimizer)
    with pytest.raises(ValueError, match=r"call SIFT\.of\(model\)\.close\(\) first"):
        SIFT(model)
    found = SIFT.of(model)
    assert found is not None
    assert all(part.is_trained for part in found.sparse_mapping.values())
    found.close()
    assert SIFT.of(model) is None
    SIFT(model).close()


def test_masters_without_an_optimizer_are_reported_once(caplog: pytest.LogCaptureFixture) -> None:
    model = make_net()
    sift = SIFT(model, 0.2, ["weight"])
    first, *others = sift.parameters_in_optimizer()
    optimizer = torch.optim.AdamW([first], lr=1e-2)
    with caplog.at_level(logging.WARNING, "sift_train.sift"):
        step(model, optimizer)
        caplog.clear()  # that one batch has chosen
        step(model, optimizer)
        step(model, optimizer)
    assert len(caplog.records) == 1
    assert f"no optimizer trains {len(others)} of the {1 + len(others)} masters" in caplog.text


def test_two_optimizers_over_all_masters_are_fine(caplog: pytest.LogCaptureFixture) -> None:
    model = make_net()
    sift = SIFT(model, 0.2, ["weight"])
    first, *others = sift.parameters_in_optimizer()
    both = [torch.optim.AdamW([first], lr=1e-2), torch.optim.AdamW(others, lr=1e-2)]
    for seed in range(3):
        square_loss(model, make_inputs(1, seed)[0]).backward()
        for optimizer in both:
            optimizer.step()
    assert "no optimizer trains" not in caplog.text


def test_no_exception_may_be_none() -> None:
    assert SIFT(make_net(), 0.2, ["first"], None).n_trained == 43
