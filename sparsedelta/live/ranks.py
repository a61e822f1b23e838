"""The ranks of ``torch.distributed`` that hold one model together: they exchange values, and all fail if one does.

All ranks call the same functions in the same order. Before each exchange they find out whether one of them has failed; then
all raise its error, and none waits for another.
"""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from sparsedelta.errors import ConflictError, SparseDeltaError
from sparsedelta.interrupts import Delay, uninterrupted
from sparsedelta.live.bits import check_installed
from sparsedelta.live.wire import RankFailed, RankLost, Wire
from sparsedelta.tensors.parallel import Pace, run_all

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
R = TypeVar("R")


class Group(Protocol):
    """The processes that change a model together."""

    def entered(self) -> AbstractContextManager[None]:
        """Return a context in which they exchange values. It may be entered again inside itself."""

    def together(self, work: Callable[[], T], *, interruptible: bool = True) -> T:
        """Return the result of work that all processes do; if it fails in one of them, raise its error in all.

        Args:
            work: what each process does.
            interruptible: a signal that is delayed is handled after the work, as a failure of it.
        """

    def gathered(self, value: T) -> list[T]:
        """Return the values of all processes."""

    def each(
        self, work: Callable[[T], R], items: Sequence[T], *, cost: Callable[[T], int], pace: Pace
    ) -> list[R]:
        """Return the result of work for each item; see ``run_all``."""


class Alone:
    """This process alone."""

    def entered(self) -> AbstractContextManager[None]:
        """Return a context that does nothing."""
        return nullcontext()

    def together(self, work: Callable[[], T], *, interruptible: bool = True) -> T:
        """Return the result of the work."""
        return work()

    def gathered(self, value: T) -> list[T]:
        """Return the value."""
        return [value]

    def each(
        self, work: Callable[[T], R], items: Sequence[T], *, cost: Callable[[T], int], pace: Pace
    ) -> list[R]:
        """Return the result of work for each item, which several threads do."""
        return run_all(work, items, cost=cost, pace=pace)


