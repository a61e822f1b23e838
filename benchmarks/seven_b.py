"""A 7B model trained in 24 GiB: measured, beside LoRA, with a delta written and applied at the end.

    python benchmarks/seven_b.py                                 # on a GPU; 45 GB of disk
    python benchmarks/seven_b.py --shape 350m --device cpu       # the same on a CPU, smaller

A Llama of random bf16 weights is trained at rate 0.05 on all seven projections, with activation
checkpointing, in a process that may hold 24 GiB of device memory and no more. Then LoRA at an equal
number of trained parameters, in the same process. The planner must come within 5 % of the peak, or
the exit status is 1.

The GPU run has not been made yet: no GPU was at hand. What is measured is measured on a CPU.
"""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from measuring import options_for, table, work_folder, write_result
from safetensors import safe_open
from torch import nn
from training_memory import (
    PROJECTIONS,
    SHAPES,
    Comparison,
    Setting,
    Trained,
    compare,
    config_of,
    lean_adamw,
    make_model,
    measure,
    run_steps,
    step,
)

import sparsedelta
from sift_train import SIFT, export_delta, plan
from sift_train.shape import as_dtype

GIB = 1 << 30


@dataclass
class Export:
    """Saves the base before the training, writes and applies the delta after it, and looks at both.

    Attributes:
        folder: where everything goes.
        facts: what came of it, to be shown.
    """

    folder: Path
    facts: list[tuple[str, str]] = field(default_factory=list)

    def before(self, model: nn.Module) -> None:
        """Save the base."""
        saved: Any = model
        saved.save_pretrained(self.folder / "base")

    def after(self, model: nn.Module, sift: SIFT) -> None:
        """Write the delta, apply it, and compare the result with the model in memory.

        Raises:
            ValueError: they differ.
        """
        base, delta, out = self.folder / "base", self.folder / "delta.sd", self.folder / "out"
        start = time.perf_counter()
        nnz = export_delta(model, delta, sift=sift, base=base)
        exported = time.perf_counter()
        sparsedelta.apply(base, delta, out)
        applied = time.perf_counter()
        check_same(model, out)
        self.facts = [
            ("delta", f"{delta.stat().st_size / 1e6:,.1f} MB, {nnz:,} components changed"),
            ("bytes a changed component", f"{delta.stat().st_size / max(nnz, 1):.3f}"),
            ("export", f"{exported - start:.1f} s"),
            ("apply", f"{applied - exported:.1f} s; every tensor bit for bit the trained one"),
        ]


def check_same(model: nn.Module, folder: Path) -> None:
    """Find out whether a checkpoint holds a model's weights, bit for bit.

    Raises:
        ValueError: a tensor differs or is missing.
    """
    waiting = {name: value.detach() for name, value in model.state_dict().items()}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                held, own = file.get_tensor(name), waiting.pop(name).cpu()
                if held.dtype != own.dtype or not torch.equal(
                    held.view(torch.uint8), own.view(torch.uint8)
                ):
                    raise ValueError(f"tensor {name!r} of '{folder}' is not the trained one")
    if waiting:
        raise ValueError(f"'{folder}' lacks the tensor {next(iter(waiting))!r}")


def equal_rank(setting: Setting, n_trained: int) -> int:
    """Return the rank at which LoRA on the same projections trains about as many parameters."""
    shape = setting.shape
    per_rank = shape.n_layers * (4 * 2 * shape.hidden + 3 * (shape.hidden + shape.intermediate))
    return max(1, round(n_trained / per_rank))


def train_lora(setting: Setting, rank: int) -> tuple[int, float]:
    """Train by PEFT's LoRA; return how many components, and the seconds a step."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(PROJECTIONS))
    base: Any = make_model(setting)
    model = get_peft_model(base, config)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = lean_adamw(trained, setting)
    seconds = run_steps(setting, model, lambda: step(optimizer))
    return sum(p.numel() for p in trained), seconds


def limit_memory(gib: float) -> str:
    """Let this process hold no more than that of the device; return what was done."""
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # no gaps
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(gib * GIB / total, 1.0))
    return f"{torch.cuda.get_device_name(0)}, {total / GIB:.1f} GiB, limited to {gib:g} GiB"


def full_bytes(n_total: int, dtype: torch.dtype) -> int:
    """Return what full fine-tuning keeps: weights, gradients, AdamW's state, fp32 masters if half."""
    masters = 4 if dtype.itemsize < 4 else 0
    return n_total * (2 * dtype.itemsize + masters + 8)


