"""The names that users of PEFT know, settings in YAML, and trainings that a file describes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml  # type: ignore[import-untyped]
from causal_helpers import make_causal, make_tokenizer
from torch import nn
from train_helpers import make_bert, make_inputs, make_net, square_loss

import sparsedelta
from sift_train import SIFT, FitConfig, FitResult, Rule, SiftConfig, get_sift_model
from sift_train.__main__ import main
from sift_train.labelled import read_labelled

WORDS = ["good", "fine", "great", "bad", "poor", "awful", "the", "film", "is"]
GOOD, BAD = WORDS[:3], WORDS[3:6]
TEXTS = [(f"the film is {word}", "pos" if word in GOOD else "neg") for word in GOOD + BAD] * 4


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


def test_an_interrupted_run_is_no_success(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for stopped, code in (("interrupted", 130), ("patience", 0)):
        result = FitResult(
            delta=Path("d.sd"), delta_bytes=9, target=None, n_trained=1, n_total=2, nnz=1, losses=(0.5,) * 3,
            train_seconds=1.0, export_seconds=1.0, kept_step=2, stopped=stopped,
        )  # fmt: skip
        monkeypatch.setattr("sift_train.run_file.run_file", lambda *_, made=result, **__: made)
        assert main(["--config", "run.yaml"]) == code
        says = f"d.sd: 9 bytes, 1 of 2 components trained in 3 steps ({stopped}); it has the weights after step 2, the best"
        assert capsys.readouterr().out == f"{says}\n"


def test_ctrl_c_before_the_first_step(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any, **__: Any) -> FitResult:
        raise KeyboardInterrupt

    monkeypatch.setattr("sift_train.run_file.run_file", interrupted)
    assert main(["--config", "run.yaml"]) == 130
    assert capsys.readouterr() == ("", "interrupted\n")


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
def test_a_switch_in_quotes_is_refused(tmp_path: Path, kind: Any) -> None:
    (tmp_path / "c.yaml").write_text('lr_transfer: "no"\n')
    with pytest.raises(ValueError, match="lr_transfer is 'no'; it must be true or false"):
        kind.from_yaml(tmp_path / "c.yaml")


def test_what_a_file_cannot_hold_is_refused(tmp_path: Path) -> None:
    rule = Rule(from_gradient=lambda w, g: g.abs())
    for config in (SiftConfig(selection=rule), SiftConfig(selection={"w": [1]})):
        with pytest.raises(ValueError, match="which YAML cannot hold"):
            config.to_yaml(tmp_path / "c.yaml")
        assert not (tmp_path / "c.yaml").exists()


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    """A classifier without a head for these labels, with a tokenizer."""
    import transformers

    folder = make_bert(tmp_path / "bert", torch.float32)
    model: Any = transformers.BertModel.from_pretrained(folder)
    for path in folder.glob("*.safetensors"):
        path.unlink()
    model.save_pretrained(folder)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    make: Any = transformers.BertTokenizer
    make(str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


def write_run(folder: Path, **more: Any) -> str:
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(more))
    return str(path)


def test_a_file_trains_a_classifier(
    tmp_path: Path, bert: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [json.dumps({"text": text, "label": label}) for text, label in TEXTS]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    path = write_run(
        tmp_path,
        task="text-classification", model=str(bert), data=str(tmp_path / "train.jsonl"),
        evaluation=str(tmp_path / "train.jsonl"), output=str(tmp_path / "d.sd"), batch_size=8,
        micro_batch=4, max_tokens=12, run_dir=str(tmp_path / "run"),
        save_target=str(tmp_path / "target"),
        train={"sparse_rate": 0.2, "lr": 3e-2, "epochs": 30, "save_every": 40},
    )  # fmt: skip
    assert main(["--config", path]) == 0
    out = capsys.readouterr().out
    assert float(re.search(r"accuracy (\S+)", out).group(1)) > 0.9  # type: ignore[union-attr]
    with sparsedelta.load(tmp_path / "d.sd") as delta:
        settings: Any = delta.info["settings"]
        names = settings["exception"]
    assert settings["accumulation"] == 2
    assert [re.sub(r"\\", "", name) for name in names] == [
        "re:^classifier.bias$",
        "re:^classifier.weight$",
    ]
    config = json.loads((tmp_path / "target" / "config.json").read_text())
    assert config["id2label"] == {"0": "neg", "1": "pos"}
    first = (tmp_path / "d.sd").read_bytes()
    assert main(["--config", path]) == 1
    assert "holds a checkpoint of an earlier run" in capsys.readouterr().err
    assert main(["--config", path, "--overwrite", "--resume"]) == 0
    assert (tmp_path / "d.sd").read_bytes() == first


def test_a_file_trains_a_language_model(tmp_path: Path) -> None:
    tasks = [
        {"instruction": "Greet.", "input": n, "output": f"Hi, {n}!"} for n in ("Ada", "Mary")
    ] * 4
    tokenizer = make_tokenizer([f"{task['input']} {task['output']}" for task in tasks])
    make_causal(tmp_path / "model", tokenizer)
    (tmp_path / "tasks.json").write_text(json.dumps(tasks))
    path = write_run(
        tmp_path,
        task="causal-lm", model=str(tmp_path / "model"), data=str(tmp_path / "tasks.json"),
        evaluation=str(tmp_path / "tasks.json"), output=str(tmp_path / "d.sd"), batch_size=4,
        train={"sparse_rate": 0.1, "lr": 1e-2, "max_steps": 6, "eval_every": 3, "lr_transfer": False},
    )  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "sift_train", "--config", path],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    losses = [float(each) for each in re.findall(r"loss (\S+)", done.stdout)]
    assert len(losses) == 2
    assert losses[1] < losses[0]
    with sparsedelta.load(tmp_path / "d.sd") as delta:
        assert delta.nnz > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": "vision"}, "task is 'vision'; choose one of text-classification, causal-lm"),
        ({"data": None}, "lacks the setting 'data'"),
        ({"batchsize": 3}, "has the setting 'batchsize'"),
        ({"batch_size": 6, "micro_batch": 4}, "no multiple of micro_batch"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"train": [1]}, "train is no mapping"),
        ({"train": {"accumulation": 2}}, "set batch_size and micro_batch"),
        ({"train": {"rate": 2}}, "has the setting 'rate'"),
        ({"train": {"sparse_rate": 2}}, "sparse rate is 2"),
        ({"data": "missing.txt"}, "No such file"),
        ({"model": "no/such/folder"}, "is neither a folder nor a repository"),
    ],
)
def test_a_wrong_file_is_one_clear_sentence(
    tmp_path: Path,
    bert: Path,
    capsys: pytest.CaptureFixture[str],
    change: dict[str, Any],
    message: str,
) -> None:
    (tmp_path / "train.txt").write_text("\n".join(f"{label} {text}" for text, label in TEXTS))
    given: dict[str, Any] = {
        "task": "text-classification", "model": str(bert), "data": str(tmp_path / "train.txt"),
        "output": str(tmp_path / "d.sd"), **change,
    }  # fmt: skip
    kept = {name: value for name, value in given.items() if value is not None}
    assert main(["--config", write_run(tmp_path, **kept)]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    with pytest.raises((OSError, ValueError)):
        main(["--config", write_run(tmp_path, **kept), "--debug"])


def test_an_error_in_a_batch_is_told_with_its_step(
    tmp_path: Path, bert: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = f"{'the film is good ' * 20}"
    (tmp_path / "train.txt").write_text(f"pos good\nneg bad\npos {text}\nneg {text}\n")
    path = write_run(
        tmp_path, task="text-classification", model=str(bert), data=str(tmp_path / "train.txt"),
        output=str(tmp_path / "d.sd"), batch_size=4, max_tokens=64,
    )  # fmt: skip
    assert main(["--config", path]) == 1
    error, note = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ")
    assert note == "This was in a batch of step 1."


def test_a_model_without_a_tokenizer(
    tmp_path: Path, bert: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in bert.glob("*"):
        if "token" in file.name or file.name == "vocab.txt":
            file.unlink()
    (tmp_path / "train.txt").write_text("\n".join(f"{label} {text}" for text, label in TEXTS))
    given = {"task": "text-classification", "model": str(bert), "output": str(tmp_path / "d.sd")}
    path = write_run(tmp_path, data=str(tmp_path / "train.txt"), **given)
    assert main(["--config", path]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: model '{bert}' has no tokenizer that transformers can load")
    assert error.count("\n") == 1


def test_labelled_files_of_every_form(tmp_path: Path) -> None:
    expected = [("a film, good", "pos"), ("bad", "1")]
    forms = {
        "a.jsonl": '{"text": "a film, good", "label": "pos"}\n\n{"text": "bad", "label": 1}\n',
        "a.csv": 'label,text\npos,"a film, good"\n1,bad\n',
        "a.tsv": "text\tlabel\na film, good\tpos\nbad\t1\n",
        "a.txt": "pos a film, good\n1 bad\n",
    }
    for name, text in forms.items():
        (tmp_path / name).write_text(text)
        assert read_labelled(tmp_path / name) == expected
    wrong = {
        "b.jsonl": ('{"text": 3}', "line 1 of .* has no text under 'text'"),
        "b.csv": ("text,other\na,b\n", "line 2 of .* under 'label'"),
        "b.txt": ("word\n", "line 1 of .* has no space"),
        "c.txt": ("\n", "has no example"),
        "c.jsonl": ("{", "line 1 of .* is no JSON"),
    }
    for name, (text, message) in wrong.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=message):
            read_labelled(tmp_path / name)
