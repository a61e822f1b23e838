"""``Wire``: what the ranks of a process group send to each other, and how all of them fail if one fails."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from sparsedelta.errors import SparseDeltaError

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist

T = TypeVar("T")
_PLACE = re.compile(r"^\[[^]]*\] ")  # in the source of a backend


class RankFailed(SparseDeltaError, RuntimeError):
    """Another rank has failed; the message is that of its error."""


class RankLost(SparseDeltaError, RuntimeError):
    """Another rank has ended, or does not answer within the time limit of the process group."""


class Wire:
    """The ranks of a process group, or this process alone.

    All ranks must call the same methods in the same order; ``send`` and ``receive`` are for two. Values must be picklable. In
    a single process nothing is exchanged. All methods raise RankLost.

    Attributes:
        group: the process group; None: all ranks, or this process alone.
        rank: number of this rank in the group, from 0.
        size: number of ranks.

    Args:
        group: the process group; None: all ranks, or this process alone if ``torch.distributed`` connects none.
        alone: this process alone in any case.
        advice: what the message of RankLost tells the user.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        *,
        alone: bool = False,
        advice: str = "start all ranks again",
    ) -> None:
        import torch.distributed as dist

        connected = dist.is_available() and (group is not None or dist.is_initialized())
        is_alone = alone or not connected
        self.group = group
        self.rank = 0 if is_alone else dist.get_rank(group)
        self.size = 1 if is_alone else dist.get_world_size(group)
        self._advice = advice

    @property
    def is_first(self) -> bool:
        """Whether this process is rank 0."""
        return self.rank == 0

    def gathered(self, value: T) -> list[T]:
        """Return the values of all ranks, in order."""
        import torch.distributed as dist

        found: list[Any] = [value]
        if self.size > 1:
            found = [None] * self.size
            with self._connected():
                dist.all_gather_object(found, value, group=self.group)
        return found

    def gathered_on(self, rank: int, value: T) -> list[T]:
        """Return the values of all ranks, in order, on one of them; an empty list on the others."""
        import torch.distributed as dist

        if self.size == 1:
            return [value]
        found: list[Any] | None = [None] * self.size if self.rank == rank else None
        with self._connected():
            dist.gather_object(value, found, dst=self._global(rank), group=self.group)
        return found or []

    def from_first(self, value: T) -> T:
        """Return the value of rank 0."""
        import torch.distributed as dist

        found = [value]
        if self.size > 1:
            with self._connected():
                dist.broadcast_object_list(found, src=self._global(0), group=self.group)
        return found[0]

    def send(self, value: Any, rank: int) -> None:
        """Send a value to a rank, which receives it."""
        import torch.distributed as dist

        with self._connected():
            dist.send_object_list([value], self._global(rank), self.group)

    def receive(self, rank: int) -> Any:
        """Return what a rank sends to this one."""
        import torch.distributed as dist

        found = [None]
        with self._connected():
            dist.recv_object_list(found, self._global(rank), self.group)
        return found[0]

    def reduce_(self, tensor: torch.Tensor, operation: Any) -> torch.Tensor:
        """Replace a tensor by the result of a ``ReduceOp`` over all ranks, and return it."""
        import torch.distributed as dist

        if self.size == 1:
            return tensor
        sent = self._movable(tensor)
        with self._connected():
            dist.all_reduce(sent, operation, group=self.group)
        return tensor if sent is tensor else tensor.copy_(sent)

    def broadcast_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Replace a tensor by that of rank 0, and return it."""
        import torch.distributed as dist

        if self.size == 1:
            return tensor
        sent = self._movable(tensor)
        with self._connected():
            dist.broadcast(sent, src=self._global(0), group=self.group)
        return tensor if sent is tensor else tensor.copy_(sent)

    def agree(self, value: T, failure: Exception | None = None) -> list[T]:
        """Return what each rank gives, unless a rank has failed.

        Args:
            value: what this rank gives.
            failure: why this rank cannot continue.

        Raises:
            RankFailed: another rank has failed; on that rank its own error.
        """
        found = self.gathered((value, None if failure is None else str(failure)))
        if failure is not None:
            raise failure
        for rank, (_, problem) in enumerate(found):
            if problem is not None:
                raise _failed(rank, problem)
        return [one for one, _ in found]

    def together(self, work: Callable[[], T]) -> T:
        """Return the result of work that each rank does on its own, unless it fails on a rank; see ``agree``."""
        try:
            result, failure = work(), None
        except Exception as error:
            failure = error
        self.agree(None, failure)
        return result

    def first_does(self, work: Callable[[], T]) -> T:
        """Return on all ranks the result of work that only rank 0 does.

        Raises:
            RankFailed: on the other ranks, if the work of rank 0 raised an error; on rank 0 its own error.
        """
        result: Any = None
        failure: Exception | None = None
        if self.is_first:
            try:
                result = work()
            except Exception as error:
                failure = error
        result, problem = self.from_first((result, None if failure is None else str(failure)))
        if failure is not None:
            raise failure
        if problem is not None:
            raise _failed(0, problem)
        done: T = result
        return done

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Explain an error of the network that something else raises, such as the forward pass of FSDP2."""
        import torch.distributed as dist

        try:
            yield
        except RankLost:
            raise
        except RuntimeError as error:
            if isinstance(error, dist.DistError) or "/gloo/" in str(error):
                raise self._lost(error) from error
            raise

    @contextmanager
    def _connected(self) -> Iterator[None]:
        """Explain an error of the network, which a backend raises if another process has died."""
        try:
            yield
        except RuntimeError as error:
            raise self._lost(error) from error

    def _lost(self, error: RuntimeError) -> RankLost:
        first = next(iter(str(error).splitlines()), type(error).__name__)
        reason = _PLACE.sub("", first).partition(". This is typically")[0]  # advice of gloo
        return RankLost(f"another rank stopped or cannot be reached ({reason}); {self._advice}")

    def _movable(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a contiguous tensor on a device from which the group can send it."""
        import torch.distributed as dist

        sent = tensor.contiguous()
        backends = str(dist.get_backend_config(self.group))
        has_cpu = "cpu:" in backends and "cpu:nccl" not in backends  # NCCL has none for the CPU
        if sent.device.type == "cpu":
            return sent if has_cpu else sent.to("cuda")
        return sent if f"{sent.device.type}:" in backends or not has_cpu else sent.cpu()

    def _global(self, rank: int) -> int:
        import torch.distributed as dist

        return rank if self.group is None else dist.get_global_rank(self.group, rank)


def _failed(rank: int, problem: str) -> RankFailed:
    return RankFailed(f"rank {rank} has failed: {problem}")
