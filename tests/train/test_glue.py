"""``examples/recipes/glue.py``: the real script and libraries with tiny models and local data."""

from __future__ import annotations

import csv
import json
import math
import random
import re
import runpy
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from train_helpers import same_bits, snapshot

import sparsedelta

pytest.importorskip("datasets", reason="needs the group recipes")
sys.path.append(str(Path(__file__).parents[2] / "examples" / "recipes"))

import datasets  # type: ignore[import-untyped]
from glue_files import MAX_HELD_OUT, load_files, regression_hint
from glue_tasks import SCORES, TASKS, load_task, narrowed
from recipe_common import Choice, KeepBest, adapt, by_method, equalized, export

RECIPES = Path(__file__).parents[2] / "examples" / "recipes"
WORDS = [["sun", "warm", "light"], ["rain", "cold", "dark"]]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
LAYERS = ["query", "key", "value", "attention.output.dense"]

Recipe = Callable[..., str]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two pretrained models: one with a name prefix and another task's head, one without both."""
    place = tmp_path_factory.mktemp("bases")
    shape: dict[str, Any] = {
        "vocab_size": 12, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 32, "max_position_embeddings": 34, "initializer_range": 0.3,
        "pad_token_id": 0,
    }  # fmt: skip
    make: Any = transformers
    torch.manual_seed(0)
    make.RobertaForMaskedLM(make.RobertaConfig(**shape)).save_pretrained(place / "roberta")
    make.BertModel(make.BertConfig(**shape)).save_pretrained(place / "bert")
    vocabulary = dict.fromkeys([*SPECIAL, *WORDS[0], *WORDS[1], "and"])
    for name in ("roberta", "bert"):
        (place / name / "vocab.txt").write_text("\n".join(vocabulary))
        tokenizer = make.BertTokenizerFast.from_pretrained(place / name, model_max_length=32)
        tokenizer.save_pretrained(place / name)
    return {name: place / name for name in ("roberta", "bert")}


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Recipe:
    """Return a function that runs the script with arguments and returns its output."""

    def run(*words: object, fails: bool = False) -> str:
        monkeypatch.setattr(sys, "argv", ["glue.py", *map(str, words)])
        monkeypatch.syspath_prepend(str(RECIPES))
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(RECIPES / "glue.py"), run_name="__main__")
        printed = capsys.readouterr().out
        if fails:
            assert isinstance(ended.value.code, str)
            return ended.value.code
        assert ended.value.code == 0, ended.value.code
        return printed

    return run


def sentences(n: int, seed: int = 0) -> list[tuple[str, int]]:
    """Return texts with words that determine the label."""
    draw = random.Random(seed)
    return [(" and ".join(draw.choices(WORDS[i % 2], k=3)), i % 2) for i in range(n)]


def write_lines(path: Path, rows: Sequence[tuple[str, int]]) -> Path:
    path.write_text("\n".join(f"{'wet' if label else 'dry'} {text}" for text, label in rows))
    return path


