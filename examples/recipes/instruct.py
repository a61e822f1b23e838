"""Tunes any causal language model on instructions, and writes the delta.

    python examples/recipes/instruct.py --preset 7b --model huggyllama/llama-7b --data alpaca_data.json \
        --gradient-checkpointing --packing --fast --output delta.sd

Only answers are learnt. ``--help`` with ``--model`` shows the memory for that model.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from causal_loss import (
    LOSSES,
    check_chunked,
    chunked_loss,
    compile_layers,
)
from instruct_common import Loaded, check, choice_of, load, make_parser, peak_bytes, plan
from instruct_resume import note_interrupted
from recipe_common import check_folder, parse, run
from recipe_methods import find_layers, sift_names
from transformers.utils.import_utils import is_flash_attn_2_available

import sift_train
from sift_train.instructions import Steps, collate, encode, plain_loss, read_conversations

N_FIRST, N_LINES = (
    3,
    10,
)  # number of steps whose losses are shown: the first, and others evenly spaced
SHOW_SECONDS = 30  # longest time between lines, unless a step takes longer


def options_of() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = make_parser(__doc__)
    own = parser.add_argument_group("of this way")
    own.add_argument("--selection-batches", type=int, default=4, help="micro-batches that choose")
    own.add_argument(
        "--loss", choices=LOSSES, default="plain", help="chunked: compute few logits at a time"
    )
    own.add_argument(
        "--fast",
        action="store_true",
        help="chunked loss, compiled layers, fastest available attention",
    )
    own.add_argument("--mixed-precision", choices=("no", "bf16", "fp16"), default="no")
    own.add_argument(
        "--test", type=Path, help="file of examples whose loss is reported, in any of the formats"
    )
    own.add_argument(
        "--eval-every", type=int, help="steps between evaluations of --test; default: at the end"
    )
    own.add_argument(
        "--save-target", type=Path, help="also keep the trained checkpoint at this path"
    )
    own.add_argument("--report", type=Path, help="file for the measurements, as JSON")
    options = parse(parser, plan)
    if options.fast:
        has_flash = torch.cuda.is_available() and is_flash_attn_2_available()
        options.attention = options.attention or ("flash_attention_2" if has_flash else "sdpa")
    return options


def main() -> None:
    """Train, write the delta, and print a summary."""
    options = options_of()
    n_micro = check(options)
    check_folder(options.report)
    if options.save_target is not None and not options.save_target.parent.is_dir():
        raise FileNotFoundError(
            f"folder '{options.save_target.parent}' does not exist; create it first"
        )
    loaded = load(options)
    loss = choose_loss(options, loaded.model)
    compile_model(options, loaded.model)
    data = Steps(
        loaded.rows,
        batch=options.batch,
        micro_batch=options.micro_batch,
        pad_id=loaded.pad_id,
        is_packed=options.packing,
        is_flat=loaded.is_flat,
    )
    clock = Clock()
    result = sift_train.fit(
        loaded.model,
        data,
        output=options.output,
        config=config_of(options, loaded, n_micro),
        loss=loss,
        base=loaded.folder,
        base_id=loaded.base_id,
        save_target=options.save_target,
        overwrite=options.overwrite,
        evaluate=make_evaluate(options, loaded) if options.test else None,
        on_step=clock.on_step,
        on_evaluation=lambda found: print(f"  loss on --test: {found.first:.4f}", flush=True),
        run_dir=options.run_dir,
        resume=options.resume,
    )
    measured = describe(result, clock, loaded)
    for name, value in measured.items():
        print(f"{name.replace('_', ' '):<24}{value}")
    if options.report:
        options.report.write_text(json.dumps(measured, indent=1), "utf-8")
    if result.stopped == "interrupted":
        end_interrupted(options, result, clock)


def end_interrupted(
    options: argparse.Namespace, result: sift_train.FitResult, clock: Clock
) -> NoReturn:
    """Raise the exception that says how to resume an interrupted run.

    Raises:
        KeyboardInterrupt: always; its message is one sentence.
    """
    at = f"stopped after step {result.n_steps:,}" + (
        f" of {clock.n_steps:,}" if clock.n_steps else ""
    )
    if options.run_dir is None:
        raise KeyboardInterrupt(
            f"{at}; without --run-dir there is no checkpoint to resume from, only '{result.delta}'"
        )
    note_interrupted(options)
    raise KeyboardInterrupt(f"{at}; continue with --resume")


def config_of(options: argparse.Namespace, loaded: Loaded, n_micro: int) -> sift_train.FitConfig:
    """Return the settings of ``fit``."""
    choice = choice_of(options)
    sparse, dense = sift_names(find_layers(loaded.model, choice), choice)
    return sift_train.FitConfig(
        sparse_rate=options.rate,
        sparse_module=sparse,
        exception=dense,
        selection=options.selection,
        selection_batches=options.selection_batches,
        lr=options.lr,
        lr_transfer=False,
        weight_decay=options.weight_decay,
        schedule=options.schedule,
        warmup=options.warmup,
        epochs=options.epochs,
        max_steps=options.steps,
        accumulation=n_micro,
        mixed_precision=options.mixed_precision,
        gradient_checkpointing=options.gradient_checkpointing,
        eval_every=options.eval_every,
        higher_is_better=False,
        save_every=options.save_every,
        seed=options.seed,
    )


def choose_loss(
    options: argparse.Namespace, model: Any
) -> Callable[[Any, Mapping[str, torch.Tensor]], torch.Tensor]:
    """Return the chosen loss; ``--fast`` uses the plain loss if the model does not support chunks."""
    if options.loss == "plain" and not options.fast:
        return plain_loss
    try:
        check_chunked(model)
    except ValueError as error:
        if options.loss == "chunked":
            raise
        print(f"not chunked: {error}", flush=True)
        return plain_loss
    return chunked_loss


def compile_model(options: argparse.Namespace, model: Any) -> None:
    """Compile the layers if chosen; ``--fast`` leaves it out if it is not possible."""
    if not (options.compile or options.fast):
        return
    try:
        print(f"{compile_layers(model)} layers are compiled when they first run", flush=True)
    except ValueError as error:
        if options.compile:
            raise
        print(f"not compiled: {error}", flush=True)


def make_evaluate(
    options: argparse.Namespace, loaded: Loaded
) -> Callable[[torch.nn.Module], dict[str, float]]:
    """Return a function that computes the mean loss of the test examples' learnt tokens."""
    examples, _ = encode(
        read_conversations(options.test),
        loaded.tokenizer,
        template=options.template,
        max_tokens=options.max_tokens,
    )
    rows = [[example] for example in examples]

    def evaluate(model: torch.nn.Module) -> dict[str, float]:
        device, total = next(model.parameters()).device, 0.0
        for at in range(0, len(rows), options.micro_batch):
            batch = collate(
                rows[at : at + options.micro_batch], pad_id=loaded.pad_id, is_packed=False
            )
            here = {name: value.to(device) for name, value in batch.items()}
            total += float(plain_loss(model, {**here, "n_learnt": torch.tensor(1.0)}))
        return {"test_loss": total / sum(example.n_learnt for example in examples)}

    return evaluate


