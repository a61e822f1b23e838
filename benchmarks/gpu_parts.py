"""The parts of ``gpu.py``; each runs in its own process and writes every result at once.

    python benchmarks/gpu_parts.py PART --results FILE --work FOLDER [--rehearse]

A failure is recorded as a result, and the part continues with the next measurement.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Measure this checkout, even if another version is installed.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from gpu_bench import FAILED, GIB, MB, Bench
from gpu_live import run_channel, run_live
from gpu_model import PROJECTIONS, Shape, add_lora, batches, make_model
from torch import Tensor, nn

import sparsedelta
from sift_train import SIFT, export_delta, plan

ROOT = Path(__file__).resolve().parent.parent
LIMIT_GIB = 24.0
RATE = 0.05


def run_tests(bench: Bench) -> None:
    """Run the tests marked ``gpu`` and record each as a result."""
    import pytest

    class Told:
        def pytest_runtest_logreport(self, report: Any) -> None:
            if report.when == "call" or report.outcome != "passed":
                name, outcome = report.nodeid.split("::", 1)[-1], str(report.outcome)
                reason = str(report.longrepr).strip().split("\n")[-1] if report.failed else ""
                bench.record(name, outcome, note=reason[:300])

    marked = [p for p in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in p.read_text("utf-8")]
    os.chdir(ROOT)
    sys.path.remove(
        str(ROOT / "benchmarks")
    )  # otherwise live.py would shadow the package tests/live
    options = ["-m", "gpu", "-q", "--no-header", "-p", "no:cacheprovider"]
    status = pytest.main([*options, *map(str, sorted(marked))], plugins=[Told()])
    if status:
        bench.record("pytest", FAILED, note=f"exit status {int(status)}")


def run_memory(bench: Bench) -> None:
    """Train 7B and 1B models within 24 GiB by SIFT and LoRA of equal size; 1B also in full."""
    if bench.device == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(LIMIT_GIB * GIB / total, 1.0))
        bench.record("limit", min(LIMIT_GIB, total / GIB), "GiB", "a hard cap of the allocator")
    for name, n_rows in (("7b", 1), ("1b", 1), ("1b", 8)):
        (shape,) = bench.shapes(name).values()
        size = bench.size(512, 16), n_rows
        label = f"{name}, {size[0] * n_rows} tokens"
        n_trained = round(RATE * sum(p.numel() for p in _projections(make_model(shape, "meta"))))
        with bench.attempt(f"{label}: SIFT"):
            _measure_sift(bench, label, shape, size)
        if n_rows == 1:
            with bench.attempt(f"{label}, masters on the CPU: SIFT"):
                _measure_sift(bench, f"{label}, masters on the CPU", shape, size, "cpu")
        with bench.attempt(f"{label}: LoRA"):
            model = make_model(shape, bench.device)
            trained = add_lora(model, n_trained)
            _measure(bench, f"{label}: LoRA, {_millions(trained)}", shape, size, model, trained)
            del model, trained
        if name == "1b":
            with bench.attempt(f"{label}: full"):
                model = make_model(shape, bench.device, torch.float32)
                trained = list(model.parameters())
                what = f"{label}: full, fp32 under bf16 autocast, {_millions(trained)}"
                _measure(bench, what, shape, size, model, trained, autocasts=True)
                del model, trained


def _measure_sift(
    bench: Bench, name: str, shape: Shape, size: tuple[int, int], masters_device: str = "model"
) -> None:
    planned = plan(
        make_model(shape, "meta"), RATE, sparse_module=PROJECTIONS, masters_device=masters_device
    )
    bench.record(f"{name}: planned, without activations", planned.peak_bytes / GIB, "GiB")
    model = make_model(shape, bench.device)
    own = _activation_bytes(bench, shape, size, model, planned.largest_gradient_bytes)
    bench.record(f"{name}: activations, measured without SIFT", own / GIB, "GiB")
    with SIFT(
        model,
        RATE,
        PROJECTIONS,
        selection="gradient",
        lr_transfer=False,
        masters_device=masters_device,
    ) as sift:
        peak = _measure(
            bench,
            f"{name}: SIFT, {_millions(sift.parameters_in_optimizer())}",
            shape,
            size,
            model,
            sift.parameters_in_optimizer(),
        )
    if peak:
        over = peak / (planned.peak_bytes + own) - 1
        bench.record(f"{name}: peak over plan and activations", f"{over:+.2%}")


def _activation_bytes(
    bench: Bench, shape: Shape, size: tuple[int, int], model: nn.Module, gradient_bytes: int
) -> int:
    """Return the peak of forward and backward passes that drop every gradient at once, in bytes."""
    model.requires_grad_(False)
    handles = []
    for parameter in _projections(model):
        hooked: Any = parameter.requires_grad_(True)  # the method is untyped
        handles.append(
            hooked.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        )
    held = torch.cuda.memory_allocated() if bench.device == "cuda" else 0
    bench.begin_peak()
    (data,) = batches(shape, 1, bench.device, *size)
    seconds = [bench.seconds(lambda: model(data).backward()) for _ in range(3)]
    bench.record("the same without SIFT: forward and backward pass", min(seconds[1:]), "s")
    for handle in handles:
        handle.remove()
    return max(bench.peak() - held - gradient_bytes, 0)


def _measure(
    bench: Bench,
    what: str,
    shape: Shape,
    size: tuple[int, int],
    model: nn.Module,
    trained: Sequence[nn.Parameter],
    *,
    autocasts: bool = False,
) -> int:
    """Train, record seconds and peak, and return the peak in bytes, 0 without a GPU."""
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    data = batches(shape, bench.size(6, 3), bench.device, *size)
    losses = []

    def step(batch: Tensor) -> None:
        with torch.autocast(bench.device, torch.bfloat16, enabled=autocasts):
            loss = model(batch)
        losses.append(loss.detach())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    bench.begin_peak()
    first, *rest = [bench.seconds(lambda batch=batch: step(batch)) for batch in data]  # type: ignore[misc] # a default
    usual = statistics.median(rest)
    bench.record(f"{what}: step", usual, "s", f"median of {len(rest)}")
    bench.record(f"{what}: first step, beyond the others", first - usual, "s")
    peak = bench.peak()
    if peak:
        bench.record(f"{what}: peak", peak / GIB, "GiB")
    if not all(bool(loss.isfinite()) for loss in losses):
        raise ValueError("a loss is not finite")
    return peak


def run_waits(bench: Bench) -> None:
    """Run ten steps of a plain loop and of ``fit`` in which any wait for the device is an error."""
    (shape,) = bench.shapes("100m").values()
    with bench.attempt("own loop"):
        model = make_model(shape, bench.device)
        data = batches(shape, 13, bench.device, bench.size(64, 8))
        with SIFT(model, RATE, PROJECTIONS, selection="gradient", lr_transfer=False) as sift:
            optimizer = torch.optim.AdamW(sift.parameters_in_optimizer(), lr=1e-4, fused=True)
            for number, batch in enumerate(data):
                _forbid_waits(bench, is_forbidden=number >= 3)
                model(batch).backward()
                sift.clip_grad_norm_(1.0)
                optimizer.step()
                optimizer.zero_grad()
            _forbid_waits(bench, is_forbidden=False)
        bench.record("own loop: waits in 10 steps", "none")
    _forbid_waits(bench, is_forbidden=False)
    with bench.attempt("fit"):
        from sift_train import FitConfig, fit  # needs accelerate

        model = make_model(shape, bench.device)
        config = FitConfig(
            max_steps=14,
            log_every=13,
            selection="gradient",
            selection_batches=1,
            sparse_module=list(PROJECTIONS),
        )
        n_losses = 0

        def loss(model: nn.Module, batch: Tensor) -> Tensor:
            nonlocal n_losses
            n_losses += 1  # the first is for the selection
            _forbid_waits(bench, is_forbidden=4 <= n_losses < 14)
            found: Tensor = model(batch)
            return found

        host = [batch.cpu() for batch in batches(shape, 14, bench.device, bench.size(64, 8))]
        fit(model, host, output=bench.work / "fit.sd", config=config, loss=loss)
        bench.record("fit: waits in 10 steps", "none", note="batches come from the host")
    _forbid_waits(bench, is_forbidden=False)


def run_export(bench: Bench) -> None:
    """Write the delta of a trained model, apply it on the host, and compare with the model."""
    from safetensors.torch import load_file, save_model

    (shape,) = bench.shapes("1b").values()
    base, delta, out = (bench.work / name for name in ("base.safetensors", "d.sd", "out"))
    with bench.attempt("export"):
        model = make_model(shape, bench.device)
        save_model(model, str(base))
        with SIFT(model, RATE, PROJECTIONS, selection="gradient", lr_transfer=False) as sift:
            optimizer = torch.optim.AdamW(sift.parameters_in_optimizer(), lr=1e-3, fused=True)
            for batch in batches(shape, 3, bench.device, bench.size(128, 8)):
                model(batch).backward()
                optimizer.step()
                optimizer.zero_grad()
            nnz = 0

            def export() -> None:
                nonlocal nnz
                nnz = export_delta(model, delta, sift=sift, base=base)

            seconds = bench.seconds(export)
        n_total = sum(p.numel() for p in model.parameters())
        bench.record("export", seconds, "s", f"{n_total / 1e6:,.0f} M weights")
        bench.record("delta", delta.stat().st_size / MB, "MB", f"{nnz:,} components changed")
        bench.record(
            "apply on the host", bench.seconds(lambda: sparsedelta.apply(base, delta, out)), "s"
        )
        (written,) = [out] if out.is_file() else out.rglob("*.safetensors")
        found = load_file(written)
        for name, value in model.state_dict().items():
            if not torch.equal(found[name].view(torch.int16), value.cpu().view(torch.int16)):
                raise ValueError(f"tensor {name!r} of the applied delta is not the model's")
        bench.record("applied on the host", "equal", note="to the model, bit for bit")


def _projections(model: nn.Module) -> list[nn.Parameter]:
    return [p for name, p in model.named_parameters() if re.search("|".join(PROJECTIONS), name)]


def _millions(parameters: Sequence[nn.Parameter]) -> str:
    return f"{sum(p.numel() for p in parameters) / 1e6:,.1f} M trained"


def _forbid_waits(bench: Bench, *, is_forbidden: bool) -> None:
    if bench.device == "cuda":
        torch.cuda.set_sync_debug_mode("error" if is_forbidden else "default")


PARTS = {
    "tests": run_tests,
    "memory": run_memory,
    "waits": run_waits,
    "export": run_export,
    "live": run_live,
    "channel": run_channel,
}


def main() -> None:
    """Run one part."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args()
    device = "cpu" if options.rehearse else "cuda"
    results, work = options.results.resolve(), options.work.resolve()
    work.mkdir(parents=True)
    PARTS[options.part](Bench(options.part, results, work, device, options.rehearse))


if __name__ == "__main__":
    main()
