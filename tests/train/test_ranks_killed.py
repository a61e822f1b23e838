"""A rank is killed or stops answering: the other ends with one sentence, nothing is half written, and a resume has the same bits."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from rank_helpers import free_port
from safetensors.torch import save_file
from train_helpers import make_net

SCRIPT = """
import os, signal, sys
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from train_helpers import make_inputs, make_net, square_loss

import sparsedelta.distributed
from sift_train import FitConfig, fit
from sift_train.ranks import fitting

folder, output, way, ending = Path(sys.argv[1]), *sys.argv[2:]
dist.init_process_group("gloo", timeout=timedelta(seconds=10 if ending == "silent" else 100))
model = make_net().double()
if way == "sharded":
    mesh = init_device_mesh("cpu", (2,))
    fully_shard(model.first, mesh=mesh)
    fully_shard(model, mesh=mesh)
done = 0

def end(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGSTOP if ending == "silent" else signal.SIGKILL)

def loss(model, batch):
    value = square_loss(model, batch)
    if dist.get_rank() == 1 and ending in ("killed", "silent") and done == 5:
        end()  # between the forward and the backward pass
    return value

def on_step(report):
    global done
    done = report.step
    if dist.get_rank() == 1 and ending == "saving" and done == 4:
        fitting.save_sharded = end
    if dist.get_rank() == 1 and ending == "export" and done == 8:
        sparsedelta.distributed.diff_shards = end

fit(model, [batch.double() for batch in make_inputs(7)], output=folder / output,
    base=folder / "base.safetensors", loss=loss, run_dir=folder / f"run-{output}", resume=True,
    on_step=on_step, config=FitConfig(sparse_rate=0.2, lr=1e-2, selection="gradient",
    selection_batches=3, epochs=2, save_every=2))
"""


def start(folder: Path, output: str, way: str, ending: str) -> list[tuple[int | None, str]]:
    """Return the exit code of both ranks, None if it was stopped, and the last line of what they wrote."""
    script = folder / "train.py"
    script.write_text(SCRIPT)
    here = Path(__file__).parent
    given = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    given |= {"MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    given["PYTHONPATH"] = os.pathsep.join(map(str, (here.parents[1], here)))
    command = [sys.executable, str(script), str(folder), output, way, ending]
    ranks = [
        subprocess.Popen(
            command,
            env={**os.environ, **given, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        first = ranks[0].communicate(timeout=120)[1]
        if ending == "silent":
            ranks[1].kill()
        second = ranks[1].communicate(timeout=120)[1]
    finally:
        for rank in ranks:
            rank.kill()
    ends = [*zip(ranks, (first, second), strict=True)]
    return [(rank.returncode, (text.strip().splitlines() or [""])[-1]) for rank, text in ends]


def check_lost(folder: Path, way: str, ending: str, step: int) -> None:
    """Check that rank 0 ends with one sentence and that only the checkpoint of a step is there."""
    (code, said), (other, _) = start(folder, "delta.sd", way, ending)
    assert (code, other) == (1, -9), said
    assert "another rank" in said
    assert "stopped or cannot be reached" in said
    assert "start" in said.rpartition(";")[2]
    assert not (folder / "delta.sd").exists()
    names = [p.name for p in (folder / "run-delta.sd").iterdir() if not p.name.startswith(".")]
    assert names == [f"step-{step:08d}"]


@pytest.mark.parametrize(
    ("way", "endings"),
    [
        ("data parallel", [("killed", 4)]),
        ("sharded", [("saving", 2), ("silent", 4), ("export", 8)]),
    ],
)
def test_a_lost_rank(tmp_path: Path, way: str, endings: list[tuple[str, int]]) -> None:
    save_file(make_net().double().state_dict(), tmp_path / "base.safetensors")
    for ending, step in endings:
        check_lost(tmp_path, way, ending, step)
    for output in ("delta.sd", "whole.sd"):
        ranks = start(tmp_path, output, way, "none")
        assert [code for code, _ in ranks] == [0, 0], ranks
        assert [path.name for path in (tmp_path / f"run-{output}").iterdir()] == ["step-00000008"]
    assert (tmp_path / "delta.sd").read_bytes() == (tmp_path / "whole.sd").read_bytes()
