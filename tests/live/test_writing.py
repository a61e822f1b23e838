"""A failed or interrupted write is undone completely, or the model is marked as half written."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from live.live_helpers import Disk, State, copied, disk, same, tuned

from sparsedelta import Delta, DeltaBank
from sparsedelta.errors import BaseMismatch, PartlyApplied, StructureMismatch
from sparsedelta.interrupts import uninterrupted
from sparsedelta.live import patch
from sparsedelta.live.bits import scatter
from sparsedelta.live.patch import HalfWritten
from sparsedelta.live.rwlock import Hold, SharedLock

N_TENSORS = 4
FAULTS = [RuntimeError("device lost"), KeyboardInterrupt(), SystemExit()]
CALLS = range(1, N_TENSORS + 1)


@pytest.fixture(name="disk")
def _disk(tmp_path: Path) -> Iterator[Disk]:
    yield from disk(tmp_path)


@pytest.fixture
def states() -> dict[str | None, State]:
    """Return a base and three targets; "same" changes the same positions as "a"."""
    generator = torch.Generator().manual_seed(0)
    base = {f"{n}": torch.randn(8, 5, generator=generator) for n in range(N_TENSORS)}
    targets = {"a": tuned(base, seed=1), "b": tuned(base, seed=2), "same": copied(base)}
    for name, tensor in targets["same"].items():
        tensor[targets["a"][name] != base[name]] = 3.0
    states: dict[str | None, State] = {None: base}
    states.update(targets)
    return states


@pytest.fixture
def deltas(disk: Disk, states: dict[str | None, State]) -> dict[str, Delta]:
    return {name: disk.diff(states[None], state) for name, state in states.items() if name}


@pytest.fixture
def model(states: dict[str | None, State]) -> State:
    return copied(states[None])


class Fault:
    """A ``scatter`` that, in the chosen calls, writes half of the elements and then calls an action."""

    def __init__(self, action: Callable[[], None], *calls: int) -> None:
        self.action, self.calls, self.n_calls = action, calls, 0

    def __call__(self, tensor: torch.Tensor, index: torch.Tensor, values: torch.Tensor) -> None:
        self.n_calls += 1
        if self.n_calls in self.calls:
            half = len(index) // 2
            scatter(tensor, index[:half], values[:half])
            self.action()
        scatter(tensor, index, values)


@pytest.fixture
def fault_at(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that makes chosen writes fail, counted from now."""

    def begin(error: BaseException | None, *calls: int) -> None:
        def fail() -> None:
            if error is None:
                signal.raise_signal(signal.SIGINT)
            else:
                raise error

        monkeypatch.setattr(patch, "scatter", Fault(fail, *calls))

    return begin


@pytest.mark.parametrize("n", CALLS)
@pytest.mark.parametrize("error", FAULTS, ids=repr)
class TestOneFault:
    def test_apply(
        self, states: Any, deltas: Any, model: State, fault_at: Any, error: Any, n: int
    ) -> None:
        fault_at(error, n)
        with pytest.raises(type(error)):
            deltas["a"].apply_(model)
        assert same(model, states[None])
        deltas["a"].apply_(model)
        assert same(model, states["a"])
        fault_at(error, n)
        with pytest.raises(type(error)):
            deltas["a"].revert_(model)
        assert same(model, states["a"])

    def test_applied(
        self, states: Any, deltas: Any, model: State, fault_at: Any, error: Any, n: int
    ) -> None:
        for call in (n, N_TENSORS + n):  # while it begins, and while it ends
            fault_at(error, call)
            seen = []
            with pytest.raises(type(error)), deltas["a"].applied(model):
                seen.append(same(model, states["a"]))
            assert seen == [True] * (call > N_TENSORS)
            assert same(model, states[None])

    def test_switches(
        self, states: Any, deltas: Any, model: State, fault_at: Any, error: Any, n: int
    ) -> None:
        bank = DeltaBank(model)
        for name, delta in deltas.items():
            bank.add(name, delta)
        for old, new in ((None, "a"), ("a", "b"), ("a", "same"), ("same", None)):
            bank.activate(old)
            fault_at(error, n)
            with pytest.raises(type(error)):
                bank.activate(new)
            assert bank.active == old
            assert same(model, states[old])
            bank.activate(new)
            assert same(model, states[new])
            if old == "a" and new == "b":  # both are written
                bank.activate(old)
                fault_at(error, N_TENSORS + n)
                with pytest.raises(type(error)):
                    bank.activate(new)
                assert bank.active == old
                assert same(model, states[old])


