"""Compares the peak memory of training, as the allocator counts it, with ``plan``.

    python benchmarks/training_memory.py --shape 350m

A figure is the highest number of bytes that tensors held at one time, from torch's CUDA allocator or
from the profiler's record of all CPU allocations. It is exact and does not depend on other programs
or on memory that a C library keeps.

``plan`` does not count activations. They are measured on the same model in plain torch, which drops
every gradient as soon as it exists: its peak minus the weights and one gradient.
"""

from __future__ import annotations

import gc
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from measuring import options_for, table, write_result
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

from sift_train import SIFT, MemoryReport, plan
from sift_train.checkpointing import enable_checkpointing

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
WINDOW = "training"
MIB = 1 << 20
TOLERANCE = 0.05


@dataclass(frozen=True)
class Shape:
    """The shape of a Llama: seven projections per layer; embeddings and head are not tied."""

    hidden: int
    intermediate: int
    n_layers: int
    n_heads: int
    vocabulary: int = 32_000


SHAPES = {
    "30m": Shape(512, 1376, 8, 8, 4_000),
    "350m": Shape(1024, 2816, 24, 16),
}


@dataclass(frozen=True)
class Setting:
    """The settings of one training.

    Attributes:
        shape: shape of the model.
        dtype: dtype of the weights.
        device: device of torch.
        rate: share of all seven projections to train.
        length: tokens per sequence.
        batch_size: sequences per step.
        n_steps: optimizer steps, including the one that chooses the components.
        checkpointing: recompute activations layer by layer.
    """

    shape: Shape
    dtype: torch.dtype
    device: str
    rate: float
    length: int
    batch_size: int = 1
    n_steps: int = 3
    checkpointing: bool = True

    @property
    def n_tokens(self) -> int:
        """Tokens per step."""
        return self.batch_size * self.length


@dataclass(frozen=True)
class Trained:
    """The cost of one training.

    Attributes:
        n_trained: number of trained components.
        peak_bytes: highest memory over all steps.
        step_seconds: time of the fastest step, the first excluded; on a CPU the profiler is running.
    """

    n_trained: int
    peak_bytes: int
    step_seconds: float


@dataclass(frozen=True)
class Comparison:
    """A measured peak of SIFT, with the planned and the target figures.

    Attributes:
        report: the result of ``plan``, made before the model.
        measured_bytes: the measured peak.
        activation_bytes: memory of forward and backward passes without weights and gradient.
        host_bytes: size of the originals if the model is trained on the CPU, else 0.
        step_seconds: as for ``Trained``.
    """

    report: MemoryReport
    measured_bytes: int
    activation_bytes: int
    host_bytes: int
    step_seconds: float

    @property
    def expected_bytes(self) -> int:
        """The planned peak plus the activations, which ``plan`` does not count."""
        return self.report.peak_bytes + self.activation_bytes + self.host_bytes

    @property
    def deviation(self) -> float:
        """Measured divided by expected bytes, minus one."""
        return self.measured_bytes / self.expected_bytes - 1.0

    @property
    def target_bytes(self) -> int:
        """1.05 × (weights, one gradient, 20 bytes per trained component), plus activations."""
        report = self.report
        lean = report.weight_bytes + report.largest_gradient_bytes + 20 * report.n_trained
        return int((1 + TOLERANCE) * lean) + self.activation_bytes + self.host_bytes

    @property
    def holds(self) -> bool:
        """Whether the plan is within 5 % of the peak, and the peak within the target."""
        return abs(self.deviation) <= TOLERANCE and self.measured_bytes <= self.target_bytes


def config_of(shape: Shape) -> Any:
    """Return a config of transformers."""
    from transformers import LlamaConfig

    make: Any = LlamaConfig
    return make(
        architectures=["LlamaForCausalLM"],
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.n_layers,
        num_attention_heads=shape.n_heads,
        num_key_value_heads=shape.n_heads,
        vocab_size=shape.vocabulary,
        tie_word_embeddings=False,
        use_cache=False,
    )


