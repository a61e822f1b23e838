"""``Ranks``: the processes that train one model together, and what they send to each other."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch import Tensor

from sparsedelta.distributed import Wire

_ADVICE = "start the run again, with resume if it has checkpoints"


class Ranks(Wire):
    """The ranks of a process group, or this process alone, and what they compute of tensors.

    Args:
        group: a process group of torch.distributed; None: this process alone.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        super().__init__(group, alone=group is None, advice=_ADVICE)

    def sum_(self, tensor: Tensor) -> Tensor:
        """Replace a tensor by its sum over all ranks, and return it."""
        return self.reduce_(tensor, dist.ReduceOp.SUM)

    def extremes(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Return the smallest and the largest value over all ranks of each number, on the CPU."""
        both = torch.stack([numbers, ~numbers]).cpu()  # ~x is smallest where x is largest
        low, flipped = self.reduce_(both, dist.ReduceOp.MIN)
        return low, ~flipped


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
