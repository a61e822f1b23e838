"""The parts of ``gpu.py``; each runs in its own process and writes every result at once.

    python benchmarks/gpu_parts.py PART --results FILE --work FOLDER [--rehearse]

A failure is recorded as a result, and the part continues with the next measurement.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Measure this checkout, even if another version is installed.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from gpu_model import PROJECTIONS, SHAPES, Shape, add_lora, batches, make_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import sparsedelta
from sift_train import SIFT, export_delta, plan

ROOT = Path(__file__).resolve().parent.parent
GIB, MB = 1 << 30, 1e6
LIMIT_GIB = 24.0
RATE, CHANGED = 0.05, 0.01
FAILED = "failed"


@dataclass(frozen=True)
class Bench:
    """The settings of a part, and methods that record its results.

    Attributes:
        part: name of the part.
        results: file of JSON lines to which results are appended.
        work: folder for the part's files.
        device: device of torch.
        is_rehearsal: whether the part runs at toy size.
    """

    part: str
    results: Path
    work: Path
    device: str
    is_rehearsal: bool

    def shapes(self, *names: str) -> dict[str, Shape]:
        """Return the shapes with these names; toy shapes in a rehearsal."""
        return {name: SHAPES["toy" if self.is_rehearsal else name] for name in names}

    def size(self, real: int, toy: int) -> int:
        """Return the full size, or the toy size in a rehearsal."""
        return toy if self.is_rehearsal else real

    def record(self, what: str, value: float | str, unit: str = "", note: str = "") -> None:
        """Append a result to the file and print it."""
        row = {"part": self.part, "what": what, "value": value, "unit": unit, "note": note}
        with self.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        shown = f"{value:,.4g}" if isinstance(value, float) else value
        print(f"  {what}: {shown} {unit} {note}".rstrip(), flush=True)

    @contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """Record an exception of the block as a result, and free memory afterwards."""
        try:
            yield
        except Exception as error:  # any error: the next measurement may still work
            self.record(what, FAILED, note=f"{type(error).__name__}: {error}".split("\n")[0][:300])
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def seconds(self, work: Callable[[], Any]) -> float:
        """Return the seconds a function takes, including the work it leaves on the device."""
        self._wait()
        start = time.perf_counter()
        work()
        self._wait()
        return time.perf_counter() - start

    def begin_peak(self) -> None:
        """Reset the peak of the device's memory."""
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def peak(self) -> int:
        """Return the peak of the GPU's memory since the reset, in bytes; 0 without a GPU."""
        return torch.cuda.max_memory_allocated() if self.device == "cuda" else 0

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


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
    for name, shape in bench.shapes("7b", "1b").items():
        n_trained = round(RATE * sum(p.numel() for p in _projections(make_model(shape, "meta"))))
        with bench.attempt(f"{name}: SIFT"):
            _measure_sift(bench, name, shape)
        with bench.attempt(f"{name}: LoRA"):
            model = make_model(shape, bench.device)
            trained = add_lora(model, n_trained)
            _measure(bench, f"{name}: LoRA, {_millions(trained)}", shape, model, trained)
            del model, trained
        if name == "1b":
            with bench.attempt(f"{name}: full"):
                model = make_model(shape, bench.device, torch.float32)
                trained = list(model.parameters())
                what = f"{name}: full, fp32 under bf16 autocast, {_millions(trained)}"
                _measure(bench, what, shape, model, trained, autocasts=True)
                del model, trained


def _measure_sift(bench: Bench, name: str, shape: Shape) -> None:
    planned = plan(make_model(shape, "meta"), RATE, sparse_module=PROJECTIONS)
    bench.record(f"{name}: planned, without activations", planned.peak_bytes / GIB, "GiB")
    model = make_model(shape, bench.device)
    own = _activation_bytes(bench, shape, model, planned.largest_gradient_bytes)
    bench.record(f"{name}: activations, measured without SIFT", own / GIB, "GiB")
    with SIFT(model, RATE, PROJECTIONS) as sift:
        peak = _measure(
            bench,
            f"{name}: SIFT, {_millions(sift.parameters_in_optimizer())}",
            shape,
            model,
            sift.parameters_in_optimizer(),
        )
    if peak:
        over = peak / (planned.peak_bytes + own) - 1
        bench.record(f"{name}: peak over plan and activations", f"{over:+.2%}")


