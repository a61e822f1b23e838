"""Writes tasks of the lm-evaluation-harness from MMLU's CSV files.

A row has a question, four choices and a letter. The prompts are those of the harness's own MMLU, so that
scores can be compared.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

GROUP = "mmlu_csv"
LETTERS = "ABCD"
TEST, DEV = "_test.csv", "_dev.csv"
PROMPT = (
    "{{question.strip()}}\nA. {{choices[0]}}\nB. {{choices[1]}}\nC. {{choices[2]}}\nD. {{choices[3]}}\n"
    "Answer:"
)

Question = dict[str, Any]


def write_tasks(source: Path, work: Path, *, n_shots: int) -> str:
    """Write a task for each subject and a group of them all; return the group's name.

    Args:
        source: folder of ``<subject>_test.csv`` and, for worked examples, ``<subject>_dev.csv``.
        work: folder for the tasks, which must exist while they are used.
        n_shots: number of worked examples that will be used.

    Raises:
        ValueError: there is no such file, or a file has another format or too few worked examples.
    """
    tests = sorted(source.glob(f"*{TEST}")) if source.is_dir() else []
    if not tests:
        raise ValueError(f"'{source}' is not a folder with files such as astronomy{TEST}")
    names = []
    for test in tests:
        subject = test.name.removesuffix(TEST)
        splits = {"test": read_questions(test)}
        dev = test.with_name(subject + DEV)
        if dev.is_file():
            splits["dev"] = read_questions(dev)
        n_worked = len(splits.get("dev", []))
        if n_worked < n_shots:
            raise ValueError(
                f"'{dev}' has {n_worked} worked examples, but --shots is {n_shots}; lower it"
            )
        names.append(_write_task(subject, splits, work))
    group = {
        "group": GROUP,
        "task": names,
        "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}],
        "metadata": {"version": 1},
    }
    _write_yaml(work / f"{GROUP}.yaml", group)
    return GROUP


def read_questions(path: Path) -> list[Question]:
    """Return the questions of a file, each with its choices and the number of the correct one.

    Raises:
        ValueError: a row has another format, or there is no row.
    """
    found = []
    with path.open(encoding="utf-8", newline="") as file:
        rows = csv.reader(file)
        for row in rows:
            if len(row) != 6 or row[5].strip() not in tuple(LETTERS):
                raise ValueError(
                    f"line {rows.line_num} of '{path}' has {len(row)} columns and ends in "
                    f"{row[-1] if row else ''!r}; expected a question, four choices and a letter A to D"
                )
            answer = LETTERS.index(row[5].strip())
            found.append({"question": row[0], "choices": row[1:5], "answer": answer})
    if not found:
        raise ValueError(f"'{path}' holds no question")
    return found


def _write_task(subject: str, splits: dict[str, list[Question]], work: Path) -> str:
    files = {}
    for split, questions in splits.items():
        # As JSON lines: from CSV, a choice such as "1" or "None" would not be read as text.
        path = work / f"{subject}.{split}.jsonl"
        path.write_text("".join(json.dumps(q) + "\n" for q in questions), "utf-8")
        files[split] = str(path)
    name = f"{GROUP}_{subject}"
    topic = subject.replace("_", " ")
    task = {
        "task": name,
        "task_alias": topic,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": files, "cache_dir": str(work / "cache")},
        "test_split": "test",
        "description": f"The following are multiple choice questions (with answers) about {topic}.\n\n",
        "output_type": "multiple_choice",
        "doc_to_text": PROMPT,
        "doc_to_choice": list(LETTERS),
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0},
    }
    if "dev" in splits:
        task |= {"fewshot_split": "dev", "fewshot_config": {"sampler": "first_n"}}
    _write_yaml(work / f"{name}.yaml", task)
    return name


def _write_yaml(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1), "utf-8")  # JSON is valid YAML
