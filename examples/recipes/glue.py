"""Trains sequence classification and regression on GLUE's tasks, or on your own texts.

    python examples/recipes/glue.py --task rte --output delta.sd
    python examples/recipes/glue.py --data train.csv --test test.csv --model base/ --method full lora shira sift

By default a GLUE task is trained with the settings of the paper's authors (RoBERTa-large, SIFT at
rate 0.008). Several methods train equal numbers of components, without the head, and are compared in one
table.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets  # type: ignore[import-untyped]
import numpy as np
import torch
import transformers
from glue_files import load_files, regression_hint
from glue_report import comparison, summary
from glue_tasks import SCORES, TASKS, Data, load_task, narrowed, score
from recipe_common import (
    ADAPTERS,
    METHODS,
    Choice,
    KeepBest,
    adapt,
    by_method,
    count,
    empty_model,
    equalized,
    export,
    local_model,
    model_config,
    parse,
    plan_table,
    planned_dtype,
    run,
    share,
)
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    PrinterCallback,
    RobertaConfig,
    Trainer,
    TrainingArguments,
)

from sift_train import RULES
from sift_train.loading import checkpoint_dtype

PAPER_MODEL = "FacebookAI/roberta-large"
LAYERS = ["query", "key", "value", "attention.output.dense"]
# SIFT uses the task's learning rate. LoRA's paper uses 2e-4 to 4e-4 for RoBERTa-large, RoBERTa's paper
# 1e-5 to 3e-5. SHiRA trains single components, as SIFT does, and uses its rate.
RATES = {"full": 2e-5, "lora": 3e-4}


def options_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0],
        add_help=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    data = parser.add_argument_group("data").add_argument
    data("--task", choices=TASKS, metavar="NAME", help=f"of GLUE: {', '.join(TASKS)}")
    data("--data-dir", type=Path, help="a local copy of GLUE with a folder for each task")
    data(
        "--data",
        type=Path,
        help=".csv, .jsonl, or a label, a space or tab, and a text on each line",
    )
    data("--dev", type=Path, help="file that chooses the best step; default: a tenth of --data")
    data("--test", type=Path, help="file that is scored at the end")
    data(
        "--text", nargs="+", default=[], metavar="COLUMN", help="column of the text, or two columns"
    )
    data("--label", default="label", metavar="COLUMN", help="of the label")
    data("--regression", action="store_true", help="the labels are numbers to predict")
    data("--encoding", default="utf-8", help="of the files")
    data("--n-train", type=count, metavar="N", help="train on only N examples")
    data("--score", nargs="+", default=[], choices=SCORES, help="the task's own if left out")
    data("--max-length", type=count, default=512, help="maximum tokens of a text or pair")
    method = parser.add_argument_group("method").add_argument
    method("--model", default=PAPER_MODEL, help="a folder or a Hub id")
    method("--method", nargs="+", default=["sift"], choices=METHODS, help="one or several")
    method("--rate", type=share, default=0.008, help="share of each layer that SIFT trains")
    method(
        "--rank", type=count, help="rank of LoRA and SHiRA; default: the one nearest to the rate"
    )
    method("--selection", default="gradient", choices=RULES, help="how SIFT chooses")
    method("--selection-batches", type=count, default=4, help="whose gradients choose")
    method("--layers", nargs="+", default=LAYERS, metavar="FRAGMENT", help="linear layers to train")
    method("--dense", nargs="+", default=["classifier"], metavar="MODULE", help="trained densely")
    training = parser.add_argument_group("training").add_argument
    training(
        "--lr",
        nargs="+",
        action="extend",
        default=[],
        metavar="LR",
        help="1e-4, or by method: sift=1e-4 …",
    )
    training(
        "--dense-lr", type=float, help="learning rate of densely trained parameters; default: --lr"
    )
    training("--epochs", type=count, help="passes; default: the task's, 10 for files")
    training("--max-steps", type=count, help="optimizer steps, instead of passes")
    training("--batch", type=count, default=32, help="examples a step")
    training("--accumulation", type=count, default=1, help="micro-batches per batch")
    training("--warmup", type=share, default=0.06, help="share of steps")
    training("--weight-decay", type=float, default=0.1)
    training(
        "--eval-every",
        type=count,
        metavar="STEPS",
        help="steps between evaluations; default: one pass",
    )
    training("--seeds", type=int, nargs="+", default=[42], help="seeds; one run for each")
    training("--bf16", action="store_true", help="compute in bfloat16")
    training("--checkpointing", action="store_true", help="recompute activations")
    add("--output", type=Path, help="delta of the best seed; NAME-method.sd for several methods")
    add("--overwrite", action="store_true", help="replace it")
    add("--json", type=Path, help="file for all results")
    add("--debug", action="store_true", help="show the traceback of an error")
    return parser


def plan(options: argparse.Namespace, n_labels: int = 2) -> str:
    """Return the memory plan of the chosen methods; only the model's config is read."""
    if options.model == PAPER_MODEL:  # the shape is known without a request to the Hub
        config: Any = RobertaConfig(
            vocab_size=50265, hidden_size=1024, num_hidden_layers=24, num_attention_heads=16,
            intermediate_size=4096, max_position_embeddings=514, type_vocab_size=1,
        )  # fmt: skip
    else:
        config = model_config(options.model)
    config.num_labels = n_labels
    dtype = planned_dtype(options.model, config)
    model = empty_model(AutoModelForSequenceClassification, config, dtype)
    return f"{options.model}\n{plan_table(model, options.method, choice_of(options))}"


