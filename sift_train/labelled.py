"""Reads labelled texts from local files, and makes batches of tokens from them."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sift_train.fingerprints import fingerprint_of
from sift_train.text_files import read_text

Batch = dict[str, Tensor]
_SEPARATORS = {".csv": ",", ".tsv": "\t"}
_N_SHOWN = 10  # of the labels, in a message


class Example(NamedTuple):
    """A text with its label, and the line of the file on which it ends, counted from 1."""

    text: str
    label: str
    line: int


def read_labelled(path: Path) -> list[Example]:
    """Return the texts of a file with their labels.

    ``.jsonl`` has one object per line, and ``.csv`` and ``.tsv`` a header, with ``text`` and ``label``. Any
    other file has a label, a space and a text on each line.

    Raises:
        OSError: the file cannot be read.
        ValueError: a line or row has another form, or there is none.
    """
    text, suffix = read_text(path, "examples"), path.suffix.lower()
    if suffix == ".jsonl":
        found = [_example(_parsed(line, at, path), at, path) for at, line in _lines(text)]
    elif suffix in _SEPARATORS:
        rows = csv.DictReader(io.StringIO(text), delimiter=_SEPARATORS[suffix])
        try:
            found = [_example(row, rows.line_num, path) for row in rows]
        except csv.Error as error:
            raise ValueError(
                f"line {rows.line_num + 1} of '{path}' is no row: {error}; close its quotes, or write long texts in a file"
                " named .jsonl"
            ) from error
    else:
        if _is_json(text) or _is_json(text.lstrip().partition("\n")[0]):
            raise ValueError(
                f"'{path}' looks like JSON, but is not named .jsonl; write one object with text and label on each line"
                " of a file named .jsonl"
            )
        found = []
        for at, line in _lines(text):
            label, space, rest = line.partition(" ")
            if not space or not label:
                raise ValueError(f"line {at} of '{path}' has no space between a label and a text")
            found.append(Example(rest, label, at))
    if not found:
        raise ValueError(f"'{path}' has no example; give at least one")
    return found


def labels_of(examples: Sequence[Example], path: Path) -> list[str]:
    """Return the labels of the training data, sorted; integers by their size.

    Raises:
        ValueError: all examples have the same label.
    """
    names = sorted({example.label for example in examples})
    if all(name.isdecimal() for name in names):
        names.sort(key=int)
    if len(names) == 1:
        raise ValueError(
            f"all {len(examples)} examples of '{path}' have the label {names[0]!r}; a classifier needs at least two labels"
        )
    return names


def in_order_of(config: Any, names: Sequence[str]) -> list[str] | None:
    """Return the labels of the outputs of a model's classifier, spelled as in the data; None if the data have another one.

    Upper and lower case do not count, and the integer n is the LABEL_n of transformers.
    """
    known = [str(config.id2label[number]) for number in range(config.num_labels)]
    numbers = [str(number) for number in range(config.num_labels)]
    if known == [f"LABEL_{number}" for number in numbers]:
        known = numbers
    folded = {name.casefold(): name for name in names}
    fits = folded.keys() <= {label.casefold() for label in known}
    are_distinct = len({label.casefold() for label in known}) == len(known)
    if not (fits and are_distinct and len(folded) == len(names)):
        return None
    return [folded.get(label.casefold(), label) for label in known]


def check_labels(examples: Sequence[Example], names: Sequence[str], path: Path) -> None:
    """Check that the examples of a file have labels of the training data.

    Raises:
        ValueError: one has another label.
    """
    for example in examples:
        if example.label not in names:
            shown = ", ".join(map(repr, names[:_N_SHOWN])) + (", …" * (len(names) > _N_SHOWN))
            raise ValueError(
                f"line {example.line} of '{path}' has the label {example.label!r}, which does not occur in the training"
                f" data; its labels are {shown}"
            )


def _lines(text: str) -> Iterator[tuple[int, str]]:
    for at, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield at, line


def _is_json(text: str) -> bool:
    """Return whether a text is a JSON object or array."""
    try:
        return isinstance(json.loads(text), dict | list)
    except json.JSONDecodeError:
        return False


def _parsed(line: str, at: int, path: Path) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"line {at} of '{path}' is no JSON: {error.msg}") from error


def _example(record: Any, at: int, path: Path) -> Example:
    if not isinstance(record, Mapping) or not isinstance(record.get("text"), str):
        raise ValueError(f"line {at} of '{path}' has no text under 'text'")
    if not isinstance(record.get("label"), str | int) or not str(record["label"]).strip():
        raise ValueError(f"line {at} of '{path}' has no text or integer under 'label'")
    return Example(record["text"], str(record["label"]).strip(), at)


def set_padding(tokenizer: Any, model: Any) -> None:
    """Let texts be padded: a decoder may have no token for it, or its configuration may not name it.

    The classifier of a decoder reads the last token that is no padding, so its configuration must name the token.

    Raises:
        ValueError: the tokenizer has neither a padding token nor one for the end of a text.
    """
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ValueError(
                "the tokenizer of the model has no padding token, and none for the end of a text; give it a pad_token"
            )
        tokenizer.pad_token = tokenizer.eos_token
    config = model.config.get_text_config()
    # The head of a decoder is named so. Some encoders count positions by this number, and theirs is right.
    if config.pad_token_id is None or hasattr(model, "score"):
        config.pad_token_id = tokenizer.pad_token_id


class LabelledBatches:
    """Micro-batches of tokenized texts with labels, in a new random order on every pass.

    Args:
        examples: texts with their labels.
        names: all labels of the examples; their numbers are their positions.
        tokenizer: of the model.
        size: texts per micro-batch.
        max_tokens: longer texts are cut.
        shuffle: False: in the order of the examples.

    Attributes:
        fingerprint: as for ``fit``.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        names: Sequence[str],
        tokenizer: Any,
        *,
        size: int,
        max_tokens: int,
        shuffle: bool = True,
    ) -> None:
        numbers = {name: number for number, name in enumerate(names)}
        self._rows = [(example.text, numbers[example.label]) for example in examples]
        self._tokenizer, self._size, self._max_tokens = tokenizer, size, max_tokens
        self._shuffle = shuffle
        self.fingerprint = fingerprint_of([numbers, size, max_tokens, *self._rows])

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