class _FailedElsewhere(BaseException):
    """The ranks know of a failure, and leave the work in which it happened."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(error)
        self.error = error


class Ranks:
    """All ranks of ``torch.distributed``.

    Args:
        model: what they hold together; None: nothing that FSDP2 may hold in full.
    """

    def __init__(self, model: Any = None) -> None:
        self._model = model
        self._delay: Delay | None = None

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Free full tensors, and delay signals: they are handled at a moment when the other ranks can be told."""
        if self._delay is not None:
            yield
            return
        with uninterrupted() as delay:
            self._delay = delay
            try:
                is_divided(self._model)
                yield
            finally:
                self._delay = None

    @contextmanager
    def left(self) -> Iterator[None]:
        """Leave ``entered`` until the context ends: signals are handled at once."""
        delay, self._delay = self._delay, None
        try:
            with delay.lifted() if delay else nullcontext():
                yield
        finally:
            self._delay = delay

    def together(self, work: Callable[[], T], *, interruptible: bool = True) -> T:
        """Return the result of work that all ranks do; if it fails on one of them, raise its error on all.

        The work may call ``merge``.

        Raises:
            RankLost: the connection to a rank was lost.
        """
        failure: BaseException | None = None
        try:
            try:
                result = work()
                if interruptible:
                    self._handle_signals()
            except (_FailedElsewhere, RankLost):
                raise
            except BaseException as error:
                failure = error
            _agree(failure, 0)
        except _FailedElsewhere as error:
            failure = error.error
        if failure is not None:
            raise failure
        return result

    def gathered(self, value: T) -> list[T]:
        """Return the values of all ranks, in order; they must be picklable. Called inside ``together``."""
        _agree(None, -1)
        return _wire().gathered(value)

    def shared(self, value: T) -> T:
        """Return the value of rank 0; it must be picklable. Called inside ``together``."""
        _agree(None, -2)
        return _wire().from_first(value)

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0."""
        return _wire().is_first

    def each(
        self, work: Callable[[T], R], items: Sequence[T], *, cost: Callable[[T], int], pace: Pace
    ) -> list[R]:
        """Return the result of work for each item, in this order: the work may exchange something."""
        results = []
        for item in items:
            self._handle_signals()
            results.append(work(item))
        return results

    def _handle_signals(self) -> None:
        if self._delay is not None:
            self._delay.handle_now()


def merge(part: torch.Tensor) -> torch.Tensor:
    """Return integers of which each rank has some. All ranks call this, inside ``Ranks.together``.

    Args:
        part: the integers of this rank, (n,), and zeros in place of those that it does not have. Integers that
            several ranks have must be equal; otherwise the result is none of them.
    """
    import torch
    import torch.distributed as dist

    merged = part.clone()
    _agree(None, merged.nbytes)
    if merged.numel():
        # Of the bytes at one place, those of other ranks are zero or the same.
        _wire().reduce_(merged.view(torch.uint8), dist.ReduceOp.MAX)
    return merged


def group_of(model: Any) -> Group:
    """Return the processes that change a model together: all ranks if it has a tensor that is divided among ranks.

    Raises:
        ModuleNotFoundError: torch is not installed.
    """
    check_installed("torch")
    return Ranks(model) if is_divided(model) else Alone()


def send(integers: torch.Tensor) -> torch.Tensor:
    """Return the integers that rank 0 has. All ranks call this, inside ``Ranks.together``.

    Args:
        integers: those to send, (n,), on rank 0; on other ranks any of the same shape and dtype, which they replace.
    """
    import torch

    _agree(None, integers.nbytes)
    if integers.numel():
        _wire().broadcast_(integers.view(torch.uint8))
    return integers


def check_same_call(group: Group, *call: object) -> None:
    """Check that all processes make the same call.

    Args:
        group: the processes.
        call: name of the method, and its arguments.

    Raises:
        ConflictError: they do not.
    """
    calls = group.together(lambda: group.gathered(call))
    other = next((one for one in calls if one != calls[0]), None)
    if other is not None:
        raise ConflictError(
            f"the ranks make different calls: {_shown(calls[0])} and {_shown(other)}; call the same methods in the same"
            " order on all ranks; nothing was written"
        )


def _shown(call: Sequence[object]) -> str:
    return f"{call[0]}({', '.join(map(repr, call[1:]))})"


def is_divided(model: Any) -> bool:
    """Return whether a model has tensors that are divided among ranks. The shards of FSDP2 take the place of full tensors.

    Outside forward and backward passes the module may have full tensors, which FSDP2 frees without reading them.
    """
    from sparsedelta.live.parts import components_of

    parts = components_of(model)
    found = [_has_dtensor(part) for part in (parts.values() if parts else [model])]
    return any(found)


def _has_dtensor(model: Any) -> bool:
    dtensors = sys.modules.get("torch.distributed.tensor")
    if dtensors is None:
        return False
    if isinstance(model, Mapping):
        return any(isinstance(tensor, dtensors.DTensor) for tensor in model.values())
    if not hasattr(model, "modules"):
        return False
    fsdp = sys.modules.get("torch.distributed.fsdp")
    for module in model.modules():
        if fsdp and isinstance(module, fsdp.FSDPModule):
            module.reshard()
    tensors = (tensor for find in (model.parameters, model.buffers) for tensor in find())
    return any(isinstance(tensor, dtensors.DTensor) for tensor in tensors)


def _agree(failure: BaseException | None, n_bytes: int) -> None:
    """Find out whether all ranks are well and about to exchange the same number of bytes.

    Raises:
        _FailedElsewhere: with the error of the first rank that has failed.
        RankLost: the connection to a rank was lost.
    """
    import torch
    import torch.distributed as dist

    now = torch.tensor([failure is not None, n_bytes, -n_bytes])
    _wire().reduce_(now, dist.ReduceOp.MAX)
    failed, most, least = now.tolist()
    if failed:
        raise _FailedElsewhere(_first_failure(failure))
    if most != -least:
        raise _FailedElsewhere(
            SparseDeltaError(
                "the ranks do not do the same: give all of them the same delta, model and arguments;"
                " nothing was written"
            )
        )


def _first_failure(failure: BaseException | None) -> BaseException:
    wire = _wire()
    found = wire.gathered(None if failure is None else pickled(failure))
    rank, first = next((rank, one) for rank, one in enumerate(found) if one is not None)
    if failure is not None and rank == wire.rank:
        return failure
    error: BaseException = pickle.loads(first)
    return error


def pickled(failure: BaseException) -> bytes:
    """Return an error as it is sent to the other ranks; one that cannot be sent, as its message."""
    rank = _wire().rank
    failure.add_note(f"on rank {rank}")
    try:
        sent = pickle.dumps(failure)
        pickle.loads(sent)
    except Exception:
        kind = type(failure).__name__
        return pickle.dumps(RankFailed(f"rank {rank} has failed: {kind}: {failure}"))
    return sent


def _wire() -> Wire:
    return Wire(advice="this rank writes nothing, or undoes what it has written")
