"""The nine GLUE tasks and local files as one thing: texts, labels, and the scores that count.

The settings of a task are those of the paper's authors where they published some; see docs/glue.md.
"""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import datasets  # type: ignore[import-untyped]
import numpy as np
import numpy.typing as npt
from scipy import stats  # type: ignore[import-untyped]
from sklearn import metrics  # type: ignore[import-untyped]

HUB_ID = "nyu-mll/glue"
MAX_HELD_OUT = 500

Rows = list[tuple[tuple[str, ...], str]]  # texts, label
Array = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is to be learnt, and how.

    Attributes:
        name: of GLUE, or of a file.
        texts: the columns that hold one text, or the two of a pair.
        scores: names in ``SCORES``; the best step is the one with the highest mean of them.
        dev: the splits that are scored, by the name shown; the first chooses the step.
        epochs, lr: SIFT's defaults.
        n_labels: of GLUE's tasks; 1 is a regression.
    """

    name: str
    texts: tuple[str, ...]
    scores: tuple[str, ...] = ("accuracy",)
    dev: Mapping[str, str] = field(default_factory=lambda: {"validation": "validation"})
    epochs: int = 20
    lr: float = 7e-5
    n_labels: int = 2


_PAIR = ("sentence1", "sentence2")
_MNLI = {"matched": "validation_matched", "mismatched": "validation_mismatched"}
TASKS = {
    task.name: task
    for task in (
        Task(name="cola", texts=("sentence",), scores=("matthews",)),
        Task(name="sst2", texts=("sentence",), epochs=15),
        Task(name="mrpc", texts=_PAIR, scores=("accuracy", "f1")),
        Task(
            name="stsb", texts=_PAIR, scores=("pearson", "spearman"), epochs=30, lr=8e-5, n_labels=1
        ),
        Task(name="qqp", texts=("question1", "question2"), scores=("accuracy", "f1")),
        Task(name="mnli", texts=("premise", "hypothesis"), dev=_MNLI, epochs=10, n_labels=3),
        Task(name="qnli", texts=("question", "sentence"), epochs=10),
        Task(name="rte", texts=_PAIR),
        Task(name="wnli", texts=_PAIR),  # no setting is published: that of rte
    )
}


@dataclass(frozen=True, kw_only=True)
class Data:
    """Texts with numbers for labels.

    Attributes:
        task: what they are for.
        train: to train on.
        scored: what is scored, by name; the first chooses the step.
        labels: names of the classes; none for a regression.
    """

    task: Task
    train: datasets.Dataset
    scored: dict[str, datasets.Dataset]
    labels: list[str]

    @property
    def is_regression(self) -> bool:
        """Whether the label is a number."""
        return not self.labels


# Scores ---------------------------------------------------------------------------------------


def _correlation(made: Callable[[Array, Array], Any]) -> Callable[[Array, Array], float]:
    def score(labels: Array, found: Array) -> float:
        if np.ptp(labels) == 0 or np.ptp(found) == 0:
            return 0.0  # it is not defined; a constant tells nothing
        return float(made(labels, found).statistic)

    return score


SCORES: dict[str, Callable[[Array, Array], float]] = {
    "accuracy": lambda labels, found: float(metrics.accuracy_score(labels, found)),
    "f1": lambda labels, found: float(metrics.f1_score(labels, found, zero_division=0)),
    "macro_f1": lambda labels, found: float(
        metrics.f1_score(labels, found, average="macro", zero_division=0)
    ),
    "matthews": lambda labels, found: float(metrics.matthews_corrcoef(labels, found)),
    "pearson": _correlation(stats.pearsonr),
    "spearman": _correlation(stats.spearmanr),
}


def score(task: Task, logits: Array, labels: Array) -> dict[str, float]:
    """Return the task's scores and, as ``score``, their mean.

    Args:
        task: with the names of the scores.
        logits: (examples, classes); one column for a regression.
        labels: (examples,).
    """
    found = logits[:, 0] if logits.shape[1] == 1 else logits.argmax(axis=1)
    own = {name: SCORES[name](labels, found) for name in task.scores}
    return {**own, "score": sum(own.values()) / len(own)}


# GLUE -----------------------------------------------------------------------------------------


def load_task(name: str, data_dir: Path | None) -> Data:
    """Return a GLUE task's data, from the Hub or from a local copy.

    Args:
        name: of the task.
        data_dir: holds a folder of the task's name, either written by the ``save_to_disk`` of
            datasets or with files such as ``train-00000-of-00001.parquet``, as the Hub has them.

    Raises:
        ValueError: the task is not known, or the copy lacks a split.
        OSError: the data cannot be had.
    """
    if name not in TASKS:
        raise ValueError(f"task {name!r} is not one of GLUE's; choose one of {', '.join(TASKS)}")
    task = TASKS[name]
    splits = _local_splits(task, data_dir) if data_dir else _hub_splits(task)
    classes = splits["train"].features["label"]
    labels = [str(n) for n in getattr(classes, "names", range(task.n_labels))]

    def plain(split: str) -> datasets.Dataset:
        rows = splits[split]
        texts = [list(rows[column]) for column in task.texts]
        return _dataset(texts, list(rows["label"]))

    scored = {shown: plain(split) for shown, split in task.dev.items()}
    return Data(
        task=task,
        train=plain("train"),
        scored=scored,
        labels=labels if task.n_labels > 1 else [],
    )


def _hub_splits(task: Task) -> Mapping[str, datasets.Dataset]:
    try:
        return datasets.load_dataset(HUB_ID, task.name)  # type: ignore[no-any-return]
    except OSError as error:
        raise OSError(
            f"{task.name} cannot be had from {HUB_ID} on the Hub ({error}); give a copy by --data-dir"
        ) from error


def _local_splits(task: Task, data_dir: Path) -> Mapping[str, datasets.Dataset]:
    folder = data_dir / task.name
    wanted = ["train", *task.dev.values()]
    if (folder / "dataset_dict.json").is_file():
        found = datasets.load_from_disk(str(folder))
        missing = [split for split in wanted if split not in found]
    else:
        files = {s: [str(p) for p in sorted(folder.glob(f"{s}-*.parquet"))] for s in wanted}
        missing = [split for split in wanted if not files[split]]
        found = {} if missing else datasets.load_dataset("parquet", data_files=files)
    if missing:
        raise ValueError(
            f"'{folder}' lacks {' and '.join(missing)}; expected what save_to_disk of datasets "
            f"writes, or files such as {missing[0]}-00000-of-00001.parquet"
        )
    return found  # type: ignore[no-any-return]


def _dataset(texts: Sequence[Sequence[str]], labels: Sequence[float]) -> datasets.Dataset:
    columns: dict[str, Any] = {"text": texts[0], "labels": labels}
    if len(texts) == 2:
        columns["text_pair"] = texts[1]
    return datasets.Dataset.from_dict(columns)


# Files ----------------------------------------------------------------------------------------


def load_files(
    train: Path,
    dev: Path | None = None,
    test: Path | None = None,
    *,
    texts: Sequence[str] = (),
    label: str = "label",
    is_regression: bool = False,
    encoding: str = "utf-8",
) -> Data:
    """Return the data of local files.

    A ``.csv`` has a line of column names first, a ``.jsonl`` an object a line; any other file has a
    label, a space and a text on each line. Without ``dev`` a tenth of the training examples, at
    most 500, is held out to choose the step by.

    Args:
        train: to train on.
        dev: to choose the step by.
        test: scored in the end.
        texts: the column of the text, or of two texts; by default all but the label's and ``id``
            and ``idx``.
        label: the column of the label.
        is_regression: labels are numbers to be predicted.
        encoding: of the files.

    Raises:
        ValueError: a file cannot be read as what it is.
        OSError: it cannot be read at all.
    """
    read: dict[str, Rows] = {}
    rows = _rows(train, texts, label, encoding)
    if dev is not None:
        read["dev"] = _rows(dev, texts, label, encoding)
    else:
        random.Random(0).shuffle(rows)
        n_held_out = min(MAX_HELD_OUT, len(rows) // 10)
        if not n_held_out:
            raise ValueError(f"'{train}' has {len(rows)} examples, too few to hold some out")
        read["dev"], rows = rows[:n_held_out], rows[n_held_out:]
    read["train"] = rows
    if test is not None:
        read["test"] = _rows(test, texts, label, encoding)
    classes = [] if is_regression else _classes(label for _, label in read["train"])
    made = {name: _numbered(rows, classes, name) for name, rows in read.items()}
    task = Task(
        name=train.name,
        texts=tuple(texts),
        scores=("pearson", "spearman") if is_regression else ("accuracy",),
        dev={},
        epochs=10,
        n_labels=max(1, len(classes)),
    )
    train_rows = made.pop("train")
    return Data(task=task, train=train_rows, scored=made, labels=classes)


def _rows(path: Path, texts: Sequence[str], label: str, encoding: str) -> Rows:
    try:
        content = path.read_text(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"'{path}' is not {encoding}: {error.reason} at byte {error.start}; "
            "say by --encoding what it is, such as latin-1"
        ) from error
    if path.suffix.lower() == ".csv":
        rows = _from_table(path, list(csv.DictReader(content.splitlines(True))), texts, label)
    elif path.suffix.lower() in (".jsonl", ".json"):
        rows = _from_table(path, _objects(path, content), texts, label)
    else:
        rows = _from_lines(path, content)
    if not rows:
        raise ValueError(f"'{path}' holds no example")
    return rows


def _from_lines(path: Path, content: str) -> Rows:
    rows: Rows = []
    for number, line in enumerate(content.split("\n"), 1):
        if line.strip():
            label, space, text = line.strip().partition(" ")
            if not space:
                raise ValueError(
                    f"'{path}', line {number} is {line[:40]!r}; expected a label, a space, a text"
                )
            rows.append(((text,), label))
    return rows


def _objects(path: Path, content: str) -> list[dict[str, Any]]:
    found = []
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"'{path}', line {number} is not JSON: {error.msg}") from error
        if not isinstance(row, dict):
            raise ValueError(f"'{path}', line {number} is not a JSON object")
        found.append(row)
    return found


def _from_table(
    path: Path, table: Sequence[Mapping[str, Any]], texts: Sequence[str], label: str
) -> Rows:
    columns = [str(name) for name in table[0]] if table else []
    texts = texts or [name for name in columns if name not in (label, "id", "idx")]
    for name in (label, *texts):
        if table and name not in columns:
            raise ValueError(f"'{path}' has no column {name!r}, only {', '.join(columns)}")
    if table and len(texts) not in (1, 2):
        raise ValueError(
            f"'{path}' has the columns {', '.join(columns)}; name the text, or two, by --text"
        )
    rows: Rows = []
    for number, row in enumerate(table, 1):
        if any(row.get(name) is None for name in (label, *texts)):
            raise ValueError(f"'{path}', example {number} lacks {label} or {' or '.join(texts)}")
        rows.append((tuple(str(row[name]) for name in texts), str(row[label])))
    return rows


def _classes(labels: Iterable[str]) -> list[str]:
    found = sorted(set(labels))
    if len(found) < 2:
        raise ValueError(f"every label is {found[0]!r}; there is nothing to tell apart")
    return sorted(found, key=int) if all(label.isdecimal() for label in found) else found


def _numbered(rows: Rows, classes: list[str], name: str) -> datasets.Dataset:
    numbers = {label: number for number, label in enumerate(classes)}
    labels: list[float] = []
    for _, label in rows:
        if classes and label not in numbers:
            raise ValueError(f"label {label!r} of the {name} examples is none of {classes}")
        try:
            labels.append(numbers[label] if classes else float(label))
        except ValueError:
            raise ValueError(f"label {label!r} is not a number, as a regression needs") from None
    return _dataset(list(zip(*(texts for texts, _ in rows), strict=True)), labels)


def narrowed(data: Data, *, n_train: int | None = None, scores: Sequence[str] = ()) -> Data:
    """Return the same with fewer training examples, drawn with a fixed seed, or other scores.

    Raises:
        ValueError: a score is not for such labels.
    """
    for name in scores:
        is_correlation = name in ("pearson", "spearman")
        if is_correlation != data.is_regression or (name == "f1" and len(data.labels) != 2):
            kind = f"{len(data.labels)} classes" if data.labels else "a regression"
            raise ValueError(f"the score {name!r} is not for {kind}; choose another")
    train = data.train
    if n_train is not None and n_train < len(train):
        train = train.shuffle(seed=0).select(range(n_train))
    task = replace(data.task, scores=tuple(scores)) if scores else data.task
    return replace(data, task=task, train=train)
