"""What the ranks of ``torch.distributed`` send to each other while they make one delta. Without ``torch.distributed``, one rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch.distributed as dist

from sparsedelta.errors import SparseDeltaError

T = TypeVar("T")


class Wire:
    """The ranks of a process group. All must call ``agree`` in the same order; ``send`` and ``receive`` are for two.

    Attributes:
        rank: number of this rank in the group.
        size: number of ranks.

    Args:
        group: the process group; None: all ranks, or this process alone if ``torch.distributed`` connects none.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._group = group
        is_alone = group is None and not dist.is_initialized()
        self.rank = 0 if is_alone else dist.get_rank(group)
        self.size = 1 if is_alone else dist.get_world_size(group)

    def agree(self, value: T, failure: Exception | None = None) -> list[T]:
        """Return what each rank gives, unless a rank has failed.

        Args:
            value: anything that can be pickled.
            failure: why this rank cannot continue.

        Raises:
            SparseDeltaError: another rank has failed; on that rank its own error.
        """
        given = (value, None if failure is None else str(failure))
        found: list[Any] = [given]
        if self.size > 1:
            found = [None] * self.size
            with _one_sentence():
                dist.all_gather_object(found, given, group=self._group)
        if failure is not None:
            raise failure
        for rank, (_, problem) in enumerate(found):
            if problem is not None:
                raise SparseDeltaError(f"rank {rank} has failed: {problem}")
        return [one for one, _ in found]

    def together(self, work: Callable[[], T]) -> T:
        """Return the result of work that each rank does on its own, unless it fails on a rank; see ``agree``."""
        try:
            result, failure = work(), None
        except Exception as error:
            failure = error
        self.agree(None, failure)
        return result

    def send(self, value: Any, rank: int) -> None:
        """Send anything that can be pickled to a rank, which receives it."""
        with _one_sentence():
            dist.send_object_list([value], self._global(rank), self._group)

    def receive(self, rank: int) -> Any:
        """Return what a rank sends to this one."""
        found = [None]
        with _one_sentence():
            dist.recv_object_list(found, self._global(rank), self._group)
        return found[0]

    def _global(self, rank: int) -> int:
        return rank if self._group is None else dist.get_global_rank(self._group, rank)


@contextmanager
def _one_sentence() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # of the backend, if another process has ended
        raise SparseDeltaError(
            "another rank stopped or cannot be reached; start all ranks again"
        ) from error
