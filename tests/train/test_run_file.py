"""Trainings that a YAML file describes; what is wrong is found before the model is loaded."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml  # type: ignore[import-untyped]
from causal_helpers import make_causal, make_tokenizer
from safetensors.torch import load_file, save_file
from train_helpers import make_bert

import sparsedelta
from sift_train import FitResult, run_file
from sift_train.__main__ import main
from sift_train.labelled import in_order_of, own_labels

WORDS = ["good", "fine", "great", "bad", "poor", "awful", "the", "film", "is"]
GOOD, BAD = WORDS[:3], WORDS[3:6]
TEXTS = [(f"the film is {word}", "pos" if word in GOOD else "neg") for word in GOOD + BAD] * 4


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


def told(capsys: pytest.CaptureFixture[str]) -> str:
    """Return what was printed on standard error, without what was being done."""
    lines = capsys.readouterr().err.splitlines(keepends=True)
    return "".join(line for line in lines if not line.endswith(" …\n"))


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


def classify(folder: Path, texts: list[tuple[str, str]], **more: Any) -> int:
    lines = [json.dumps({"text": text, "label": label}) for text, label in texts]
    (folder / "train.jsonl").write_text("\n".join(lines))
    given = {
        "task": "text-classification", "data": str(folder / "train.jsonl"), "output": str(folder / "d.sd"),
        "save_target": str(folder / "target"), "batch_size": 4, "max_tokens": 12,
    }  # fmt: skip
    return main(["--config", write_run(folder, **{**given, **more}), "--overwrite"])


def test_a_classifier_keeps_the_order_of_its_labels(
    tmp_path: Path, bert: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With names in another order, a trained classifier would call everything by the wrong name."""
    import transformers

    make: Any = transformers.BertForSequenceClassification
    trained = tmp_path / "trained"
    shutil.copytree(bert, trained)
    labels = {0: "pos", 1: "neg", 2: "none"}
    config = json.loads((bert / "config.json").read_text())
    (bert / "config.json").write_text(json.dumps({**config, "problem_type": "regression"}))
    make.from_pretrained(
        bert, id2label=labels, label2id={v: k for k, v in labels.items()}
    ).save_pretrained(trained)
    train = {"sparse_rate": 0.2, "lr": 1e-5, "max_steps": 1}
    assert classify(tmp_path, TEXTS, model=str(trained), train=train) == 0
    config = json.loads((tmp_path / "target" / "config.json").read_text())
    assert config["id2label"] == {"0": "pos", "1": "neg", "2": "none"}
    assert config["problem_type"] == "single_label_classification"
    settings: Any
    with sparsedelta.load(tmp_path / "d.sd") as delta:
        settings = delta.info["settings"]
        assert not settings["exception"]  # no new head
    assert "has a classifier of the labels" not in caplog.text
    # Other labels, as many: told. Of another number: a new classifier.
    renamed = [(text, {"neg": "a", "pos": "b"}[label]) for text, label in TEXTS]
    third = [*renamed, ("good", "c")]
    assert classify(tmp_path, third, model=str(trained), train=train) == 0
    assert "has a classifier of the labels 'pos', 'neg', 'none', and the data have" in caplog.text
    assert classify(tmp_path, renamed, model=str(trained), train=train) == 0
    with sparsedelta.load(tmp_path / "d.sd") as delta:
        settings = delta.info["settings"]
        assert len(settings["exception"]) == 2


@pytest.mark.parametrize(
    ("known", "names", "expected"),
    [
        (["pos", "neg"], ["neg", "pos"], ["pos", "neg"]),
        (["POSITIVE", "Negative"], ["negative", "positive"], ["positive", "negative"]),
        (["a", "b", "c"], ["c", "a"], ["a", "b", "c"]),
        ([f"LABEL_{n}" for n in range(12)], ["1", "10", "2"], [str(n) for n in range(12)]),
        (["LABEL_0", "LABEL_1"], ["1", "2"], None),
        (
            [f"LABEL_{n}" for n in range(12)],
            ["LABEL_10", "LABEL_2"],
            [f"LABEL_{n}" for n in range(12)],
        ),
        (["a", "b"], ["a", "b", "c"], None),
        (["a", "A"], ["a", "A"], None),
        (["a", "b"], ["a", "A"], None),
    ],
)
def test_the_outputs_of_a_classifier(
    known: list[str], names: list[str], expected: list[str] | None
) -> None:
    config = SimpleNamespace(id2label=dict(enumerate(known)), num_labels=len(known))
    assert in_order_of(config, names) == expected


