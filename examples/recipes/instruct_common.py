"""Shared code of ``instruct.py`` and ``trl_sft.py``: options, the paper's presets, model and data.

Both train on the same tokens in the same rows, so their results can be compared.
"""

from __future__ import annotations

import argparse
import resource
import sys
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import transformers
from causal_loss import check_packing
from instruct_resume import is_left_by_interrupted
from recipe_common import (
    ALL_LINEAR,
    Choice,
    check_folder,
    empty_model,
    local_model,
    model_config,
    plan_table,
    planned_dtype,
    print_plan,
)

from sift_train import RULES
from sift_train.instructions import (
    TEMPLATES,
    Tokens,
    choose_template,
    count_empty,
    encode,
    pack,
    read_conversations,
)

# The settings with which the authors of SIFT (arXiv 2312.11875) trained LLaMA on Alpaca.
_ALWAYS = {"batch": 128, "epochs": 3, "warmup": 0.03, "weight_decay": 0.01, "max_tokens": 512}
PRESETS = MappingProxyType(
    {
        "7b": {**_ALWAYS, "rate": 0.05, "lr": 2e-4, "micro_batch": 4},
        "13b": {**_ALWAYS, "rate": 0.04, "lr": 9e-5, "micro_batch": 4},
        "30b": {
            **_ALWAYS,
            "rate": 0.03,
            "lr": 8e-5,
            "micro_batch": 2,
            "gradient_checkpointing": True,
        },
    }
)
ATTENTION = ("sdpa", "eager", "flash_attention_2", "flash_attention_3")