def accuracy_of(folder: Path, rows: Sequence[tuple[str, int]]) -> float:
    """Return the accuracy of a classifier that is loaded from a folder."""
    auto: Any = transformers.AutoModelForSequenceClassification
    model, report = auto.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    tokens: Any = transformers.AutoTokenizer
    tokens = tokens.from_pretrained(folder)(
        [text for text, _ in rows], padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        found = model.eval()(**tokens).logits.argmax(1)
    wanted = torch.tensor([model.config.label2id["wet" if label else "dry"] for _, label in rows])
    return float((found == wanted).float().mean())


@pytest.mark.parametrize(
    ("name", "methods", "seeds", "more"),
    [
        ("roberta", ["full", "lora", "shira", "sift"], [0, 1], []),
        ("bert", ["lora", "sift"], [0], ["--checkpointing", "--accumulation", 2]),
    ],
)
def test_the_methods_train_equal_numbers_and_their_deltas_rebuild_the_classifiers(
    bases: dict[str, Path],
    name: str,
    methods: list[str],
    seeds: list[int],
    more: list[object],
    recipe: Recipe,
    tmp_path: Path,
) -> None:
    held_out = sentences(41, seed=2)
    train = write_lines(tmp_path / "train.txt", sentences(160))
    test = write_lines(tmp_path / "test.txt", held_out)
    printed = recipe(
        "--model", bases[name], "--data", train, "--test", test, "--method", *methods,
        "--seeds", *seeds, "--epochs", 5, "--eval-every", 10, "--batch", 16, "--rate", 0.1,
        "--lr", "1e-2", "full=5e-3", "--output", tmp_path / "out.sd", "--json", tmp_path / "out.json", *more,
    )  # fmt: skip

    found = json.loads((tmp_path / "out.json").read_text())
    by_method = {row["method"]: row for row in found["summary"]}
    if "shira" in methods:
        assert by_method["lora"]["n_trained"] == by_method["shira"]["n_trained"]
    n_layers = 2 * len(LAYERS)
    assert 0 <= by_method["sift"]["n_trained"] - by_method["lora"]["n_trained"] <= n_layers
    assert len({row["n_dense"] for row in found["summary"]}) == 1
    for method in methods:
        row = by_method[method]
        assert f"| {method} " in printed
        assert (row["deviation"]["test accuracy"] is not None) == (len(seeds) > 1)
        assert row["mean"]["dev accuracy"] > 0.8
        output = tmp_path / f"out-{method}.sd"
        assert row["delta"] == {
            "path": str(output), "seed": row["delta"]["seed"], "bytes": output.stat().st_size,
        }  # fmt: skip
        sparsedelta.apply(bases[name], output, tmp_path / method)
        own = [r for r in found["runs"] if r["method"] == method]
        best = max(own, key=lambda r: float(r["scores"]["dev"]["score"]))
        assert row["delta"]["seed"] == best["seed"]
        with sparsedelta.load(output) as delta:
            assert delta.info["seed"] == best["seed"]
        assert accuracy_of(tmp_path / method, held_out) == pytest.approx(
            best["scores"]["test"]["accuracy"]
        )
        values = [e["values"]["score"] for e in best["evaluations"]]
        assert best["scores"]["dev"]["score"] == max(values)
        assert best["best_step"] == best["evaluations"][values.index(max(values))]["step"]


@pytest.mark.parametrize("name", ["roberta", "bert"])
def test_a_delta_holds_the_trained_components_and_the_new_head(
    bases: dict[str, Path], name: str, tmp_path: Path
) -> None:
    auto: Any = transformers.AutoModelForSequenceClassification
    model = auto.from_pretrained(bases[name], num_labels=3)
    adapted = adapt(model, "sift", Choice(targets=LAYERS, dense=["classifier"], rate=0.05))
    adapted.select([{"input_ids": torch.tensor([[2, 6, 3]]), "labels": torch.tensor([1])}])
    with torch.no_grad():
        for master in adapted.trained.values():
            master.add_(1)
    adapted.sift.write_back()  # type: ignore[union-attr]
    export(adapted.finish(), tmp_path / "out.sd", base=bases[name], base_id="org/model@1")
    with sparsedelta.load(tmp_path / "out.sd") as delta:
        rows = delta.tensors
    assert sum(row.base is not None and not row.is_copied for row in rows) == 2 * len(LAYERS)
    # A bias of zeros exists in the base under another name.
    new = {row.name for row in rows if row.base is None or row.base.name != row.name}
    assert new == {n for n, _ in model.named_parameters() if n.startswith("classifier")}


@pytest.mark.parametrize("method", ["full", "lora", "shira", "sift"])
def test_the_best_step_is_restored(bases: dict[str, Path], method: str) -> None:
    auto: Any = transformers.AutoModelForSequenceClassification
    model = auto.from_pretrained(bases["bert"])
    choice = equalized(model, Choice(targets=LAYERS, dense=["classifier"]), ["lora", "sift"])
    adapted = adapt(model, method, choice)
    adapted.select([{"input_ids": torch.tensor([[2, 6, 3]]), "labels": torch.tensor([1])}])
    best = KeepBest(adapted, "eval_score")
    states = []
    for step, value in enumerate([0.2, 0.7, float("nan"), 0.7], 1):
        with torch.no_grad():
            for parameter in adapted.trained.values():
                parameter.add_(0.25)
        if adapted.sift is not None:
            adapted.sift.write_back()
        states.append(snapshot(adapted.model))
        state: Any = transformers.TrainerState(global_step=step)
        best.on_evaluate(None, state, None, metrics={"eval_score": value})
    best.on_train_end(None, None, None)
    assert best.step == 2
    now = snapshot(adapted.model)
    assert all(same_bits(now[name], value) for name, value in states[1].items())
    assert not all(same_bits(now[name], value) for name, value in states[3].items())


def glue_copy(folder: Path, name: str, *, as_parquet: bool) -> None:
    """Write a task's splits with ``datasets``, with the columns and types of GLUE."""
    task = TASKS[name]
    label = (
        datasets.Value("float32")
        if task.n_labels == 1
        else datasets.ClassLabel(names=[f"class{n}" for n in range(task.n_labels)])
    )
    columns = {**{text: datasets.Value("string") for text in task.texts}, "label": label}
    features = datasets.Features({**columns, "idx": datasets.Value("int32")})
    splits = {}
    for number, split in enumerate(["train", *task.dev.values()]):
        rows = sentences(24, seed=number)
        values: dict[str, Any] = {text: [words for words, _ in rows] for text in task.texts}
        values["label"] = [n % task.n_labels if task.n_labels > 1 else n / 2 for _, n in rows]
        values["idx"] = list(range(len(rows)))
        splits[split] = datasets.Dataset.from_dict(values, features=features)
    if as_parquet:
        (folder / name).mkdir(parents=True)
        for split, rows in splits.items():
            rows.to_parquet(folder / name / f"{split}-00000-of-00001.parquet")
    else:
        datasets.DatasetDict(splits).save_to_disk(str(folder / name))


@pytest.mark.parametrize("as_parquet", [True, False])
@pytest.mark.parametrize("name", TASKS)
def test_every_task_is_read_from_a_copy(
    name: str, as_parquet: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    glue_copy(tmp_path, name, as_parquet=as_parquet)
    data = load_task(name, tmp_path)
    assert list(data.scored) == list(TASKS[name].dev)
    assert [len(data.train), *map(len, data.scored.values())] == [24] * (1 + len(data.scored))
    assert data.labels == [
        f"class{n}" for n in range(TASKS[name].n_labels) if not data.is_regression
    ]
    assert ("text_pair" in data.train.column_names) == (len(TASKS[name].texts) == 2)
    assert data.train[1]["labels"] == (0.5 if data.is_regression else 1)


@pytest.mark.parametrize(
    ("name", "scores"),
    [
        ("cola", {"validation": ["matthews"]}),
        ("mrpc", {"validation": ["accuracy", "f1"]}),
        ("stsb", {"validation": ["pearson", "spearman"]}),
        ("mnli", {"matched": ["accuracy"], "mismatched": ["accuracy"]}),
    ],
)
def test_a_task_is_scored_by_its_own_measures(
    bases: dict[str, Path], name: str, scores: dict[str, list[str]], recipe: Recipe, tmp_path: Path
) -> None:
    glue_copy(tmp_path, name, as_parquet=False)
    printed = recipe(
        "--task", name, "--data-dir", tmp_path, "--model", bases["roberta"], "--max-steps", 2,
        "--output", tmp_path / "delta.sd", "--json", tmp_path / "out.json",
    )  # fmt: skip
    run = json.loads((tmp_path / "out.json").read_text())["runs"][0]
    assert {
        split: [n for n in own if n != "score"] for split, own in run["scores"].items()
    } == scores
    for split, own in scores.items():
        for score in own:
            assert f"{split} {score}" in printed
    assert run["rate"] == 0.008
    assert run["lr"] == (8e-5 if name == "stsb" else 7e-5)
    with sparsedelta.load(tmp_path / "delta.sd") as delta:
        assert delta.info["method"] == "sift"
        assert delta.info["scores"] == run["scores"]


def test_scores_are_the_known_ones() -> None:
    import numpy as np

    labels, found = np.array([1, 1, 0, 0, 1]), np.array([1, 0, 0, 1, 1])
    assert SCORES["accuracy"](labels, found) == pytest.approx(3 / 5)
    assert SCORES["f1"](labels, found) == pytest.approx(2 / 3)
    assert SCORES["matthews"](labels, found) == pytest.approx(1 / 6)
    numbers = np.array([0.0, 1.0, 2.0, 4.0])
    assert SCORES["spearman"](numbers, numbers**3) == pytest.approx(1)
    assert SCORES["pearson"](numbers, numbers**3) < 0.99
    assert SCORES["pearson"](numbers, np.ones(4)) == 0.0


def test_files_of_three_kinds_are_the_same_data(tmp_path: Path) -> None:
    rows = sentences(40)
    lines = write_lines(tmp_path / "data.txt", rows)
    names = ["dry", "wet"]
    with (tmp_path / "data.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([("id", "label", "text"), *((0, names[n], text) for text, n in rows)])
    tabs = [line.replace(" ", "\t", 1) for line in lines.read_text().split("\n")]
    (tmp_path / "tabs.txt").write_text("\n".join(tabs))
    records = [json.dumps({"said": text, "kind": names[n], "more": 1}) for text, n in rows]
    (tmp_path / "data.jsonl").write_text("\n".join(records))
    found = [
        load_files(lines),
        load_files(tmp_path / "data.csv"),
        load_files(tmp_path / "data.jsonl", texts=["said"], label="kind"),
        load_files(tmp_path / "tabs.txt"),
    ]
    for data in found:
        assert data.labels == names
        assert data.train.to_list() == found[0].train.to_list()
        assert data.scored["dev"].to_list() == found[0].scored["dev"].to_list()
    assert len(found[0].scored["dev"]) == 4
    assert len(narrowed(found[0], n_train=5).train) == 5


def test_the_held_out_are_a_tenth_of_each_class_and_no_class_is_lost(tmp_path: Path) -> None:
    sizes = {"many": 300, "some": 100, "few": 10, "two": 2, **{f"one{n}": 1 for n in range(30)}}
    lines = [f"{label} text{n}" for label, size in sizes.items() for n in range(size)]
    (tmp_path / "data.txt").write_text("\n".join(lines))
    data = load_files(tmp_path / "data.txt")

    def count(rows: datasets.Dataset) -> dict[str, int]:
        return dict(Counter(data.labels[number] for number in rows["labels"]))

    train, held_out = count(data.train), count(data.scored["dev"])
    assert data.labels == sorted(sizes)
    assert set(train) == set(sizes)
    assert sum(held_out.values()) == len(lines) // 10
    assert held_out["few"] == 1
    assert held_out["many"] == pytest.approx(3 * held_out["some"], abs=2)
    assert not any(label.startswith("one") for label in held_out)
    assert {label: train[label] + held_out.get(label, 0) for label in sizes} == sizes
    every = [
        f"{data.labels[row['labels']]} {row['text']}" for row in [*data.train, *data.scored["dev"]]
    ]
    assert sorted(every) == sorted(lines)


def test_at_most_a_fixed_number_is_held_out(tmp_path: Path) -> None:
    (tmp_path / "data.txt").write_text("1 sun\n2 rain\n" * 6 * MAX_HELD_OUT)
    for is_regression in (False, True):
        data = load_files(tmp_path / "data.txt", is_regression=is_regression)
        assert len(data.scored["dev"]) == MAX_HELD_OUT
        assert len(data.train) == 11 * MAX_HELD_OUT


def test_lists_in_messages_are_short_and_quantities_are_hinted_at(tmp_path: Path) -> None:
    numbers = [str(n / 4) for n in range(100)]
    (tmp_path / "data.txt").write_text("\n".join(f"{number} sun" for number in numbers * 2))
    (tmp_path / "test.txt").write_text("0.1 sun")
    with pytest.raises(ValueError, match=r"row 1 of '.*test.txt' has the label '0.1'") as told:
        load_files(tmp_path / "data.txt", test=tmp_path / "test.txt")
    shown = [number for number in numbers if f"'{number}'" in str(told.value)]
    assert len(shown) == 10
    assert "and 90 more; the 101 labels are all numbers; set --regression" in str(told.value)
    assert "--regression" in regression_hint(numbers)
    assert not regression_hint(numbers[:10])
    assert not regression_hint([*numbers, "wet"])
    assert not regression_hint([])

    columns = [f"column{n}" for n in range(300)]
    (tmp_path / "wide.csv").write_text(",".join(columns) + "\n" + ",".join(columns))
    with pytest.raises(ValueError, match=r"no column 'label', only .* and 290 more$"):
        load_files(tmp_path / "wide.csv")


def test_quantities_as_classes_are_noted_before_training(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    (tmp_path / "data.txt").write_text("\n".join(f"{n / 4} sun" for n in range(20)) + "\n0.0 sun")
    words = ["--data", tmp_path / "data.txt", "--model", bases["bert"], "--max-steps", 1]
    monkeypatch.setattr(sys, "argv", ["glue.py", *map(str, words)])
    monkeypatch.syspath_prepend(str(RECIPES))
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(RECIPES / "glue.py"), run_name="__main__")
    assert "note: the 20 labels are all numbers; set --regression" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["txt", "csv", "jsonl"])
def test_lines_end_at_line_feeds_alone(kind: str, tmp_path: Path) -> None:
    text = "sun\x85warm\x1clight\x0bsky"  # str.splitlines would split this into four lines
    rows = [("wet" if n % 2 else "dry", text) for n in range(20)]
    lines = {
        "txt": [f"{label} {said}" for label, said in rows],
        "csv": ["label,text", *(f"{label},{said}" for label, said in rows)],
        "jsonl": [
            json.dumps({"label": label, "text": said}, ensure_ascii=False) for label, said in rows
        ],
    }
    (tmp_path / f"data.{kind}").write_bytes("\r\n".join(lines[kind]).encode("latin-1"))
    data = load_files(tmp_path / f"data.{kind}", encoding="latin-1")
    assert data.labels == ["dry", "wet"]
    assert [*data.train["text"], *data.scored["dev"]["text"]] == [text] * 20


def test_a_run_that_diverges_ends_with_an_error_if_output_is_given(
    bases: dict[str, Path], recipe: Recipe, tmp_path: Path
) -> None:
    (tmp_path / "data.txt").write_text("1 sun\n2 rain\n3 warm\n" * 20)
    words = [
        "--data", tmp_path / "data.txt", "--regression", "--model", bases["bert"],
        "--max-steps", 3, "--lr", "1e36",
    ]  # fmt: skip
    message = recipe(*words, "--output", tmp_path / "delta.sd", fails=True)
    assert message.startswith("error: no delta of sift is written")
    assert not (tmp_path / "delta.sd").exists()
    assert "nan" in recipe(*words)


def test_numbers_are_predicted_for_pairs_of_texts(
    bases: dict[str, Path], recipe: Recipe, tmp_path: Path
) -> None:
    rows = [{"a": text, "b": text, "label": label + 0.5} for text, label in sentences(40)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    recipe(
        "--data", tmp_path / "data.jsonl", "--regression", "--model", bases["bert"], "--batch", 8,
        "--lr", 1e-2, "--epochs", 8, "--json", tmp_path / "out.json",
    )  # fmt: skip
    scores = json.loads((tmp_path / "out.json").read_text())["runs"][0]["scores"]
    assert scores["dev"]["pearson"] > 0.5
    assert not list(tmp_path.glob("*.sd"))


def test_help_plans_the_run_without_any_weights(
    bases: dict[str, Path], recipe: Recipe, tmp_path: Path
) -> None:
    shutil.copytree(bases["bert"], tmp_path / "empty")
    (tmp_path / "empty" / "model.safetensors").unlink()
    shown = ["--method", "sift", "lora", "--rate", "0.1"]
    printed = recipe("--model", tmp_path / "empty", *shown, "--help")
    assert "--selection" in printed
    planned = {
        m[1]: int(m[2].replace(",", "")) for m in re.finditer(r"\| (\w+) +\| ([\d,]+) ", printed)
    }
    auto: Any = transformers.AutoModelForSequenceClassification
    for method in ("sift", "lora"):
        model = auto.from_pretrained(bases["bert"])
        wanted = Choice(targets=LAYERS, dense=["classifier"], rate=0.1)
        adapted = adapt(model, method, equalized(model, wanted, ["sift", "lora"]))
        assert planned[method] == adapted.n_trained + adapted.n_dense
    assert "FacebookAI/roberta-large" in recipe("--help")


def test_rates_are_given_for_all_methods_or_one() -> None:
    known = {"sift": 1.0, "full": 2.0}
    assert by_method([], known, "--lr") == known
    assert by_method(["3"], known, "--lr") == {"sift": 3.0, "full": 3.0}
    for words in (["3", "full=4"], ["full=4", "3"]):
        assert by_method(words, known, "--lr") == {"sift": 3.0, "full": 4.0}


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (
            ["sift=1e-3", "sift=1e-4"],
            "--lr gives method sift two numbers, 0.001 and 0.0001; give one",
        ),
        (["1e-3", "1e-4"], "--lr gives every method two numbers, 0.001 and 0.0001; give one"),
    ],
)
def test_two_rates_for_one_method_are_refused(words: list[str], problem: str) -> None:
    with pytest.raises(ValueError, match=re.escape(problem)):
        by_method(words, {"sift": 1.0, "full": 2.0}, "--lr")


def test_option_given_twice_is_not_forgotten(
    bases: dict[str, Path], tmp_path: Path, recipe: Recipe
) -> None:
    train = write_lines(tmp_path / "train.txt", [("sun", 0), ("rain", 1)] * 20)
    words = ["--model", bases["bert"], "--data", train, "--lr", "sift=1e-3", "--lr", "sift=1e-4"]
    error = recipe(*words, fails=True)
    assert error.startswith("error: --lr gives method sift two numbers, 0.001 and 0.0001")


@pytest.mark.parametrize("words", [["--batch", "0"], ["--epochs", "x"], ["--rate", "1.5"]])
def test_numbers_out_of_range_are_usage_errors(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["glue.py", *words])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(RECIPES / "glue.py"), run_name="__main__")
    assert f"{words[0]}: {words[1]!r} is not a" in capsys.readouterr().err


