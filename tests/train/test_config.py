"""Settings are checked on creation."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from sift_train import FitConfig, Rule


@pytest.mark.parametrize(
    "setting",
    [
        {"sparse_rate": 1.5},
        {"selection": "gradiant"},
        {"selection_batches": 0},
        {"optimizer": "adam"},
        {"schedule": "step"},
        {"mixed_precision": "fp8"},
        {"epochs": 0},
        {"epochs": True},
        {"max_steps": 0},
        {"accumulation": 0},
        {"lr": 0.0},
        {"lr": float("nan")},
        {"lr": float("inf")},
        {"weight_decay": -0.1},
        {"warmup": 1.5},
        {"betas": (0.9, 1.5)},
        {"max_grad_norm": 0.0},
        {"publish_every": 2},
    ],
)
def test_out_of_range(setting: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"rate|is .*[;]"):
        FitConfig(**setting)


def test_as_json_is_plain() -> None:
    config = FitConfig(selection=Rule(from_gradient=lambda w, g: g), sparse_module=("a", "b"))
    plain = config.as_json()
    assert json.loads(json.dumps(plain)) == plain
    assert plain["selection"] == "custom"
    assert plain["sparse_module"] == ["a", "b"]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"lr": "1e-3"}, "lr is '1e-3', of type str; it must be a number"),
        ({"weight_decay": None}, "weight_decay is None, of type NoneType; it must be a number"),
        ({"sparse_rate": "0.1"}, "sparse rate is '0.1', of type str; it must be a number"),
        ({"seed": -1}, "seed is -1; it must be an integer of at least 0"),
        ({"seed": 2**32}, "seed is 4294967296; it must be at most 4294967295"),
        ({"betas": 0.9}, "betas is 0.9; it must be two numbers"),
        ({"betas": (0.9, "0.99")}, "betas is '0.99', of type str; it must be a number"),
    ],
)
def test_a_value_that_is_not_a_number_is_one_clear_sentence(
    setting: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        FitConfig(**setting)


def test_numbers_of_numpy_are_numbers() -> None:
    lr: Any = np.float32(1e-3)
    assert FitConfig(lr=lr, sparse_rate=np.float64(0.1)).lr == lr