class _Defaults(argparse.ArgumentDefaultsHelpFormatter):
    """Shows only informative defaults."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        says_something = action.default not in (None, False, [])
        return super()._get_help_string(action) if says_something else action.help


@dataclass(frozen=True)
class Loaded:
    """A model and its training data.

    Attributes:
        model: the transformers model in the dtype of its files.
        tokenizer: the model's tokenizer.
        folder: folder of the base.
        base_id: where others find the base; None for a local folder.
        rows: the rows that batches consist of: lists of examples, with one each unless packed.
        is_flat: whether a micro-batch of packed rows goes through the model as one row.
        report: a text about the data.
    """

    model: Any
    tokenizer: Any
    folder: Path
    base_id: str | None
    rows: list[list[Tokens]]
    is_flat: bool
    report: str

    @property
    def pad_id(self) -> int:
        """A token for the padding; any token gives the same result."""
        for number in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id):
            if number is not None:
                return int(number)
        return 0


def make_parser(description: str | None, epilog: str = "") -> argparse.ArgumentParser:
    """Return a parser of the shared options, with the chosen preset as defaults."""
    parser = argparse.ArgumentParser(
        description=(description or "").split("\n")[0],
        epilog=epilog,
        add_help=False,
        formatter_class=_Defaults,
    )
    files = parser.add_argument_group("model and data")
    files.add_argument("--model", help="folder of a causal language model, or its id on the Hub")
    files.add_argument("--data", type=Path, help="JSON or JSON lines: Alpaca, chat, self-instruct")
    files.add_argument("--output", type=Path, default=Path("delta.sd"), help="the delta")
    files.add_argument("--overwrite", action="store_true", help="replace existing outputs")
    text = parser.add_argument_group("text")
    text.add_argument("--template", choices=TEMPLATES, default="auto", help="what writes prompts")
    text.add_argument(
        "--max-tokens", type=int, default=512, help="maximum tokens of an example or a packed row"
    )
    text.add_argument("--packing", action="store_true", help="put several examples in a row")
    _add_training(parser)
    _add_checkpoints(parser)
    speed = parser.add_argument_group("memory and speed")
    speed.add_argument(
        "--gradient-checkpointing",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="recompute activations in the backward pass",
    )
    speed.add_argument("--attention", choices=ATTENTION, help="default: transformers' choice")
    speed.add_argument("--compile", action="store_true", help="compile each layer")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    finder = argparse.ArgumentParser(add_help=False)
    finder.add_argument("--preset", choices=PRESETS)
    preset = finder.parse_known_args()[0].preset
    parser.set_defaults(**PRESETS.get(preset or "", {}))
    return parser


def _add_checkpoints(parser: argparse.ArgumentParser) -> None:
    saved = parser.add_argument_group("checkpoints")
    saved.add_argument("--run-dir", type=Path, help="their folder")
    saved.add_argument("--save-every", type=int, help="steps between them")
    saved.add_argument("--resume", action="store_true", help="resume from the newest checkpoint")


def _add_training(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what is trained")
    what.add_argument("--preset", choices=PRESETS, help="the paper's settings for LLaMA on Alpaca")
    what.add_argument(
        "--rate", type=float, default=0.05, help="share of each layer that is trained"
    )
    what.add_argument(
        "--targets", nargs="+", default=[ALL_LINEAR], help="fragments of layers' names"
    )
    what.add_argument("--dense", nargs="+", default=[], help="modules to train densely")
    what.add_argument(
        "--selection", choices=RULES, default="gradient", help="what ranks components"
    )
    how = parser.add_argument_group("how")
    how.add_argument("--lr", type=float, default=2e-4, help="peak learning rate")
    how.add_argument("--weight-decay", type=float, default=0.0, help="toward zero")
    how.add_argument("--warmup", type=float, default=0.03, help="share of steps")
    how.add_argument("--schedule", choices=("linear", "cosine", "constant"), default="linear")
    how.add_argument("--batch", type=int, default=128, help="rows per optimizer step")
    how.add_argument("--micro-batch", type=int, default=4, help="rows per micro-batch")
    how.add_argument("--epochs", type=int, default=3)
    how.add_argument("--steps", type=int, help="optimizer steps, instead of epochs")
    how.add_argument("--seed", type=int, default=0)


def choice_of(options: argparse.Namespace) -> Choice:
    """Return the choice of parameters to train."""
    return Choice(
        targets=options.targets,
        dense=options.dense,
        rate=options.rate,
        selection=options.selection,
        seed=options.seed,
    )


def plan(options: argparse.Namespace) -> str:
    """Return the memory plan of the chosen model; only its config is read."""
    if options.model is None:
        return "For the memory plan, give --model; only its config is read."
    return plan_table(empty_causal(options.model), ("sift", "full"), choice_of(options))


def check(options: argparse.Namespace) -> int:
    """Check the options; return the number of micro-batches per optimizer step.

    Outputs that the resumed run itself left when it was interrupted may be replaced.

    Raises:
        FileExistsError: an output exists and may not be replaced.
        FileNotFoundError: the folder of an output does not exist.
        ValueError: an option is missing or excludes another.
    """
    for name in ("model", "data"):
        if getattr(options, name) is None:
            raise ValueError(f"--{name} is missing; see --help")
    if not options.data.is_file():
        raise ValueError(f"--data '{options.data}' is not a file")
    check_folder(options.output)
    if options.resume and not options.overwrite:
        options.overwrite = is_left_by_interrupted(options)
    if options.output.exists() and not options.overwrite:
        raise FileExistsError(
            f"'{options.output}' exists; name another --output, or set --overwrite"
        )
    if options.run_dir is None and (options.resume or options.save_every):
        raise ValueError("--resume and --save-every need a folder for checkpoints; give --run-dir")
    for name in ("batch", "micro_batch", "max_tokens"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(options, name)}, below 1")
    n_micro, rest = divmod(options.batch, options.micro_batch)
    if rest or not n_micro:
        raise ValueError(
            f"--batch {options.batch} is not a multiple of --micro-batch {options.micro_batch}"
        )
    return int(n_micro)


def load(options: argparse.Namespace, *, is_flat: bool | None = None) -> Loaded:
    """Print the memory plan, then read the data, then load the model.

    Args:
        options: options of the command line.
        is_flat: join the packed rows of a micro-batch; None: only if the attention needs that.

    Raises:
        ValueError: data or model cannot be used.
    """
    print_plan(empty_causal(options.model), ("sift", "full"), choice_of(options))
    folder, base_id = local_model(options.model)
    auto: Any = transformers.AutoTokenizer
    tokenizer = auto.from_pretrained(folder)
    conversations = read_conversations(options.data)
    examples, n_left_out = encode(
        conversations, tokenizer, template=options.template, max_tokens=options.max_tokens
    )
    rows = pack(examples, options.max_tokens) if options.packing else [[e] for e in examples]
    report = (
        f"{len(examples)} examples of {len(conversations)} conversations, "
        f"{sum(map(len, examples)):,} tokens, {sum(e.n_learnt for e in examples):,} of them learnt, "
        f"{choose_template(options.template, tokenizer)} prompt"
    )
    if options.packing:
        report += f", packed in {len(rows)} rows"
    if n_empty := count_empty(conversations):
        report += f"; {n_empty} have empty answers, of which only the end is learnt"
    if n_left_out:
        report += (
            f"; {n_left_out} left out, since their answers begin after {options.max_tokens} tokens"
        )
    print(report, flush=True)
    model = load_causal(folder, options.attention)
    if is_flat is None:
        is_flat = str(model.config._attn_implementation).startswith("flash")
    if options.packing:
        check_packing(model, is_flat=is_flat)
    return Loaded(model, tokenizer, folder, base_id, rows, is_flat, report)


def load_causal(folder: Path, attention: str | None = None) -> Any:
    """Return the causal language model in a folder, in the dtype of its files, on the GPU if any.

    Raises:
        ValueError: the attention is not available.
    """
    auto: Any = transformers.AutoConfig
    config = auto.from_pretrained(folder)
    make: Any = transformers.AutoModelForCausalLM
    try:
        model = make.from_pretrained(
            folder, dtype=planned_dtype(str(folder), config), attn_implementation=attention
        )
    except ImportError as error:
        raise ValueError(f"--attention {attention} is not available: {error}") from error
    return model.to("cuda") if torch.cuda.is_available() else model


def empty_causal(name: str) -> Any:
    """Return the model of a folder or a Hub id without weights; only its config is read.

    Raises:
        OSError: the model does not exist.
        ValueError: the model is not a causal language model.
    """
    config = model_config(name)
    make: Any = transformers.AutoModelForCausalLM
    if type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(
            f"'{name}' is a {config.model_type!r} model, which is not a causal language model"
        )
    return empty_model(make, config, planned_dtype(name, config))


def peak_bytes() -> int:
    """Return the peak memory in bytes: of the GPU, or without one of the process."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    peak: int = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kB on Linux
