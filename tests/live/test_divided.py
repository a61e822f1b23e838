"""Deltas on models that FSDP2 or tensor parallelism divides among ranks, in real processes."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import small_chunks
from live.divided_helpers import (
    N_RANKS,
    Case,
    Net,
    local,
    make_model,
    outcome,
    save_delta,
    weights,
    whole,
)
from live.live_helpers import same
from live.model_helpers import change
from rank_helpers import RankPool
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, distribute_tensor

import sparsedelta
from sparsedelta.errors import (
    AlreadyApplied,
    BaseMismatch,
    ConflictError,
    PartlyApplied,
)
from sparsedelta.live import decoding, patch


@pytest.fixture(scope="module")
def ranks() -> Iterator[RankPool]:
    pool = RankPool(N_RANKS)
    yield pool
    pool.close()


def there_and_back(rank: int, folder: str, what: str, kind: str) -> bool:
    """Apply and revert in all ways; return whether this rank holds less than the model."""
    case = Case(folder, what, kind)
    delta, model = case.delta, case.model
    for verify in ("touched", "full", "none"):
        delta.apply_(model, verify=verify)
        assert case.is_at(case.target), verify
        if verify != "none":
            with pytest.raises(AlreadyApplied):
                delta.apply_(model, verify=verify)
        delta.revert_(model, verify=verify)
        assert case.is_at(case.base), verify
        with delta.applied(model, verify=verify):
            assert case.is_at(case.target)
        assert case.is_at(case.base)
    tensors = model.values() if isinstance(model, dict) else model.parameters()
    n_held = sum(local(tensor).numel() for tensor in tensors)
    return bool(n_held < sum(tensor.numel() for tensor in case.base.values()))


@pytest.mark.parametrize("kind", ["fsdp2", "tensor", "state dict"])
def test_there_and_back(ranks: RankPool, tmp_path: Path, kind: str) -> None:
    save_delta(tmp_path)
    assert ranks.results(there_and_back, str(tmp_path), "net", kind) == [True] * N_RANKS


def coded_by_base(rank: int, folder: str) -> bool:
    model = torch.nn.Linear(256, 127, bias=False, dtype=torch.bfloat16)
    model.weight.data = weights(0)
    fully_shard(model)
    delta = sparsedelta.load(f"{folder}/delta.sd")
    delta.apply_(model, verify="full")
    assert same(whole(model), {"weight": weights(1)})
    with pytest.raises(AlreadyApplied):
        delta.apply_(model)
    model.load_state_dict({"weight": distribute(model, weights(2))})
    with pytest.raises(BaseMismatch):
        delta.apply_(model)
    return same(whole(model), {"weight": weights(2)})


def distribute(model: Any, tensor: torch.Tensor) -> Any:
    return distribute_tensor(tensor, model.weight.device_mesh, model.weight.placements)


@pytest.mark.parametrize("span", [1 << 24, 1 << 12])
def test_coded_by_base(
    ranks: RankPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, span: int
) -> None:
    """One chunk or several, whose positions are found by the base's exponents on all ranks."""
    small_chunks(monkeypatch, span, 1 << 19)
    with sparsedelta.diff({"weight": weights(0)}, {"weight": weights(1)}) as delta:
        delta.save(tmp_path / "delta.sd")
        chunks = delta.tensors[0].chunks
    assert (len(chunks) > 1) == (span < 1 << 24)
    assert span < 1 << 24 or any(chunk.coding.classes for chunk in chunks)
    assert all(ranks.results(coded_by_base, str(tmp_path)))


@pytest.mark.parametrize("what", ["tied llama", "mixtral", "tied qwen2-moe"])
def test_converted(ranks: RankPool, tmp_path: Path, what: str) -> None:
    """A checkpoint that has other names and one tensor for each expert."""
    save_delta(tmp_path, what)
    assert ranks.results(there_and_back, str(tmp_path), what, "fsdp2") == [True] * N_RANKS


