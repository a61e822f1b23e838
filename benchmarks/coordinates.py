"""Measures finding where models hold the tensors of their checkpoints: time and memory, on the meta device.

    python benchmarks/coordinates.py

Each model has the shape of a published one and no data. It runs in its own process.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
import tracemalloc
import warnings
from pathlib import Path
from typing import Any

from measuring import options_for, table, write_result

GROUPED = {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8}
MOE = {
    "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768,
    "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48, "vocab_size": 151936,
    "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
}  # fmt: skip
DENSE = {"hidden_size": 4096, "intermediate_size": 11008, "vocab_size": 32000}
SHAPES: dict[str, tuple[str, dict[str, int]]] = {
    "Llama 2 7B": ("Llama", DENSE | {"num_hidden_layers": 32, "num_attention_heads": 32}),
    "Mixtral 8x7B": ("Mixtral", DENSE | GROUPED | {"intermediate_size": 14336}),
    "Qwen3 30B-A3B": ("Qwen3Moe", MOE),
}


def measure(name: str) -> dict[str, Any]:
    """Return the times and memory of one model, in a process of its own."""
    import torch
    import transformers
    from transformers.core_model_loading import revert_weight_conversion

    from sparsedelta.live.coordinates import Scattered, find_coordinates
    from sparsedelta.live.slots import find_slots

    warnings.simplefilter("ignore")
    family, sizes = SHAPES[name]
    config = getattr(transformers, f"{family}Config")(**sizes)
    with torch.device("meta"):
        model = getattr(transformers, f"{family}ForCausalLM")(config).to(torch.bfloat16)
    saved = revert_weight_conversion(model, model.state_dict())
    shapes = {key: tuple(tensor.shape) for key, tensor in saved.items()}
    own = find_slots(model)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        found = find_coordinates(model, own, shapes, shapes)
        seconds.append(time.perf_counter() - start)
    start = time.perf_counter()
    for slot in found.slots.values():
        slot.tensor()
    views = time.perf_counter() - start
    del found
    tracemalloc.start()
    found = find_coordinates(model, own, shapes, shapes)
    kept, peak = tracemalloc.get_traced_memory()
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "tensors": len(shapes),
        "converted": sum(isinstance(slot, Scattered) for slot in found.slots.values()),
        "lost": len(shapes) - len(found.slots),
        "first": seconds[0],
        "again": min(seconds),
        "views": views,
        "kept": kept,
        "peak": peak,
    }


def row(name: str) -> list[str]:
    """Return the cells of a model."""
    command = [sys.executable, __file__, "--only", name]
    found = json.loads(subprocess.check_output(command, text=True).splitlines()[-1])
    if found["lost"]:
        raise SystemExit(f"{name}: {found['lost']} tensors were not found")
    return [
        name,
        f"{found['parameters'] / 1e9:.1f}",
        f"{found['tensors']:,}",
        f"{found['converted']:,}",
        f"{found['first']:.2f}",
        f"{found['again']:.2f}",
        f"{found['views']:.2f}",
        f"{found['peak'] / 1e6:.0f}",
        f"{found['kept'] / 1e6:.0f}",
    ]


def main() -> None:
    """Measure all models, or print the figures of one."""
    parser = options_for(__doc__, "coordinates.md")
    parser.add_argument("--only", choices=[*SHAPES], help="print one model's figures as JSON")
    options = parser.parse_args()
    if options.only:
        print(json.dumps(measure(options.only)))
        return
    columns = ["model", "parameters (10⁹)", "tensors in files", "converted", "first s", "again s",
               "views s", "peak MB", "kept MB"]  # fmt: skip
    rows = [row(name) for name in SHAPES]
    title = "Finding a checkpoint's tensors in a model"
    write_result(options.result, title, [table(columns, rows)], where=Path(__file__))


if __name__ == "__main__":
    main()
