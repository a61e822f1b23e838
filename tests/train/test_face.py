"""The names that users of PEFT know, and settings in YAML."""

from __future__ import annotations

import copy
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml  # type: ignore[import-untyped]
from torch import nn
from train_helpers import make_inputs, make_net, square_loss

from sift_train import SIFT, FitConfig, Rule, SiftConfig, get_sift_model


def test_the_same_model_has_its_sift(capsys: pytest.CaptureFixture[str]) -> None:
    model = make_net()
    names = list(model.state_dict())
    config = SiftConfig(sparse_rate=0.1, sparse_module="first.weight")
    assert get_sift_model(model, config, grad_acc=2) is model
    sift: Any = model.sift
    assert isinstance(sift, SIFT)
    assert SIFT.of(model) is sift
    assert sift.grad_acc == 2
    sift.print_trainable_parameters()
    assert "trainable params: 20 || all params: 308" in capsys.readouterr().out
    assert list(model.state_dict()) == names
    optimizer = torch.optim.AdamW(sift.parameters_in_optimizer(), lr=1e-2)
    square_loss(model, make_inputs(1)[0]).backward()
    optimizer.step()
    changed = (model.first.weight != make_net().first.weight).sum()
    assert int(changed) == 20
    with pytest.raises(ValueError, match="is trained by another SIFT"):
        get_sift_model(model)
    sift.close()
    assert get_sift_model(model) is model


def test_settings_for_the_mixin_only_are_said(caplog: pytest.LogCaptureFixture) -> None:
    get_sift_model(make_net(), SiftConfig(selection_batches=4, reselection={"every": 3}))
    assert [message.split(" of the SiftConfig is for ")[0] for message in caplog.messages] == [
        "reselection",
        "selection_batches",
    ]


def test_an_attribute_of_the_model_is_not_replaced() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.sift = nn.Linear(4, 4)

    with pytest.raises(ValueError, match="has an attribute 'sift' of its own"):
        get_sift_model(Own())


@pytest.mark.parametrize(
    "config",
    [
        SiftConfig(),
        SiftConfig(sparse_rate=0.05, sparse_module=["a", "re:b$"], block=(2, 3), seed=3),
        SiftConfig(exception=["a"], reselection={"every": 3}),
        SiftConfig(selection="mask.safetensors", budget="tensor", lr_transfer=True),
        FitConfig(),
        FitConfig(lr=2e-5, betas=(0.9, 0.95), max_grad_norm=None, trackers=["tensorboard"]),
    ],
)
def test_settings_go_to_yaml_and_back(tmp_path: Path, config: Any) -> None:
    config.to_yaml(tmp_path / "c.yaml")
    found = type(config).from_yaml(tmp_path / "c.yaml")
    assert found == config
    assert yaml.safe_load((tmp_path / "c.yaml").read_text()).keys() == vars(config).keys()


def test_a_compiled_expression_and_a_path_become_text(tmp_path: Path) -> None:
    config = SiftConfig(sparse_module=re.compile("q$"), selection=tmp_path / "m.npz")
    config.to_yaml(tmp_path / "c.yaml")
    found = SiftConfig.from_yaml(tmp_path / "c.yaml")
    assert found.sparse_module == "re:q$"
    assert found.selection == str(tmp_path / "m.npz")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr: 2e-4", None),
        ("lr: 5E-05", None),
        ("lr: 1.5e-3", None),
        ("lr: .5e-3", None),
        ("lr: many", "lr is 'many'"),
        ("rate: 0.1", "has the setting 'rate', which is not known; choose from sparse_rate"),
        ("- a", "holds no mapping of names"),
        ("a: [", "is not YAML"),
        ("lr: !!python/object/apply:os.getcwd []", "is not YAML"),
        ("1: 2", "holds no mapping of names"),
    ],
)
def test_a_file_is_read_or_refused_in_one_sentence(
    tmp_path: Path, text: str, message: str | None
) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    if message is None:
        assert FitConfig.from_yaml(path).lr == float(text.split()[1])
        return
    with pytest.raises(ValueError, match=message) as caught:
        FitConfig.from_yaml(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [FitConfig, SiftConfig])
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('lr_transfer: "no"', "lr_transfer is 'no'; it must be true or false"),
        ("seed: abc", "seed is 'abc'; it must be an integer"),
    ],
)
def test_a_value_of_another_type_is_refused(
    tmp_path: Path, kind: Any, line: str, message: str
) -> None:
    (tmp_path / "c.yaml").write_text(f"{line}\n")
    with pytest.raises(ValueError, match=message):
        kind.from_yaml(tmp_path / "c.yaml")


def test_what_a_file_cannot_hold_is_refused(tmp_path: Path) -> None:
    rule = Rule(from_gradient=lambda w, g: g.abs())
    for config in (SiftConfig(selection=rule), SiftConfig(selection={"w": [1]})):
        with pytest.raises(ValueError, match="which YAML cannot hold"):
            config.to_yaml(tmp_path / "c.yaml")
        assert not (tmp_path / "c.yaml").exists()


def test_a_copy_has_no_sift_and_a_pickle_is_refused() -> None:
    """A copy with the SIFT of the first model would seem to train, and would not."""
    model = get_sift_model(make_net(), SiftConfig(sparse_rate=0.1))
    copied: Any = copy.deepcopy(model)
    assert copied.sift is None
    again: Any = get_sift_model(copied, SiftConfig(sparse_rate=0.1))
    assert again.sift.model is copied
    with pytest.raises(
        TypeError, match=r"a SIFT cannot be copied or pickled; .*sift\.save\(path\)"
    ):
        pickle.dumps(model)
