"""The parts of ``gpu.py`` about deltas on a model in memory: apply, switch, snapshot, channel."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import channel_costs
import torch
from gpu_bench import GIB, MB, Bench
from gpu_model import Llama, Shape, make_model
from torch import Tensor

import sparsedelta
from sparsedelta.errors import BaseNeeded
from sparsedelta.live.fused import changed

BLOCK_ELEMENTS = 1 << 24
STEP_SIZE, CHANGED = 4e-6, 0.01


@dataclass(frozen=True)
class Change:
    """Changed elements of one tensor.

    Attributes:
        flat: the whole tensor as flat integers; the model's memory.
        at: flat indices of the elements.
        before: their bits before the change.
        after: their bits after it.
    """

    flat: Tensor
    at: Tensor
    before: Tensor
    after: Tensor


def run_live(bench: Bench) -> None:
    """Time apply, revert, switch and diff of a model in memory, beside plain operations of torch."""
    with bench.attempt("bandwidth"):
        bandwidth = _bandwidth(bench)
    for name, shape in bench.shapes("1b", "7b").items():
        with bench.attempt(f"{name}: live"):
            _live(bench, name, shape, bandwidth)
    for keep_on in ("cpu", "model"):
        (shape,) = bench.shapes("1b").values()
        with bench.attempt(f"1b: Snapshot, copy on {keep_on}"):
            model = make_model(shape, bench.device)
            snapshot = _snapshot(bench, "1b", model, keep_on)
            _small_step(model)
            _time_diff(bench, f"1b, small step, copy on {keep_on}", snapshot, "default")
            del model, snapshot


def _bandwidth(bench: Bench) -> float:
    """Record the speed of the device's memory and of the bus; return the former in bytes per second."""
    n_bytes = bench.size(1 << 30, 1 << 20)
    source = torch.ones(n_bytes, dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    seconds = min(bench.seconds(lambda: target.copy_(source)) for _ in range(5))
    device = 2 * n_bytes / seconds
    bench.record("device", device / 1e9, "GB/s", "a copy, read and write counted")
    host = torch.empty(n_bytes, dtype=torch.uint8, pin_memory=bench.device == "cuda")
    seconds = min(bench.seconds(lambda: target.copy_(host)) for _ in range(5))
    bench.record("bus, to the device", n_bytes / seconds / 1e9, "GB/s", "from pinned memory")
    seconds = min(bench.seconds(lambda: host.copy_(target)) for _ in range(5))
    bench.record("bus, to the host", n_bytes / seconds / 1e9, "GB/s", "to pinned memory")
    return device


def _live(bench: Bench, name: str, shape: Shape, bandwidth: float) -> None:
    model = make_model(shape, bench.device)
    snapshot = _snapshot(bench, name, model, "both")
    paths: list[Path] = []
    changes: list[list[Change]] = []
    for kind, change in (("small step", _small_step), ("random values", _random_values)):
        made = change(model)
        path = bench.work / f"{name} {kind}.sd"
        if name == "1b":
            _time_diff(bench, f"{name}, {kind}", snapshot, "fast")
            copied = bench.bus_bytes(lambda one=snapshot: one.diff(level="fast").close())  # type: ignore[misc] # a default
            nnz = sum(len(each.at) for each in made)
            _record_bytes(bench, f"{name}, {kind}: diff", copied, nnz)
        _time_diff(bench, f"{name}, {kind}", snapshot, "default", path)
        if not paths:
            _time_comparison(bench, name, made, bandwidth)
        _scatter(made, "before")
        _apply(bench, f"{name}, {kind}", model, path, made)
        paths.append(path)
        changes.append(made)
    del snapshot
    bank = sparsedelta.DeltaBank(model)
    for path in paths:
        bank.add(path.stem, path)
    names = [path.stem for path in paths]
    for each in names:
        bank.activate(each)
    times = [bench.seconds(lambda to=to: bank.activate(to)) for to in names * 5]  # type: ignore[misc] # a default
    found = statistics.median(times)
    bank.activate(None)

    def plain() -> None:
        _scatter(changes[0], "before")
        _scatter(changes[1], "after")

    floor = min(bench.seconds(plain) for _ in range(5))
    note = f"{found / floor:.2f} × two plain scatters, which take {floor * 1000:.2f} ms"
    bench.record(f"{name}: switch between residents", found, "s", note)


def _snapshot(bench: Bench, name: str, model: Llama, keep_on: str) -> sparsedelta.Snapshot:
    made: list[sparsedelta.Snapshot] = []

    def make() -> None:
        made.append(sparsedelta.Snapshot(model, keep_on=keep_on))  # type: ignore[arg-type] # checked

    seconds = bench.seconds(make)
    note = f"{made[0].n_bytes / GIB:.1f} GiB"
    bench.record(f"{name}: Snapshot, copy on {keep_on}", seconds, "s", note)
    return made[0]


def _time_diff(
    bench: Bench, what: str, snapshot: sparsedelta.Snapshot, level: str, path: Path | None = None
) -> None:
    made: list[sparsedelta.Delta] = []
    seconds = bench.seconds(lambda: made.append(snapshot.diff(level=level)))
    delta = made.pop()
    size = len(delta.to_bytes())
    note = f"{delta.nnz:,} of {delta.numel:,} changed, {size / MB:,.1f} MB"
    bench.record(f"{what}: diff, level {level}", seconds, "s", note)
    if path:
        delta.save(path)
    delta.close()


def _record_bytes(bench: Bench, what: str, copied: tuple[float, float] | None, nnz: int) -> None:
    if copied:
        note = f"{copied[0]:,.1f} MB to the device, {copied[1]:,.1f} MB to the host"
        bench.record(f"{what}: over the bus", sum(copied) * MB / nnz, "B per change", note)


def _time_comparison(bench: Bench, name: str, changes: Sequence[Change], bandwidth: float) -> None:
    """Time finding what has changed, all on the device."""
    copies = [change.flat.clone() for change in changes]
    for change, copy in zip(changes, copies, strict=True):
        copy[change.at] = change.before

    def compare() -> None:
        for change, copy in zip(changes, copies, strict=True):
            for block in zip(
                change.flat.split(BLOCK_ELEMENTS), copy.split(BLOCK_ELEMENTS), strict=True
            ):
                changed(block[1], block[0])

    compare()
    seconds = min(bench.seconds(compare) for _ in range(3))
    n_bytes = 2 * sum(copy.numel() * copy.element_size() for copy in copies)
    note = f"{n_bytes / seconds / bandwidth:.0%} of the device's bandwidth"
    bench.record(f"{name}: comparison on the device", n_bytes / seconds / 1e9, "GB/s", note)


def _apply(bench: Bench, what: str, model: Llama, path: Path, changes: Sequence[Change]) -> None:
    """Time one delta's apply and revert, and check the result; the model is the base before and after."""
    floor = min(bench.seconds(lambda: _scatter(changes, "before")) for _ in range(5))
    bench.record(f"{what}: plain scatter", floor, "s", "the same elements")
    with sparsedelta.load(path) as delta:
        by_base = any(chunk.coding.classes for row in delta.tensors for chunk in row.chunks)
        note = "coded by the base's exponents" if by_base else ""
        bench.record(f"{what}: apply_", bench.seconds(lambda: delta.apply_(model)), "s", note)
        for change in changes:
            if not torch.equal(change.flat[change.at], change.after):
                raise ValueError("the model does not hold the target")
        try:
            seconds = bench.seconds(lambda: delta.revert_(model))
            bench.record(f"{what}: revert_", seconds, "s")
        except BaseNeeded:
            _scatter(changes, "before")
        copied = bench.bus_bytes(lambda: delta.apply_(model))
        _record_bytes(bench, f"{what}: apply_", copied, delta.nnz)
        _scatter(changes, "before")
        seconds = bench.seconds(lambda: delta.apply_(model, verify="full"))
        bench.record(f"{what}: apply_, full verification", seconds, "s")
        _scatter(changes, "before")


def run_channel(bench: Bench) -> None:
    """Publish versions of a model, and follow them with another one on the same device."""
    (shape,) = bench.shapes("1b").values()
    model = make_model(shape, bench.device)
    state = {name: parameter.data for name, parameter in model.named_parameters()}
    place = bench.work / "channel"
    with bench.attempt("channel"):
        channel_costs.run(
            state, place, bench.record, wait=bench.wait, keep_on="both", n_versions=3, n_behind=4
        )


def _small_step(model: Llama, seed: int = 0) -> list[Change]:
    """Add small random numbers in fp32 and round: small weights change more often, as in a training step."""
    generator = torch.Generator(next(model.parameters()).device).manual_seed(seed)
    changes = []
    for parameter in model.parameters():
        flat = parameter.data.view(-1)
        step = torch.randn(len(flat), generator=generator, device=flat.device) * STEP_SIZE
        changes.append(_changed(flat, (flat.float() + step).to(flat.dtype)))
    return changes


def _random_values(model: Llama) -> list[Change]:
    """Give one element in a hundred another value."""
    changes = []
    for parameter in model.parameters():
        flat = parameter.data.view(-1)
        drawn = (torch.randn(len(flat), device=flat.device) * 0.02).to(flat.dtype)
        is_changed = torch.rand(len(flat), device=flat.device) < CHANGED
        changes.append(_changed(flat, torch.where(is_changed, drawn, flat)))
    return changes


def _changed(flat: Tensor, values: Tensor) -> Change:
    bits, new = flat.view(torch.int16), values.view(torch.int16)
    at = (bits != new).nonzero().view(-1)
    change = Change(bits, at, bits[at], new[at])
    bits.copy_(new)
    return change


def _scatter(changes: Sequence[Change], which: str) -> None:
    for change in changes:
        change.flat.index_copy_(0, change.at, getattr(change, which))