def choice_of(options: argparse.Namespace, seed: int = 0) -> Choice:
    """Return the choice of parameters to train."""
    return Choice(
        targets=options.layers,
        dense=options.dense,
        rate=options.rate,
        rank=options.rank,
        selection=options.selection,
        seed=seed,
    )


def load_data(options: argparse.Namespace) -> Data:
    """Return the data that the command line names.

    Raises:
        ValueError: it names both a task and files, or neither.
    """
    if (options.task is None) == (options.data is None):
        raise ValueError("give either --task, a GLUE task, or --data, your own file")
    if options.task:
        data = load_task(options.task, options.data_dir)
    else:
        data = load_files(
            options.data,
            options.dev,
            options.test,
            texts=options.text,
            label=options.label,
            is_regression=options.regression,
            encoding=options.encoding,
        )
    return narrowed(data, n_train=options.n_train, scores=options.score)


def load_model(folder: Path, data: Data) -> Any:
    """Return the pretrained model with a new head, in the checkpoint's own dtype."""
    labels = data.labels or ["value"]
    model, found = AutoModelForSequenceClassification.from_pretrained(
        folder,
        num_labels=len(labels),
        id2label=dict(enumerate(labels)),
        label2id={label: number for number, label in enumerate(labels)},
        problem_type="regression" if data.is_regression else "single_label_classification",
        dtype=checkpoint_dtype(folder) or "auto",
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    if not found["missing_keys"] and not found["mismatched_keys"]:
        raise ValueError(
            f"the model has a trained classifier of {len(labels)} outputs already, and here a new one is trained; give the model that"
            " it was made from"
        )
    return model


@dataclass
class Prepared:
    """The examples as token ids."""

    train: Any
    scored: dict[str, Any]
    collate: Any


def prepare(options: argparse.Namespace, data: Data, folder: Path) -> Prepared:
    """Return the examples as token ids, with their labels."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    longest = min(options.max_length, tokenizer.model_max_length)

    def tokenized(rows: datasets.Dataset) -> Any:
        texts = [column for column in ("text", "text_pair") if column in rows.column_names]
        return rows.map(
            lambda batch: tokenizer(
                *(batch[column] for column in texts), truncation=True, max_length=longest
            ),
            batched=True,
            remove_columns=texts,
        )

    scored = {name: tokenized(rows) for name, rows in data.scored.items()}
    return Prepared(tokenized(data.train), scored, DataCollatorWithPadding(tokenizer))


def arguments_of(
    options: argparse.Namespace, n_examples: int, n_epochs: int, seed: int, work: str
) -> TrainingArguments:
    """Return the settings of a run."""
    per_epoch = math.ceil(n_examples / options.batch)
    n_steps = options.max_steps or per_epoch * n_epochs
    return TrainingArguments(
        output_dir=work,
        max_steps=n_steps,
        per_device_train_batch_size=math.ceil(options.batch / options.accumulation),
        per_device_eval_batch_size=options.batch,
        gradient_accumulation_steps=options.accumulation,
        warmup_steps=math.ceil(options.warmup * n_steps),
        eval_strategy="steps",
        eval_steps=min(n_steps, options.eval_every or per_epoch),
        save_strategy="no",
        logging_steps=max(1, n_steps // 100),
        bf16=options.bf16,
        use_cpu=not (torch.cuda.is_available() or torch.backends.mps.is_available()),
        seed=seed,
        label_names=["labels"],
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=not sys.stderr.isatty(),
        report_to="none",
    )


def train_once(
    options: argparse.Namespace, data: Data, method: str, seed: int, *, lr: float, folder: Path
) -> tuple[dict[str, Any], Any]:
    """Train one model; return its results, and the model at its best step without adapters or hooks."""
    ready = prepare(options, data, folder)
    with tempfile.TemporaryDirectory() as work:
        n_epochs = options.epochs or data.task.epochs
        arguments = arguments_of(options, len(ready.train), n_epochs, seed, work)
        transformers.set_seed(seed)
        model = load_model(folder, data).to(arguments.device)
        choice = equalized(model, choice_of(options, seed), options.method)
        adapted = adapt(model, method, choice, checkpointing=options.checkpointing)
        start = time.perf_counter()
        n_chosen_by = min(len(ready.train), options.selection_batches * options.batch)
        chosen_by = ready.train.shuffle(seed=seed).select(range(n_chosen_by))
        adapted.select(DataLoader(chosen_by, batch_size=options.batch, collate_fn=ready.collate))
        groups = adapted.groups(lr, weight_decay=options.weight_decay, dense_lr=options.dense_lr)
        best = KeepBest(adapted, "eval_score")
        trainer = Trainer(
            model=adapted.model,
            args=arguments,
            train_dataset=ready.train,
            eval_dataset=next(iter(ready.scored.values())),
            data_collator=ready.collate,
            compute_metrics=lambda found: score(
                data.task, *map(np.asarray, (found.predictions, found.label_ids))
            ),
            optimizers=(torch.optim.AdamW(groups), None),
            callbacks=[*adapted.callbacks(), best],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        seconds = time.perf_counter() - start
        scores = {
            name: _scores(trainer.predict(rows, metric_key_prefix=name).metrics or {}, name)
            for name, rows in ready.scored.items()
        }
    history = trainer.state.log_history
    found = {
        "method": method,
        "data": data.task.name,
        "seed": seed,
        "lr": lr,
        "rate": choice.rate if method == "sift" else None,
        "rank": choice.rank if method in ADAPTERS else None,
        "n_trained": adapted.n_trained,
        "n_dense": adapted.n_dense,
        "scores": scores,
        "best_step": best.step,
        "steps": trainer.state.global_step,
        "seconds": round(seconds, 1),
        "losses": [[e["step"], round(float(e["loss"]), 6)] for e in history if "loss" in e],
        "evaluations": [
            {"step": e["step"], "values": _scores(e, "eval")} for e in history if "eval_score" in e
        ],
    }
    return found, adapted.finish()


def _scores(metrics: dict[str, float], prefix: str) -> dict[str, float]:
    names = (*SCORES, "score")
    return {n: float(metrics[f"{prefix}_{n}"]) for n in names if f"{prefix}_{n}" in metrics}


def delta_path(options: argparse.Namespace, method: str) -> Path | None:
    """Return the path of a method's delta, None without --output."""
    output: Path | None = options.output
    if output is None or len(options.method) == 1:
        return output
    return output.with_name(f"{output.stem}-{method}{output.suffix}")


def check_outputs(options: argparse.Namespace) -> None:
    """Check the output paths before any work.

    Raises:
        FileExistsError: an output exists and --overwrite is not set.
        FileNotFoundError: the folder of an output does not exist.
    """
    deltas = [delta_path(options, method) for method in options.method]
    for path in (*deltas, options.json):
        if path is None:
            continue
        if path.exists() and not options.overwrite:
            raise FileExistsError(f"'{path}' exists; choose another name, or set --overwrite")
        if not path.absolute().parent.is_dir():
            raise FileNotFoundError(f"folder '{path.parent}' does not exist; create it first")


def main() -> None:
    """Train every method with every seed, keep the best deltas, and print the table."""
    options = parse(options_parser(), plan)
    options.method = list(dict.fromkeys(options.method))
    datasets.disable_progress_bars()
    check_outputs(options)
    print(plan(options, TASKS[options.task].n_labels if options.task else 2), flush=True)
    data = load_data(options)
    hint = regression_hint(data.labels)
    if hint:
        print(f"note: {hint}", file=sys.stderr, flush=True)
    own = {"sift": data.task.lr, "shira": data.task.lr, **RATES}
    lrs = by_method(options.lr, own, "--lr")
    sizes = ", ".join(f"{len(rows):,} {name}" for name, rows in data.scored.items())
    print(f"\n{data.task.name}: {len(data.train):,} examples to train on, {sizes}\n", flush=True)
    folder, base_id = local_model(options.model)

    runs: list[dict[str, Any]] = []
    deltas: dict[str, dict[str, Any]] = {}
    highest = dict.fromkeys(options.method, -math.inf)
    # All methods with one seed before the next seed, so that an interrupted run can be compared.
    for seed, method in itertools.product(options.seeds, options.method):
        found, model = train_once(options, data, method, seed, lr=lrs[method], folder=folder)
        runs.append(found)
        chosen = next(iter(found["scores"].values()))["score"]
        print(
            f"{method}, seed {seed}: score {chosen:.4f} after step {found['best_step']} of "
            f"{found['steps']}, {found['seconds']:.0f} s",
            flush=True,
        )
        output = delta_path(options, method)
        if output is not None and chosen > highest[method]:
            highest[method] = chosen
            # An existing file is the delta of an earlier seed, or --overwrite is set.
            n_bytes = export(
                model, output, base=folder, base_id=base_id, info=found, overwrite=True
            )
            deltas[method] = {"path": str(output), "seed": seed, "bytes": n_bytes}
        if options.json is not None:
            write_json(options, runs, deltas)
    print(f"\nScores in percent, mean ± deviation over {len(options.seeds)} seed(s):\n")
    print(comparison(summary(runs, deltas)))
    check_deltas(options, deltas)


def check_deltas(options: argparse.Namespace, deltas: dict[str, dict[str, Any]]) -> None:
    """Check that a delta of every method is written.

    Raises:
        ValueError: a method has no delta, since its scores are NaN.
    """
    missing = [method for method in options.method if method not in deltas]
    if options.output is not None and missing:
        raise ValueError(
            f"no delta of {' and '.join(missing)} is written, since no score that chooses it is a "
            "number: training diverged; try a lower --lr"
        )


def write_json(
    options: argparse.Namespace, runs: list[dict[str, Any]], deltas: dict[str, dict[str, Any]]
) -> None:
    """Write the results so far."""
    given = {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()}
    content = {"options": given, "summary": summary(runs, deltas), "runs": runs}
    options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run(main)
