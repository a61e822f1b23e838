"""``DeltaBank``: exact switches, the memory budget, and readers in other threads."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from live.live_helpers import Disk, Net, State, copied, disk, same, tuned

import sparsedelta
from sparsedelta import Delta, DeltaBank
from sparsedelta.errors import AlreadyApplied, BaseMismatch, ConflictError, StructureMismatch
from sparsedelta.live.rwlock import SharedLock

NAMES = ("a", "b", "c")


@pytest.fixture(name="disk")
def _disk(tmp_path: Path) -> Iterator[Disk]:
    yield from disk(tmp_path)


@pytest.fixture
def net() -> Net:
    return Net()


@pytest.fixture
def states(net: Net) -> dict[str | None, State]:
    base = copied(net.state_dict())
    return {None: base, **{name: tuned(base, seed=n) for n, name in enumerate(NAMES)}}


@pytest.fixture
def deltas(disk: Disk, states: dict[str | None, State]) -> dict[str, Delta]:
    return {name: disk.diff(states[None], states[name]) for name in NAMES}


@pytest.fixture
def paths(tmp_path: Path, deltas: dict[str, Delta]) -> dict[str, Path]:
    for name, delta in deltas.items():
        delta.save(tmp_path / f"{name}.sd")
    return {name: tmp_path / f"{name}.sd" for name in deltas}


@pytest.fixture
def bank(net: Net, deltas: dict[str, Delta]) -> DeltaBank:
    bank = DeltaBank(net)
    for name, delta in deltas.items():
        bank.add(name, delta)
    return bank


def one_size(net: Net, delta: Delta) -> int:
    bank = DeltaBank(net)
    bank.add("x", delta)
    assert bank.resident_bytes == 8 * delta.nnz  # a flat index, and two values of two bytes
    return bank.resident_bytes


def test_switching(net: Net, bank: DeltaBank, states: dict[str | None, State]) -> None:
    assert list(bank) == list(NAMES)
    assert len(bank) == 3
    assert "a" in bank
    assert same(net.state_dict(), states[None])
    for name in ("a", "b", None, "c", "c", "a", None):
        bank.activate(name)
        assert bank.active == name
        assert same(net.state_dict(), states[name])


def test_repr(bank: DeltaBank) -> None:
    assert repr(bank) == f"<DeltaBank of Net: {sorted(NAMES)}, active: None>"


def test_the_same_positions(disk: Disk, net: Net, states: dict[str | None, State]) -> None:
    other = copied(states[None])
    for name, tensor in other.items():
        touched = states["a"][name] != tensor
        tensor[touched] = 3.0
    bank = DeltaBank(net)
    bank.add("a", disk.diff(states[None], states["a"]))
    bank.add("other", disk.diff(states[None], other))
    for name, state in (("a", states["a"]), ("other", other), ("a", states["a"])):
        bank.activate(name)
        assert same(net.state_dict(), state)


def test_new_values_and_state_dicts(disk: Disk, states: dict[str | None, State]) -> None:
    model = copied(states[None])
    bank = DeltaBank(model)
    for name in NAMES:
        bank.add(name, disk.diff(states[None], states[name], values="target"))
    for key in ("c", "a", None):
        bank.activate(key)
        assert same(model, states[key])


def test_adding_while_another_is_active(
    net: Net, deltas: dict[str, Delta], states: dict[str | None, State]
) -> None:
    bank = DeltaBank(net)
    bank.add("a", deltas["a"])
    bank.activate("a")
    bank.add("b", deltas["b"])
    assert bank.active == "a"
    assert same(net.state_dict(), states["a"])
    bank.activate("b")
    assert same(net.state_dict(), states["b"])


def test_what_is_refused(
    disk: Disk, net: Net, bank: DeltaBank, deltas: dict[str, Delta], states: dict[str | None, State]
) -> None:
    bank.activate("a")
    with pytest.raises(ValueError, match="'a' already"):
        bank.add("a", deltas["a"])
    with pytest.raises(ConflictError, match=r"'d' and '.'.*' differs.*deltas of one base"):
        bank.add("d", disk.diff(states["a"], states["b"]))
    with pytest.raises(KeyError, match="no delta 'd', only a, b, c"):
        bank.activate("d")
    with pytest.raises(ValueError, match="active"):
        bank.remove("a")
    assert bank.active == "a"
    assert same(net.state_dict(), states["a"])
    bank.remove("b")
    assert list(bank) == ["a", "c"]
    with pytest.raises(KeyError):
        bank.remove("b")


class TestSiblings:
    """Deltas count as deltas of one base if their bases share tensors and no shared tensor differs."""

    A, B = "a.safetensors", "b.safetensors"

    @pytest.fixture
    def base(self) -> State:
        return {"w": torch.randn(4, 4), "v": torch.randn(6)}

    def check(self, model: State, one: Delta, other: Delta, *targets: State) -> None:
        bank = DeltaBank(model)
        base = copied(model)
        bank.add("one", one)
        bank.add("other", other)
        for name, state in zip(("one", "other", None), (*targets, base), strict=True):
            bank.activate(name)
            assert same(model, state)

    def test_one_base_divided_in_other_files(self, disk: Disk, base: State) -> None:
        one, other = tuned(base, seed=1), tuned(base, seed=2)
        divided = {self.A: {"w": base["w"]}, self.B: {"v": base["v"]}}
        deltas = disk.diff(base, one), disk.diff_files(divided, {self.A: other})
        self.check(base, *deltas, one, other)

    def test_tensors_of_one_name_in_two_files(self, disk: Disk, base: State) -> None:
        """One delta was made from both files, the other from one of them."""
        half = {"w": base["w"].half()}
        one, other = tuned(base, seed=1), tuned(base, seed=2)
        files = {self.A: half, self.B: base}
        deltas = disk.diff_files(files, {self.A: half, self.B: one}), disk.diff(base, other)
        self.check(base, *deltas, one, other)

    def test_a_tensor_that_only_one_has(self, disk: Disk, base: State) -> None:
        one, other = tuned(base, seed=1), tuned(base, "w", seed=2)
        deltas = disk.diff(base, one), disk.diff(base, {"w": other["w"]})
        self.check(base, *deltas, one, other)

    def test_none_from_any_base(self, disk: Disk, base: State) -> None:
        """A delta that uses no base tensor fits every base. This one changes nothing in place."""
        new = disk.diff(base, {"new": torch.ones(2)})
        assert not any(row.base for row in new.tensors)
        bank = DeltaBank(base, names={"new": None})
        bank.add("new", new)
        bank.add("one", disk.diff(base, tuned(base)))
        assert list(bank) == ["new", "one"]

    def test_nothing_in_common(self, disk: Disk, base: State) -> None:
        one = disk.diff({"w": base["w"]}, tuned({"w": base["w"]}))
        other = disk.diff({"v": base["v"]}, tuned({"v": base["v"]}))
        bank = DeltaBank(base)
        bank.add("one", one)
        with pytest.raises(ConflictError, match="no tensor in common"):
            bank.add("other", other)

    def test_one_of_two_files_differs(self, disk: Disk, base: State) -> None:
        """A base tensor differs, although the other file has an equal tensor of this name."""
        files = {self.A: base, self.B: {"w": base["w"] + 1}}
        others = {self.A: base, self.B: {"w": base["w"] + 2}}
        target = tuned(base, "v")
        bank = DeltaBank(base)
        bank.add("one", disk.diff_files(files, {**files, self.A: target}))
        with pytest.raises(ConflictError, match="tensor 'w' differs"):
            bank.add("other", disk.diff_files(others, {**others, self.A: target}))


def test_a_model_that_is_not_the_base(net: Net, deltas: dict[str, Delta]) -> None:
    deltas["a"].apply_(net)
    bank = DeltaBank(net)
    with pytest.raises(AlreadyApplied):
        bank.add("a", deltas["a"])
    with pytest.raises(BaseMismatch):
        bank.add("b", deltas["b"])
    assert len(bank) == 0


class TestBudget:
    def test_the_least_recently_used_is_released(
        self,
        net: Net,
        paths: dict[str, Path],
        deltas: dict[str, Delta],
        states: dict[str | None, State],
    ) -> None:
        budget = 2 * one_size(net, deltas["a"])
        bank = DeltaBank(net, budget_bytes=budget)
        for name, path in paths.items():
            bank.add(name, path)
            assert bank.resident_bytes <= budget
        for key in ("a", "b", "c", "a", None, "b"):
            bank.activate(key)
            assert bank.resident_bytes <= budget
            assert same(net.state_dict(), states[key])

    def test_room_for_one(
        self,
        net: Net,
        paths: dict[str, Path],
        deltas: dict[str, Delta],
        states: dict[str | None, State],
    ) -> None:
        bank = DeltaBank(net, budget_bytes=one_size(net, deltas["a"]))
        bank.add("a", paths["a"])
        bank.activate("a")
        bank.add("b", paths["b"])
        assert same(net.state_dict(), states["a"])
        for name in ("b", "a", None):
            bank.activate(name)
            assert same(net.state_dict(), states[name])

    def test_room_for_none(self, net: Net, deltas: dict[str, Delta]) -> None:
        bank = DeltaBank(net, budget_bytes=one_size(net, deltas["a"]) - 1)
        with pytest.raises(ValueError, match=r"budget is \d+; raise it"):
            bank.add("a", deltas["a"])
        assert "a" not in bank

    def test_a_file_that_is_gone(
        self,
        net: Net,
        paths: dict[str, Path],
        deltas: dict[str, Delta],
        states: dict[str | None, State],
    ) -> None:
        bank = DeltaBank(net, budget_bytes=one_size(net, deltas["a"]))
        bank.add("a", paths["a"])
        bank.add("b", paths["b"])
        bank.activate("b")
        paths["a"].unlink()
        with pytest.raises(FileNotFoundError):
            bank.activate("a")
        assert bank.active == "b"
        assert same(net.state_dict(), states["b"])


def test_a_model_that_changes_under_the_bank(net: Net, bank: DeltaBank) -> None:
    bank.activate("a")
    before = copied(net.state_dict())
    net.last = torch.nn.Linear(6, 11, bias=False)
    with pytest.raises(StructureMismatch, match=r"'last.weight' is now"):
        bank.activate("b")
    assert bank.active == "a"
    assert all(torch.equal(before[n], t) for n, t in net.state_dict().items() if n != "last.weight")


def test_parameters_that_are_replaced(
    net: Net, bank: DeltaBank, states: dict[str | None, State]
) -> None:
    bank.activate("a")
    net.load_state_dict(copied(net.state_dict()), assign=True)
    bank.activate("b")
    assert same(net.state_dict(), states["b"])


@pytest.mark.parametrize("how", ["replaced", "moved", "retyped"])
def test_a_model_that_changes_between_equal_switches(
    how: str, net: Net, bank: DeltaBank, states: dict[str | None, State]
) -> None:
    """The bank keeps the plan of a switch only as long as the model keeps its tensors."""
    for name in ("a", "b", "a"):
        bank.activate(name)
    if how == "replaced":
        net.load_state_dict(copied(net.state_dict()), assign=True)
    elif how == "moved":
        for parameter in net.parameters():
            parameter.data = parameter.data.clone()
    else:
        net.last.weight.data = net.last.weight.data.double()
        with pytest.raises(StructureMismatch, match=r"'last.weight' is now"):
            bank.activate("b")
        return
    bank.activate("b")
    assert same(net.state_dict(), states["b"])


def test_plans_do_not_keep_what_the_bank_frees(
    net: Net, paths: dict[str, Path], deltas: dict[str, Delta], states: dict[str | None, State]
) -> None:
    bank = DeltaBank(net, budget_bytes=one_size(net, deltas["a"]))
    for name in "ab":
        bank.add(name, paths[name])
    bank.activate("a")
    freed = weakref.ref(bank._deltas["a"].patches[0].index)  # type: ignore[index] # it is resident
    bank.activate("b")
    gc.collect()
    assert freed() is None
    bank.activate("a")
    assert same(net.state_dict(), states["a"])
    held = weakref.ref(bank._deltas["a"].patches[0].index)  # type: ignore[index] # it is resident
    bank.activate(None)
    bank.remove("a")
    gc.collect()
    assert held() is None


def test_readers_see_whole_states(
    net: Net, bank: DeltaBank, states: dict[str | None, State]
) -> None:
    stop, wrong, n_read = threading.Event(), [], []

    def read() -> None:
        while not stop.is_set():
            with bank.reading() as name:
                if not same(net.state_dict(), states[name]):
                    wrong.append(name)
                n_read.append(name)

    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    for number in range(60):
        bank.activate((*NAMES, None)[number % 4])
    with bank.using("b"):
        assert same(net.state_dict(), states["b"])
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong
    assert n_read


class TestLock:
    def test_readers_share(self) -> None:
        lock, barrier = SharedLock(), threading.Barrier(2, timeout=10)

        def read() -> None:
            with lock.reading():
                barrier.wait()

        thread = threading.Thread(target=read)
        thread.start()
        read()
        thread.join()

    @pytest.mark.parametrize(
        ("others", "own"), [("writing", ("reading", "writing")), ("reading", ("writing",))]
    )
    def test_all_get_their_turn(self, others: str, own: tuple[str, ...]) -> None:
        """Threads that ask again at once keep nobody out."""
        lock, stop = SharedLock(), threading.Event()

        def hold() -> None:
            while not stop.is_set():
                with getattr(lock, others)():
                    time.sleep(0.0005)

        def take_turns() -> None:
            for side in own * 30:
                with getattr(lock, side)():
                    pass

        holders = [threading.Thread(target=hold, daemon=True) for _ in range(3)]
        waiting = threading.Thread(target=take_turns, daemon=True)
        for thread in (*holders, waiting):
            thread.start()
        waiting.join(30)
        came_through = not waiting.is_alive()
        stop.set()
        for thread in holders:
            thread.join(30)
        assert came_through

    def test_a_long_wait_is_said(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        """As of a thread that waits for itself."""
        monkeypatch.setattr("sparsedelta.live.rwlock._PATIENCE_SECONDS", 0.01)
        lock, entered = SharedLock(), threading.Event()

        def write() -> None:
            with lock.writing():
                entered.set()

        with lock.reading():
            thread = threading.Thread(target=write)
            thread.start()
            assert not entered.wait(0.2)
        thread.join(30)
        assert entered.is_set()
        assert caplog.text.count("must leave that block first, or it waits for itself") == 1

    def test_a_context_is_entered_once_at_a_time(self) -> None:
        lock = SharedLock()
        context = lock.reading()
        for _ in range(2):
            with context, pytest.raises(RuntimeError, match="this context is in use"):
                context.__enter__()
        with lock.writing():
            pass

    @pytest.mark.parametrize("side", ["reading", "writing"])
    def test_a_hold_is_of_a_context_and_not_of_a_thread(self, side: str) -> None:
        """In a server, requests share the threads of a pool, and enter and leave in any of them."""
        lock, done = SharedLock(), threading.Event()
        hold = lock.writing()
        hold.__enter__()
        other = getattr(lock, side)()

        def leave() -> None:
            time.sleep(0.05)
            done.set()
            hold.__exit__()

        threading.Thread(target=leave).start()
        with other:
            assert done.is_set()

    def test_writers_do_not(self) -> None:
        lock, inside, most = SharedLock(), [0], [0]

        def work() -> None:
            for _ in range(50):
                with lock.writing():
                    inside[0] += 1
                    most[0] = max(most[0], inside[0])
                    inside[0] -= 1

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert most == [1]

    def test_a_waiting_writer_goes_before_new_readers(self) -> None:
        lock, order = SharedLock(), []
        waiting = threading.Event()

        def write() -> None:
            waiting.set()
            with lock.writing():
                order.append("writer")

        def read() -> None:
            with lock.reading():
                order.append("reader")

        with lock.reading():
            writer = threading.Thread(target=write)
            writer.start()
            while not lock._next_writers:
                waiting.wait(0.001)
            reader = threading.Thread(target=read)
            reader.start()
            reader.join(0.05)
            assert reader.is_alive()
        writer.join()
        reader.join()
        assert order == ["writer", "reader"]


def test_public_name() -> None:
    assert sparsedelta.DeltaBank is DeltaBank
