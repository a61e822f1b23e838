"""Measures each option that saves time or memory in instruction tuning, one at a time.

Runs ``examples/recipes/instruct.py`` on a Llama of random weights and on synthetic instructions, whose
lengths are distributed as Alpaca's. Each option runs in its own process.

    OMP_NUM_THREADS=1 python benchmarks/training_speed.py
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from measuring import ROOT, options_for, table, work_folder, write_result

SCRIPT = ROOT / "examples" / "recipes" / "instruct.py"
N_WORDS = 32_000  # the vocabulary of LLaMA
N_EXAMPLES = 256
MAX_TOKENS = 512
WAYS = {
    "plain": [],
    "attention without SDPA": ["--attention", "eager"],
    "chunked loss": ["--loss", "chunked"],
    "compiled layers": ["--compile"],
    "gradient checkpointing": ["--gradient-checkpointing"],
    "`--fast`": ["--fast"],
    "`--fast`, checkpointing": ["--fast", "--gradient-checkpointing"],
    "packing": ["--packing"],
    "packing, `--fast`": ["--packing", "--fast"],
}
MIB = 1 << 20


def make_model(folder: Path, options: Any) -> None:
    """Save a model and a tokenizer whose tokens are whole words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{n}" for n in range(N_WORDS - 4))]
    make: Any = models.WordLevel
    plain: Any = Tokenizer(make({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer: Any = transformers.PreTrainedTokenizerFast
    tokenizer(
        tokenizer_object=plain, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        unk_token="<unk>", chat_template="{% for m in messages %}{{ m.content }} {% endfor %}",
    ).save_pretrained(folder)  # fmt: skip
    config: Any = transformers.LlamaConfig
    model: Any = transformers.LlamaForCausalLM
    torch.manual_seed(0)
    made = model(
        config(
            vocab_size=N_WORDS,
            hidden_size=options.width,
            intermediate_size=options.width * 11 // 4,
            num_hidden_layers=options.layers,
            num_attention_heads=options.width // 64,
            num_key_value_heads=options.width // 64,
            max_position_embeddings=2 * MAX_TOKENS,
        )
    )
    made.to(torch.float32).save_pretrained(folder)


def make_data(path: Path) -> None:
    """Write instructions and answers of about 60 and 65 words, some much longer."""
    draw = random.Random(0)

    def text(mean: float) -> str:
        n = min(300, max(4, round(draw.lognormvariate(0, 0.8) * mean)))
        return " ".join(f"w{draw.randrange(N_WORDS - 4)}" for _ in range(n))

    rows = [{"instruction": text(45), "input": "", "output": text(50)} for _ in range(N_EXAMPLES)]
    path.write_text(json.dumps(rows), "utf-8")


def measure(work: Path, name: str, words: list[str], n_steps: int) -> dict[str, Any]:
    """Return what a run of the recipe reports."""
    print(f"{name} ...", file=sys.stderr, flush=True)
    report = work / "report.json"
    command = [
        sys.executable, str(SCRIPT), "--model", str(work / "model"), "--data", str(work / "data.json"),
        "--output", str(work / "delta.sd"), "--overwrite", "--max-tokens", str(MAX_TOKENS),
        "--batch", "4", "--micro-batch", "4", "--steps", str(n_steps), "--report", str(report), *words,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stdout}\n{done.stderr}")
    found: dict[str, Any] = json.loads(report.read_text("utf-8"))
    return found


def rows_of(found: dict[str, dict[str, Any]]) -> list[list[str]]:
    """Return the table's rows."""
    rows = []
    plain = found["plain"]["cpu_seconds_per_step"]
    for name, run in found.items():
        learnt = 4 * run["learnt_tokens"] / run["rows"]  # average seconds per step
        more = (run["peak_bytes"] - run["loaded_bytes"]) / MIB
        cells = [run["cpu_seconds_per_step"], run["cpu_seconds_per_step"] / plain]
        speed = learnt / run["cpu_seconds_per_step"]
        shown = [f"{cells[0]:.2f}", f"{cells[1]:.2f}", f"{speed:.0f}", f"{more:,.0f}"]
        rows.append([name, *shown, f"{run['last_loss']:.4f}"])
    return rows


def main() -> None:
    """Measure every option and write the table."""
    parser = options_for(__doc__, "training_speed.md")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--steps", type=int, default=8)
    options = parser.parse_args()
    with work_folder(options.work_dir, keep=options.keep) as work:
        make_model(work / "model", options)
        make_data(work / "data.json")
        found = {name: measure(work, name, words, options.steps) for name, words in WAYS.items()}
        columns = (
            "way",
            "CPU s / step",
            "× plain",
            "learnt tokens / CPU s",
            "MiB over loaded",
            "loss",
        )
        text = (
            f"Llama shape, {options.layers} layers of width {options.width}, {N_WORDS:,} tokens, fp32, rate "
            f"0.05; steps of 4 rows of up to {MAX_TOKENS} tokens, {options.steps} steps; "
            f"{os.environ.get('OMP_NUM_THREADS', 'all')} thread(s). CPU seconds are medians over steps. "
            "Memory is the process's peak during training minus its memory with the loaded model. The "
            "loss is the last step's."
        )
        write_result(
            options.result, "Instruction tuning, faster", [text, table(columns, rows_of(found))],
            where=work,
        )  # fmt: skip


if __name__ == "__main__":
    main()
