"""What ``fit`` refuses, each in one clear sentence and before it trains."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from train_helpers import (
    bert_batches,
    make_bert,
    make_inputs,
    make_net,
    same_bits,
    snapshot,
    square_loss,
)

from sift_train import SIFT, FitConfig, export_delta, fit


def test_batches_of_lists_are_refused_in_one_sentence(tmp_path: Path) -> None:
    lists: Any = [[[1.0] * 12]]
    with pytest.raises(
        TypeError,
        match=r"batch is of type list, expected a mapping .*; make such batches, as a DataLoader",
    ):
        fit(make_net(), lists, output=tmp_path / "d.sd")
    with pytest.raises(
        TypeError, match=r"batch has a list as 'x', and Net cannot use it .*; give tensors"
    ):
        fit(make_net(), [{"x": [[1.0] * 12]}], output=tmp_path / "d.sd")
    with pytest.raises(TypeError, match=r"argument 'y'\nThis was in a batch of step 1\.$"):
        fit(make_net(), [{"y": torch.ones(2, 12)}], output=tmp_path / "d.sd")


def test_a_rate_of_1_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with SIFT(make_net(), 1):
        assert (
            "sparse_rate is 1, so all components of the chosen parameters are trained; 1 % is"
            in caplog.text
        )
    caplog.clear()
    with SIFT(make_net(), selection={"first.weight": torch.arange(3)}, sparse_rate=1):
        assert not caplog.messages


def test_an_existing_output_stops_before_training(tmp_path: Path) -> None:
    (tmp_path / "d.sd").write_text("mine")
    model = make_net()
    before = snapshot(model)
    with pytest.raises(FileExistsError, match=r"output '.*d.sd' exists; choose another name"):
        fit(model, make_inputs(1), output=tmp_path / "d.sd", loss=square_loss)
    assert (tmp_path / "d.sd").read_text() == "mine"
    assert all(same_bits(value, model.state_dict()[name]) for name, value in before.items())
    fit(model, make_inputs(1), output=tmp_path / "d.sd", loss=square_loss, overwrite=True)
    assert (tmp_path / "d.sd").read_bytes() != b"mine"


@pytest.mark.parametrize("setting", [{"eval_every": 2}, {"eval_before": True}, {"patience": 3}])
def test_settings_of_evaluations_need_evaluate(tmp_path: Path, setting: dict[str, Any]) -> None:
    ((name, value),) = setting.items()
    with pytest.raises(ValueError, match=f"{name} is {value}, but there is no evaluate"):
        fit(make_net(), make_inputs(1), output=tmp_path / "d.sd", config=FitConfig(**setting))


def test_an_output_written_like_a_folder_stops_before_training(tmp_path: Path) -> None:
    model = make_net()
    before = snapshot(model)
    with pytest.raises(IsADirectoryError, match=r"such as '.*/new/delta.sd'"):
        fit(model, make_inputs(1), output=f"{tmp_path}/new/", loss=square_loss)
    assert not list(tmp_path.iterdir())
    assert all(same_bits(value, model.state_dict()[name]) for name, value in before.items())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"data": []}, ValueError, "the data has no batch"),
        ({"data": iter(make_inputs(2))}, TypeError, "without a length; set max_steps"),
        ({"loss": None}, TypeError, "expected a mapping"),
        ({"loss": lambda model, batch: model(batch)}, TypeError, "not a tensor of one element"),
        (
            {"loss": lambda model, batch: model(batch).sum() * torch.nan},
            ValueError,
            "loss is nan at step 1, before anything was trained; check the first batches",
        ),
        ({"base": "nowhere.safetensors"}, FileNotFoundError, "does not exist"),
        ({"base": str(Path(__file__).parent)}, ValueError, "is not a safetensors file"),
        ({"output": "nowhere/d.sd"}, FileNotFoundError, "create it first"),
    ],
)
def test_bad_input_is_one_clear_sentence(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    given: dict[str, Any] = {"data": make_inputs(1), "output": "d.sd", "loss": square_loss}
    given |= arguments
    model = make_net()
    with pytest.raises(error, match=message) as caught:
        fit(model, given.pop("data"), **given)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    assert not model._forward_pre_hooks


def test_wrong_models_and_evaluations_are_said(tmp_path: Path) -> None:
    given: dict[str, Any] = {"output": tmp_path / "d.sd", "loss": square_loss}
    wrong: Any = make_inputs(2)
    with pytest.raises(
        TypeError, match=r"model is of type list, .*; the order is fit\(model, data\)"
    ):
        fit(wrong, wrong, **given)
    with pytest.raises(TypeError, match="model is of type str, expected a module; load the model"):
        SIFT("base/")  # type: ignore[arg-type]
    results: list[Any] = [None, "good", {"score": None}]
    for found in results:
        given |= {
            "config": FitConfig(eval_every=1),
            "evaluate": partial(lambda each, _: each, found),
        }
        with pytest.raises(
            TypeError, match=r"evaluate returned .*, expected a number or a mapping"
        ):
            fit(make_net(), make_inputs(2), **given)
    given["config"] = FitConfig(patience=2)
    with pytest.raises(ValueError, match="patience is 2, but without eval_every there is one"):
        fit(make_net(), make_inputs(2), **given)


def test_settings_in_place_of_a_config_are_refused(tmp_path: Path) -> None:
    settings: Any = {"lr": 1e-3}
    with pytest.raises(TypeError, match=r"config is of type dict, expected FitConfig; .*dict of"):
        fit(make_net(), make_inputs(1), output=tmp_path / "d.sd", config=settings)


def test_a_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="the model folder 'bsae' does not exist; give the"):
        fit("bsae/", make_inputs(1), output=tmp_path / "d.sd")
    with pytest.raises(ValueError, match=r"has no config.json, so it is not a model folder"):
        fit(tmp_path, make_inputs(1), output=tmp_path / "d.sd")


def test_a_model_without_loss_is_refused(tmp_path: Path) -> None:
    bert_folder = make_bert(tmp_path / "base", torch.float32)
    batches = [{"input_ids": batch["input_ids"]} for batch in bert_batches(1)]
    with pytest.raises(TypeError, match="has no loss; put labels in the batch"):
        fit(bert_folder, batches, output=tmp_path / "d.sd")
    labelled = [{**batch, "labels": batch["input_ids"]} for batch in batches]
    from transformers import AutoModel

    auto: Any = AutoModel
    encoder = auto.from_pretrained(bert_folder)
    with pytest.raises(TypeError, match="BertModel has no loss; give a model with a head"):
        fit(encoder, labelled, output=tmp_path / "d.sd")


def test_export_needs_to_know_the_base(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no base is given; give base, or the sift"):
        export_delta(make_net(), tmp_path / "d.sd")