def test_replicas(ranks: RankPool, tmp_path: Path) -> None:
    save_delta(tmp_path)
    assert all(ranks.results(there_and_back, str(tmp_path), "net", "replicas"))


def test_four_ranks_in_two_directions(tmp_path: Path) -> None:
    save_delta(tmp_path)
    pool = RankPool(4)
    try:
        assert pool.results(there_and_back, str(tmp_path), "net", "both") == [True] * 4
        assert pool.results(there_and_back, str(tmp_path), "net", "fsdp2") == [True] * 4
    finally:
        pool.close()


def after_a_forward_pass(rank: int, folder: str) -> bool:
    """FSDP2 keeps the full tensors of the root after a forward pass; they are freed, not written."""
    case = Case(folder, "net", "fsdp2")
    tokens = torch.arange(4)
    with torch.no_grad():
        case.model(tokens)
        case.delta.apply_(case.model)
        found = case.model(tokens)
    expected = Net()
    expected.load_state_dict(case.target)
    assert case.is_at(case.target)
    return torch.equal(found, expected(tokens))


def test_after_a_forward_pass(ranks: RankPool, tmp_path: Path) -> None:
    save_delta(tmp_path)
    assert all(ranks.results(after_a_forward_pass, str(tmp_path)))


def broken(rank: int, folder: str, what: str) -> tuple[str, str, str, bool]:
    """Break something on rank 1; return the errors of applying in three ways, and whether nothing was changed."""
    case = Case(folder, "net", "replicas" if what == "a replica" else "fsdp2")
    tensors = {**dict(case.model.named_parameters()), **dict(case.model.named_buffers())}
    delta = case.delta
    if rank == 1:
        if what == "another delta":
            delta = sparsedelta.load(f"{folder}/other.sd")
        elif what in ("a shard", "a replica"):
            local(tensors["up.weight"]).view(torch.int16).bitwise_xor_(2)
        elif what == "a buffer":
            tensors["seen"][::7] += 2
        elif what == "a buffer is the target's":
            tensors["seen"].copy_(case.target["seen"])
    before = [local(tensor).clone() for tensor in tensors.values()]
    touched = outcome(lambda: delta.apply_(case.model))
    full = outcome(lambda: delta.apply_(case.model, verify="full"))
    context = outcome(lambda: delta.applied(case.model).__enter__())
    unchanged = all(
        torch.equal(one.view(torch.uint8), local(tensor).view(torch.uint8))
        for one, tensor in zip(before, tensors.values(), strict=True)
    )
    return touched, full, context, unchanged


@pytest.mark.parametrize(
    ("what", "error", "says"),
    [
        ("a shard", BaseMismatch, "'up.weight' has at its touched positions neither"),
        ("a replica", BaseMismatch, "hold the same elements of tensor 'up.weight' have different"),
        ("a buffer", BaseMismatch, "'seen' has at its touched positions neither"),
        ("a buffer is the target's", PartlyApplied, "'seen' among them"),
        ("another delta", ConflictError, "the ranks have different deltas"),
    ],
)
def test_nothing_is_changed(
    ranks: RankPool, tmp_path: Path, what: str, error: type[Exception], says: str
) -> None:
    """A mistake on one rank is the same error on all, and none changes anything."""
    save_delta(tmp_path)
    target = make_model("net")
    change(target, every=5)
    with sparsedelta.diff(make_model("net"), target) as other:
        other.save(tmp_path / "other.sd")
    first, second = ranks.results(broken, str(tmp_path), what)
    assert first == second
    assert first[3]
    assert first[0].startswith(f"{error.__name__}: ")
    assert says in first[0]
    assert first[1].startswith(f"{error.__name__}: ")
    assert first[2] == first[0]


