"""Instruction tuning as in ``instruct.py`` with TRL's SFTTrainer, which saves deltas.

    python examples/recipes/trl_sft.py --model org/model --data alpaca_data.json --packing --output delta.sd

The trainer gets tokens and labels, so it trains on the same tokens as ``instruct.py``.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from causal_loss import compile_layers
from datasets import Dataset  # type: ignore[import-untyped]
from instruct_common import Loaded, check, choice_of, load, make_parser, peak_bytes, plan
from instruct_resume import keep_settings
from recipe_common import parse, run
from recipe_methods import find_layers, sift_names
from transformers.trainer_utils import get_last_checkpoint
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

import sift_train


class SiftSFTTrainer(sift_train.SiftTrainerMixin, SFTTrainer):
    """An SFTTrainer that trains the masters."""


def options_of() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = make_parser(__doc__)
    own = parser.add_argument_group("of this way")
    own.add_argument(
        "--trackers", nargs="+", default=[], help="trackers, such as tensorboard or wandb"
    )
    return parse(parser, plan)


def main() -> None:
    """Train, keep the delta of the last save, and print a summary."""
    options = options_of()
    n_micro = check(options)
    loaded = load(
        options, is_flat=True
    )  # TRL passes packed rows on in this form with every attention
    keep_settings(options, len(loaded.rows))
    if options.compile:
        print(f"{compile_layers(loaded.model)} layers are compiled when they first run", flush=True)
    with ExitStack() as stack:
        work = options.run_dir or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        trainer = make_trainer(options, loaded, n_micro, work)
        train(trainer, options, newest_in(options.run_dir) if options.resume else None)
        first_config: Any = trainer.sift.first_config
        if hasattr(first_config, "use_cache"):  # Trainer turns it off for gradient checkpointing
            loaded.model.config.use_cache = first_config.use_cache
        final = work / "final"
        trainer.save_model(str(final))
        shutil.copyfile(final / "delta.sd", options.output)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    for name, value in (
        ("delta", options.output),
        ("delta bytes", options.output.stat().st_size),
        ("trained", trainer.sift.n_trained),
        ("steps", trainer.state.global_step),
        ("first loss", losses[0] if losses else "none"),
        ("last loss", losses[-1] if losses else "none"),
        ("peak bytes", peak_bytes()),
    ):
        print(f"{name:<24}{value}")


def train(trainer: SiftSFTTrainer, options: argparse.Namespace, checkpoint: str | None) -> None:
    """Train, from a checkpoint if there is one.

    Raises:
        KeyboardInterrupt: the run is interrupted; the message says how to resume.
    """
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except KeyboardInterrupt:
        state = trainer.state
        at = f"stopped after step {state.global_step:,} of {state.max_steps:,}"
        newest = newest_in(options.run_dir)
        if newest is None:
            raise KeyboardInterrupt(f"{at}; there is no checkpoint to resume from") from None
        raise KeyboardInterrupt(f"{at}; resume from '{Path(newest).name}' with --resume") from None


def newest_in(run_dir: Path | None) -> str | None:
    """Return the newest checkpoint of a run's folder, None if there is none."""
    found: Callable[[str], str | None] = get_last_checkpoint
    return found(str(run_dir)) if run_dir is not None and run_dir.is_dir() else None


def make_trainer(
    options: argparse.Namespace, loaded: Loaded, n_micro: int, work: Path
) -> SiftSFTTrainer:
    """Return TRL's trainer for the model and its examples."""
    choice = choice_of(options)
    sparse, dense = sift_names(find_layers(loaded.model, choice), choice)
    sift = sift_train.SIFT(
        loaded.model,
        options.rate,
        sparse,
        dense,
        grad_acc=n_micro,
        selection=options.selection,
        lr_transfer=False,
        seed=options.seed,
    )
    examples = [example for row in loaded.rows for example in row]
    given: dict[str, Any] = {}
    if options.save_every:
        given = {"save_strategy": "steps", "save_steps": options.save_every, "save_total_limit": 1}
    config = SFTConfig(
        output_dir=str(work),
        per_device_train_batch_size=options.micro_batch,
        gradient_accumulation_steps=n_micro,
        num_train_epochs=options.epochs,
        max_steps=options.steps or -1,
        learning_rate=options.lr,
        weight_decay=options.weight_decay,
        warmup_steps=options.warmup,  # a value below 1 is a share of the steps
        lr_scheduler_type=options.schedule,
        max_length=options.max_tokens,
        packing=options.packing,
        gradient_checkpointing=options.gradient_checkpointing,
        bf16=False,  # keeps the weights' dtype; the masters are fp32
        logging_steps=1,
        report_to=options.trackers or "none",
        dataloader_pin_memory=torch.cuda.is_available(),
        seed=options.seed,
        disable_tqdm=True,
        **{"save_strategy": "no", **given},
    )
    return SiftSFTTrainer(
        model=loaded.model,
        args=config,
        train_dataset=Dataset.from_list(
            [{"input_ids": e.input_ids, "labels": e.labels} for e in examples]
        ),
        processing_class=loaded.tokenizer,
        sift=sift,
        base=loaded.folder,
        base_id=loaded.base_id,
    )


if __name__ == "__main__":
    run(main)