def rows_of(setting: Setting, found: Comparison, lora: tuple[int, Trained] | None) -> list[Any]:
    """Return the rows of the table."""
    report = found.report
    full = full_bytes(report.n_total, setting.dtype)
    rows = [
        [
            f"SIFT, rate {setting.rate:g}",
            f"{report.n_trained / 1e6:.1f} M",
            gib(found.measured_bytes),
            f"{setting.n_tokens / found.step_seconds:,.0f}",
        ]
    ]
    if lora is not None:
        rank, run = lora
        speed = f"{setting.n_tokens / run.step_seconds:,.0f}"
        rows.append(
            [f"LoRA, rank {rank}", f"{run.n_trained / 1e6:.1f} M", gib(run.peak_bytes), speed]
        )
    rows.append(
        [
            "full, by arithmetic, without activations",
            f"{report.n_total / 1e6:.1f} M",
            gib(full),
            "–",
        ]
    )
    return rows


def facts_of(found: Comparison) -> list[tuple[str, str]]:
    """Return what the planner said and what came of it."""
    target = found.measured_bytes / found.target_bytes
    return [
        ("planned, without activations", gib(found.report.peak_bytes)),
        ("activations of forward and backward", gib(found.activation_bytes)),
        ("originals, on the device because it is the host", gib(found.host_bytes)),
        ("expected peak", gib(found.expected_bytes)),
        ("measured peak", gib(found.measured_bytes)),
        ("measured over expected", f"{found.deviation:+.2%}"),
        ("measured over weights, one gradient, 20 bytes a component, 5 % more", f"{target:.3f}"),
    ]


def gib(n_bytes: int) -> str:
    """Return bytes in GiB."""
    return f"{n_bytes / GIB:.3f} GiB"


def read_options() -> argparse.Namespace:
    """Return what the command line asks for."""
    has_gpu = torch.cuda.is_available()
    parser = options_for(__doc__, "seven_b.md")
    parser.set_defaults(result=None)
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if has_gpu else "cpu")
    parser.add_argument("--dtype", default=None, help="bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--rate", type=float, default=0.05)
    parser.add_argument("--length", type=int, default=None, help="512 on a GPU, 64 on a CPU")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--steps", type=int, default=None, help="20 on a GPU, 2 on a CPU")
    parser.add_argument("--limit-gib", type=float, default=24.0, help="of a GPU's memory")
    parser.add_argument("--no-lora", action="store_true")
    return parser.parse_args()


def main() -> None:
    """Train, compare, export and apply; show all of it."""
    options = read_options()
    on_gpu = options.device == "cuda"
    setting = Setting(
        SHAPES[options.shape],
        as_dtype(options.dtype or ("bf16" if on_gpu else "fp32")),
        options.device,
        options.rate,
        options.length or (512 if on_gpu else 64),
        options.batch_size,
        options.steps or (20 if on_gpu else 2),
    )
    where = limit_memory(options.limit_gib) if on_gpu else "CPU; every allocation traced"
    planned = plan(config_of(setting.shape), setting.rate, dtype=setting.dtype)
    print(f"{where}\n\n{planned}\n", flush=True)
    with work_folder(options.work_dir, keep=options.keep) as folder:
        export = Export(folder)
        found = compare(setting, export)
        lora = None
        if not options.no_lora:
            rank = equal_rank(setting, found.report.n_trained)
            lora = rank, measure(lambda: train_lora(setting, rank), setting.device)
        text = (
            f"A Llama of the shape {options.shape}, {options.dtype or planned.dtype}, "
            f"{options.batch_size} × {setting.length} tokens a step; {where}."
        )
        rows = rows_of(setting, found, lora)
        facts = [[name, value] for name, value in (*facts_of(found), *export.facts)]
        sections = [
            text,
            table(("method", "trained", "peak", "tokens/s"), rows),
            table(("", "SIFT"), facts),
        ]
        if options.result is None:
            print("\n\n".join(sections))
        else:
            write_result(options.result, "7B in 24 GB", sections, where=folder)
    if not found.holds:
        raise SystemExit("the peak is beyond 5 % of the plan, or beyond the target")


if __name__ == "__main__":
    main()
