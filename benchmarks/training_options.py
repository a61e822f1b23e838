r"""What masters without fp32 and re-selection change: bytes per component, accuracy and loss.

    OMP_NUM_THREADS=1 python benchmarks/training_options.py --data trec.train.txt

The set is a file with one example per line: a label, a space, a text. Each run is appended to a file of
JSON lines and is not repeated if it is already there; ``--table`` only writes the tables. A long training of some
re-selections, in a table of its own:

    OMP_NUM_THREADS=1 python benchmarks/training_options.py --data trec.train.txt --epochs 8 --seeds 3 \
        --moves none "random, revert" "accumulated, revert" spiel --result training_options_long.md
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measuring import RESULTS, options_for, table, write_result
from quality_run import HEAD_LR, MAX_NORM, TAIL, WARMUP
from quality_tasks import BATCH, N_DEV, Sentences
from torch import Tensor, nn
from training import Record

from sift_train import SIFT, FitConfig, Reselection
from sift_train.reselection import PRESETS

RATE = 0.01
N_TEST = 1000
CHOOSE = 4  # micro-batches that rank, and others that measure the share
MASTERS = ("fp32", "kahan", "stochastic")
MOVES: Mapping[str, Reselection | None] = {
    "none": None,
    "random, revert": Reselection(every=20),
    "accumulated, revert": Reselection(every=20, grow="accumulated"),
    "accumulated, keep": Reselection(every=20, grow="accumulated", dropped="keep"),
    "lift, every 20": Reselection(**{**vars(PRESETS["lift"]), "every": 20}),
    "spiel": PRESETS["spiel"],
}


def measure(task: Sentences, spec: Mapping[str, Any]) -> dict[str, Any]:
    """Train MiniLM once; return scores and bytes per sparsely trained component."""
    seed, dtype = spec["seed"], getattr(torch, spec["dtype"])
    model = task.model(seed).to(dtype)
    moves = MOVES[spec["moves"]]
    selection = "principal" if spec["moves"].startswith("lift") else FitConfig.selection
    sift = SIFT(
        model, RATE, task.targets, ["head"], selection=selection, seed=seed, masters=spec["masters"]
    )
    head = [part.master for part in sift.sparse_mapping.values() if part.is_dense]
    body = [part.master for part in sift.sparse_mapping.values() if not part.is_dense]
    groups = [{"params": body, "lr": spec["lr"]}, {"params": head, "lr": HEAD_LR}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0, betas=(0.9, spec["beta2"]))
    n_warm = max(1, round(WARMUP * task.n_steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / n_warm, 1 - step / task.n_steps)
    )
    torch.manual_seed(seed)
    batches, losses, held = list(task.batches(seed)), [], 0.0
    model.train()
    if selection != FitConfig.selection:
        with sift.measuring_share():
            backward(task, model, batches[:CHOOSE])
    for step, batch in enumerate(batches):
        share = 0.0 if moves is None else moves.share_after(step, task.n_steps)
        if moves is not None and share:
            ranking, measuring = batches[step : step + CHOOSE], batches[step + CHOOSE :][:CHOOSE]
            with moves.applied(sift, optimizer, share):
                backward(task, model, ranking)
            with sift.measuring_share():
                backward(task, model, measuring or ranking)
        loss = loss_of(task, model, batch)
        loss.backward()
        sift.clip_grad_norm_(MAX_NORM)
        if step == 1:
            held = bytes_of(sift, optimizer) / sum(master.numel() for master in body)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(float(loss.detach()))
    with sift.reverted():
        base = [parameter.clone() for parameter in sift.trainable_parameters()]
    pairs = zip(sift.trainable_parameters(), base, strict=True)
    n_changed = sum(int((now != before).sum()) for now, before in pairs)
    sift.close()
    test = task.evaluate(model.float(), "test")
    return {
        "test": test,
        "train_loss": statistics.mean(losses[-max(1, round(TAIL * len(losses))) :]),
        "bytes": held,
        "n_changed": n_changed,
        "n_trained": sift.n_trained,
    }


def backward(task: Sentences, model: nn.Module, batches: list[Any]) -> None:
    """Run backward passes, inside a block that collects their gradients."""
    for batch in batches:
        loss_of(task, model, batch).backward()


def loss_of(task: Sentences, model: nn.Module, batch: Any) -> Tensor:
    """Return the cross-entropy, of logits in fp32."""
    tokens, labels = batch
    return nn.functional.cross_entropy(model(tokens).float(), labels)


def bytes_of(sift: SIFT, optimizer: torch.optim.Optimizer) -> int:
    """Return the bytes of all that exists for sparsely trained components after a backward pass, without originals."""
    total = 0
    for part in sift.sparse_mapping.values():
        if part.is_dense:
            continue
        held = [
            part.master,
            part.flat_index,
            part.master.grad,
            *optimizer.state[part.master].values(),
        ]
        held.append(None if part.lean is None else part.lean.compensation)
        sizes = (t.untyped_storage().nbytes() for t in held if isinstance(t, Tensor) and t.dim())
        total += sum(sizes)
    return total


def specs(options: Any) -> Iterator[dict[str, Any]]:
    """Yield the settings of all runs, the first seed of each first."""
    common = {"lr": options.lr, "n_train": options.n_train, "epochs": options.epochs}
    for seed in range(options.seeds):
        for masters in () if options.moves else MASTERS:
            yield {**common, "masters": masters, "moves": "none", "dtype": "bfloat16", "beta2": 0.999, "seed": seed}  # fmt: skip
        for beta2 in (0.999,) if options.moves else (0.999, 0.95):
            for moves in options.moves or (MOVES if beta2 == 0.999 else list(MOVES)[:3]):
                # Rows without this key are from before grown components had their own counts of steps.
                grown = {} if moves == "none" else {"grown": "own steps"}
                yield {**common, "masters": "fp32", "moves": moves, "dtype": "float32", "beta2": beta2, "seed": seed, **grown}  # fmt: skip


def rows_of(found: list[tuple[dict[str, Any], dict[str, Any]]], dtype: str) -> list[list[str]]:
    """Return the rows of a table: the means over the seeds."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for spec, result in found:
        if spec["dtype"] == dtype:
            is_lean = dtype == "bfloat16"
            name = [spec["masters"]] if is_lean else [spec["moves"], str(spec["beta2"])]
            groups.setdefault(tuple(name), []).append(result)
    rows = []
    for key, results in groups.items():
        accuracy = [100 * each["test"]["accuracy"] for each in results]
        rows.append(
            [
                *key,
                str(len(results)),
                f"{statistics.mean(each['bytes'] for each in results):.1f}",
                f"{statistics.mean(accuracy):.1f}",
                f"{min(accuracy):.1f} to {max(accuracy):.1f}",
                f"{statistics.mean(each['test']['loss'] for each in results):.3f}",
                f"{statistics.mean(each['train_loss'] for each in results):.3f}",
                f"{statistics.mean(each['n_changed'] / each['n_trained'] for each in results):.2f}",
            ]
        )
    return rows


