"""``examples/recipes/evaluate.py`` gives the scores that the tuned checkpoints have."""

from __future__ import annotations

import csv
import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from causal_helpers import RECIPES, make_causal, make_tokenizer, run_script

import sparsedelta

pytest.importorskip("lm_eval", reason="needs the group recipes")
sys.path.append(str(RECIPES))

import mmlu_csv

WORDS = ["sun", "moon", "star", "tree", "rock", "wave", "None", "1", "2.0", "true"]


def write_questions(path: Path, n: int, seed: int) -> None:
    draw = random.Random(seed)
    with path.open("w", encoding="utf-8", newline="") as file:
        for number in range(n):
            choices = draw.sample(WORDS, 4)
            csv.writer(file).writerow([f'Which is, "{number}"?', *choices, draw.choice("ABCD")])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, two tuned checkpoints, their deltas, and questions."""
    import transformers

    folder = tmp_path_factory.mktemp("evaluate")
    tokenizer = make_tokenizer([*WORDS, "Which is, Answer: A B C D"])
    make_causal(folder / "base", tokenizer, dtype=torch.bfloat16)
    make: Any = transformers.AutoModelForCausalLM
    for number, name in enumerate(("one", "two", "grown")):
        model = make.from_pretrained(folder / "base", dtype=torch.bfloat16)
        torch.manual_seed(number + 5)
        with torch.no_grad():
            for part in ("q_proj", "down_proj"):
                weight = dict(model.named_modules())[f"model.layers.1.{_home(part)}.{part}"].weight
                weight[torch.rand(weight.shape) < 0.3] += 0.7
            if name == "grown":
                model.resize_token_embeddings(len(tokenizer) + 8)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        with sparsedelta.diff(folder / "base", folder / name) as delta:
            delta.save(folder / f"{name}.sd")
    (folder / "mmlu").mkdir()
    for number, subject in enumerate(("night_sky", "woods")):
        write_questions(folder / "mmlu" / f"{subject}_test.csv", 40, number)
        write_questions(folder / "mmlu" / f"{subject}_dev.csv", 3, number + 10)
    return folder


def _home(part: str) -> str:
    return "mlp" if part == "down_proj" else "self_attn"


def evaluate(
    words: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Any]:
    path = tmp_path / "scores.json"
    assert run_script("evaluate", [*words, "--json", path], monkeypatch) == 0
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def accuracies(scores: dict[str, Any]) -> list[float]:
    return [value["acc,none"] for value in scores.values()]


def test_deltas_score_as_their_checkpoints_and_leave_the_base_unchanged(
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tasks = ["--mmlu-csv", place / "mmlu", "--shots", 2]
    deltas = [place / f"{name}.sd" for name in ("one", "grown", "two")]
    found = evaluate(["--base", place / "base", "--delta", *deltas, *tasks], tmp_path, monkeypatch)
    shown = capsys.readouterr().out
    assert set(found) == {"base", "one", "two", "grown"}
    for name in ("one", "two", "grown"):
        whole = evaluate(["--base", place / name, *tasks], tmp_path, monkeypatch)
        assert found[name] == whole["base"]
        assert accuracies(found[name]) != accuracies(found["base"])
    group = found["base"]["mmlu_csv"]
    assert group["n"] == 80
    parts = [found["base"][f"mmlu_csv_{subject}"]["acc,none"] for subject in ("night_sky", "woods")]
    assert group["acc,none"] == pytest.approx(sum(parts) / 2)
    row = next(line for line in shown.splitlines() if line.startswith("| night sky"))
    cells = [cell.strip() for cell in row.split("|")[1:-1]]
    values = [float(cell.split()[0]) for cell in cells[3:]]
    assert values[2] == pytest.approx(values[1] - values[0], abs=1e-3)


def test_a_task_has_the_prompt_of_mmlu_and_keeps_choices_as_text(
    place: Path, tmp_path: Path
) -> None:
    from lm_eval.tasks import TaskManager  # type: ignore[import-untyped]

    group = mmlu_csv.write_tasks(place / "mmlu", tmp_path, n_shots=3)
    manager: Any = TaskManager(include_path=str(tmp_path), include_defaults=False)
    task = manager.load([group])["tasks"]["mmlu_csv_night_sky"]
    own = manager.load(["mmlu_csv_woods"])["tasks"]["mmlu_csv_woods"]
    assert own.config.description.endswith("about woods.\n\n")
    text = (place / "mmlu" / "night_sky_test.csv").read_text("utf-8")
    rows = list(csv.reader(text.splitlines()))
    docs = list(task.test_docs())
    assert len(docs) == len(rows)
    assert any("None" in row for row in rows)
    for doc, (question, a, b, c, d, letter) in zip(docs, rows, strict=True):
        assert task.doc_to_text(doc) == f"{question}\nA. {a}\nB. {b}\nC. {c}\nD. {d}\nAnswer:"
        assert task.doc_to_choice(doc)[task.doc_to_target(doc)] == letter


def test_help_shows_the_memory_of_base_and_delta(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--help", "--base", place / "base", "--delta", place / "one.sd"]
    assert run_script("evaluate", words, monkeypatch) == 0
    shown = capsys.readouterr().out
    with sparsedelta.load(place / "one.sd") as delta:
        n_bytes = delta.nnz * (8 + 2 + 2)
    assert f"| one.sd, while applied    | {n_bytes / (1 << 20):.2f} |" in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "error: nothing says what to evaluate on; give --tasks or --mmlu-csv"),
        (["--tasks", "humaneval"], "error: humaneval runs code that a model wrote"),
        (["--mmlu-csv", "base"], "error: 'base' is not a folder with files such as"),
        (["--mmlu-csv", "mmlu", "--shots", "5"], "error: 'mmlu/night_sky_dev.csv' has 3 worked"),
        (
            ["--mmlu-csv", "mmlu", "--json", "nodir/x.json"],
            "error: folder 'nodir' does not exist; create it first",
        ),
        (
            ["--base", "nolm", "--tasks", "x"],
            "error: 'nolm' is not a folder, and the Hub has no model of that",
        ),
        (["--base", "mmlu", "--tasks", "x"], "error: folder 'mmlu' has no config.json"),
        (["--mmlu-csv", "bad"], "error: line 2 of 'bad/a_test.csv' has 3 columns and ends in 'c'"),
        (
            ["--mmlu-csv", "mmlu", "--delta", "one.sd", "other/one.sd"],
            "error: two columns would be called 'one'",
        ),
    ],
)
def test_bad_input_is_one_clear_sentence(
    place: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    (place / "bad").mkdir(exist_ok=True)
    (place / "bad" / "a_test.csv").write_text("q,1,2,3,4,A\na,b,c\n")
    monkeypatch.chdir(place)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    ended = run_script("evaluate", ["--base", "base", *words], monkeypatch)
    assert str(ended).startswith(message)


@pytest.mark.parametrize("wrong", ["other.sd", "taller.sd"])
def test_a_delta_of_another_base_is_refused_before_anything_is_scored(
    place: Path, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    import lm_eval  # type: ignore[import-untyped]

    pairs = {"other.sd": ("one", "two"), "taller.sd": ("grown", "one")}
    with sparsedelta.diff(*(place / name for name in pairs[wrong])) as delta:
        delta.save(place / wrong, overwrite=True)
    scored: list[Any] = []
    monkeypatch.setattr(lm_eval, "simple_evaluate", scored.append)
    monkeypatch.chdir(place)
    words = ["--base", "base", "--delta", "one.sd", wrong, "--mmlu-csv", "mmlu"]
    ended = run_script("evaluate", words, monkeypatch)
    assert str(ended).startswith(f"error: '{wrong}' was not made from 'base': tensor '")
    assert not scored


def test_scores_are_kept_when_a_later_one_fails(
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    import lm_eval

    evaluate, n_calls = lm_eval.simple_evaluate, 0

    def fail_at_the_third(*args: Any, **given: Any) -> Any:
        nonlocal n_calls
        n_calls += 1
        if n_calls == 3:
            raise OSError("the disk is gone")
        return evaluate(*args, **given)

    monkeypatch.setattr(lm_eval, "simple_evaluate", fail_at_the_third)
    monkeypatch.chdir(tmp_path)  # outside any git repository
    deltas = [place / f"{name}.sd" for name in ("one", "two")]
    words = ["--base", place / "base", "--delta", *deltas, "--mmlu-csv", place / "mmlu"]
    more = ["--limit", 2, "--json", "scores.json"]
    assert run_script("evaluate", [*words, *more], monkeypatch) == "error: the disk is gone"
    assert list(json.loads(Path("scores.json").read_text())) == ["base", "one"]
    shown = capfd.readouterr()
    assert "| one " in shown.out
    assert "not a git repository" not in shown.err
