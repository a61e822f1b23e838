"""``ShardSnapshot``: the deltas that ranks make of a divided model are those of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from live.divided_helpers import Net, divided, outcome
from rank_helpers import RankPool
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

import sparsedelta
from sparsedelta.distributed import ShardSnapshot
from sparsedelta.live.homes import Homes

OPTIONS: list[dict[str, Any]] = [{"info": {"step": 1}}, {"values": "target", "base_id": "org/base"}]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """Return what this rank holds of a tensor, as integers."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.detach().view({2: torch.int16, 8: torch.int64}[local.element_size()])


def step(model: Any, n: int) -> None:
    """Change some elements, which their values choose, so that ranks and the whole model agree."""
    for _, tensor in sorted(model.named_parameters()):
        chosen = bits(tensor) % 5 == n % 3
        bits(tensor)[chosen] ^= 1


def of_ranks(rank: int, kind: str, folder: str | None) -> list[bytes | None]:
    """Return the deltas of two steps, between which the snapshot advances, and that of both."""
    model = divided(Net(), kind)
    found = []
    with (
        ShardSnapshot(model, folder=folder if rank == 0 else "nowhere")
        if folder
        else (ShardSnapshot(model)) as snapshot
    ):
        for n, options in enumerate(OPTIONS):
            step(model, n)
            delta = snapshot.diff(**options)
            assert (delta is None) == (rank != 0)
            found.append(delta.to_bytes() if delta else None)
            if n:
                snapshot.advance(delta)
        last = snapshot.diff()
        found.append(last.to_bytes() if last else None)
    return found


@pytest.mark.parametrize(
    ("kind", "is_folder"), [("fsdp2", False), ("tensor", False), ("fsdp2", True)]
)
def test_the_deltas_are_those_of_one_process(
    pool: RankPool, tmp_path: Path, kind: str, *, is_folder: bool
) -> None:
    folder = None
    if is_folder:
        folder = tmp_path / "base"
        folder.mkdir()
        state = Net().state_dict()
        del state["head.weight"]
        state["head.weight"] = state["embed.weight"].clone()
        save_file(state, folder / "model.safetensors")
        (folder / "config.json").write_text("{}")
    model = Net()
    snapshot = sparsedelta.Snapshot(dict(model.state_dict()), folder=folder)
    expected: list[bytes | None] = []
    for n, options in enumerate(OPTIONS):
        step(model, n)
        with snapshot.diff(**options) as delta:
            expected.append(delta.to_bytes())
            if n:
                snapshot.advance(delta)
    expected.append(snapshot.diff().to_bytes())
    found, others = pool.results(of_ranks, kind, folder and str(folder))
    assert found == expected
    assert others == [None] * 3


def wrong(rank: int) -> tuple[list[str], int]:
    """Make mistakes, one of them on rank 1; return the errors, and how many elements the delta after them changes."""
    model = divided(Net(), "fsdp2")
    snapshot = ShardSnapshot(model)
    step(model, 0)
    errors = [outcome(lambda: snapshot.diff(level="low" if rank else "max"))]
    errors.append(outcome(lambda: snapshot.advance(None)))
    with pytest.MonkeyPatch.context() as faults:
        if rank:

            def fail(*args: Any) -> None:
                raise OSError("no space left")

            faults.setattr(Homes, "_do", fail)
        errors.append(outcome(snapshot.diff))
    delta = snapshot.diff()
    snapshot.advance(delta)
    again = snapshot.diff()
    snapshot.close()
    return errors, delta.nnz - again.nnz if delta and again else 0


def test_a_mistake_of_one_rank(pool: RankPool) -> None:
    (first, nnz), (second, _) = pool.results(wrong)
    assert first[0].startswith("RankFailed: rank 1 has failed: level is 'low'")
    assert second[0].startswith("ValueError: level is 'low'")
    assert first[1].startswith("ValueError: the delta is not the one that diff has returned last")
    assert (
        second[1]
        == "RankFailed: rank 0 has failed: the delta is not the one that diff has returned last"
    )
    assert first[2] == "RankFailed: rank 1 has failed: no space left"
    assert second[2].startswith("RankFailed: rank 0 has failed: rank 1 has failed: no space left")
    assert nnz > 0