def test_a_configuration_that_does_not_name_its_first_output() -> None:
    config = SimpleNamespace(id2label={1: "a", 2: "b"}, num_labels=2)
    assert in_order_of(config, ["a", "b"]) is None
    assert own_labels(config) == ["LABEL_0", "a"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"max_tokens": 10_000}, "max_tokens is 10000, and the model reads at most 16 tokens"),
        ({"model": "adapter"}, "'adapter' is a PEFT adapter; merge it into its model"),
        ({"model": "custom"}, "'custom' needs code that comes with it, which is not run"),
        ({"label": " "}, "has no text or integer under 'label'"),
        ({"template": "chat"}, "template is 'chat', which is for the task causal-lm; leave it out"),
        ({"max_tokens": 2}, "max_tokens is 2, which leaves nothing of the texts"),
        (
            {"tokens": 512, "max_tokens": 100},
            "max_tokens is 100, and the model reads at most 16 tokens, as its table of",
        ),
    ],
)
def test_models_and_data_that_do_not_fit(
    tmp_path: Path, bert: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], said: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    settings = json.loads((bert / "tokenizer_config.json").read_text())
    length = change.pop("tokens", 16)
    changed = json.dumps({**settings, "model_max_length": length})
    (bert / "tokenizer_config.json").write_text(changed)
    shutil.copytree(bert, "custom")
    config = json.loads((bert / "config.json").read_text())
    own = {**config, "model_type": "mine", "auto_map": {"AutoConfig": "mine.MineConfig"}}
    (tmp_path / "custom" / "config.json").write_text(json.dumps(own))
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    label = change.pop("label", "pos")
    texts = [*TEXTS, ("good", label)]
    given = {"model": str(bert), "train": {"max_steps": 1}, **change}
    assert classify(tmp_path, texts, **given) == 1
    assert said in told(capsys)


