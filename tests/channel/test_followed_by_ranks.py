"""``Follower`` with a model that FSDP2 or tensor parallelism divides among ranks, in real processes."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from live.divided_helpers import Net, divided, local, make_model, outcome, weights, whole
from live.live_helpers import State, same
from live.model_helpers import change, saved
from rank_helpers import RankPool
from torch.distributed.fsdp import fully_shard

import sparsedelta
from sparsedelta.channel import following, model_replica
from sparsedelta.channel.following import SyncReport
from sparsedelta.channel.layout import object_name
from sparsedelta.channel.publisher import publish_checkpoint
from sparsedelta.live import held, patch

N_VERSIONS = 4


def model_at(version: int) -> Net:
    model = Net()
    for step in range(1, version):
        change(model, every=step + 2)
    return model


def state_at(version: int) -> State:
    state: State = model_at(version).state_dict()
    return state


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A channel with four versions, the first of which is an anchor."""
    place = tmp_path_factory.mktemp("followed") / "channel"
    state = state_at(1)
    with sparsedelta.Publisher(place, state, anchor_ratio=None) as publisher:
        for version in range(1, N_VERSIONS + 1):
            for name, tensor in state_at(version).items():
                state[name].copy_(tensor)
            publisher.publish(version).result()
    return str(place)


class Case:
    """A divided model that follows a channel, of which only rank 0 knows the place."""

    def __init__(self, rank: int, place: str, *, at: int = 1, kind: str = "fsdp2") -> None:
        self.model = divided(model_at(at), kind)
        self.follower = sparsedelta.Follower("nowhere" if rank else place, self.model)

    def is_at(self, version: int) -> bool:
        found: bool = same(whole(self.model), state_at(version))
        return found and self.follower.version == version


def follow_all(rank: int, place: str, kind: str) -> list[SyncReport]:
    case = Case(rank, place, kind=kind)
    reports = []
    for version in (1, 2, None, 3):
        reports.append(case.follower.sync(version))
        assert case.is_at(version or N_VERSIONS)
        with case.follower.reading() as held_version:
            assert held_version == reports[-1].version
    case.follower.close()
    other = Case(rank, place, at=N_VERSIONS + 1, kind=kind)
    reports.append(other.follower.sync())
    assert other.is_at(N_VERSIONS)
    return reports


@pytest.mark.parametrize("kind", ["fsdp2", "tensor", "state dict"])
def test_following(pool: RankPool, place: str, kind: str) -> None:
    """The first version is found by its digests; two deltas are one change; an older version takes an anchor."""
    first, second = pool.results(follow_all, place, kind)
    assert first == second
    assert [(one.version, one.n_versions, one.anchor) for one in first] == [
        (1, 0, False), (2, 1, False), (4, 2, False), (3, 3, True), (4, 4, True)
    ]  # fmt: skip


def by_exponents(rank: int, place: str) -> list[int]:
    model = torch.nn.Linear(256, 127, bias=False, dtype=torch.bfloat16)
    model.weight.data = weights(0)
    fully_shard(model)
    follower = sparsedelta.Follower(place, model)
    found = []
    for version in (1, 3):
        found.append(follower.sync(version).n_versions)
        assert same(whole(model), {"weight": weights(version - 1)})
    return found


def test_deltas_that_are_coded_by_exponents(pool: RankPool, tmp_path: Path) -> None:
    """Positions of the second delta are found by what the first one makes of the model."""
    state = {"weight": weights(0)}
    with sparsedelta.Publisher(tmp_path / "channel", state, anchor_ratio=None) as publisher:
        for step in range(3):
            state["weight"].copy_(weights(step))
            publisher.publish(step).result()
    with sparsedelta.diff({"weight": weights(0)}, {"weight": weights(1)}) as delta:
        assert any(chunk.coding.classes for chunk in delta.tensors[0].chunks)
    assert pool.results(by_exponents, str(tmp_path / "channel")) == [[0, 2]] * 2


def converted(rank: int, place: str, what: str) -> list[tuple[int, bool]]:
    found = []
    target = make_model(what)
    change(target, every=3)
    for is_known in (True, False):
        model = make_model(what)
        if not is_known:
            change(model, every=5)
        model = divided(model, "fsdp2")
        report = sparsedelta.Follower(place, model).sync()
        assert same(whole(model), target.state_dict())
        found.append((report.n_versions, report.anchor))
    return found


@pytest.mark.parametrize("what", ["tied llama", "mixtral"])
def test_a_converted_model(pool: RankPool, tmp_path: Path, what: str) -> None:
    """Its checkpoint has other names; it is recognised, and written as a whole if it is not."""
    base, target = make_model(what), make_model(what)
    change(target, every=3)
    folders = saved(base, tmp_path / "base"), saved(target, tmp_path / "target")
    with sparsedelta.Channel(tmp_path / "channel") as channel:
        publish_checkpoint(channel, folders[0])
        publish_checkpoint(channel, folders[1], base=folders[0])
    found = pool.results(converted, str(tmp_path / "channel"), what)
    assert found == [[(1, False), (2, True)]] * 2


