"""What ``fit`` does in another way for a model that ``fully_shard`` has divided among the ranks.

FSDP2 exchanges weights and gradients in each forward and backward pass. So all ranks must do the same number
of passes, and a rank without a micro-batch repeats one whose loss counts 0 times.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

from torch import nn
from torch.optim import Optimizer

from sift_train.basecheck import model_folder
from sift_train.ranks.checkpoint import load_sharded, save_sharded
from sift_train.ranks.export import check_shards
from sift_train.ranks.group import Ranks
from sift_train.ranks.shard import fsdp_modules, is_sharded
from sift_train.sift import SIFT

T = TypeVar("T")
SHARDS = ".shards.partial"  # in the folder of a run, until the checkpoint that holds it is written


def has_shards(model: nn.Module) -> bool:
    """Return whether a parameter of the model is a DTensor."""
    return any(is_sharded(parameter) for parameter in model.parameters())


def check_sharded_fit(sift: SIFT, base: str | PathLike[str] | None, *, compare: bool) -> None:
    """Check that ``fit`` can train and export a sharded model; all ranks must call this.

    Args:
        sift: the SIFT of the model.
        base: the checkpoint from which the model was loaded.
        compare: whether to compare it with the model.

    Raises:
        ValueError: no base is given, or the base holds other weights; or the ranks of a shard read the same
            data, as with tensor parallelism.
    """
    if base is None:
        raise ValueError("the model is sharded, so no rank can save it as the base; give base")
    meshes = [module._get_fsdp_state()._fsdp_param_group for module in fsdp_modules(sift.model)]
    sizes = {group.mesh_info.mesh.size() for group in meshes if group is not None}
    if sizes != {sift.ranks.size}:
        raise ValueError(
            f"fit divides the data among all {sift.ranks.size} ranks, and the model is not sharded by fully_shard"
            " over all of them; with tensor parallelism use SIFT in your own loop"
        )
    if compare:
        check_shards(sift, model_folder(sift.model, Path(base).absolute(), sift))


def shares(batches: Sequence[T], ranks: Ranks, *, same_number: bool) -> Iterator[tuple[T, float]]:
    """Yield this rank's micro-batches, each with the weight of its loss, 1 or 0.

    Args:
        batches: the micro-batches of all ranks.
        ranks: the ranks.
        same_number: yield as many on each rank; the added ones have the weight 0.
    """
    own = batches[ranks.rank :: ranks.size]
    yield from ((batch, 1.0) for batch in own)
    if same_number and batches:
        n_most = -(-len(batches) // ranks.size)
        yield from [(batches[0], 0.0)] * (n_most - len(own))


@contextmanager
def saved_shards(sift: SIFT, optimizer: Optimizer, folder: Path) -> Iterator[Path]:
    """Write all ranks' shards to a folder inside a run's folder; it is removed if it is still there at the end."""
    work = folder / SHARDS
    sift.ranks.first_does(lambda: folder.mkdir(parents=True, exist_ok=True))
    save_sharded(sift, work, optimizer)
    try:
        yield work
    finally:
        if sift.ranks.is_first:
            shutil.rmtree(work, ignore_errors=True)


def restore_shards(sift: SIFT, optimizer: Optimizer, groups: Any, folder: Path) -> None:
    """Restore what ``saved_shards`` wrote, and the settings of the optimizer's groups, with any number of ranks."""
    optimizer.load_state_dict({"state": {}, "param_groups": groups})
    load_sharded(sift, folder, optimizer)