def failing(rank: int, folder: str, when: str, what: str) -> tuple[list[str], bool]:
    """Let something fail on rank 1 while the delta is read or written; then try again."""
    case = Case(folder, "net", "fsdp2")
    module, name = (patch, "scatter") if when == "writing" else (decoding, "touched_digest")
    real, calls = getattr(module, name), list[None]()

    def faulty(*args: Any) -> Any:
        calls.append(None)
        if rank == 1 and len(calls) == 3:
            if what == "Ctrl-C":
                os.kill(os.getpid(), signal.SIGINT)
            elif what == "two Ctrl-C" and when == "writing":
                signal.raise_signal(signal.SIGINT)
                signal.raise_signal(signal.SIGINT)
            else:
                raise OSError("the device fails")
        return real(*args)

    setattr(module, name, faulty)
    try:
        found = [outcome(lambda: case.delta.apply_(case.model))]
        assert case.is_at(case.base)
        calls.clear()
        found.append(outcome(lambda: case.delta.applied(case.model).__enter__()))
        assert case.is_at(case.base)
    finally:
        setattr(module, name, real)
    case.delta.apply_(case.model)
    return found, case.is_at(case.target)


@pytest.mark.parametrize("what", ["error", "Ctrl-C", "two Ctrl-C"])
@pytest.mark.parametrize("when", ["reading", "writing"])
def test_all_or_none(ranks: RankPool, tmp_path: Path, when: str, what: str) -> None:
    """A failure of one rank takes all ranks back, with the same error; then the delta can be applied."""
    save_delta(tmp_path)
    first, second = ranks.results(failing, str(tmp_path), when, what)
    assert first == second
    errors, is_at_target = first
    assert is_at_target
    is_signal = what == "Ctrl-C" or (what, when) == ("two Ctrl-C", "writing")
    assert errors == ["KeyboardInterrupt: " if is_signal else "OSError: the device fails"] * 2


def refused(rank: int, folder: str) -> list[str]:
    case = Case(folder, "net", "fsdp2")
    mesh = init_device_mesh("cpu", (N_RANKS,))
    partial = {"weight": DTensor.from_local(torch.ones(4, 4), mesh, [Partial()], run_check=False)}
    with sparsedelta.diff({"weight": torch.zeros(4, 4)}, {"weight": torch.ones(4, 4)}) as delta:
        return [
            outcome(lambda: sparsedelta.Snapshot(case.model)),
            outcome(lambda: sparsedelta.diff(case.base, case.model)),
            outcome(lambda: delta.apply_(partial)),
        ]


def test_refused(ranks: RankPool, tmp_path: Path) -> None:
    save_delta(tmp_path)
    first, second = ranks.results(refused, str(tmp_path))
    assert first == second
    *making, partial = first
    for error in making:
        assert "is divided among ranks (DTensor), and all ranks have to make its delta" in error
    assert partial.startswith("StructureMismatch: tensor 'weight' is placed as")


def killed(rank: int, folder: str) -> tuple[str, bool]:
    """Rank 1 dies while it writes."""
    case = Case(folder, "net", "fsdp2")
    before = [local(tensor).clone() for tensor in case.model.parameters()]

    def die(*args: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if rank == 1:
        setattr(patch, "scatter", die)  # noqa: B010 - it is not exported
    error = outcome(lambda: case.delta.apply_(case.model))
    after = [local(tensor) for tensor in case.model.parameters()]
    Path(folder, "found").write_text(
        f"{error}\n{all(map(torch.equal, before, after))}", encoding="utf-8"
    )
    os._exit(0)


def test_a_killed_rank(tmp_path: Path) -> None:
    """The ranks that are left undo what they have written."""
    save_delta(tmp_path)
    pool = RankPool(N_RANKS)
    try:
        with pytest.raises(EOFError):
            pool.results(killed, str(tmp_path))
    finally:
        pool.close()
    error, unchanged = (tmp_path / "found").read_text(encoding="utf-8").split("\n")
    assert error.startswith("RankLost: another rank stopped or cannot be reached")
    assert unchanged == "True"
