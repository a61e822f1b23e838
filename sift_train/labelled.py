"""Reads labelled texts from local files, and makes batches of tokens from them."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Batch = dict[str, Tensor]
_SEPARATORS = {".csv": ",", ".tsv": "\t"}


def read_labelled(path: Path) -> list[tuple[str, str]]:
    """Return the texts of a file with their labels.

    ``.jsonl`` has one object per line, and ``.csv`` and ``.tsv`` a header, with ``text`` and ``label``. Any
    other file has a label, a space and a text on each line.

    Raises:
        ValueError: a line or row has another form, or there is none.
    """
    if path.suffix == ".jsonl":
        found = [_pair(_parsed(line, at, path), at, path) for at, line in _lines(path)]
    elif path.suffix in _SEPARATORS:
        with path.open(newline="", encoding="utf-8") as file:
            rows = csv.DictReader(file, delimiter=_SEPARATORS[path.suffix])
            found = [_pair(row, at, path) for at, row in enumerate(rows, 2)]
    else:
        split = [(at, line.split(" ", 1)) for at, line in _lines(path)]
        for at, parts in split:
            if len(parts) < 2:
                raise ValueError(f"line {at} of '{path}' has no space between a label and a text")
        found = [(text, label) for _, (label, text) in split]
    if not found:
        raise ValueError(f"'{path}' has no example; give at least one")
    return found


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    for at, line in enumerate(path.read_text("utf-8").split("\n"), 1):
        if line.strip():
            yield at, line


def _parsed(line: str, at: int, path: Path) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"line {at} of '{path}' is no JSON: {error.msg}") from error


def _pair(record: Any, at: int, path: Path) -> tuple[str, str]:
    if not isinstance(record, Mapping) or not isinstance(record.get("text"), str):
        raise ValueError(f"line {at} of '{path}' has no text under 'text'")
    if not isinstance(record.get("label"), str | int):
        raise ValueError(f"line {at} of '{path}' has no text or integer under 'label'")
    return record["text"], str(record["label"])


class LabelledBatches:
    """Micro-batches of tokenized texts with labels, in a new random order on every pass.

    Args:
        examples: texts with their labels.
        names: all labels; their numbers are their positions.
        tokenizer: of the model.
        size: texts per micro-batch.
        max_tokens: longer texts are cut.
        shuffle: False: in the order of the examples.

    Raises:
        ValueError: an example has another label.
    """

    def __init__(
        self,
        examples: Sequence[tuple[str, str]],
        names: Sequence[str],
        tokenizer: Any,
        *,
        size: int,
        max_tokens: int,
        shuffle: bool = True,
    ) -> None:
        numbers = {name: number for number, name in enumerate(names)}
        for _, label in examples:
            if label not in numbers:
                raise ValueError(f"label {label!r} does not occur in the training data")
        self._rows = [(text, numbers[label]) for text, label in examples]
        self._tokenizer, self._size, self._max_tokens = tokenizer, size, max_tokens
        self._shuffle = shuffle

    def __len__(self) -> int:
        return -(-len(self._rows) // self._size)

    def __iter__(self) -> Iterator[Batch]:
        n = len(self._rows)
        order = torch.randperm(n).tolist() if self._shuffle else range(n)
        for at in range(0, n, self._size):
            texts, labels = zip(*(self._rows[i] for i in order[at : at + self._size]), strict=True)
            tokens = self._tokenizer(
                list(texts),
                padding=True,
                truncation=True,
                max_length=self._max_tokens,
                return_tensors="pt",
            )
            yield {**tokens, "labels": torch.tensor(labels)}


def accuracy(model: nn.Module, batches: LabelledBatches) -> float:
    """Return the share of texts whose label the model finds."""
    device = next(model.parameters()).device
    hits = [
        model(**{name: value.to(device) for name, value in batch.items()}).logits.argmax(1).cpu()
        == batch["labels"]
        for batch in batches
    ]
    return float(torch.cat(hits).float().mean())
