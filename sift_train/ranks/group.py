"""``Ranks``: the processes that train one model together, and what they send to each other."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
_PLACE = re.compile(r"^\[[^]]*\] ")  # in the source of a backend


class Ranks:
    """The ranks of a process group, or this process alone.

    All ranks must call the same methods in the same order. In a single process the methods change nothing.

    Attributes:
        group: the process group; None: this process alone.
        size: number of ranks.
        rank: number of this process, from 0.

    Args:
        group: a process group of torch.distributed; None: this process alone.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group
        self.size = 1 if group is None else dist.get_world_size(group)
        self.rank = 0 if group is None else dist.get_rank(group)

    @property
    def is_first(self) -> bool:
        """Whether this process is rank 0, which writes the files."""
        return self.rank == 0

    def sum_(self, tensor: Tensor) -> Tensor:
        """Replace a tensor by its sum over all ranks, and return it."""
        return self._reduce(tensor, dist.ReduceOp.SUM)

    def extremes(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Return the smallest and the largest value over all ranks of each number, on the CPU."""
        both = torch.stack([numbers, ~numbers]).cpu()  # ~x is smallest where x is largest
        low, flipped = self._reduce(both, dist.ReduceOp.MIN)
        return low, ~flipped

    def from_first(self, value: T) -> T:
        """Return the value that rank 0 has; it must be picklable."""
        if self.size == 1:
            return value
        held = [value]
        with one_sentence():
            dist.broadcast_object_list(held, self._global_rank(0), group=self.group)
        return held[0]

    def _global_rank(self, rank: int) -> int:
        return rank if self.group is None else dist.get_global_rank(self.group, rank)

    def first_does(self, work: Callable[[], T]) -> T:
        """Return the result of ``work``, which only rank 0 does.

        Raises:
            RuntimeError: on the other ranks, if the work of rank 0 raised an error.
        """
        result: Any = None
        error: Exception | None = None
        if self.is_first:
            try:
                result = work()
            except Exception as caught:
                error = caught
        result, problem = self.from_first((result, None if error is None else str(error)))
        if error is not None:
            raise error
        if problem is not None:
            raise RuntimeError(f"rank 0 stopped: {problem}")
        done: T = result
        return done

    def _reduce(self, tensor: Tensor, operation: Any) -> Tensor:
        if self.size == 1:
            return tensor
        sent = tensor.contiguous()
        if not self._takes(sent.device):
            sent = sent.to("cuda")
        with one_sentence():
            dist.all_reduce(sent, operation, group=self.group)
        return tensor if sent is tensor else tensor.copy_(sent)

    def _takes(self, device: torch.device) -> bool:
        """Return whether the group has a backend for a device; NCCL has none for the CPU."""
        if device.type != "cpu":
            return True
        backends = str(dist.get_backend_config(self.group))
        return "cpu:" in backends and "cpu:nccl" not in backends


ALONE = Ranks(None)


def find_ranks(group: dist.ProcessGroup | None = None) -> Ranks:
    """Return the ranks of a group, by default of all processes that torch.distributed connects.

    Raises:
        ValueError: a launcher started several processes, but torch.distributed does not connect them.
    """
    if group is not None or (dist.is_available() and dist.is_initialized()):
        found = Ranks(dist.group.WORLD if group is None else group)
        return found if found.size > 1 else ALONE
    n_started = launched_processes()
    if n_started > 1:
        raise ValueError(
            f"{n_started} processes were started together (WORLD_SIZE), but torch.distributed does not"
            " connect them, so each would train a model of its own; call"
            " torch.distributed.init_process_group() first, or start one process"
        )
    return ALONE


def expected_size() -> int:
    """Return the number of ranks, also before torch.distributed connects them."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    return launched_processes()


def launched_processes() -> int:
    """Return the number of processes that torchrun or accelerate started together, 1 if none did."""
    size = os.environ.get("WORLD_SIZE", "1")
    return int(size) if "RANK" in os.environ and size.isdigit() else 1


class RankLost(RuntimeError):
    """Another rank has ended, or does not answer within the time limit of the process group."""


@contextmanager
def one_sentence() -> Iterator[None]:
    """Explain an error of the network, which a backend raises if another process has died.

    Raises:
        RankLost: the block raised a RuntimeError.
    """
    try:
        yield
    except RuntimeError as error:
        raise _lost(error) from error


@contextmanager
def network_errors_explained() -> Iterator[None]:
    """Explain an error of the network that something else raises, such as the forward pass of FSDP2.

    Raises:
        RankLost: the block raised an error of a backend.
    """
    try:
        yield
    except RankLost:
        raise
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "/gloo/" in str(error):
            raise _lost(error) from error
        raise


def _lost(error: RuntimeError) -> RankLost:
    first = next(iter(str(error).splitlines()), type(error).__name__)
    reason = _PLACE.sub("", first).partition(". This is typically")[0]  # advice of gloo
    return RankLost(
        f"another rank of this run stopped or cannot be reached ({reason}); start the run again, with"
        " resume if it has checkpoints"
    )