class Clock:
    """Prints some losses; records the time between steps, and the memory before and after."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []
        self.loaded_bytes = self.peak_bytes = peak_bytes()
        self.n_steps: int | None = None
        self._last: tuple[float, float] | None = None
        self._shown = -math.inf

    def on_step(self, report: sift_train.StepReport) -> None:
        """Record the time since the previous step."""
        now = time.perf_counter(), time.process_time()
        if self._last is not None:
            self.seconds.append(now[0] - self._last[0])
            self.cpu_seconds.append(now[1] - self._last[1])
        self._last = now
        self.peak_bytes = peak_bytes()
        self.n_steps = report.n_steps
        every = max(1, report.n_steps // N_LINES)
        is_due = report.step % every == 0 or report.step in (*range(1, N_FIRST + 1), report.n_steps)
        if is_due or now[0] - self._shown >= SHOW_SECONDS:
            self._shown = now[0]
            line = f"  step {report.step:>5}/{report.n_steps}  loss {report.loss:.4f}"
            print(line, flush=True)


def describe(
    result: sift_train.FitResult, clock: Clock, loaded: Loaded
) -> dict[str, float | int | str]:
    """Return a summary of the run, to print."""
    found: dict[str, float | int | str] = {
        "delta": str(result.delta),
        "delta_bytes": result.delta_bytes,
        "trained": result.n_trained,
        "trained_share": round(result.trained_share, 6),
        "changed": result.nnz,
        "steps": result.n_steps,
        "first_loss": round(result.losses[0], 4) if result.losses else "none",
        "last_loss": round(result.losses[-1], 4) if result.losses else "none",
        "ended": result.stopped,
        "train_seconds": round(result.train_seconds, 1),
        "loaded_bytes": clock.loaded_bytes,
        "peak_bytes": clock.peak_bytes,
        "rows": len(loaded.rows),
        "learnt_tokens": sum(e.n_learnt for row in loaded.rows for e in row),
    }
    for name, seconds in (("", clock.seconds), ("cpu_", clock.cpu_seconds)):
        if seconds:
            found[f"{name}seconds_per_step"] = round(statistics.median(seconds), 4)
    return found


if __name__ == "__main__":
    run(main)