def make_model(setting: Setting) -> nn.Module:
    """Return a model of random weights, created on the device in the dtype."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    make: Any = LlamaForCausalLM
    with torch.device(setting.device):
        model: nn.Module = make._from_config(config_of(setting.shape), dtype=setting.dtype)
    if setting.checkpointing:
        enable_checkpointing(model)
    return model.train()


def make_batches(setting: Setting) -> list[dict[str, Tensor]]:
    """Return one batch of random tokens per step."""
    generator = torch.Generator().manual_seed(1)
    shape = (setting.n_steps, setting.batch_size, setting.length)
    tokens = torch.randint(0, setting.shape.vocabulary, shape, generator=generator)
    return [{"input_ids": ids, "labels": ids} for ids in tokens.to(setting.device)]


def compare(setting: Setting) -> Comparison:
    """Return the measured peak of a SIFT training with its plan."""
    report = plan(
        config_of(setting.shape), setting.rate, sparse_module=PROJECTIONS, dtype=setting.dtype
    )
    own = measure(lambda: train_plainly(setting), setting.device)
    sift = measure(lambda: train_sift(setting), setting.device)
    return Comparison(
        report,
        sift.peak_bytes,
        max(own.peak_bytes - report.weight_bytes - report.largest_gradient_bytes, 0),
        report.host_bytes if setting.device == "cpu" else 0,
        sift.step_seconds,
    )


def train_plainly(setting: Setting) -> tuple[int, float]:
    """Run only forward and backward, dropping gradients; return components and seconds per step."""
    model = make_model(setting)
    trained = _projections(model)
    for parameter in trained:
        hooked: Any = parameter  # the method is untyped
        hooked.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    seconds = run_steps(setting, model, lambda: None)
    return sum(p.numel() for p in trained), seconds


def train_sift(setting: Setting) -> tuple[int, float]:
    """Train by SIFT; return the number of trained components and the seconds per step."""
    model = make_model(setting)
    with SIFT(model, setting.rate, PROJECTIONS, selection="gradient", lr_transfer=False) as sift:
        optimizer = lean_adamw(sift.parameters_in_optimizer(), setting)
        seconds = run_steps(setting, model, lambda: step(optimizer))
        return sift.n_trained, seconds


def lean_adamw(parameters: list[nn.Parameter], setting: Setting) -> torch.optim.Optimizer:
    """Return an AdamW that does not copy all parameters at once, as torch's default does on CUDA."""
    fused = setting.device != "cpu"
    return torch.optim.AdamW(parameters, lr=1e-4, fused=fused, foreach=None if fused else False)


def step(optimizer: torch.optim.Optimizer) -> None:
    """Step, and drop the gradients."""
    optimizer.step()
    optimizer.zero_grad()


def run_steps(setting: Setting, model: nn.Module, after: Callable[[], None]) -> float:
    """Train on every batch inside the window; return the fastest step's seconds, the first excluded.

    Raises:
        ValueError: a loss is not finite.
    """
    seconds = []
    batches = make_batches(setting)
    with record_function(WINDOW):
        for batch in batches:
            start = time.perf_counter()
            loss: Tensor = model(**batch).loss
            value = loss.detach()
            loss.backward()
            del loss
            after()
            if not bool(value.isfinite()):  # also waits for the device
                raise ValueError(f"the loss is {float(value)}")
            seconds.append(time.perf_counter() - start)
    return min(seconds[1:] or seconds)


def measure(train: Callable[[], tuple[int, float]], device: str) -> Trained:
    """Return the cost of a training; all its tensors are freed afterwards."""
    peaks: list[int] = []
    with _cpu_peak(peaks) if device == "cpu" else _cuda_peak(peaks):
        n_trained, seconds = train()
        gc.collect()
    return Trained(n_trained, peaks[0], seconds)


@contextmanager
def _cuda_peak(peaks: list[int]) -> Iterator[None]:
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    yield
    peaks.append(torch.cuda.max_memory_allocated())
    torch.cuda.empty_cache()


