"""Measures saving and loading with DeltaStorageWriter and DeltaStorageReader beside torch's own, on two gloo processes.

    python benchmarks/delta_storage.py [--mb 200] [--links 4]

The state is BF16 matrices that the ranks divide by rows. Before each save, 1 % of the elements change at random.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from measuring import median, options_for, table, tree_bytes, work_folder, write_result
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.multiprocessing.spawn import spawn

from sparsedelta.distributed import DeltaStorageReader, DeltaStorageWriter

N_RANKS = 2
SIDE = 2048
Seconds = dict[str, list[float]]


def measure(rank: int, root: str, n_tensors: int, n_links: int) -> None:
    """Save and load on one rank; rank 0 writes the seconds to a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{root}/store", rank=rank, world_size=N_RANKS)
    mesh = init_device_mesh("cpu", (N_RANKS,))
    draw = torch.Generator().manual_seed(rank)
    held = [torch.randn(SIDE // N_RANKS, SIDE, generator=draw).bfloat16() for _ in range(n_tensors)]
    state = {f"w{n}": DTensor.from_local(t, mesh, [Shard(0)]) for n, t in enumerate(held)}
    seconds: Seconds = {}

    def timed(name: str, work: Any) -> None:
        dist.barrier()
        start = time.perf_counter()
        work()
        dist.barrier()
        seconds.setdefault(name, []).append(time.perf_counter() - start)

    writers = {
        "copy": DeltaStorageWriter(f"{root}/copy0"),
        "read": DeltaStorageWriter(f"{root}/read0", keep_copy=False),
    }
    for step in range(n_links + 1):
        for tensor in held if step else ():
            flat = tensor.view(torch.int16).view(-1)
            index = torch.randint(0, len(flat), (len(flat) // 100,), generator=draw)
            flat[index] ^= 1
        plain = f"{root}/plain{step}"
        timed("save plain", lambda p=plain: save(state, storage_writer=FileSystemWriter(p)))
        for name, writer in writers.items():
            folder = f"{root}/{name}{step}"
            what = f"save {name}" if step else "save full"
            timed(
                what,
                lambda f=folder, w=writer: save(state, storage_writer=w, checkpoint_id=f),
            )
    expected = [tensor.clone() for tensor in held]
    last = f"{root}/plain{n_links}"
    timed("load plain", lambda: load(state, storage_reader=FileSystemReader(last)))
    for step in (0, 1, n_links):
        folder = f"{root}/copy{step}"
        timed(f"load {step}", lambda f=folder: load(state, storage_reader=DeltaStorageReader(f)))
    for tensor, wanted in zip(held, expected, strict=True):
        if not torch.equal(tensor.view(torch.int16), wanted.view(torch.int16)):
            raise RuntimeError("the loaded state differs")
    if rank == 0:
        torch.save(seconds, f"{root}/seconds")
    dist.destroy_process_group()


def main() -> int:
    """Run the benchmark."""
    parser = options_for(__doc__, "delta_storage.md")
    parser.add_argument("--mb", type=int, default=200, help="size of the state")
    parser.add_argument("--links", type=int, default=4, help="saves after the first one")
    options = parser.parse_args()
    n_tensors = max(1, options.mb * 1_000_000 // (2 * SIDE * SIDE))
    with work_folder(options.work_dir, keep=options.keep) as work:
        spawn(measure, (str(work), n_tensors, options.links), nprocs=N_RANKS)
        seconds: Seconds = torch.load(work / "seconds", weights_only=True)
        full, delta = tree_bytes(work / "plain0"), tree_bytes(work / "copy1")
        names = {
            "save plain": ("save, `FileSystemWriter`", full),
            "save full": ("save, `DeltaStorageWriter`, full", tree_bytes(work / "copy0")),
            "save copy": ("save, `DeltaStorageWriter`, delta", delta),
            "save read": ("save, `DeltaStorageWriter`, delta, `keep_copy=False`", delta),
            "load plain": ("load, `FileSystemReader`", full),
            "load 0": ("load, `DeltaStorageReader`, full", full),
            "load 1": ("load, `DeltaStorageReader`, 1 delta", full + delta),
            f"load {options.links}": (
                f"load, `DeltaStorageReader`, {options.links} deltas",
                full + sum(_bytes(work, n) for n in range(1, options.links + 1)),
            ),
        }
        rows = [
            [label, f"{median(seconds[name]):.2f}", f"{n / 1e6:.2f}"]
            for name, (label, n) in names.items()
        ]
        text = (
            f"{N_RANKS} gloo processes with one thread each; {n_tensors} BF16 matrices of {SIDE} × {SIDE}, 1 % of the"
            " elements changed before each save. Medians; the loaded state was compared bit for bit."
        )
        columns = ("what", "s", "MB written or read")
        write_result(
            options.result,
            "Checkpoints of torch.distributed as deltas",
            [text, table(columns, rows)],
            where=work,
        )
    return 0


def _bytes(work: Path, step: int) -> int:
    return tree_bytes(work / f"copy{step}")


if __name__ == "__main__":
    sys.exit(main())
