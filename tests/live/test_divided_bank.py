"""``DeltaBank`` with models that FSDP2 or tensor parallelism divides among ranks, in real processes."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from live.divided_helpers import Net, changed, divided, local, outcome, whole
from live.live_helpers import State, same
from live.model_helpers import change
from rank_helpers import RankPool
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import sparsedelta
from sparsedelta import DeltaBank
from sparsedelta.live import held, patch

NAMES = ("a", "b")


def target(name: str) -> Net:
    model = Net()
    if name == "a":
        changed(model)
    else:
        change(model, every=5)
    return model


@pytest.fixture
def folder(tmp_path: Path) -> str:
    for name in NAMES:
        with sparsedelta.diff(Net(), target(name)) as delta:
            delta.save(tmp_path / f"{name}.sd")
    return str(tmp_path)


class Case:
    """A divided model in a bank with two deltas, on one rank."""

    def __init__(self, folder: str, kind: str = "fsdp2", **options: Any) -> None:
        self.states: dict[str | None, State] = {
            None: Net().state_dict(),
            **{name: target(name).state_dict() for name in NAMES},
        }
        self.model = divided(Net(), kind)
        self.paths = {name: f"{folder}/{name}.sd" for name in NAMES}
        self.bank = DeltaBank(self.model, **options)
        for name, path in self.paths.items():
            self.bank.add(name, path)

    def holds(self, name: str | None) -> bool:
        found: bool = same(whole(self.model), self.states[name])
        return found and self.bank.active == name


def switching(rank: int, folder: str, kind: str) -> list[bool]:
    case = Case(folder, kind)
    found = [case.holds(None)]
    for name in ("a", "b", "b", None, "b", "a"):
        case.bank.activate(name)
        found.append(case.holds(name))
    with case.bank.using("b"), pytest.raises(KeyError, match="no delta 'c', only a, b"):
        case.bank._activate("c")
    found.append(case.holds("b"))
    case.bank.remove("a")
    case.bank.add("a", case.paths["a"])  # while another one is active
    found.append(case.holds("b"))
    case.bank.activate("a")
    return [*found, case.holds("a")]


@pytest.mark.parametrize("kind", ["fsdp2", "tensor", "state dict"])
def test_switching(pool: RankPool, folder: str, kind: str) -> None:
    for found in pool.results(switching, folder, kind):
        assert found == [True] * 10


def failing(rank: int, folder: str, what: str) -> tuple[list[str], list[bool]]:
    """Let something fail on rank 1 while it switches from a to b; then try again."""
    case = Case(folder)
    bank = case.bank
    bank.activate("a")
    real, calls = held.scatter, list[None]()

    def faulty(*args: Any) -> None:
        calls.append(None)
        if rank == 1 and len(calls) == 3:
            if what == "error":
                raise OSError("the device fails")
            for _ in range(1 if what == "Ctrl-C" else 2):
                signal.raise_signal(signal.SIGINT)
        if rank == 1 and len(calls) > 3 and what == "undoing fails":
            raise OSError("the device fails again")
        real(*args)

    with pytest.MonkeyPatch.context() as faults:
        faults.setattr(patch, "scatter", faulty)
        errors = [outcome(lambda: bank.activate("b"))]
        if what == "undoing fails":
            errors += [outcome(lambda: bank.active), outcome(lambda: bank.activate(None))]
            errors.append(outcome(bank.restore))
    bank.restore()
    found = [case.holds("a")]
    bank.activate("b")
    return errors, [*found, case.holds("b")]


@pytest.mark.parametrize("what", ["error", "Ctrl-C", "two Ctrl-C", "undoing fails"])
def test_all_switch_or_none(pool: RankPool, folder: str, what: str) -> None:
    """A failure of one rank takes all ranks back with the same error; if it cannot be undone, all say so until ``restore``."""
    first, second = pool.results(failing, folder, what)
    assert first == second
    errors, found = first
    assert found == [True, True]
    if what == "undoing fails":
        assert [error.partition(":")[0] for error in errors] == [*["HalfWritten"] * 3, "OSError"]
    else:
        assert errors == ["OSError: the device fails" if what == "error" else "KeyboardInterrupt: "]


def wrong(rank: int, folder: str) -> tuple[list[str], bool]:
    """Make mistakes on rank 1."""
    case = Case(folder)
    bank = case.bank
    bank.activate("a")
    whole_file = Path(case.paths["b"]).read_bytes()
    own = Path(folder, f"of rank {rank}.sd")
    errors = [outcome(lambda: bank.add("c", own if rank else case.paths["b"]))]
    own.write_bytes(whole_file[: -9 if rank else None])
    errors.append(outcome(lambda: bank.add("c", own)))
    errors.append(outcome(lambda: bank.add("c", case.paths["a" if rank else "b"])))
    bank.add("c", case.paths["b"])
    errors.append(outcome(lambda: bank.activate("c" if rank else "b")))
    errors.append(outcome(lambda: bank.remove("c") if rank else bank.activate("c")))
    errors.append(outcome(lambda: DeltaBank(case.model, budget_bytes=rank)))
    found = case.holds("a") and list(bank) == ["a", "b", "c"]
    bank.activate("b")
    return errors, found and case.holds("b")


def test_a_mistake_of_one_rank(pool: RankPool, folder: str) -> None:
    first, second = pool.results(wrong, folder)
    assert first == second
    errors, unchanged = first
    assert unchanged
    assert errors[0].startswith("FileNotFoundError: ")
    assert errors[1].startswith("Truncated: ")
    assert errors[2].startswith("ConflictError: the ranks have different deltas")
    assert errors[3].startswith(
        "ConflictError: the ranks make different calls: activate('b') and activate('c'); call"
    )
    assert "activate('c') and remove('c')" in errors[4]
    assert "DeltaBank(0, 'touched') and DeltaBank(1, 'touched')" in errors[5]


def within_a_budget(rank: int, folder: str) -> tuple[list[list[str]], int, bool]:
    """Switch between two deltas of which the budget holds one; return which are decoded after each switch."""
    case = Case(folder)
    sizes = [one.n_bytes for one in case.bank._deltas.values()]
    small = Case(folder, budget_bytes=max(sizes)).bank
    decoded = []
    for name in ("a", "b", None, "a"):
        small.activate(name)
        decoded.append([name for name, one in small._deltas.items() if one.patches is not None])
    case.bank = small
    return decoded, small.resident_bytes, small.active == "a"


def test_ranks_that_hold_less_free_the_same_deltas(pool: RankPool, folder: str) -> None:
    """Rank 0 has more rows, and the parameter of one element."""
    first, second = pool.results(within_a_budget, folder)
    assert first[0] == second[0] == [["a"], ["b"], ["b"], ["a"]]
    assert first[1] > second[1] > 0
    assert first[2]
    assert second[2]


def divided_again(rank: int, folder: str) -> list[str]:
    """Divide a tensor in another direction after the deltas were decoded."""
    case = Case(folder, "state dict")
    name = "up.weight"
    mesh = init_device_mesh("cpu", (2,))
    before = case.model[name]
    case.model[name] = distribute_tensor(whole(case.model)[name], mesh, [Shard(1)])
    kept = local(case.model[name]).clone()
    errors = [outcome(lambda: case.bank.activate("a"))]
    assert torch.equal(local(case.model[name]), kept)
    case.model[name] = before
    case.bank.activate("a")
    return [*errors, str(case.holds("a"))]


def test_a_model_that_is_divided_otherwise(pool: RankPool, folder: str) -> None:
    for error, again in pool.results(divided_again, folder):
        assert error.startswith("StructureMismatch: tensor 'up.weight' is divided otherwise among")
        assert again == "True"


def disconnected(rank: int, folder: str) -> tuple[str, list[bool]]:
    """Lose the connection after something was written."""
    case = Case(folder)
    case.bank.activate("a")
    with pytest.MonkeyPatch.context() as faults:

        def lost(*args: Any, **options: Any) -> None:
            faults.undo()
            raise RuntimeError("connection closed by peer")

        def write_and_lose(*args: Any) -> None:
            faults.setattr(dist, "all_reduce", lost)
            held.scatter(*args)

        faults.setattr(patch, "scatter", write_and_lose)
        error = outcome(lambda: case.bank.activate("b"))
    found = [case.holds("a")]
    case.bank.activate("b")
    return error, [*found, case.holds("b")]


def test_a_lost_connection(pool: RankPool, folder: str) -> None:
    """The ranks that are left undo what they have written."""
    for error, found in pool.results(disconnected, folder):
        assert error.startswith("RankLost: another rank stopped or cannot be reached")
        assert found == [True, True]