class TestFaultWhileTakingBack:
    @pytest.mark.parametrize("n", CALLS)
    def test_apply(self, states: Any, deltas: Any, model: State, fault_at: Any, n: int) -> None:
        fault_at(RuntimeError("device lost"), n, n + 2)
        with pytest.raises(HalfWritten, match=r"4 tensors.*call restore\(\)") as caught:
            deltas["a"].apply_(model)
        assert isinstance(caught.value.__cause__, RuntimeError)
        assert not any(same(model, state) for state in states.values())
        with pytest.raises((BaseMismatch, PartlyApplied)):
            deltas["a"].apply_(model)
        caught.value.restore()
        assert same(model, states[None])
        caught.value.restore()
        assert same(model, states[None])

    def test_the_bank_only_allows_restore(
        self, states: Any, deltas: Any, model: State, fault_at: Any
    ) -> None:
        bank = DeltaBank(model)
        bank.add("a", deltas["a"])
        bank.add("b", deltas["b"])
        bank.activate("a")
        fault_at(RuntimeError("device lost"), 6, 8)
        with pytest.raises(PartlyApplied):
            bank.activate("b")
        left = copied(model)
        refused: list[Callable[[], Any]] = [
            lambda: bank.active,
            lambda: bank.activate(None),
            lambda: bank.activate("a"),
            lambda: bank.add("same", deltas["same"]),
            lambda: bank.remove("b"),
            lambda: bank.reading().__enter__(),
            lambda: bank.using("a").__enter__(),
        ]
        for use in refused:
            with pytest.raises(HalfWritten, match=r"call restore\(\)"):
                use()
        assert same(model, left)
        assert list(bank) == ["a", "b"]
        bank.restore()
        assert bank.active == "a"
        assert same(model, states["a"])
        bank.restore()
        for name in ("b", None):
            bank.activate(name)
            assert same(model, states[name])

    def test_restoring_may_fail_too(
        self, states: Any, deltas: Any, model: State, fault_at: Any
    ) -> None:
        bank = DeltaBank(model)
        bank.add("a", deltas["a"])
        fault_at(KeyboardInterrupt(), 2, 3, 4)
        with pytest.raises(HalfWritten):
            bank.activate("a")
        with pytest.raises(KeyboardInterrupt):
            bank.restore()
        with pytest.raises(HalfWritten):
            bank.activate(None)
        bank.restore()
        assert bank.active is None
        assert same(model, states[None])


