"""What can be checked of a run is checked before its model is loaded."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from train_helpers import make_bert, make_inputs

from sift_train import SIFT, FitConfig, export_delta, fit

DATA = make_inputs(1)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"output": "taken.sd"}, "output 'taken.sd' exists; choose another name"),
        ({"output": "folder"}, "output 'folder' is a folder, but the output is one file"),
        ({"output": "new/"}, "output 'new/' is written like a folder"),
        ({"output": "no/d.sd"}, "the folder of output 'no/d.sd' does not exist"),
        ({"save_target": "folder"}, "output 'folder' exists"),
        ({"save_target": "d.sd"}, "output and save_target are both 'd.sd'; give two paths"),
        ({"base": "missing"}, "base 'missing' does not exist"),
        ({"output": "pipe"}, "output 'pipe' is a device, pipe or socket, which would be replaced"),
        ({"output": "run", "run_dir": "run"}, "output 'run' is, or is around, run_dir 'run'"),
        ({"save_target": "new", "run_dir": "new/run"}, "'new' is, or is around, run_dir 'new/run'"),
        ({"run_dir": "taken.sd"}, "run_dir 'taken.sd' cannot be a folder, because .* is a file"),
        ({"config": FitConfig(eval_every=2)}, "eval_every is 2, but there is no evaluate"),
        ({"data": "data.jsonl"}, "data is the path 'data.jsonl', expected micro-batches, .* YAML"),
        ({"data": Path("data.jsonl")}, "data is the path 'data.jsonl', expected micro-batches"),
        ({"data": None}, "data is of type NoneType, expected micro-batches"),
        ({"config": FitConfig(), "data": []}, "the data has no batch"),
        ({"config": FitConfig(), "data": iter(DATA)}, "without a length; set max_steps"),
    ],
)
def test_a_run_that_cannot_end_well_loads_no_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], message: str
) -> None:
    def loads(_: Any) -> None:
        raise AssertionError("the model is loaded")

    monkeypatch.setattr(sys.modules["sift_train.fit"], "load_model", loads)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken.sd").touch()
    (tmp_path / "folder").mkdir()
    os.mkfifo("pipe")
    rest: dict[str, Any] = {"output": "d.sd", "config": FitConfig(max_steps=1), **given}
    with pytest.raises((OSError, TypeError, ValueError), match=message):
        fit("model/", rest.pop("data", DATA), **rest)


def test_a_folder_is_not_replaced_by_a_delta(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError, match="is a folder, but the output is one file"):
        fit("model/", DATA, output=tmp_path, overwrite=True)


@pytest.mark.parametrize(
    ("output", "message"), [("base/d.sd", "is in the base, 'base'"), ("base", "is a folder")]
)
def test_an_output_is_apart_from_the_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    model: Any = transformers.BertForSequenceClassification.from_pretrained(
        make_bert(Path("base"), torch.float32)
    )
    before = sorted(Path().rglob("*"))
    places: list[dict[str, Any]] = [{"output": output}, {"output": "d.sd", "save_target": "."}]
    for given in places:
        told = message if given["output"] == output else "is a folder around the base, 'base'"
        with pytest.raises((OSError, ValueError), match=told):
            fit(model, DATA, base="base", overwrite=True, **given)
    with SIFT(model, 0.1, "query") as sift, pytest.raises((OSError, ValueError), match=message):
        export_delta(model, output, sift=sift, base="base", overwrite=True)
    assert sorted(Path().rglob("*")) == before
