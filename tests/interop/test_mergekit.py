"""Merge configurations of mergekit: the same delta as ``merge`` with these settings, or one clear refusal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from helpers import Raw
from interop.interop_helpers import floats, pair

import sparsedelta
from sparsedelta.cli import main
from sparsedelta.interop.mergekit import read_configuration

METHODS = {
    "linear": "linear",
    "task_arithmetic": "task-arithmetic",
    "ties": "ties",
    "dare_linear": "dare",
    "dare_ties": "dare-ties",
}


def run_command(*arguments: str, status: int = 0) -> Result:
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == status, result.stderr
    return result


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with ``base``, and deltas ``a.sd`` and ``b.sd`` of it."""
    monkeypatch.chdir(tmp_path)
    old = {"w": floats("F32", 20, 10), "v": floats("F32", 30, seed=1)}
    for number, name in enumerate("ab"):
        noise = np.random.default_rng(number).normal(size=200).astype("<f4") / 50
        new = old | {
            "w": Raw("F32", (20, 10), (np.frombuffer(old["w"].data, "<f4") + noise).tobytes())
        }
        pair(tmp_path / name, old, new).delta.rename(tmp_path / f"{name}.sd")
    (tmp_path / "a" / "base").rename(tmp_path / "base")
    return tmp_path


def config(method: str, **changes: Any) -> dict[str, Any]:
    return {
        "merge_method": method,
        "base_model": "base",
        "models": [
            {"model": "a.sd", "parameters": {"weight": 0.7, "density": 0.5}},
            {"model": "b.sd", "parameters": {"weight": 0.3, "density": [{"value": 0.25}]}},
        ],
        "dtype": "float32",
        **changes,
    }


def written(value: Any) -> str:
    Path("merge.yml").write_text(json.dumps(value))  # JSON is YAML
    return "merge.yml"


@pytest.mark.parametrize("method", METHODS)
def test_same_as_the_settings(folder: Path, method: str) -> None:
    run_command("merge", "--config", written(config(method)), "-o", "one.sd")
    options: dict[str, Any] = {"method": METHODS[method], "weights": [0.7, 0.3]}
    if method.startswith(("ties", "dare")):
        options["density"] = [0.5, 0.25]
    with sparsedelta.merge("base", "a.sd", "b.sd", **options) as delta:
        assert delta.to_bytes() == (folder / "one.sd").read_bytes()
        assert delta.nnz > 0


def test_shared_parameters_and_lambda(folder: Path) -> None:
    Path("merge.yml").write_text(
        "merge_method: ties\nbase_model: base\nmodels:\n  - model: a.sd\n  - model: b.sd\n  - model: base\n"
        "parameters: {weight: 1, density: 0.5, normalize: false, lambda: 0.5, int8_mask: true}\n"
    )
    plan = read_configuration("merge.yml")
    assert (plan.base, plan.deltas) == ("base", ("a.sd", "b.sd"))
    assert plan.options == {
        "method": "ties",
        "weights": (1.0, 1.0),
        "density": (0.5, 0.5),
        "normalize": False,
        "scale": 0.5,
    }


def test_linear_with_a_weight_of_the_base(folder: Path) -> None:
    models = [*config("linear")["models"], {"model": "base", "parameters": {"weight": 1.0}}]
    plan = read_configuration(written(config("linear", models=models)))
    assert (
        plan.options["scale"] == 0.5
    )  # (0.7 a + 0.3 b + 1 base) / 2 = base + 0.5 (0.7 d_a + 0.3 d_b)
    plan = read_configuration(written(config("linear", parameters={"normalize": False})))
    assert plan.options["scale"] == 1.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"merge_method": "slerp"}, "merge_method is 'slerp'"),
        ({"slices": []}, "the key 'slices'"),
        ({"base_model": None}, "no base_model"),
        ({"models": "a.sd"}, "no list of models"),
        ({"models": [{"model": "a.sd"}]}, "weight of 'a.sd' is None"),
        ({"models": [{"model": 3, "parameters": {"weight": 1}}]}, "a model is 3"),
        ({"models": [{"model": "a.sd", "parameters": {"weight": [0, 1]}}]}, "differs between layers"),
        ({"models": [{"model": "a.sd", "parameters": {"gamma": 1}}]}, "the key 'gamma'"),
        ({"parameters": {"normalize": 3}}, "normalize is 3"),
        ({"parameters": {"rescale": True}}, "rescale is True"),
        ({"parameters": 3}, "not keys and values"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"merge_method": "linear", "parameters": {"normalize": False, "weight": 1},
          "models": [{"model": "a.sd"}, {"model": "b.sd"}]}, "weights sum to 2"),
    ],
)  # fmt: skip
def test_refused(folder: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_configuration(written(config("ties", **changes)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "error in line"),
        ("- 1", "holds no keys"),
        ("a: &x [1]\nb: *x", "aliases"),
        ("[" * 5000, "deeper than 16"),
        ("- " * 100, "deeper than 16"),
        ("dtype: 2001-99-99", "not YAML"),
        ("1: x\nfoo: y", "has the key 'foo'"),
        ("{merge_method: ties, base_model: b, models: [], dtype: [a]}", r"dtype is \['a'\]"),
        ("\x00", "not YAML"),
    ],
)
def test_no_configuration(folder: Path, text: str, message: str) -> None:
    Path("merge.yml").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_configuration("merge.yml")


def test_the_dtype_of_the_base_is_kept(folder: Path) -> None:
    done = run_command(
        "merge", "--config", written(config("ties", out_dtype="bfloat16")), "-o", "x.sd", status=1
    )
    assert "asks for BF16" in done.stderr
    assert not Path("x.sd").exists()


def test_arguments_beside_a_configuration(folder: Path) -> None:
    path = written(config("ties"))
    for extra in (["base", "a.sd"], ["--method", "dare"], ["--scale", "2"]):
        done = run_command("merge", "--config", path, *extra, "-o", "x.sd", status=2)
        assert "one or the other" in done.stderr
    assert "or --config" in run_command("merge", "-o", "x.sd", status=2).stderr
