"""Sparse training with ``transformers.Trainer``, which saves deltas.

    python examples/hf_trainer.py --data trec.train.txt --output delta.sd

With your own optimizer and without the mixin, give ``Trainer`` ``optimizers=(optimizer, None)`` and call
``sift.set_trainer(trainer)``.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from labelled_options import options_of

LAYERS = ["query", "key", "value", "attention.output.dense"]


def main() -> int:
    """Train, keep the delta of the last save, and print a summary."""
    options = options_of(__doc__)
    import torch  # after the options, so that --help is fast
    from labelled import (
        BATCH,
        MAX_TOKENS,
        accuracy,
        load,
        make_batches,
        model_folder,
        read_examples,
        split,
    )
    from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

    import sift_train

    class SiftTrainer(sift_train.SiftTrainerMixin, Trainer):
        """A Trainer that trains the masters."""

    rows = read_examples(options.data)
    training, held_out = split(rows)
    with model_folder(options.model) as folder, tempfile.TemporaryDirectory() as work:
        model, tokenizer = load(folder, 1 + max(label for label, _ in rows))
        test = make_batches(tokenizer, held_out)
        dataset: Any = [
            {**tokenizer(text, truncation=True, max_length=MAX_TOKENS), "labels": label}
            for label, text in training
        ]
        sift = sift_train.SIFT(model, 0.05, LAYERS, ["classifier"])
        sift.print_trainable_parameters()
        trainer = SiftTrainer(
            model=model,
            args=TrainingArguments(
                output_dir=work,
                per_device_train_batch_size=BATCH,
                max_steps=options.steps,
                learning_rate=2e-3,
                weight_decay=0.1,
                warmup_steps=max(1, options.steps // 16),
                logging_steps=max(1, options.steps // 5),
                save_strategy="steps",
                save_steps=options.steps,
                report_to="none",
                disable_tqdm=True,
                dataloader_pin_memory=torch.cuda.is_available(),
            ),
            train_dataset=dataset,
            data_collator=DataCollatorWithPadding(tokenizer),
            sift=sift,
        )
        print(f"accuracy before: {accuracy(model, test):.3f}")
        trainer.train()
        print(f"accuracy after: {accuracy(model, test):.3f}")
        saved = Path(work) / f"checkpoint-{options.steps}"
        print("saved:", *sorted(path.name for path in saved.iterdir()))
        shutil.copyfile(saved / "delta.sd", options.output)
    print(f"{options.output}: {options.output.stat().st_size:,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