def main() -> None:
    """Do the runs that are missing, and write the tables."""
    parser = options_for(__doc__, "training_options.md")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--lr", type=float, default=2e-4, help="that of full fine-tuning")
    parser.add_argument("--n-train", type=int, default=640)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument(
        "--moves", nargs="+", choices=MOVES, help="only these re-selections, with β₂ 0.999"
    )
    parser.add_argument("--table", action="store_true", help="only write the tables")
    options = parser.parse_args()
    task = Sentences(options.data, options.n_train, options.epochs, N_TEST)
    record = Record(RESULTS / "training_options.jsonl")
    wanted = list(specs(options))
    for spec in [] if options.table else wanted:
        record.get(spec, partial(measure, task, spec))
    found = [(row["spec"], row["result"]) for row in record.rows if row["spec"] in wanted]
    columns = [
        "seeds",
        "bytes",
        "test accuracy, %",
        "range",
        "test loss",
        "training loss",
        "changed ÷ trained",
    ]
    text = (
        f"MiniLM on {options.data.stem}, {options.n_train} examples, {task.n_steps} steps of {BATCH}, rate {RATE:g}, lr"
        f" {options.lr:g} of full fine-tuning with lr_transfer, AdamW, clipped to {MAX_NORM:g}; {N_TEST} test examples, apart"
        f" from {N_DEV} not used here; means over the seeds. *Bytes*: per sparsely trained component, of index,"
        " master, gradient, moments and rounding error, after a backward pass."
    )
    lean = rows_of(found, "bfloat16")
    sections = [
        text,
        *(["## Masters of bf16 weights\n\n" + table(["masters", *columns], lean)] if lean else []),
        "## Re-selection, fp32\n\n"
        + table(["re-selection", "β₂", *columns], rows_of(found, "float32")),
    ]
    write_result(options.result, "Masters and re-selection", sections, where=Path())


if __name__ == "__main__":
    main()
