"""The nine GLUE tasks, and the form of all data: texts, labels and scores.

The settings of a task are those that the paper's authors published, if any; see docs/glue.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import datasets  # type: ignore[import-untyped]
import numpy as np
import numpy.typing as npt
from scipy import stats  # type: ignore[import-untyped]
from sklearn import metrics  # type: ignore[import-untyped]

HUB_ID = "nyu-mll/glue"

Array = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class Task:
    """A task to learn, with its settings.

    Attributes:
        name: name of a GLUE task, or of a file.
        texts: the column of the text, or the two columns of a pair.
        scores: names in ``SCORES``; the best step has the highest mean of these scores.
        dev: the splits that are scored, by the name shown; the first chooses the step.
        epochs, lr: defaults for SIFT.
        n_labels: number of labels of a GLUE task; 1 means regression.
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
        Task(name="wnli", texts=_PAIR),  # no setting is published; this is that of rte
    )
}


@dataclass(frozen=True, kw_only=True)
class Data:
    """Texts with numbers for labels.

    Attributes:
        task: the task.
        train: the examples to train on.
        scored: the sets of examples that are scored, by name; the first chooses the step.
        labels: names of the classes; empty for a regression.
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
            return 0.0  # not defined for constant predictions
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
        task: has the names of the scores.
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
        name: name of the task.
        data_dir: a folder with a subfolder of the task's name, either written by the ``save_to_disk`` of
            datasets or with files such as ``train-00000-of-00001.parquet``, as on the Hub.

    Raises:
        ValueError: the task is not known, or the copy lacks a split.
        OSError: the data are not available.
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
        return dataset_of(texts, list(rows["label"]))

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
            f"{task.name} is not available from {HUB_ID} on the Hub ({error}); give a copy with --data-dir"
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


def dataset_of(texts: Sequence[Sequence[str]], labels: Sequence[float]) -> datasets.Dataset:
    """Return examples as a dataset; ``texts`` is one column, or the two columns of a pair."""
    columns: dict[str, Any] = {"text": texts[0], "labels": labels}
    if len(texts) == 2:
        columns["text_pair"] = texts[1]
    return datasets.Dataset.from_dict(columns)


def narrowed(data: Data, *, n_train: int | None = None, scores: Sequence[str] = ()) -> Data:
    """Return the data with fewer training examples (drawn with a fixed seed) or other scores.

    Raises:
        ValueError: a score does not fit these labels.
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
