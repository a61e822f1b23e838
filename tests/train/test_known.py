"""An unknown setting or argument is one sentence that proposes a known one."""

from __future__ import annotations

import inspect
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from train_helpers import make_inputs, make_net

from sift_train import SIFT, FitConfig, Reselection, SiftConfig, fit, get_sift_model, plan


@pytest.mark.parametrize(
    ("kind", "given", "message"),
    [
        (
            FitConfig,
            "sparse_rat",
            "FitConfig has no setting 'sparse_rat'; did you mean 'sparse_rate'?",
        ),
        (FitConfig, "acumulation", "did you mean 'accumulation'?"),
        (
            FitConfig,
            "zzz",
            "FitConfig has no setting 'zzz'; choose from sparse_rate, sparse_module,",
        ),
        (SiftConfig, "selection_batch", "SiftConfig has no .*; did you mean 'selection_batches'?"),
        (
            partial(SIFT, make_net()),
            "sparse_rates",
            "SIFT has no setting 'sparse_rates'; did you mean 'sparse_rate'?",
        ),
        (
            partial(plan, make_net()),
            "rate",
            "plan has no argument 'rate'; choose from model, sparse_rate,",
        ),
        (
            partial(get_sift_model, make_net()),
            "sparse_rate",
            "get_sift_model has no argument 'sparse_rate'; it is a setting of SiftConfig, which",
        ),
        (Reselection, "evry", "Reselection has no setting 'evry'; did you mean 'every'?"),
    ],
)
def test_a_setting(kind: Any, given: str, message: str) -> None:
    with pytest.raises(TypeError, match=message.replace("?", r"\?")):
        kind(**{given: 1})


def test_a_setting_in_a_mapping_of_a_setting() -> None:
    with pytest.raises(ValueError, match=r"reselection: Reselection .*; did you mean 'every'\?"):
        FitConfig(reselection={"evry": 1})


@pytest.mark.parametrize("kind", [FitConfig, SiftConfig])
def test_a_file_of_a_run_is_no_file_of_settings(tmp_path: Path, kind: Any) -> None:
    (tmp_path / "run.yaml").write_text("task: causal-lm\ntrain:\n  lr: 1e-3\n")
    with pytest.raises(ValueError, match=r"is a file for python -m sift_train; .*below 'train:'"):
        kind.from_yaml(tmp_path / "run.yaml")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("max_step", r"did you mean 'max_steps', a setting of FitConfig"),
        ("resum", r"fit has no argument 'resum'; did you mean 'resume'\?"),
        ("lr", "fit has no argument 'lr'; it is a setting of FitConfig, which is given as config="),
        ("sparse_rat", r"did you mean 'sparse_rate', a setting of FitConfig, which is given as"),
        ("zzz", "fit has no argument 'zzz'; choose from model, data, output, config,"),
    ],
)
def test_an_argument_of_fit(tmp_path: Path, given: str, message: str) -> None:
    more: dict[str, Any] = {given: 1}
    with pytest.raises(TypeError, match=message):
        fit(make_net(), make_inputs(1), output=tmp_path / "d.sd", **more)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sparse_rat: 0.1", r"'sparse_rat', which is not known; did you mean 'sparse_rate'\?"),
        ("1.5: 2", "holds no mapping of names"),
    ],
)
def test_a_setting_in_a_file(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    for kind in (FitConfig, SiftConfig):
        with pytest.raises(ValueError, match=message):
            kind.from_yaml(tmp_path / "c.yaml")


def test_signatures_and_settings_stay_as_they_are() -> None:
    assert list(inspect.signature(FitConfig).parameters)[:2] == ["sparse_rate", "sparse_module"]
    assert "on_step" in inspect.signature(fit).parameters
    assert pickle.loads(pickle.dumps(FitConfig(lr=0.1))) == FitConfig(lr=0.1)
    assert fit.__name__ == "fit"
