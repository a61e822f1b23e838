"""Labelled texts for a classifier: the order of its labels, and batches of tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sift_train.fingerprints import fingerprint_of
from sift_train.labelled_files import Example

Batch = dict[str, Tensor]
_N_SHOWN = 10  # of the labels, in a message


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
    known = own_labels(config)
    if known == _unnamed(config):
        numbers = [str(number) for number in range(config.num_labels)]
        return _spelled_as(names, numbers) or _spelled_as(names, known)
    return _spelled_as(names, known)


def own_labels(config: Any) -> list[str]:
    """Return the labels of a model's outputs, in order."""
    # Some configurations do not name all outputs.
    return [str(config.id2label.get(n, label)) for n, label in enumerate(_unnamed(config))]


def _unnamed(config: Any) -> list[str]:
    return [f"LABEL_{number}" for number in range(config.num_labels)]


def _spelled_as(names: Sequence[str], known: Sequence[str]) -> list[str] | None:
    """Return known labels as ``names`` spells them; None if it has another one, or two that differ in case alone."""
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
