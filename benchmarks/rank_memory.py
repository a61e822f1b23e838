"""Measures the memory of one of two gloo processes under FSDP2: of training steps, and of the export above it.

Bytes of training are those that torch allocates for tensors, and the shard of the weights. Bytes of the export are
anonymous memory of the process above that before the call. Each way has two new processes.

    OMP_NUM_THREADS=1 python benchmarks/rank_memory.py
"""

from __future__ import annotations

import ctypes
import gc
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from distributed import make_decoder
from measuring import memory_sampler, options_for, table, work_folder, write_result
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing import get_context
from torch.profiler import ProfilerActivity, profile

import sparsedelta.distributed  # noqa: F401 - so that loading modules is no part of the export
from sift_train import SIFT, export_delta

MB = 1_000_000
MIB = 1 << 20
CHUNK = 1 << 24  # elements
N_RANKS = 2
WAYS = ("forward and backward", "dense gradients", "full, AdamW", "SIFT, AdamW")
# What is trained for the export: sparsely, and the output layer densely as well.
EXPORTS = {"5 % of all matrices": (), "lm_head entirely, 5 % of the rest": ("lm_head",)}


def sharded(folder: Path) -> Any:
    """Return a decoder with bf16 weights, of which each layer, the embeddings and the output layer are sharded."""
    import transformers

    make: Any = transformers.LlamaForCausalLM
    model: Any = make.from_pretrained(folder)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for module in [*model.model.layers, model.model.embed_tokens, model.lm_head, model]:
        fully_shard(module, mesh=mesh)
    return model


def drop_gradients(model: nn.Module, chosen: Callable[[str], bool]) -> None:
    """Let some parameters have gradients, each of which is dropped when it is complete."""

    def drop(parameter: torch.Tensor) -> None:
        parameter.grad = None

    for name, parameter in model.named_parameters():
        parameter.requires_grad_(chosen(name))
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(drop)


def peak_of_training(way: str, rate: float, folder: Path) -> dict[str, int]:
    """Return the peak of three steps on one row of eight tokens, and the sizes that it consists of."""
    model: Any = sharded(folder)
    local = [parameter.to_local() for parameter in model.parameters()]
    shard = sum(one.numel() * one.element_size() for one in local)
    tokens = torch.arange(8)[None]
    sift = None
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        trained: list[Any] = []
        if way.startswith("SIFT"):
            sift = SIFT(model, rate, "all-linear", lr_transfer=False)
            trained = sift.parameters_in_optimizer()
        elif way.startswith("full"):
            trained = [*model.parameters()]
        else:
            model.model.embed_tokens.register_forward_hook(lambda m, a, out: out.requires_grad_())
            drop_gradients(model, lambda name: way.startswith("dense") and "proj" in name)
        optimizer = torch.optim.AdamW(trained, lr=1e-4) if trained else None
        for _ in range(3):
            model(input_ids=tokens, labels=tokens).loss.backward()
            if optimizer is not None:
                optimizer.step()
                optimizer.zero_grad()
    profiler: Any = profiled.profiler
    events = profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    held = most = shard
    for _, n_bytes in changes:
        held += n_bytes
        most = max(most, held)
    n_local = sum(master.numel() for master in trained) if sift is not None else 0
    unit = max(module.weight.numel() for module in (model.lm_head, model.model.embed_tokens))
    return {"peak": most, "shard": shard, "unit": 2 * unit, "n_local": n_local}


def peak_of_export(exception: tuple[str, ...], rate: float, folder: Path) -> dict[str, float]:
    """Return the peak of an export above the memory before it, the changed elements and the seconds."""
    model = sharded(folder)
    with SIFT(
        model, rate, "re:.*(proj|embed_tokens|lm_head)", exception, lr_transfer=False
    ) as sift:
        sift.finish_selection()
        with torch.no_grad():
            for part in sift.sparse_mapping.values():
                part.master.mul_(1.02)
        sift.write_back()
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        start = time.perf_counter()
        with memory_sampler(os.getpid(), enabled=True) as samples:
            time.sleep(0.1)
            before = samples[-1]
            nnz = export_delta(
                model, folder.parent / "x.sd", sift=sift, base=folder, overwrite=True
            )
        seconds = time.perf_counter() - start
        return {"peak": max(samples) - before, "nnz": nnz, "seconds": seconds}


def serve(rank: int, measure: Any, arguments: Any, store: str, results: Any) -> None:
    """Measure one peak on all ranks; all report."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=N_RANKS)
    torch.manual_seed(0)
    results.put((rank, measure(*arguments)))
    dist.barrier()
    dist.destroy_process_group()


def on_ranks(measure: Any, *arguments: Any, folder: Path) -> list[Any]:
    """Return what both ranks measure in new processes."""
    context = get_context("spawn")
    results = context.Queue()
    store = folder / "store"
    store.unlink(missing_ok=True)
    ranks = [
        context.Process(target=serve, args=(rank, measure, arguments, str(store), results))
        for rank in range(N_RANKS)
    ]
    for process in ranks:
        process.start()
    found = dict(results.get(timeout=600) for _ in ranks)
    for process in ranks:
        process.join()
    return [found[rank] for rank in range(N_RANKS)]


def sections_of(training: dict[str, Any], exports: dict[str, list[Any]]) -> list[str]:
    """Return the sections of the result."""
    alone = training[WAYS[1]]["peak"]
    rows = []
    for way, found in training.items():
        bound = found["shard"] + found["unit"] + 20 * found["n_local"]
        cells = (found["peak"], found["peak"] - alone, 20 * found["n_local"], bound)
        rows.append([way, *(f"{n / MB:,.1f}" for n in cells), f"{found['peak'] / bound:.2f}"])
    columns = ("what trains", "peak, MB", "above dense gradients", "20 bytes × local", "bound", "÷")
    rows_of_export = [
        [name, f"{ranks[0]['nnz']:,}", *(f"{one['peak'] / MIB:.0f}" for one in ranks)]
        for name, ranks in exports.items()
    ]
    export_columns = ("trained", "changed", "rank 0, MiB above training", "rank 1")
    return [
        "## Memory of a rank under FSDP2\n\n" + table(columns, rows),
        "The decoder in bf16, random weights, one row of 8 tokens; layers, embeddings and output layer are sharded one by"
        ' one. "Dense gradients" is FSDP2 alone: matrices of the layers have gradients, each dropped as soon as it is'
        " complete. The bound is the shard of the weights, the largest unsharded part, and 20 bytes for each local component.",
        "## Memory of an export\n\n" + table(export_columns, rows_of_export),
        f"Two chunks of bf16 elements are {4 * CHUNK // MIB} MiB. The embeddings and lm_head have 20.5 million elements, 1.2 chunks. Sampled every"
        " 20 ms.",
    ]


def main() -> None:
    """Measure and write the tables."""
    parser = options_for(__doc__, "rank_memory.md")
    parser.add_argument("--rate", type=float, default=0.05)
    options = parser.parse_args()
    with work_folder(options.work_dir, keep=options.keep) as work:
        torch.manual_seed(0)
        model: Any = make_decoder()[0].to(torch.bfloat16)
        model.save_pretrained(work / "base")
        del model
        rest = options.rate, work / "base"
        training = {w: on_ranks(peak_of_training, w, *rest, folder=work)[0] for w in WAYS}
        exports = {
            name: on_ranks(peak_of_export, exception, *rest, folder=work)
            for name, exception in EXPORTS.items()
        }
        write_result(
            options.result, "Memory of two ranks", sections_of(training, exports), where=work
        )


if __name__ == "__main__":
    main()