class TestInterrupts:
    """The first SIGINT waits for the end of a write, the second ends it, the third leaves it half written."""

    def test_one(self, states: Any, deltas: Any, model: State, fault_at: Any) -> None:
        fault_at(None, 2)
        with pytest.raises(KeyboardInterrupt):
            deltas["a"].apply_(model)
        assert same(model, states["a"])
        fault_at(None, 2)
        with pytest.raises(KeyboardInterrupt):
            deltas["a"].revert_(model)
        assert same(model, states[None])
        bank = DeltaBank(model)
        bank.add("a", deltas["a"])
        fault_at(None, 2)
        with pytest.raises(KeyboardInterrupt):
            bank.activate("a")
        assert bank.active == "a"
        assert same(model, states["a"])

    @pytest.mark.parametrize("n", [2, N_TENSORS + 2])
    def test_one_while_applied(
        self, states: Any, deltas: Any, model: State, fault_at: Any, n: int
    ) -> None:
        fault_at(None, n)
        with pytest.raises(KeyboardInterrupt), deltas["a"].applied(model):
            assert n > N_TENSORS
        assert same(model, states[None])

    def test_two(self, states: Any, deltas: Any, model: State, fault_at: Any) -> None:
        fault_at(None, 1, 3)
        with pytest.raises(KeyboardInterrupt):
            deltas["a"].apply_(model)
        assert same(model, states[None])

    def test_three(self, states: Any, deltas: Any, model: State, fault_at: Any) -> None:
        bank = DeltaBank(model)
        bank.add("a", deltas["a"])
        fault_at(None, 1, 3, 5)
        with pytest.raises(HalfWritten):
            bank.activate("a")
        with pytest.raises(HalfWritten):
            bank.activate("a")
        bank.restore()
        assert bank.active is None
        assert same(model, states[None])

    def test_handlers(self) -> None:
        """A handler other than Python's is called once, when the context has ended."""
        calls: list[tuple[int, FrameType | None]] = []

        def own(number: int, frame: FrameType | None) -> None:
            calls.append((number, frame))

        previous = signal.signal(signal.SIGINT, own)
        try:
            with uninterrupted():
                signal.raise_signal(signal.SIGINT)
                assert not calls
            assert [number for number, _ in calls] == [signal.SIGINT]
            assert signal.getsignal(signal.SIGINT) is own
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            with uninterrupted():
                signal.raise_signal(signal.SIGINT)
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        finally:
            signal.signal(signal.SIGINT, previous)
        assert len(calls) == 1

    def test_inside_another(self) -> None:
        """The outer context delays; a signal can be handled in it earlier."""
        with uninterrupted() as delay:
            with uninterrupted():
                signal.raise_signal(signal.SIGINT)
            with pytest.raises(KeyboardInterrupt):
                delay.handle_now()
            delay.handle_now()
            signal.raise_signal(signal.SIGINT)
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
            with pytest.raises(KeyboardInterrupt):
                delay.handle_now()

    def test_lifted(self) -> None:
        """While the delay is lifted, signals are handled at once, and another context can delay them."""
        with uninterrupted() as delay:
            with delay.lifted():
                with pytest.raises(KeyboardInterrupt):
                    signal.raise_signal(signal.SIGINT)
                with uninterrupted() as inner:
                    signal.raise_signal(signal.SIGINT)
                    with pytest.raises(KeyboardInterrupt):
                        inner.handle_now()
            signal.raise_signal(signal.SIGINT)
            with pytest.raises(KeyboardInterrupt), delay.lifted():
                raise AssertionError

    def test_another_thread(self, states: Any, deltas: Any, model: State) -> None:
        thread = threading.Thread(target=lambda: deltas["a"].apply_(model))
        thread.start()
        thread.join()
        assert same(model, states["a"])

    @pytest.mark.slow
    def test_real(self) -> None:
        """Real signals, in a separate process, at 60 moments of a switch."""
        root = Path(__file__).parents[1]
        env = {**os.environ, "PYTHONPATH": str(root)}
        run = [sys.executable, str(root / "live" / "interrupted.py")]
        done = subprocess.run(
            run, env=env, timeout=120, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr


class TestLockThatIsLeft:
    @pytest.mark.parametrize("side", ["reading", "writing"])
    def test_an_interrupt_on_the_way_out(self, monkeypatch: pytest.MonkeyPatch, side: str) -> None:
        lock = SharedLock()
        real = lock._changed.notify_all

        def interrupted() -> None:
            monkeypatch.setattr(lock._changed, "notify_all", real)
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt), getattr(lock, side)():
            monkeypatch.setattr(lock._changed, "notify_all", interrupted)
        with lock.writing():
            pass

    @pytest.mark.parametrize("side", ["reading", "writing"])
    def test_an_interrupt_on_the_way_in(self, side: str) -> None:
        """The lock is free although the traceback, and all that it holds, is still there."""
        lock = SharedLock()

        def interrupted() -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt) as caught, getattr(lock, side)(interrupted):
            pass
        assert caught.tb is not None
        with lock.writing():
            pass

    @pytest.mark.parametrize("side", ["reading", "writing"])
    def test_an_interrupt_before_the_way_out(
        self, monkeypatch: pytest.MonkeyPatch, side: str
    ) -> None:
        """As on entry to ``__exit__``: the lock is free once the traceback is gone."""
        lock = SharedLock()

        def interrupted(*_: Any) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patched:
            patched.setattr(Hold, "__exit__", interrupted)
            try:
                with getattr(lock, side)():
                    pass
            except KeyboardInterrupt:
                pass
        with lock.writing():
            pass

    def test_an_interrupt_while_waiting(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A writer that is interrupted while waiting does not block readers."""
        lock = SharedLock()

        def interrupted(*_: Any) -> None:
            raise KeyboardInterrupt

        is_reading, may_end = threading.Event(), threading.Event()

        def read() -> None:
            with lock.reading():
                is_reading.set()
                may_end.wait(30)

        other = threading.Thread(target=read)
        other.start()
        is_reading.wait(30)
        with monkeypatch.context() as patched:
            patched.setattr(lock._changed, "wait_for", interrupted)
            with pytest.raises(KeyboardInterrupt), lock.writing():
                pass
        with lock.reading():
            pass
        may_end.set()
        other.join(30)


class TestTensorsThatChangeMeanwhile:
    """The model may get other tensors between the decoding of a delta and a write."""

    @pytest.fixture
    def bank(self, deltas: dict[str, Delta], model: State) -> DeltaBank:
        bank = DeltaBank(model)
        bank.add("a", deltas["a"])
        bank.add("b", deltas["b"])
        bank.activate("a")
        return bank

    def test_replaced(self, states: Any, model: State, bank: DeltaBank) -> None:
        model["1"] = model["1"].t().contiguous().t()  # other memory, other strides
        model["2"] = torch.stack([model["2"], model["2"]])[1]  # an offset into a larger storage
        bank.activate("b")
        assert same(model, states["b"])

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            (lambda t: t.double(), r"'3' is now F64 \[8, 5\], expected F32"),
            (lambda t: t.view(5, 8), r"'3' is now F32 \[5, 8\]"),
            (lambda t: t.to("meta"), "'3' holds no data"),
            (lambda t: t[:1].expand(8, 5), "'3' has elements that share memory"),
        ],
    )
    def test_of_another_kind(
        self, deltas: Any, model: State, bank: DeltaBank, change: Any, match: str
    ) -> None:
        """Only the last tensor is wrong; the error comes before the other tensors are written."""
        before = copied(model)
        kept = model["3"]
        model["3"] = change(kept)
        with pytest.raises(StructureMismatch, match=match):
            bank.activate("b")
        assert bank.active == "a"
        model["3"] = kept
        assert same(model, before)
        bank.activate(None)
        with pytest.raises(StructureMismatch, match=match), deltas["a"].applied(model):
            model["3"] = change(model["3"])

    def test_gone(self, model: State, bank: DeltaBank) -> None:
        del model["3"]
        before = copied(model)
        with pytest.raises(StructureMismatch, match="no longer in the model"):
            bank.activate("b")
        assert same(model, before)

    def test_no_longer_tied(self, disk: Disk) -> None:
        base = {"a": torch.randn(4, 4)}
        base["c"] = base["a"].clone()
        target = tuned(base, "a")
        target["c"] = target["a"].clone()
        shared = base["a"].clone()
        model = {"a": shared, "c": shared}
        bank = DeltaBank(model)
        bank.add("x", disk.diff(base, target))
        bank.activate("x")
        assert same(model, target)
        model["c"] = model["c"].clone()
        with pytest.raises(StructureMismatch, match="'a' and 'c' were tied in the model and no"):
            bank.activate(None)
        assert same(model, target)

    def test_made_in_inference_mode(self, states: Any, deltas: Any, model: State) -> None:
        with torch.inference_mode():
            model["3"] = model["3"].clone()
        with pytest.raises(StructureMismatch, match="'3' was made in inference mode"):
            deltas["a"].apply_(model)
        assert same(model, states[None])
        with torch.inference_mode():
            deltas["a"].apply_(model)
            assert same(model, states["a"])

    def test_restored_where_it_is_now(
        self, states: Any, model: State, bank: DeltaBank, fault_at: Any
    ) -> None:
        fault_at(RuntimeError("device lost"), 6, 8)
        with pytest.raises(HalfWritten):
            bank.activate("b")
        for name in model:
            model[name] = model[name].clone()
        bank.restore()
        assert same(model, states["a"])