def _activation_bytes(bench: Bench, shape: Shape, model: nn.Module, gradient_bytes: int) -> int:
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
    model(batches(shape, 1, bench.device, bench.size(512, 16))[0]).backward()
    for handle in handles:
        handle.remove()
    return max(bench.peak() - held - gradient_bytes, 0)


def _measure(
    bench: Bench,
    what: str,
    shape: Shape,
    model: nn.Module,
    trained: Sequence[nn.Parameter],
    *,
    autocasts: bool = False,
) -> int:
    """Train, record seconds and peak, and return the peak in bytes, 0 without a GPU."""
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    data = batches(shape, bench.size(6, 3), bench.device, bench.size(512, 16))
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
    bench.record(f"{what}: step", usual, "s", f"{data[0].numel()} tokens, median of {len(rest)}")
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
        with SIFT(model, RATE, PROJECTIONS) as sift:
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
            max_steps=14, log_every=13, selection_batches=1, sparse_module=list(PROJECTIONS)
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
        with SIFT(model, RATE, PROJECTIONS) as sift:
            optimizer = torch.optim.AdamW(sift.parameters_in_optimizer(), lr=1e-3, fused=True)
            for batch in batches(shape, 3, bench.device, bench.size(128, 8)):
                model(batch).backward()
                optimizer.step()
                optimizer.zero_grad()
            nnz = 0

            def export() -> None:
                nonlocal nnz
                nnz = export_delta(model, delta, sift=sift, base=base)

            with _BusBytes() as bus:
                seconds = bench.seconds(export)
        n_total = sum(p.numel() for p in model.parameters())
        bench.record("export", seconds, "s", f"{n_total / 1e6:,.0f} M weights")
        bench.record(
            "bytes over the bus", bus.n_bytes / MB, "MB", "device to host, while exporting"
        )
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


