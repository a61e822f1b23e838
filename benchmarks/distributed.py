"""Compares steps of two gloo processes: SIFT, LoRA and full fine-tuning, the latter two with DDP.

Bytes are those that the loopback interface has sent, for one of the two ranks. Each round trains every
way once, one after the other, in the same two processes.

    OMP_NUM_THREADS=1 python benchmarks/distributed.py
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import torch.distributed as dist
import transformers
from measuring import options_for, table, work_folder, write_result
from torch import nn
from torch.multiprocessing import get_context
from torch.nn.parallel import DistributedDataParallel

from sift_train import SIFT

LINEAR = {"minilm": "re:encoder.*(query|key|value|dense)[.]weight", "decoder": "all-linear"}
LORA_TARGETS = {"minilm": r".*encoder.*(query|key|value|dense)", "decoder": "all-linear"}
WAYS = ("full, DDP", "LoRA, DDP", "SIFT", "SIFT, bf16 sums")
N_RANKS = 2


def make_minilm() -> tuple[nn.Module, int]:
    """Return a classifier of MiniLM-L6's shape with random weights, and its vocabulary's size."""
    make: Any = transformers.BertConfig
    config = make(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
    )
    return transformers.BertForSequenceClassification(config), config.vocab_size


def make_decoder() -> tuple[nn.Module, int]:
    """Return a Llama of 97 million parameters with random weights, and its vocabulary's size."""
    make: Any = transformers.LlamaConfig
    config = make(
        vocab_size=32_000,
        hidden_size=640,
        intermediate_size=1760,
        num_hidden_layers=11,
        num_attention_heads=10,
        num_key_value_heads=10,
        max_position_embeddings=512,
    )
    return transformers.LlamaForCausalLM(config), config.vocab_size


MODELS: dict[str, Callable[[], tuple[nn.Module, int]]] = {
    "minilm": make_minilm,
    "decoder": make_decoder,
}


def lora_rank(model: nn.Module, n_wanted: int, name: str) -> int:
    """Return the rank at which LoRA trains about as many parameters as wanted."""
    one: Any = peft.get_peft_model(model, lora_config(name, 1))
    n_each: int = sum(p.numel() for n, p in one.named_parameters() if "lora_" in n)
    return max(1, round(n_wanted / n_each))


def lora_config(name: str, rank: int) -> peft.LoraConfig:
    """Return a LoRA of the matrices that SIFT trains."""
    return peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=LORA_TARGETS[name])


def sent_bytes() -> int:
    """Return the bytes that the loopback interface has sent since the machine started."""
    for line in Path("/proc/net/dev").read_text("utf-8").splitlines():
        device, _, numbers = line.partition(":")
        if device.strip() == "lo":
            return int(numbers.split()[8])
    raise OSError("this machine has no interface lo; the benchmark needs Linux")


def train(rank: int, name: str, way: str, rate: float, n_steps: int) -> dict[str, Any]:
    """Return the seconds and sent bytes of each step, and the number of trained components."""
    torch.manual_seed(0)
    model, n_tokens = MODELS[name]()
    sift = None
    if way.startswith("SIFT"):
        dtype = torch.bfloat16 if "bf16" in way else None
        sift = SIFT(
            model, rate, LINEAR[name], selection="gradient", lr_transfer=False, reduce_dtype=dtype
        )
        masters, n_trained = sift.parameters_in_optimizer(), sift.n_trained
        called: Any = model
    else:
        if way.startswith("LoRA"):
            with SIFT(MODELS[name]()[0], rate, LINEAR[name]) as other:
                n_wanted = other.n_trained
            rank_of = lora_rank(MODELS[name]()[0], n_wanted, name)
            model = peft.get_peft_model(model, lora_config(name, rank_of))
        masters = [p for p in model.parameters() if p.requires_grad]
        n_trained = sum(p.numel() for p in masters)
        called = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(masters, lr=1e-4)
    generator = torch.Generator().manual_seed(rank)
    seconds, sent = [], []
    for _ in range(n_steps):
        tokens = torch.randint(0, n_tokens, (8, 64), generator=generator)
        labels = tokens if name == "decoder" else tokens[:, 0] % 2
        dist.barrier()
        before, start = sent_bytes(), time.perf_counter()
        called(input_ids=tokens, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        dist.barrier()
        seconds.append(time.perf_counter() - start)
        sent.append(sent_bytes() - before)
    if sift is not None:
        sift.close()
    # The first step chooses components, or builds DDP's buckets.
    return {"seconds": seconds[2:], "sent": sent[2:], "n_trained": n_trained}


def serve(rank: int, options: Any, store: str, results: Any) -> None:
    """Train every way in every round; rank 0 reports."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=N_RANKS)
    for name in options.models:
        for _ in range(options.rounds):
            for way in WAYS:
                found = train(rank, name, way, options.rate, options.steps)
                if rank == 0:
                    results.put((name, way, found))
    dist.barrier()
    dist.destroy_process_group()


def rows_of(found: dict[str, list[dict[str, Any]]]) -> list[list[str]]:
    """Return the rows of one model's table."""
    rows = []
    for way, runs in found.items():
        n_trained = runs[0]["n_trained"]
        width = 2 if "bf16" in way else 4
        seconds = [statistics.median(run["seconds"]) for run in runs]
        full = [statistics.median(run["seconds"]) for run in found[WAYS[0]]]
        lora = [statistics.median(run["seconds"]) for run in found[WAYS[1]]]
        sent = min(min(run["sent"]) for run in runs) / N_RANKS
        cells = [
            f"{n_trained:,}",
            f"{sent:,.0f}",
            f"{sent / (width * n_trained):.3f}",
            f"{statistics.median(seconds):.3f}",
            f"{statistics.median(a / b for a, b in zip(seconds, full, strict=True)):.2f}",
            f"{statistics.median(a / b for a, b in zip(seconds, lora, strict=True)):.2f}",
        ]
        rows.append([way, *cells])
    return rows


def main() -> None:
    """Measure all models and write the tables."""
    parser = options_for(__doc__, "distributed.md")
    parser.add_argument("--models", nargs="+", choices=tuple(MODELS), default=list(MODELS))
    parser.add_argument("--rate", type=float, default=0.05)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    options = parser.parse_args()
    with work_folder(options.work_dir, keep=options.keep) as work:
        context = get_context("spawn")
        results = context.Queue()
        ranks = [
            context.Process(target=serve, args=(rank, options, str(work / "store"), results))
            for rank in range(N_RANKS)
        ]
        for process in ranks:
            process.start()
        found: dict[str, dict[str, list[dict[str, Any]]]] = {}
        for _ in range(len(options.models) * options.rounds * len(WAYS)):
            name, way, run = results.get(timeout=600)
            found.setdefault(name, {}).setdefault(way, []).append(run)
        for process in ranks:
            process.join()
        columns = ("way", "trained", "bytes sent / step", "÷ width × trained", "s / step")
        text = (
            f"Two gloo processes on one machine, one thread each; 8 rows of 64 tokens per rank and step; rate"
            f" {options.rate}; {options.rounds} rounds of {options.steps} steps, of which the first two are not"
            " counted. Bytes are those of one rank, the least over all steps, with TCP headers and two barriers."
            " Seconds are medians; ratios are medians over rounds of the ratio within a round."
        )
        tables = [
            f"## {name}\n\n" + table((*columns, "× full", "× LoRA"), rows_of(ways))
            for name, ways in found.items()
        ]
        write_result(options.result, "Two ranks", [text, *tables], where=work)


if __name__ == "__main__":
    main()
