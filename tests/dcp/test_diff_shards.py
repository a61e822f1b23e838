"""The delta that all ranks of a divided model make has the bytes of the one that a single process makes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference_decoder
import torch
from rank_helpers import RankPool
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import sparsedelta
from sparsedelta.distributed import diff_shards, shard_rows
from sparsedelta.errors import SparseDeltaError
from sparsedelta.tensors import compare
from sparsedelta.tensors.compare_tasks import Coder


@pytest.fixture(scope="module")
def four() -> Iterator[RankPool]:
    made = RankPool(4)
    yield made
    made.close()


class Net(nn.Module):
    """Sizes that ranks cannot divide evenly, several dtypes, a buffer, a scalar and an empty tensor."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Linear(61, 90, dtype=torch.bfloat16)
        self.down = nn.Linear(90, 47)
        self.experts = nn.Parameter(torch.randn(5, 7, 11, dtype=torch.float64))
        self.scale = nn.Parameter(torch.ones(1, dtype=torch.float16))
        self.register_buffer("seen", torch.zeros(3, dtype=torch.int64))
        self.register_buffer("step", torch.tensor(7))
        self.register_buffer("none", torch.zeros(0, 3))


def change(model: Any, share: int) -> None:
    """Change one of ``share`` elements, which their values choose, so that ranks and the whole model agree."""
    for name, tensor in model.state_dict().items():
        held = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if name != "down.bias":  # one tensor stays
            kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[held.element_size()]
            bits = held.view(kind)
            bits[bits % share == 0] += 3


def divided(way: str) -> Any:
    model = Net()
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    if way == "rows":
        return fully_shard(model)
    if way == "replicas":
        return fully_shard(
            model, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "shard"))
        )
    if way == "columns":
        return parallelize_module(
            model, init_device_mesh("cpu", (torch.distributed.get_world_size(),)), plan
        )
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("shard", "tensor"))
    parallelize_module(model, mesh["tensor"], plan)
    return fully_shard(model, mesh=mesh["shard"])


def write_base(folder: Path) -> Path:
    """Write the model as two shards, with a tensor that the model lacks, and a file."""
    base = folder / "base"
    base.mkdir()
    state = dict(Net().state_dict())
    first = {name: state.pop(name) for name in ("up.weight", "seen", "none")}
    save_file(first, base / "a.safetensors", {"format": "pt"})
    save_file({**state, "other": torch.arange(9)}, base / "b.safetensors")
    (base / "config.json").write_text("{}\n")
    return base


Patch = Callable[[Any, str, int], None]


def small_chunks(patch: Patch) -> None:
    """Divide the small tensors of the tests into many chunks."""
    for module in (compare, shard_rows):
        patch(module, "MAX_SPAN", 1280)
        patch(module, "BLOCK_BYTES", 1 << 11)
    patch(shard_rows, "_SENT_ELEMENTS", 50)
    patch(shard_rows, "_SENT_BYTES", 100)


def diffed(rank: int, folder: Path, way: str, share: int, options: dict[str, Any]) -> bytes | None:
    small_chunks(setattr)
    model = divided(way)
    change(model, share)
    found = diff_shards(folder / "base", model, strict=False, info={"a": 1}, **options)
    if found is None:
        return None
    with found as delta:
        return delta.to_bytes()


def expected(folder: Path, share: int, options: dict[str, Any]) -> bytes:
    whole = Net()
    change(whole, share)
    given: dict[str, Any] = {"strict": False, "info": {"a": 1}, **options}
    with sparsedelta.diff(folder / "base", whole, **given) as delta:
        return delta.to_bytes()


def check(
    pool: RankPool, n: int, folder: Path, way: str, share: int, options: dict[str, Any]
) -> None:
    base = write_base(folder)
    first, *others = pool.results(diffed, folder, way, share, options)
    assert others == [None] * (n - 1)
    assert first == expected(folder, share, options)
    (folder / "delta.sd").write_bytes(first)
    reference_decoder.apply(base, folder / "delta.sd", folder / "out")
    whole = Net()
    change(whole, share)
    state = whole.state_dict()
    for name in ("a.safetensors", "b.safetensors"):
        for key, tensor in load_file(folder / "out" / name).items():
            assert torch.equal(tensor, state.get(key, torch.arange(9)))


@pytest.mark.parametrize("way", ["rows", "columns"])
@pytest.mark.parametrize(
    ("share", "options"),
    [(50, {}), (3, {"level": "max", "base_id": "org/model"}), (1, {"values": "target"})],
)
def test_two_ranks(
    pool: RankPool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    way: str,
    share: int,
    options: dict[str, Any],
) -> None:
    small_chunks(monkeypatch.setattr)
    check(pool, 2, tmp_path, way, share, options)


@pytest.mark.parametrize("way", ["rows", "replicas", "both"])
def test_four_ranks(
    four: RankPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    small_chunks(monkeypatch.setattr)
    check(four, 4, tmp_path, way, 20, {"level": "fast", "standalone": True})


def failing(rank: int, folder: Path, what: str) -> None:
    model = divided("rows")
    change(model, 9)
    given: dict[str, Any] = {"strict": False}
    if what == "options" and rank:
        given["level"] = "max"
    if what == "strict":
        given["strict"] = True
    if what == "base_id" and rank:
        given["base_id"] = float("nan")
    if what == "shape":
        model.register_buffer("seen", torch.zeros(4, dtype=torch.int64))
    if what == "name":
        model.register_buffer("more", torch.zeros(4))
    diff_shards(folder / "base", model, **given)


@pytest.mark.parametrize(
    ("what", "first", "second"),
    [
        ("options", "a rank has other options", "a rank has other options"),
        ("strict", "has tensor 'other', which the model lacks", "has tensor 'other'"),
        ("base_id", "rank 1 has failed: base_id cannot be recorded", "base_id cannot be recorded"),
        ("shape", r"'seen' is I64 \[4\] in the model and I64 \[3\]", "'seen' is I64"),
        ("name", "tensor 'more' of the model is not there", "'more' of the model is not there"),
    ],
)
def test_refusals(pool: RankPool, tmp_path: Path, what: str, first: str, second: str) -> None:
    write_base(tmp_path)
    for error, sentence in zip(pool.run(failing, tmp_path, what), (first, second), strict=True):
        assert isinstance(error, SparseDeltaError | ValueError)
        with pytest.raises((SparseDeltaError, ValueError), match=sentence):
            raise error


def broken(rank: int, folder: Path, where: str) -> None:
    """Rank 1 fails while it compares, while it codes, or while it computes digests."""
    small_chunks(setattr)
    model = divided("rows")
    change(model, 2)
    real: Any = {"compare": np, "code": Coder, "digest": shard_rows}[where]
    name = {"compare": "flatnonzero", "code": "comparison", "digest": "digest_tensor"}[where]
    kept = getattr(real, name)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("no space left")

    if rank:
        setattr(real, name, fail)
    try:
        diff_shards(folder / "base", model, strict=False)
    finally:
        setattr(real, name, kept)


@pytest.mark.parametrize("where", ["compare", "code", "digest"])
def test_an_error_of_one_rank_ends_all(pool: RankPool, tmp_path: Path, where: str) -> None:
    write_base(tmp_path)
    first, second = pool.run(broken, tmp_path, where)
    assert str(first) == "rank 1 has failed: no space left"
    assert isinstance(second, OSError)