def fault(what: str, rank: int) -> Callable[..., None]:
    """Return a function that fails on rank 1 in its third call."""
    calls: list[None] = []

    def faulty(*args: Any) -> None:
        calls.append(None)
        if rank == 1 and len(calls) == 3:
            if what == "Ctrl-C":
                signal.raise_signal(signal.SIGINT)
            else:
                raise OSError("the device fails")
        held.scatter(*args)

    return faulty


def failing(rank: int, place: str, what: str) -> tuple[str, int | None, bool, tuple[int, bool]]:
    """Let something fail on one rank; return the error, the version after it, and how all get to the last one."""
    case = Case(rank, place)
    follower = case.follower
    follower.sync(2)
    with pytest.MonkeyPatch.context() as faults:
        if what in ("error", "Ctrl-C"):
            faults.setattr(patch, "scatter", fault(what, rank))
        elif what == "Ctrl-C while reading" and rank == 0:
            faults.setattr(following, "fetch", lambda *args: signal.raise_signal(signal.SIGINT))
        elif what == "memory" and rank == 1:
            faults.setattr(model_replica, "find_unwritten", lambda patches: "up.weight")
        elif what == "another model" and rank == 1:
            with torch.no_grad():
                local(case.model.up.weight).add_(1)
        error = outcome(lambda: follower.sync(7 if what == "another version" and rank else None))
    version, is_at_2 = follower.version, same(whole(case.model), state_at(2))
    report = follower.sync()
    assert case.is_at(N_VERSIONS)
    return error, version, is_at_2, (report.n_versions, report.anchor)


@pytest.mark.parametrize(
    ("what", "error", "version", "unchanged", "way"),
    [
        ("error", "OSError: the device fails", None, True, (2, False)),
        ("Ctrl-C", "KeyboardInterrupt: ", None, True, (2, False)),
        ("Ctrl-C while reading", "KeyboardInterrupt: ", 2, True, (2, False)),
        ("memory", "Uncertain: tensor 'up.weight' of the model does not", None, True, (2, False)),
        ("another model", "Uncertain: what is held is not version 2", None, False, (4, True)),
        ("another version", "ConflictError: the ranks make different", 2, True, (2, False)),
    ],
)
def test_all_or_none(
    pool: RankPool,
    place: str,
    what: str,
    error: str,
    version: int | None,
    unchanged: bool,
    way: tuple[int, bool],
) -> None:
    """What fails on one rank fails on all in the same way, and the next call repairs it."""
    first, second = pool.results(failing, place, what)
    assert first == second
    assert first[0].startswith(error)
    assert first[1:] == (version, unchanged, way)


def refused(rank: int, place: str) -> tuple[list[str], bool]:
    case = Case(rank, place)
    case.follower.sync(2)
    errors = [outcome(lambda: case.follower.sync(9)), outcome(case.follower.sync)]
    missing = divided(torch.nn.Linear(3, 3), "state dict")
    errors.append(outcome(lambda: sparsedelta.Follower(place, missing).sync(1)))
    channel: Any = 3 if rank == 0 else place
    errors.append(outcome(lambda: sparsedelta.Follower(channel, case.model)))
    return errors, case.is_at(2)


def test_bad_versions_change_nothing(pool: RankPool, tmp_path: Path) -> None:
    place = tmp_path / "channel"
    state = state_at(1)
    with sparsedelta.Publisher(place, state, anchor_ratio=None) as publisher:
        for version in (1, 2, 3):
            for name, tensor in state_at(version).items():
                state[name].copy_(tensor)
            publisher.publish(version).result()
    entry = sparsedelta.Channel(place).entry(3)
    assert entry.delta
    path = place / object_name("deltas", 3, entry.delta)
    raw = path.read_bytes()
    path.chmod(0o600)
    path.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    first, second = pool.results(refused, str(place))
    assert first == second
    errors, unchanged = first
    assert unchanged
    assert errors[0].startswith("Behind: version 9 is not published")
    assert errors[1].startswith("BadVersion: object deltas/0000000003")
    assert errors[2].startswith("StructureMismatch: tensor ")
    assert errors[3].startswith("TypeError: channel is of type int")


def disconnected(rank: int, place: str) -> tuple[str, int | None, bool, bool]:
    """Lose the connection after something was written; then follow again."""
    case = Case(rank, place)
    case.follower.sync(2)
    with pytest.MonkeyPatch.context() as faults:

        def lost(*args: Any, **options: Any) -> None:
            faults.undo()
            raise RuntimeError("connection closed by peer")

        def write_and_lose(*args: Any) -> None:
            faults.setattr(dist, "all_reduce", lost)
            held.scatter(*args)

        faults.setattr(patch, "scatter", write_and_lose)
        error = outcome(case.follower.sync)
    version, unchanged = case.follower.version, same(whole(case.model), state_at(2))
    case.follower.sync()
    return error, version, unchanged, case.is_at(N_VERSIONS)


def test_a_lost_connection(pool: RankPool, place: str) -> None:
    for error, version, unchanged, is_at_last in pool.results(disconnected, place):
        assert error.startswith("RankLost: another rank stopped or cannot be reached")
        assert version is None
        assert unchanged
        assert is_at_last
