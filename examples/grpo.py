"""Reinforcement learning with TRL's GRPOTrainer: each step trains a few components and publishes a version.

    python examples/grpo.py --channel channel/ --output delta.sd

The policy is a tiny model with random weights, and its reward is the share of vowels in what it writes. At the end an
engine gets the weights from the channel.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path
from string import ascii_lowercase
from typing import Any

from needed import TRAIN, TRAINING, need


def main() -> int:
    """Train, follow, and print a summary."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--channel", default="channel", help="folder or URL of the channel")
    parser.add_argument("--output", type=Path, required=True, help="the delta to write")
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args()
    need(f"{TRAIN} --group recipes", *TRAINING, "trl", "datasets")
    import torch  # after the options, so that --help is fast
    from datasets import Dataset  # type: ignore[import-untyped]
    from transformers import PrinterCallback
    from trl.trainer.grpo_config import GRPOConfig
    from trl.trainer.grpo_trainer import GRPOTrainer

    import sift_train
    import sparsedelta

    class SiftGRPOTrainer(sift_train.SiftTrainerMixin, GRPOTrainer):
        """A GRPOTrainer that trains the masters."""

    policy, tokenizer = make_policy()
    with tempfile.TemporaryDirectory() as work:
        trainer = SiftGRPOTrainer(
            model=policy,
            reward_funcs=vowels,
            args=GRPOConfig(
                output_dir=work,
                per_device_train_batch_size=32,
                num_generations=8,
                max_completion_length=8,
                learning_rate=1e-3,
                lr_scheduler_type="constant",
                bf16=False,  # keeps the weights' dtype; the masters are fp32
                max_steps=options.steps,
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                dataloader_pin_memory=torch.cuda.is_available(),
            ),
            train_dataset=Dataset.from_dict({"prompt": list(ascii_lowercase)}),
            processing_class=tokenizer,
            sift=sift_train.SiftConfig(sparse_rate=0.05),
        )
        trainer.add_callback(sift_train.PublishCallback(options.channel, sift=trainer.sift))
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        trainer.save_model(work)
        shutil.copyfile(Path(work) / "delta.sd", options.output)
    engine, _ = make_policy()  # elsewhere in real life, where it follows while the policy learns
    report = sparsedelta.Follower(sparsedelta.Channel(options.channel), engine).sync()
    bits = [model.state_dict().values() for model in (policy, engine)]
    same = all(torch.equal(*pair) for pair in zip(*bits, strict=True))
    print(
        f"the engine has step {report.step}, {'the same' if same else 'OTHER'} bits as the policy"
    )
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    print(f"reward: {rewards[0]:.2f} at first, {rewards[-1]:.2f} at last")
    print(f"{options.output}: {options.output.stat().st_size:,} bytes")
    return 0 if same else 1


def vowels(completions: list[str], **_: Any) -> list[float]:
    """Return the share of vowels in each completion."""
    return [sum(c in "aeiou" for c in text) / max(1, len(text)) for text in completions]


def make_policy() -> tuple[Any, Any]:
    """Return a tiny model and its tokenizer, in which each letter is a token."""
    import torch
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate(("<end>", *ascii_lowercase))}
    letters = Tokenizer(models.WordLevel(vocabulary, unk_token="<end>"))
    letters.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    make: Any = PreTrainedTokenizerFast
    tokenizer = make(
        tokenizer_object=letters, pad_token="<end>", eos_token="<end>", padding_side="left"
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=128, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4, pad_token_id=0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    policy: Any = LlamaForCausalLM(config)
    return policy.to(torch.bfloat16), tokenizer


if __name__ == "__main__":
    sys.exit(main())
