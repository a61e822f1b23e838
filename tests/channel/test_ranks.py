"""Two ranks publish a model that FSDP2 or tensor parallelism divides between them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from channel.weights import State
from rank_helpers import RankPool
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import sparsedelta
from sparsedelta.channel.ranks import RankPublisher
from sparsedelta.errors import HeadMoved, SparseDeltaError, StructureMismatch


class Net(torch.nn.Module):
    """Sizes that two ranks cannot divide evenly, a buffer, and a parameter of one element."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = torch.nn.Linear(6, 10, dtype=torch.bfloat16)
        self.down = torch.nn.Linear(10, 7, dtype=torch.bfloat16)
        self.scale = torch.nn.Parameter(torch.ones(1))
        self.register_buffer("seen", torch.zeros(3, dtype=torch.int64))


def change(model: Any, step: int) -> None:
    """Change some elements, which their values choose, so that ranks and the whole model agree."""
    for tensor in model.state_dict().values():
        held = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[held.element_size()]
        chosen = held.view(kind) % 5 == step % 3
        held[chosen] += step


def divided(kind: str) -> Any:
    model = Net()
    if kind == "fsdp2":
        return fully_shard(model)
    if kind == "replicated":
        mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicas", "shards"))
        return fully_shard(model, mesh=mesh)
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    if kind == "tensor parallel":
        return parallelize_module(model, init_device_mesh("cpu", (2,)), plan)
    names = ("replicas", "shards", "tensor") if kind == "all three" else ("shards", "tensor")
    mesh = init_device_mesh("cpu", (1, 2, 2)[-len(names) :], mesh_dim_names=names)
    parallelize_module(model, mesh["tensor"], plan)
    return fully_shard(model, mesh=mesh[names[:-1]])


def run(rank: int, kind: str, root: str, n: int, *, gives_whole: bool) -> list[Any]:
    """Publish n versions; return the numbers of elements that this rank holds."""
    model = divided(kind)
    channel = sparsedelta.Channel(f"{root}/channel")
    whole = Net() if gives_whole and rank == 0 else None
    with RankPublisher(channel, model, whole=whole) as publisher:
        for step in range(n):
            if step:
                change(model, step)
            publication = publisher.publish(step)
            assert (publication is None) == (rank != 0)
            if publication:
                publication.result()
    held = [t.to_local() if isinstance(t, DTensor) else t for t in model.parameters()]
    return [one.numel() for one in held]


def resumed(rank: int, root: str) -> list[int]:
    """Publish once more from the weights of the last version, and return the versions that have a delta."""
    model = divided("fsdp2")
    for step in (1, 2):
        change(model, step)
    channel = sparsedelta.Channel(f"{root}/channel")
    with RankPublisher(channel, model) as publisher:
        change(model, 3)
        publisher.publish(3)
    return [entry.version for entry in channel.log() if entry.delta]


def overtaken(rank: int, root: str) -> str:
    """Publish after another publisher did; return the error."""
    model = divided("fsdp2")
    channel = sparsedelta.Channel(f"{root}/channel")
    publisher = RankPublisher(channel, model)
    if rank == 0:
        with sparsedelta.Publisher(channel, Net()) as other:
            other.publish()
    try:
        publisher.publish(1)
        publisher.close()
    except SparseDeltaError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def mismatched(rank: int, root: str) -> str:
    whole = torch.nn.Linear(2, 2) if rank == 0 else None
    with pytest.raises(StructureMismatch) as caught:
        RankPublisher(sparsedelta.Channel(f"{root}/channel"), divided("fsdp2"), whole=whole)
    return str(caught.value)


@pytest.fixture(scope="module")
def ranks() -> Iterator[RankPool]:
    pool = RankPool(2)
    yield pool
    pool.close()


def expected(n: int) -> State:
    model = Net()
    for step in range(1, n):
        change(model, step)
    return dict(model.state_dict())


def is_equal(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(one[name].view(torch.uint8), other[name].view(torch.uint8)) for name in one
    )


@pytest.mark.parametrize("gives_whole", [False, True])
@pytest.mark.parametrize("kind", ["fsdp2", "tensor parallel"])
def test_ranks_publish_what_they_hold(
    ranks: RankPool, kind: str, tmp_path: Path, *, gives_whole: bool
) -> None:
    held = ranks.results(run_one, kind, str(tmp_path), 3, gives_whole)
    total = sum(p.numel() for p in Net().parameters())
    assert all(sum(one) < total for one in held)  # no rank holds all
    channel = sparsedelta.Channel(tmp_path / "channel")
    follower = sparsedelta.Follower(channel, tmp_path / "out")
    for version in (1, 3, 2):
        follower.sync(version)
        assert is_equal(load_file(tmp_path / "out"), expected(version)), version
    model = Net()
    sparsedelta.Follower(channel, model).sync()
    assert is_equal(dict(model.state_dict()), expected(3))
    assert [bool(entry.delta) for entry in channel.log()] == [True, True, False]


def run_one(rank: int, kind: str, root: str, n: int, gives_whole: bool) -> list[Any]:
    return run(rank, kind, root, n, gives_whole=gives_whole)


@pytest.mark.parametrize("kind", ["fsdp2 and tensor parallel", "all three"])
def test_four_ranks_in_two_directions(kind: str, tmp_path: Path) -> None:
    pool = RankPool(4)
    try:
        pool.results(run_one, kind, str(tmp_path), 3, False)
    finally:
        pool.close()
    follower = sparsedelta.Follower(sparsedelta.Channel(tmp_path / "channel"), tmp_path / "out")
    for version in (1, 3):
        follower.sync(version)
        assert is_equal(load_file(tmp_path / "out"), expected(version)), version


def test_replicas_send_once(ranks: RankPool, tmp_path: Path) -> None:
    """Ranks that hold the same part: the first of them sends it."""
    ranks.results(run_one, "replicated", str(tmp_path), 2, False)
    sparsedelta.Follower(sparsedelta.Channel(tmp_path / "channel"), tmp_path / "out").sync()
    assert is_equal(load_file(tmp_path / "out"), expected(2))


def test_a_run_that_resumes_continues_with_deltas(ranks: RankPool, tmp_path: Path) -> None:
    ranks.results(run_one, "fsdp2", str(tmp_path), 3, False)
    assert ranks.results(resumed, str(tmp_path))[0] == [4, 3, 2]
    sparsedelta.Follower(sparsedelta.Channel(tmp_path / "channel"), tmp_path / "out").sync()
    assert is_equal(load_file(tmp_path / "out"), expected(4))


def test_an_error_of_rank_0_is_raised_on_all(ranks: RankPool, tmp_path: Path) -> None:
    first, second = ranks.results(overtaken, str(tmp_path))
    assert first.startswith(f"{HeadMoved.__name__}: version 1")
    assert second.startswith("SparseDeltaError: rank 0 has failed: version 1")
    found = ranks.results(mismatched, str(tmp_path))
    assert found[0] == found[1]
    assert "the whole model has no tensor 'scale'" in found[0]