def test_only_a_head_is_made_anew(
    tmp_path: Path, bert: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The table of segments has as many rows by its configuration as there are labels, and one in the file."""
    weights = load_file(bert / "model.safetensors")
    name = next(name for name in weights if "token_type" in name)
    weights[name] = weights[name][:1].contiguous()
    save_file(weights, bert / "model.safetensors", {"format": "pt"})
    assert classify(tmp_path, TEXTS, model=str(bert), train={"max_steps": 1}) == 1
    assert "token_type_embeddings.weight' has shape (1, " in told(capsys)


@pytest.mark.parametrize(("has_end", "pad_id"), [(True, None), (True, 0), (False, None)])
def test_a_classifier_of_a_decoder_without_a_padding_token(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], pad_id: int | None, *, has_end: bool
) -> None:
    tokenizer = make_tokenizer([text for text, _ in TEXTS])
    tokenizer.pad_token = None
    if not has_end:
        tokenizer.eos_token = None
    model = make_causal(tmp_path / "model", tokenizer, pad_token_id=pad_id)
    lines = [json.dumps({"text": text, "label": label}) for text, label in TEXTS]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    path = write_run(
        tmp_path,
        task="text-classification", model=str(model), data=str(tmp_path / "train.jsonl"),
        output=str(tmp_path / "d.sd"), batch_size=4, save_target=str(tmp_path / "target"),
        train={"sparse_rate": 0.2, "lr": 1e-3, "max_steps": 2},
    )  # fmt: skip
    assert main(["--config", path]) == (0 if has_end else 1)
    if has_end:
        config = json.loads((tmp_path / "target" / "config.json").read_text())
        assert config["pad_token_id"] == tokenizer.eos_token_id
    else:
        assert "give it a pad_token" in told(capsys)


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
        (
            {"batchsize": 3},
            "has the setting 'batchsize', which is not known; did you mean 'batch_size'?",
        ),
        (
            {"lr": 3},
            "'lr', which is not known; it is a setting of 'train:', so it is indented below",
        ),
        ({"train": {"output": "d"}}, "it is a setting of the file itself, not of 'train:'"),
        ({"train": {"batch_sise": 2}}, "did you mean 'batch_size', a setting of the file itself"),
        ({"batch_size": 6, "micro_batch": 4}, "no multiple of micro_batch"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"train": [1]}, "train is no mapping"),
        ({"train": {"accumulation": 2}}, "set batch_size and micro_batch"),
        ({"train": {"rate": 2}}, "has the setting 'rate'"),
        ({"train": {"sparse_rate": 2}}, "sparse rate is 2"),
        ({"template": "llama"}, "template is 'llama'; choose one of auto, chat, alpaca"),
        ({"output": 3}, "output is 3; it must be the text of a path"),
        ({"data": "missing.txt"}, "'missing.txt' does not exist; give the file of examples"),
        ({"data": "{here}"}, "is a folder; give the file of examples"),
        ({"data": "{here}/bert/model.safetensors"}, "is not text in UTF-8"),
        ({"evaluation": "missing.txt"}, "'missing.txt' does not exist"),
        ({"data": "{here}/one.txt"}, "all 2 examples of '{here}/one.txt' have the label 'pos'"),
        (
            {"evaluation": "{here}/other.txt"},
            "line 3 of '{here}/other.txt' has the label 'mixed', which does not occur in the training data; its labels"
            " are 'neg', 'pos'",
        ),
        ({"task": "causal-lm"}, "line 1 of '{here}/train.txt' is no JSON"),
        ({"model": "no/such/folder"}, "'no/such/folder' does not exist, and no repository can"),
        ({"model": "./bert"}, "'./bert' does not exist"),
        ({"model": "bert/"}, "'bert/' does not exist"),
        ({"model": "not a name"}, "'not a name' is neither a folder nor a repository"),
        ({"model": "{here}/train.txt"}, "model '{here}/train.txt' is a file; give the folder"),
        ({"model": "{here}"}, "'{here}' has no config.json, so it is not a model folder"),
        ({"output": "{here}/taken.sd"}, "output '{here}/taken.sd' exists"),
        ({"output": "{here}"}, "'{here}' is a folder, but the output is one file"),
        ({"output": "{here}/new/d.sd"}, "the folder of output '{here}/new/d.sd' does not exist"),
        ({"output": "{here}/bert/new.sd"}, "'{here}/bert/new.sd' is in the base, '{here}/bert'"),
        ({"save_target": "{here}/bert"}, "'{here}/bert' is the base, '{here}/bert', which the run"),
        ({"save_target": "{here}/taken.sd"}, "output '{here}/taken.sd' exists"),
        ({"save_target": "{here}/d.sd"}, "output and save_target are both '{here}/d.sd'"),
        ({"run_dir": "{here}/taken.sd/run"}, "because '{here}/taken.sd' is a file"),
        ({"train": {"save_every": 2}}, "save_every needs a folder for checkpoints; give run_dir"),
        ({"train": {"eval_every": 2}}, "eval_every is 2, but there is no evaluate"),
        ({"train": {"selection": "nope.sd"}}, "selection is 'nope.sd', and there is no such file"),
    ],
)
def test_a_wrong_file_is_one_clear_sentence(
    tmp_path: Path,
    bert: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, Any],
    message: str,
) -> None:
    refuse_to_load(monkeypatch)
    lines = [f"{label} {text}" for text, label in TEXTS]
    files = {
        "train.txt": lines,
        "one.txt": ["pos good", "pos fine"],
        "other.txt": [lines[0], "", "mixed the film is"],
        "taken.sd": [],
    }
    for name, content in files.items():
        (tmp_path / name).write_text("\n".join(content))
    texts = {
        name: v.format(here=tmp_path) if isinstance(v, str) else v for name, v in change.items()
    }
    given: dict[str, Any] = {
        "task": "text-classification", "model": str(bert), "data": str(tmp_path / "train.txt"),
        "output": str(tmp_path / "d.sd"), **texts,
    }  # fmt: skip
    kept = {name: value for name, value in given.items() if value is not None}
    assert main(["--config", write_run(tmp_path, **kept)]) == 1
    error = told(capsys)
    assert message.format(here=tmp_path) in error
    assert error.count("\n") == 1
    with pytest.raises((OSError, ValueError)):
        main(["--config", write_run(tmp_path, **kept), "--debug"])


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        (
            "save_target",
            "data",
            "is a folder around the data, 'data/train.txt', which the run reads",
        ),
        ("output", "data/train.txt", "is the data, 'data/train.txt', which the run reads"),
    ],
)
def test_no_output_replaces_what_the_run_reads(
    tmp_path: Path, bert: Path, monkeypatch: pytest.MonkeyPatch, name: str, given: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    Path("data/train.txt").write_text("pos good\nneg bad\n")
    paths = {"output": "d.sd", name: given}
    path = write_run(
        tmp_path, task="text-classification", model=str(bert), data="data/train.txt", **paths
    )
    with pytest.raises(ValueError, match=f"output '{given}' {message}"):
        run_file.run_file(path, overwrite=True)
    assert Path("data/train.txt").read_text() == "pos good\nneg bad\n"


@pytest.mark.parametrize("task", ["text-classification", "causal-lm"])
def test_a_run_resumes_only_with_its_data(
    tmp_path: Path, bert: Path, capsys: pytest.CaptureFixture[str], task: str
) -> None:
    data, model, max_tokens = tmp_path / "train.jsonl", bert, 16
    tests = tmp_path / "test.jsonl"
    if task == "causal-lm":
        model, max_tokens = tmp_path / "lm", 256
        make_causal(model, make_tokenizer(["a b c d"]))
        data.write_text(
            '{"instruction": "a", "output": "b"}\n{"instruction": "c", "output": "d"}\n'
        )
    else:
        data.write_text('{"text": "good", "label": "pos"}\n{"text": "bad", "label": "neg"}\n')
    given = {
        "task": task, "model": str(model), "data": str(data), "run_dir": str(tmp_path / "run"),
        "batch_size": 1, "max_tokens": max_tokens, "train": {"save_every": 1, "max_steps": 2, "lr": 1e-3},
    }  # fmt: skip
    assert main(["--config", write_run(tmp_path, output=str(tmp_path / "a.sd"), **given)]) == 0
    again = write_run(tmp_path, output=str(tmp_path / "b.sd"), **given)
    assert main(["--config", again, "--resume"]) == 0
    # An evaluation may be added and left out, and not replaced.
    shutil.copy(data, tests)
    tested = {**given, "evaluation": str(tests), "run_dir": str(tmp_path / "tested")}
    for more in ([], ["--resume", "--overwrite"]):
        path = write_run(tmp_path, output=str(tmp_path / "c.sd"), **tested)
        assert main(["--config", path, *more]) == 0
    tests.write_text(tests.read_text().splitlines()[0])
    without = {name: value for name, value in tested.items() if name != "evaluation"}
    for settings, code in ((tested, 1), (without, 0), (tested, 1)):
        path = write_run(tmp_path, output=str(tmp_path / "c.sd"), **settings)
        assert main(["--config", path, "--resume", "--overwrite"]) == code
        assert ("was evaluated on other examples" in capsys.readouterr().err) == (code == 1)
    again = write_run(tmp_path, output=str(tmp_path / "b.sd"), **given)
    before = data.read_text()
    for changed in (
        before.replace("good", "fine").replace('"a"', '"e"'),
        before.replace("pos", "aaa"),
    ):
        data.write_text(changed)
        if changed != before:
            assert main(["--config", again, "--resume", "--overwrite"]) == 1
            assert "was trained on other data" in capsys.readouterr().err


def test_a_setting_that_is_given_twice_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.yaml").write_text("task: causal-lm\ntrain:\n  lr: 1e-3\n  lr: 1e-4\n")
    assert main(["--config", str(tmp_path / "run.yaml")]) == 1
    error = told(capsys)
    assert "run.yaml' is not YAML: line 4: 'lr' is given twice" in error


def refuse_to_load(monkeypatch: pytest.MonkeyPatch) -> None:
    def loads(*_: Any, **__: Any) -> None:
        raise AssertionError("the model is loaded")

    monkeypatch.setattr(run_file, "_load", loads)


def test_a_folder_that_cannot_be_written_is_found_before_loading(
    tmp_path: Path, bert: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_to_load(monkeypatch)
    # Root may write everywhere, so a change of the permissions would not show it.
    monkeypatch.setattr(os, "access", lambda path, _: Path(path) != tmp_path)
    (tmp_path / "train.txt").write_text("\n".join(f"{label} {text}" for text, label in TEXTS))
    given = {"task": "text-classification", "model": str(bert), "data": str(tmp_path / "train.txt")}
    path = write_run(tmp_path, output=str(tmp_path / "d.sd"), **given)
    assert main(["--config", path]) == 1
    expected = f"output '{tmp_path}/d.sd' cannot be written, because you may not write to the folder '{tmp_path}'"
    assert expected in capsys.readouterr().err
    (tmp_path / "out").mkdir()
    rest = {"output": str(tmp_path / "out" / "d.sd"), "run_dir": str(tmp_path / "run" / "deep")}
    assert main(["--config", write_run(tmp_path, **rest, **given)]) == 1
    assert f"run_dir '{tmp_path}/run/deep' cannot be written" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_prompt_that_cannot_be_written_is_found_before_loading(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_to_load(monkeypatch)
    tokenizer = make_tokenizer(["Greet. Hi"])
    tokenizer.chat_template = None
    make_causal(tmp_path / "model", tokenizer)
    (tmp_path / "t.json").write_text('[{"instruction": "Greet.", "output": "Hi"}]')
    path = write_run(
        tmp_path, task="causal-lm", model=str(tmp_path / "model"), data=str(tmp_path / "t.json"),
        output=str(tmp_path / "d.sd"), template="chat",
    )  # fmt: skip
    assert main(["--config", path]) == 1
    expected = f"'{tmp_path}/t.json': the tokenizer has no chat template; use the Alpaca prompt"
    assert f"error: {expected}\n" in capsys.readouterr().err


def test_a_repository_that_cannot_be_downloaded_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise OSError("no network\nmany more lines")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fails)
    (tmp_path / "train.txt").write_text("pos good\nneg bad")
    given = {"task": "text-classification", "data": str(tmp_path / "train.txt")}
    path = write_run(tmp_path, model="org/model@refs/pr/1", output=str(tmp_path / "d.sd"), **given)
    assert main(["--config", path]) == 1
    error = told(capsys)
    assert error == (
        "error: model 'org/model@refs/pr/1' is no folder, and could not be downloaded: no network\n"
    )


def test_an_error_in_a_batch_is_told_with_its_step(
    tmp_path: Path, bert: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = sys.modules["sift_train.run_file"]  # sift_train.run_file is the function
    monkeypatch.setattr(module, "check_positions", lambda *_: None)  # which finds this one earlier
    text = f"{'the film is good ' * 20}"
    (tmp_path / "train.txt").write_text(f"pos good\nneg bad\npos {text}\nneg {text}\n")
    path = write_run(
        tmp_path, task="text-classification", model=str(bert), data=str(tmp_path / "train.txt"),
        output=str(tmp_path / "d.sd"), batch_size=4, max_tokens=64,
    )  # fmt: skip
    assert main(["--config", path]) == 1
    error, note = told(capsys).splitlines()
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
    error = told(capsys)
    assert error.startswith(f"error: model '{bert}' has no tokenizer that transformers can load")
    assert error.count("\n") == 1


def test_a_run_that_resumes_on_another_base_is_told(
    tmp_path: Path, bert: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The weights that differ are not trained, so that no checkpoint holds them."""
    more = {"run_dir": str(tmp_path / "run"), "model": str(bert)}
    assert classify(tmp_path, TEXTS, train={"max_steps": 2, "save_every": 1}, **more) == 0
    arguments = ["--config", str(tmp_path / "run.yaml"), "--overwrite", "--resume"]
    assert main(arguments) == 0
    assert "when the saved run began" not in caplog.text
    weights = load_file(bert / "model.safetensors")
    name = next(name for name in weights if "word_embeddings" in name)
    weights[name][0, 0] += 1
    save_file(weights, bert / "model.safetensors", {"format": "pt"})
    assert main(arguments) == 0
    assert (
        "1 of the parameters that are not trained, such as 'bert.embeddings.word_emb" in caplog.text
    )
