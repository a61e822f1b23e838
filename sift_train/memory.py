"""Computes the memory of training without activations, for a live run or before a model is loaded.

The weights, and the index, master and gradient of each trained component, are always in memory. The
peak occurs at one of three times: while components are chosen (optimizer state does not exist yet),
in a backward pass (with one dense gradient), or while a step writes the masters back.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from os import PathLike
from typing import Any

import torch
from torch import nn

from sift_train.buffers import saved_buffers
from sift_train.known import names_checked
from sift_train.lean import check_masters
from sift_train.masters import SparseParameter
from sift_train.ranks.buckets import BUCKET
from sift_train.ranks.traffic import Traffic, traffic_of, unit_bytes
from sift_train.reach import left_out
from sift_train.selection import index_dtype, search_bytes
from sift_train.shape import model_without_weights
from sift_train.targets import ALL_LINEAR, Names, find_targets

GIB = 1 << 30
OPTIMIZER_STATE_BYTES = {"adamw": 8, "sgd": 0, "sgd-momentum": 4, "adafactor": 4, "adamw-8bit": 2}


@dataclass(frozen=True, kw_only=True)
class MemoryReport:
    """Bytes on the training device, without activations.

    Attributes:
        n_trained: number of trained components.
        n_total: number of components of the model, tied ones counted once.
        weight_bytes: parameters and buffers of the model.
        master_bytes: masters of the trained components; with ``masters="kahan"`` the rounding errors of 16-bit weights;
            0 if the masters are on the CPU.
        gradient_bytes: gradients of the masters. If these are on the CPU, gradients in the weights' dtype on their way there, at
            most those of all masters at once.
        optimizer_bytes: optimizer state of the masters; 0 if these are on the CPU.
        index_bytes: flat indices of the trained components; 0 for densely trained parameters.
        largest_gradient_bytes: the largest dense gradient; only one exists at a time.
        selection_bytes: temporary memory, beside the gradient, for choosing the components of the
            largest tensor by one micro-batch on a GPU: the scores and the search for the largest.
        write_bytes: temporary memory for writing the largest tensor's masters back: the masters in
            the weights' dtype, and their indices in int64, which torch's kernels require. With other masters than
            ``"fp32"`` also all masters. With several devices at least one bucket of gradients to send.
        host_bytes: originals of the trained components, and first values of the buffers; they are on the CPU. With ``masters_device="cpu"`` also masters, their
            gradients, those that arrive, and the optimizer state.
        publish_bytes: what publishing to a channel adds on the CPU: the published bits of the trained components and their
            indices (which a model on the CPU shares), copies of buffers and of parameters that are trained in full, and the changes of the version
            that is on its way if all trained components change. Tensors that are converted to be saved, such as fused
            experts, are copied whole, which is not counted.
    """

    n_trained: int
    n_total: int
    weight_bytes: int
    master_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    index_bytes: int
    largest_gradient_bytes: int
    selection_bytes: int
    write_bytes: int
    host_bytes: int
    publish_bytes: int

    @property
    def trained_bytes(self) -> int:
        """Sum of masters, gradients, optimizer state and indices."""
        return self.master_bytes + self.gradient_bytes + self.optimizer_bytes + self.index_bytes

    @property
    def peak_bytes(self) -> int:
        """The most bytes at any one time."""
        choosing = self.largest_gradient_bytes + self.selection_bytes
        backward = self.largest_gradient_bytes + self.optimizer_bytes
        writing = self.write_bytes + self.optimizer_bytes
        lasting = self.weight_bytes + self.trained_bytes - self.optimizer_bytes
        return lasting + max(choosing, backward, writing)

    def __str__(self) -> str:
        rows = [
            ("weights", self.weight_bytes),
            ("masters", self.master_bytes),
            ("gradients of masters", self.gradient_bytes),
            ("optimizer state", self.optimizer_bytes),
            ("indices", self.index_bytes),
            ("largest dense gradient", self.largest_gradient_bytes),
            ("choosing, at first", self.selection_bytes),
            ("writing back", self.write_bytes),
            ("peak without activations", self.peak_bytes),
            ("on the host", self.host_bytes),
            ("on the host to publish", self.publish_bytes),
        ]
        share = 100 * self.n_trained / self.n_total
        lines = [f"trained: {self.n_trained:,} of {self.n_total:,} components, {share:.2f} %"]
        return "\n".join(lines + [f"{name:<26}{_size_text(n):>12}" for name, n in rows])


@dataclass(frozen=True, kw_only=True)
class Plan(MemoryReport):
    """A memory report for a model that is not loaded, with methods that say what fits on a device.

    Attributes:
        sparse_rate: that given to ``plan``.
        fixed_bytes: weights and one dense gradient; these do not depend on the sparse rate.
        dtype: dtype of most of the weights, such as ``"bfloat16"``.
        left_out: a sentence that says which share of the weights is selected from, and what is left out.
        traffic: what a step sends; None for one device. All bytes of the plan are those of one device. If the
            weights are sharded, it holds its share of weights, masters and state, and one unit of layers, its weights
            and gradients, unsharded.
    """

    sparse_rate: float
    fixed_bytes: int
    dtype: str
    left_out: str
    traffic: Traffic | None = None

    def room_in(self, gb: float) -> int:
        """Return the bytes left for activations on a device of ``gb`` GiB; negative if too small."""
        return int(gb * GIB) - self.peak_bytes

    def highest_rate(self, gb: float, *, activations_gb: float = 0.0) -> float | None:
        """Return approximately the highest rate that fits beside the activations, None if none.

        The estimate assumes that trained bytes are proportional to the rate.
        """
        room = (gb - activations_gb) * GIB - self.fixed_bytes
        if room < 0:
            return None
        if not self.sparse_rate:
            return 1.0
        lasting = self.trained_bytes - self.optimizer_bytes
        bounds = [
            (room - self.selection_bytes, lasting),
            (room, self.trained_bytes),
            (room + self.largest_gradient_bytes, self.trained_bytes + self.write_bytes),
        ]
        rate = min(self.sparse_rate * has / needed for has, needed in bounds if needed)
        return None if rate < 0 else min(1.0, rate)

    def fits(self, gb: float = 24.0) -> str:
        """Return a sentence that says whether training fits on a device of ``gb`` GiB."""
        room = self.room_in(gb)
        highest = self.highest_rate(gb)
        if room >= 0:
            return f"fits in {gb:g} GiB, with {_size_text(room)} left for activations"
        if highest is None:
            return f"does not fit in {gb:g} GiB at any rate: weights and one gradient need more"
        return f"lacks {_size_text(-room)} in {gb:g} GiB; a rate of {highest:.4f} would just fit"

    def __str__(self) -> str:
        text = f"{super().__str__()}\n{self.fits()}; weights in {self.dtype}\n{self.left_out}"
        return text if self.traffic is None else f"{text}\n{self.traffic}"


def memory_of(
    model: nn.Module, parts: Iterable[SparseParameter], *, optimizer: str = "adamw"
) -> MemoryReport:
    """Return the memory report of training these parts of a model.

    Raises:
        ValueError: the optimizer is not one of ``OPTIMIZER_STATE_BYTES``.
    """
    rows, masters, masters_device = [], "fp32", "model"
    for part in parts:
        rows.append((part.parameter, part.train_num, part.trains_all, part.master.element_size()))
        masters = masters if part.lean is None else part.lean.masters
        masters_device = "cpu" if part.is_on_host else masters_device
    return MemoryReport(**_count(model, rows, optimizer, masters, masters_device))


@names_checked()
def plan(
    model: str | PathLike[str] | nn.Module | Any,
    sparse_rate: float,
    *,
    sparse_module: Names = ALL_LINEAR,
    exception: Names = (),
    dtype: torch.dtype | str | None = None,
    optimizer: str = "adamw",
    devices: int = 1,
    sharded: bool = False,
    masters: str = "fp32",
    masters_device: str = "model",
) -> Plan:
    """Return the memory that training would need; no weights are loaded.

    Args:
        model: a folder or a Hub id with a ``config.json``, a config of transformers, or a module,
            which may be on the meta device.
        sparse_rate: share of each tensor's components to train.
        sparse_module: as for ``SIFT``.
        exception: as for ``SIFT``.
        dtype: dtype of the weights, such as ``torch.float32`` or ``"bf16"``. By default that of the
            folder's safetensors files, else that of the config, else bfloat16. Ignored for a
            module.
        optimizer: one of ``OPTIMIZER_STATE_BYTES``.
        devices: number of ranks; the plan is for each of them.
        sharded: whether FSDP2 shards the weights over them, layer by layer.
        masters: as for ``SIFT``.
        masters_device: as for ``SIFT``.

    Raises:
        OSError: the folder or the model does not exist.
        TypeError: the model is none of these.
        ValueError: an argument is out of range, or transformers does not know the config's model.
    """
    if devices < 1:
        raise ValueError(f"devices is {devices}; it must be at least 1")
    if not (isinstance(model, nn.Module | str | PathLike) or hasattr(model, "architectures")):
        raise TypeError(
            f"model is of type {type(model).__name__}; give a folder, a Hub id, a config of transformers or a"
            " module"
        )
    empty = model if isinstance(model, nn.Module) else model_without_weights(model, dtype)
    rows = []
    targets = find_targets(empty, sparse_module, exception, needs_values=False)
    for target in targets:
        k = target.n_trained(sparse_rate)
        width = torch.promote_types(target.parameter.dtype, torch.float32).itemsize
        rows.append((target.parameter, k, k == target.parameter.numel(), width))
    if sharded and masters_device != "model":
        raise ValueError(
            f"masters_device is {masters_device!r}, but sharded weights need 'model'; leave one of them out"
        )
    counted = _count(empty, rows, optimizer, masters, masters_device)
    sent_bytes = sum(k * width for _, k, _, width in rows)
    traffic = None
    if devices != 1 or sharded:
        traffic = traffic_of(
            empty,
            [parameter for parameter, *_ in rows],
            master_bytes=sent_bytes,
            n_trained=counted["n_trained"],
            n_devices=devices,
            sharded=sharded,
        )
    if devices > 1 and not sharded:  # one bucket of gradients is copied to be sent
        bucket = min(sent_bytes, 4 * BUCKET)
        counted["write_bytes"] = max(counted["write_bytes"], bucket)
    if sharded:
        counted = _per_shard(counted, devices, unit_bytes(empty))
    fixed = counted["weight_bytes"] + counted["largest_gradient_bytes"]
    return Plan(
        **counted,
        sparse_rate=sparse_rate,
        fixed_bytes=fixed,
        dtype=_main_dtype(empty),
        left_out=left_out(empty, {target.parameter for target in targets}),
        traffic=traffic,
    )


def _per_shard(counted: dict[str, int], n: int, unit: int) -> dict[str, int]:
    """Return the counts for one of n shards, of which one unit is gathered at a time."""
    whole = ("n_trained", "n_total")
    shares = {name: size if name in whole else -(-size // n) for name, size in counted.items()}
    # The unit's weights and its gradients exist unsharded at the same time.
    return {**shares, "largest_gradient_bytes": 2 * unit}


def _count(
    model: nn.Module,
    rows: list[tuple[nn.Parameter, int, bool, int]],
    optimizer: str,
    masters: str,
    masters_device: str,
) -> dict[str, int]:
    if optimizer not in OPTIMIZER_STATE_BYTES:
        known = ", ".join(OPTIMIZER_STATE_BYTES)
        raise ValueError(f"optimizer is {optimizer!r}; choose one of {known}")
    check_masters(masters, masters_device)
    n_trained = sum(k for _, k, _, _ in rows)
    gradient_bytes = sum(k * width for _, k, _, width in rows)
    narrow = sum(k * p.element_size() for p, k, _, width in rows if p.element_size() < width)
    lasting = {"fp32": gradient_bytes, "stochastic": 0, "kahan": narrow}[masters]
    writing = max(
        (k * (8 + p.element_size()) for p, k, trains_all, _ in rows if not trains_all), default=0
    )
    if masters != "fp32":  # the masters exist during the step
        writing += gradient_bytes + max(4 * k for _, k, _, _ in rows)
    optimizer_bytes = n_trained * OPTIMIZER_STATE_BYTES[optimizer]
    weights_dtype_bytes = sum(k * p.element_size() for p, k, _, _ in rows)
    buffer_bytes = sum(b.numel() * b.element_size() for b in set(saved_buffers(model).values()))
    host_bytes = weights_dtype_bytes + buffer_bytes
    if masters_device == "cpu":
        host_bytes += lasting + gradient_bytes + weights_dtype_bytes + optimizer_bytes
        lasting, gradient_bytes, optimizer_bytes = 0, weights_dtype_bytes, 0
    chosen = [(p, k) for p, k, trains_all, _ in rows if not trains_all]
    tensors = {*model.parameters(), *model.buffers()}
    return {
        "n_trained": n_trained,
        "n_total": sum(p.numel() for p in model.parameters()),
        "weight_bytes": sum(t.numel() * t.element_size() for t in tensors),
        "master_bytes": lasting,
        "gradient_bytes": gradient_bytes,
        "optimizer_bytes": optimizer_bytes,
        "index_bytes": sum(
            0 if trains_all else k * index_dtype(p.numel()).itemsize for p, k, trains_all, _ in rows
        ),
        "largest_gradient_bytes": max(p.numel() * p.element_size() for p, _, _, _ in rows),
        "selection_bytes": max(
            (p.numel() * p.element_size() + search_bytes(p.numel(), k) for p, k in chosen),
            default=0,
        ),
        "write_bytes": writing,
        "host_bytes": host_bytes,
        "publish_bytes": buffer_bytes + sum(_publish_bytes(p, k) for p, k, _, _ in rows),
    }


def _publish_bytes(parameter: nn.Parameter, k: int) -> int:
    """Return the bytes that publishing keeps of a parameter with k trained components."""
    n, width = parameter.numel(), parameter.element_size()
    whole = n * width
    index = 0 if k == n else k * index_dtype(n).itemsize
    on_its_way = min(k * (width + (4 if n <= 1 << 32 else 8)), whole)
    return k * width + index + on_its_way


def _main_dtype(model: nn.Module) -> str:
    counts: Counter[torch.dtype] = Counter()
    for parameter in model.parameters():
        counts[parameter.dtype] += parameter.numel()
    return str(counts.most_common(1)[0][0]).removeprefix("torch.")


def _size_text(n_bytes: int) -> str:
    if abs(n_bytes) >= GIB / 10:
        return f"{n_bytes / GIB:.2f} GiB"
    return f"{n_bytes / (1 << 20):.2f} MiB"
