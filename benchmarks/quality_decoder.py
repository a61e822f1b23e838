"""What quality.py trains as a decoder: a small Llama that has learnt Python's code, and now learns its docstrings.

Both texts are those of the standard library, so nothing is downloaded. A token is a byte. The decoder is pretrained once, on
the sources without docstrings, and kept in a folder together with the docstrings.
"""

from __future__ import annotations

import ast
import copy
import random
import re
import shutil
import sysconfig
import tempfile
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from quality_tasks import BATCH, EVAL_BATCH, N_DEV
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

MODEL, DATA = "pycode", "docstrings"
N_BYTES = 96  # predicted in each example
WIDTH, N_LAYERS, N_HEADS, MLP_WIDTH = 192, 4, 6, 512
N_STEPS, PRETRAINING_BATCH, PRETRAINING_LR, WARMUP = 1500, 32, 3e-3, 0.05
TEXTS = "docstrings.txt"
_LEFT_OUT = {"site-packages", "test", "tests", "idle_test", "__pycache__"}


class Docstrings:
    """The next byte of docstrings, predicted by a decoder that was pretrained on code.

    The docstrings are shuffled, joined and cut into windows. The first are the test set and the next are held out to
    choose the learning rate. Each seed draws its own training windows from the rest. There is no new head.

    Attributes:
        targets: the parameters that sparse methods and adapters train: all linear layers of the blocks.

    Args:
        folder: what ``make_decoder`` wrote.
        n_train: training examples.
        epochs: passes over them.
        n_test: examples of the test set.
    """

    def __init__(self, folder: Path, n_train: int, epochs: int, n_test: int) -> None:
        rows = windows((folder / TEXTS).read_bytes())
        n_held = n_test + N_DEV
        if len(rows) < n_held + n_train:
            raise SystemExit(f"'{folder}' has {len(rows)} examples; {n_held + n_train} are needed")
        self._held = {"test": rows[:n_test], "dev": rows[n_test:n_held]}
        self._pool = rows[n_held:]
        self._n_train, self._epochs = n_train, epochs
        models: Any = LlamaForCausalLM
        self._decoder: nn.Module = models.from_pretrained(folder, dtype=torch.float32)
        names = [n for n, m in self._decoder.named_modules() if isinstance(m, nn.Linear)]
        self.targets = [f"re:^{re.escape(n)}\\.weight$" for n in names if ".layers." in n]

    def model(self, seed: int) -> nn.Module:
        """Return a new copy of the pretrained decoder; it is the same for every seed."""
        return copy.deepcopy(self._decoder)

    @property
    def n_steps(self) -> int:
        """Optimizer steps of a run."""
        return self._epochs * -(-self._n_train // BATCH)

    def batches(self, seed: int) -> Iterator[Tensor]:
        """Yield the batches of a run, uint8, shape (examples, N_BYTES + 1)."""
        chosen = random.Random(seed).sample(range(len(self._pool)), self._n_train)
        for epoch in range(self._epochs):
            order = random.Random(f"{seed}/{epoch}").sample(chosen, len(chosen))
            for at in range(0, len(order), BATCH):
                yield self._pool[order[at : at + BATCH]]

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        """Return the mean cross-entropy of the next byte, in nats."""
        return loss_of(model, batch)[0]

    @torch.no_grad()
    def evaluate(self, model: nn.Module, part: str) -> dict[str, float]:
        """Return the accuracy of the next byte and the mean loss on the part ``"dev"`` or ``"test"``."""
        model.eval()
        rows = self._held[part]
        hits, loss = 0, 0.0
        for batch in rows.split(EVAL_BATCH):
            mean, n_right = loss_of(model, batch)
            loss += float(mean) * len(batch)
            hits += n_right
        model.train()
        return {"accuracy": hits / (len(rows) * N_BYTES), "loss": loss / len(rows)}


def loss_of(model: nn.Module, batch: Tensor) -> tuple[Tensor, int]:
    """Return the mean cross-entropy of the next byte, and how many bytes have the largest logit."""
    tokens = batch.long()
    logits: Tensor = model(input_ids=tokens[:, :-1], use_cache=False).logits
    wanted = tokens[:, 1:]
    n_right = int((logits.detach().argmax(-1) == wanted).sum())
    return nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten()), n_right


def windows(text: bytes) -> Tensor:
    """Return a text in windows of ``N_BYTES`` and the byte before them, uint8, shape (n, N_BYTES + 1)."""
    values = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    return values.unfold(0, N_BYTES + 1, N_BYTES)


def code_and_docstrings(sources: Path) -> tuple[bytes, bytes]:
    """Return the Python code in a folder without its docstrings, and the docstrings, each in a random order."""
    code, docstrings = [], []
    for path in sorted(sources.rglob("*.py")):
        if _LEFT_OUT.isdisjoint(path.relative_to(sources).parts):
            own, found = _divided(path)
            code.append(own)
            docstrings += found
    chance = random.Random(0)
    chance.shuffle(code)
    chance.shuffle(docstrings)
    return "\n\n".join(code).encode(), "\n\n".join(docstrings).encode()


def _divided(path: Path) -> tuple[str, list[str]]:
    """Return the code of a file without its docstrings, and the docstrings."""
    text = path.read_text("utf-8", errors="replace")
    try:
        tree = ast.parse(text)
    except SyntaxError:
        return "", []  # an example of a syntax error
    lines: list[str | None] = [*text.splitlines()]
    docstrings = []
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        docstring = ast.get_docstring(node) if isinstance(node, kinds) else None
        if docstring and isinstance(node, kinds):
            first = node.body[0]
            lines[first.lineno - 1 : first.end_lineno] = [None] * _n_lines(first)
            docstrings.append(docstring)
    return "\n".join(line for line in lines if line is not None), docstrings


def _n_lines(node: ast.stmt) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def make_decoder(folder: Path, sources: Path | None = None, *, n_steps: int = N_STEPS) -> None:
    """Pretrain a decoder and write it to a folder, with the docstrings; no effect if the folder exists.

    Args:
        folder: the folder.
        sources: a folder of Python files; None: the standard library.
        n_steps: of the pretraining.
    """
    if folder.exists():
        return
    code, docstrings = code_and_docstrings(sources or Path(sysconfig.get_path("stdlib")))
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=WIDTH,
            intermediate_size=MLP_WIDTH,
            num_hidden_layers=N_LAYERS,
            num_attention_heads=N_HEADS,
            num_key_value_heads=N_HEADS,
            max_position_embeddings=N_BYTES,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    _pretrain(model, windows(code), n_steps)
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        model.save_pretrained(work)
        (work / TEXTS).write_bytes(docstrings)
        work.rename(folder)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def _pretrain(model: nn.Module, rows: Tensor, n_steps: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=PRETRAINING_LR, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, PRETRAINING_LR, total_steps=n_steps, pct_start=WARMUP
    )
    losses: deque[float] = deque(maxlen=100)
    for step in range(n_steps):
        at = torch.randint(len(rows), (PRETRAINING_BATCH,))
        loss, _ = loss_of(model, rows[at])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
        if (step + 1) % 100 == 0:
            mean = sum(losses) / len(losses)
            print(f"pretraining: step {step + 1} of {n_steps}, loss {mean:.3f}", flush=True)