class _BusBytes(TorchDispatchMode):
    """Counts the bytes that operations bring from a GPU to the host."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.n_bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.device.type == "cpu":
            given = [a for a in args if isinstance(a, Tensor) and a.is_cuda]
            self.n_bytes += out.numel() * out.element_size() if given else 0
        return out


def run_live(bench: Bench) -> None:
    """Time apply, revert and switch of deltas on a model in memory, beside plain device copies."""
    with bench.attempt("bandwidth"):
        _bandwidth(bench)
    for name, shape in bench.shapes("1b", "7b").items():
        folder = bench.work / name
        folder.mkdir()
        with bench.attempt(f"{name}: live"):
            _live(bench, name, shape, folder)
        shutil.rmtree(folder)


def _bandwidth(bench: Bench) -> None:
    n_bytes = bench.size(1 << 30, 1 << 20)
    source = torch.ones(n_bytes, dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    seconds = min(bench.seconds(lambda: target.copy_(source)) for _ in range(5))
    bench.record("device", 2 * n_bytes / seconds / 1e9, "GB/s", "a copy, read and write counted")
    host = torch.empty(n_bytes, dtype=torch.uint8, pin_memory=bench.device == "cuda")
    seconds = min(bench.seconds(lambda: target.copy_(host)) for _ in range(5))
    bench.record("bus, to the device", n_bytes / seconds / 1e9, "GB/s", "from pinned memory")
    seconds = min(bench.seconds(lambda: host.copy_(target)) for _ in range(5))
    bench.record("bus, to the host", n_bytes / seconds / 1e9, "GB/s", "to pinned memory")


def _live(bench: Bench, name: str, shape: Shape, folder: Path) -> None:
    from safetensors.torch import save_model

    model = make_model(shape, bench.device)
    parameters = [p.data for p in model.parameters()]
    base = folder / "base.safetensors"
    save_model(model, str(base))
    deltas = {}
    for kind, change in (("small steps", _one_ulp), ("random values", _random_values)):
        places = [_draw(p) for p in parameters]
        before = [p.view(-1)[at] for p, at in zip(parameters, places, strict=True)]
        for parameter, at in zip(parameters, places, strict=True):
            change(parameter.view(-1), at)
        save_model(model, str(folder / "target.safetensors"))
        for parameter, at, values in zip(parameters, places, before, strict=True):
            parameter.view(-1)[at] = values
        path = deltas[kind] = folder / f"{kind.split()[0]}.sd"
        with sparsedelta.diff(base, folder / "target.safetensors") as made:
            made.save(path)
            note = f"{made.nnz:,} of {made.numel:,} changed, {path.stat().st_size / MB:,.1f} MB"
        (folder / "target.safetensors").unlink()
        flat = [p.view(-1) for p in parameters]
        pairs = list(zip(flat, places, before, strict=True))
        floor = min(bench.seconds(lambda pairs=pairs: _scatter(pairs)) for _ in range(5))  # type: ignore[misc] # a default
        bench.record(f"{name}, {kind}: plain scatter", floor, "s", "the same number of elements")
        del before, pairs
        with sparsedelta.load(path) as delta, bench.attempt(f"{name}, {kind}"):
            seconds = bench.seconds(lambda delta=delta: delta.apply_(model))  # type: ignore[misc] # a default
            bench.record(f"{name}, {kind}: apply_", seconds, "s", note)
            seconds = bench.seconds(lambda delta=delta: delta.revert_(model))  # type: ignore[misc] # a default
            bench.record(f"{name}, {kind}: revert_", seconds, "s", note)
    bank = sparsedelta.DeltaBank(model)
    for kind, path in deltas.items():
        bank.add(kind, path)
    one, other = deltas
    bank.activate(one)
    bank.activate(other)
    times = [bench.seconds(lambda to=to: bank.activate(to)) for to in (one, other) * 3]  # type: ignore[misc] # a default
    bench.record(f"{name}: switch between residents", statistics.median(times), "s", "median of 6")
    bank.activate(None)


def run_channel(bench: Bench) -> None:
    """Publish and follow versions of a model in memory: trainer blocked, staleness, the follower's pause."""
    from channel_costs import run  # tests have modules of the same names as benchmarks

    for name, shape in bench.shapes("1b").items():
        model = make_model(shape, bench.device)
        state = {key: value.detach() for key, value in model.state_dict().items()}
        for keep_on in ("cpu", "both"):
            what = f"{name}, copy on {keep_on}"

            def record(
                found: str, value: float | str, unit: str = "", note: str = "", what: str = what
            ) -> None:
                bench.record(f"{what}: {found}", value, unit, note)

            with bench.attempt(what):
                place = bench.work / f"channel-{keep_on}"
                run(
                    state, place, record, wait=bench._wait, keep_on=keep_on, n_behind=bench.size(4, 2)
                )  # fmt: skip
                shutil.rmtree(place)


def _draw(parameter: Tensor) -> Tensor:
    chosen = torch.rand(parameter.numel(), device=parameter.device) < CHANGED
    return chosen.nonzero().flatten()


def _one_ulp(flat: Tensor, at: Tensor) -> None:
    bits = flat.view(torch.int16)
    bits[at] = bits[at] ^ 1


def _random_values(flat: Tensor, at: Tensor) -> None:
    flat[at] = torch.randn(len(at), device=flat.device).to(flat.dtype) * 0.02


def _scatter(pairs: Sequence[tuple[Tensor, Tensor, Tensor]]) -> None:
    for flat, at, values in pairs:
        flat.index_copy_(0, at, values)


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