@contextmanager
def _cpu_peak(peaks: list[int]) -> Iterator[None]:
    """Append the highest total within the window, without earlier allocations."""
    with (
        tempfile.TemporaryDirectory() as folder,
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen,
    ):
        yield
        seen.stop()
        trace = Path(folder) / "trace.json"
        seen.export_chrome_trace(str(trace))
        peaks.append(_peak_in_window(json.loads(trace.read_bytes())["traceEvents"]))


def _peak_in_window(events: list[dict[str, Any]]) -> int:
    (window,) = (e for e in events if e.get("name") == WINDOW and e.get("ph") == "X")
    begin, end = window["ts"], window["ts"] + window["dur"]
    changes = sorted((e["ts"], e["args"]) for e in events if e.get("name") == "[memory]")
    first = changes[0][1]
    before = first["Total Allocated"] - first["Bytes"]
    return int(max(args["Total Allocated"] for ts, args in changes if begin <= ts <= end) - before)


def _projections(model: nn.Module) -> list[nn.Parameter]:
    """Freeze everything but the seven projections, and return those."""
    trained = []
    for name, parameter in model.named_parameters():
        is_target = any(fragment in name for fragment in PROJECTIONS)
        parameter.requires_grad_(is_target)
        if is_target:
            trained.append(parameter)
    return trained


def row_of(setting: Setting, found: Comparison) -> list[str]:
    """Return the cells of a comparison."""
    report = found.report
    return [
        f"{str(setting.dtype).removeprefix('torch.')}, {setting.rate:.0%}",
        f"{report.n_trained / 1e6:.1f} M of {report.n_total / 1e6:.0f} M",
        shown(report.weight_bytes),
        shown(report.largest_gradient_bytes),
        shown(report.trained_bytes),
        shown(found.host_bytes),
        shown(found.activation_bytes),
        shown(found.expected_bytes),
        shown(found.measured_bytes),
        f"{found.deviation:+.2%}",
        f"{found.measured_bytes / found.target_bytes:.3f}",
    ]


COLUMNS = (
    "weights in, rate", "trained", "weights", "one gradient", "trained parts", "originals",
    "activations", "expected", "measured", "deviation", "of the target",
)  # fmt: skip


def shown(n_bytes: int) -> str:
    """Return bytes in MiB."""
    return f"{n_bytes / MIB:,.1f}"


def main() -> None:
    """Measure each dtype and rate, and write the table."""
    parser = options_for(__doc__, "training_memory.md")
    parser.add_argument("--shape", choices=SHAPES, default="350m")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rate", type=float, nargs="+", default=[0.01, 0.05])
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--steps", type=int, default=3)
    options = parser.parse_args()
    setting = Setting(
        SHAPES[options.shape], torch.float32, options.device, 0.0, options.length,
        n_steps=options.steps,
    )  # fmt: skip
    rows, all_hold = [], True
    for name in options.dtype:
        for rate in options.rate:
            own = replace(setting, dtype=getattr(torch, name), rate=rate)
            found = compare(own)
            rows.append(row_of(own, found))
            all_hold = all_hold and found.holds
            print(" | ".join(rows[-1]), flush=True)
    text = (
        f"A Llama of the shape {options.shape}, random weights, {options.length} tokens per step, "
        "activation checkpointing, all seven projections, AdamW. All sizes are in MiB. *Expected*: "
        "the figure of `plan`, plus activations and, on a CPU, the originals, which are in host memory. "
        "*Of the target*: measured / target. The target is 1.05 × (weights, one gradient and 20 bytes "
        "per trained component), plus the same activations and originals."
    )
    write_result(
        options.result, "Memory of training", [text, table(COLUMNS, rows)], where=Path.cwd()
    )
    if not all_hold:
        raise SystemExit("a peak differs from the plan by more than 5 %, or exceeds the target")


if __name__ == "__main__":
    main()