BAD: dict[str, tuple[list[str], str]] = {
    "nothing to train on": ([], "either --task"),
    "both": (["--task", "rte", "--data", "train.txt"], "either --task"),
    "no copy": (["--task", "rte", "--data-dir", "."], "lacks train and validation"),
    "no file": (["--data", "absent.txt"], "absent.txt"),
    "encoding": (
        ["--data", "latin.txt"],
        "not utf-8: invalid continuation byte at byte 7; set --encoding",
    ),
    "no encoding": (["--data", "train.txt", "--encoding", "latin-x"], "--encoding 'latin-x'"),
    "no text": (["--data", "bare.txt"], "line 2 is 'wet'"),
    "new label": (
        ["--data", "train.txt", "--test", "other.txt"],
        "row 1 of 'other.txt' has the label 'hot'",
    ),
    "one label": (["--data", "other.txt", "--dev", "other.txt"], "no classes to distinguish"),
    "no column": (["--data", "table.csv", "--text", "said"], "no column 'said'"),
    "columns": (["--data", "table.csv"], "with --text"),
    "not JSON": (["--data", "bad.jsonl"], "line 1 is not JSON"),
    "not a number": (
        ["--data", "train.txt", "--regression"],
        "'dry', which is not a finite number",
    ),
    "not finite": (["--data", "nan.csv", "--regression"], "row 4 of 'nan.csv' has the label 'nan'"),
    "infinite": (["--data", "inf.txt", "--regression"], "row 21 of 'inf.txt' has the label '-inf'"),
    "empty label": (["--data", "empty.csv", "--text", "text"], "row 5 of 'empty.csv' has no label"),
    "blank label": (["--data", "blank.txt"], "row 2 of 'blank.txt' has no label"),
    "absent label": (["--data", "absent.jsonl"], "row 2 of 'absent.jsonl' has no label"),
    "null label": (["--data", "null.jsonl"], "row 1 of 'null.jsonl' has no label"),
    "NaN label": (["--data", "NaN.jsonl"], "row 1 of 'NaN.jsonl' has no label"),
    "no text in a row": (["--data", "empty.csv", "--text", "more"], "row 2 of 'empty.csv' lacks"),
    "comma": (["--data", "comma.csv"], "line 3 has 3 fields, and the header names 2; put texts"),
    "not CSV": (["--data", "long.csv"], "line 2 is not CSV: field larger"),
    "labels once each": (["--data", "once.txt"], "no label of 'once.txt' occurs twice"),
    "quantities": (["--data", "once.txt"], "set --regression if they are"),
    "score": (["--data", "train.txt", "--score", "pearson"], "is not for 2 classes"),
    "rate": (["--data", "train.txt", "--lr", "lara=1"], "names no method"),
    "module": (["--data", "train.txt", "--dense", "score"], "no module 'score'"),
    "layer": (["--data", "train.txt", "--layers", "q_proj"], "'q_proj' in its name"),
    "in the way": (["--data", "train.txt", "--output", "other.txt"], "exists"),
    "no folder": (["--data", "train.txt", "--output", "absent/delta.sd"], "does not exist"),
    "no model": (["--data", "train.txt", "--model", "./absent"], "absent"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_one_clear_sentence(
    bases: dict[str, Path],
    what: str,
    recipe: Recipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_lines(tmp_path / "train.txt", sentences(40))
    (tmp_path / "other.txt").write_text("hot sun\n" * 20)
    (tmp_path / "bare.txt").write_text("wet rain\nwet\n")
    (tmp_path / "latin.txt").write_bytes("wet caf\u00e9 au lait\n".encode("latin-1") * 20)
    (tmp_path / "table.csv").write_text("a,b,c,label\n1,2,3,wet\n")
    (tmp_path / "bad.jsonl").write_text("{")
    (tmp_path / "nan.csv").write_text("label,text\n1,sun\n2,sun\nnan,sun\n" + "3,sun\n" * 20)
    (tmp_path / "inf.txt").write_text("1 sun\n" * 20 + "-inf sun\n")
    # The empty line counts as a row, as in a spreadsheet; only one row has the last column.
    (tmp_path / "empty.csv").write_text("label,text,more\nwet,rain\n\ndry,sun,1\n,sun,1\n" * 9)
    (tmp_path / "blank.txt").write_text("wet rain\n sun and warm\n" * 20)
    labels: dict[str, list[dict[str, Any]]] = {
        "absent": [{"label": 1}, {}],
        "null": [{"label": None}],
        "NaN": [{"label": math.nan}],
    }
    for name, rows in labels.items():
        records = [
            {"text": "sun", **row} for row in [*rows, *[{"label": n % 2} for n in range(20)]]
        ]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)))
    (tmp_path / "comma.csv").write_text("label,text\nwet,rain\ndry,sun, and warm\n" * 9)
    (tmp_path / "long.csv").write_text(f"label,text\nwet,{'rain' * 40_000}\n")
    (tmp_path / "once.txt").write_text("\n".join(f"{n / 4} sun" for n in range(20)))
    words, told = BAD[what]
    message = recipe("--model", bases["bert"], *words, fails=True)
    assert message.startswith("error: ")
    assert told in message
    assert "\n" not in message
