"""Tries which optimizers and trainers SIFT works with, and writes the tables of docs/compatibility.md.

    python benchmarks/compatibility.py [--only optimizers names trainers] [--result docs/compatibility.md]

The page gets the table of versions too: what pyproject.toml accepts, and what constraints.txt installs for the tests.

SIFT at rate 1 trains all components. So it must end with the same bits as the plain training, if the optimizer works
on each element apart. The exit status is 1 if a training ends otherwise, except where the table says why.
"""

from __future__ import annotations

import argparse
import copy
import io
import logging
import os
import re
import sys
import tempfile
import tomllib
import warnings
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from measuring import ROOT, table

os.environ |= {
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_OFFLINE": "1",
    "TRL_EXPERIMENTAL_SILENCE": "1",
}

import torch
import transformers
from torch import nn

from sift_train import SiftConfig, SiftTrainerMixin

ALL = SiftConfig(sparse_rate=1.0, sparse_module="re:.")
SAME, TRAINS, REFUSED, ABSENT, WRONG = "same bits", "trains", "refused", "not installed", "differs"
TABLES, VERSIONS = "tables", "versions"  # the marked places of the page
# They compute a statistic of a whole matrix, which a vector of components has not.
_BY_ROWS = "scales by the rows and columns of a matrix; a vector of components has none"
BY_MATRIX = {"adafactor": _BY_ROWS, "Adafactor": _BY_ROWS}
TEXTS = ["the sun is warm", "the rain is cold", "a warm light", "a cold dark rain"]
WORDS = [
    "<pad>",
    "<s>",
    "</s>",
    "<unk>",
    "user",
    "assistant",
    *sorted({w for t in TEXTS for w in t.split()}),
]
TEMPLATE = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
# Class, configuration, module and kind of data.
TRAINERS = [
    ("SFTTrainer", "SFTConfig", "trl", "text"),
    ("DPOTrainer", "DPOConfig", "trl", "preference"),
    ("KTOTrainer", "KTOConfig", "trl", "label"),
    ("ORPOTrainer", "ORPOConfig", "trl.experimental.orpo", "preference"),
    ("CPOTrainer", "CPOConfig", "trl.experimental.cpo", "preference"),
    ("RewardTrainer", "RewardConfig", "trl", "preference"),
    ("GRPOTrainer", "GRPOConfig", "trl", "prompt"),
    ("RLOOTrainer", "RLOOConfig", "trl", "prompt"),
]


def same(one: nn.Module, other: nn.Module) -> bool:
    """Return whether two models have the same bits."""
    theirs = other.state_dict()
    return all(torch.equal(t, theirs[n]) for n, t in one.state_dict().items())


def attempt(work: Callable[[], tuple[str, str]]) -> tuple[str, str]:
    """Return a result and a remark; an error becomes a result, too."""
    try:
        return work()
    except (ImportError, PackageNotFoundError) as error:
        return ABSENT, first_sentence(error)
    except Exception as error:  # whatever a library raises is the result
        text = first_sentence(error)
        missing = "install" in text.lower() and REFUSED not in text
        return (ABSENT if missing else REFUSED), text


def first_sentence(error: Exception) -> str:
    """Return the beginning of an error's message, as a cell of a table."""
    return " ".join(str(error).split())[:160].replace("|", "/")


def of_optimizers() -> list[list[str]]:
    """Return a row for each optimizer of torch, with a loop of one's own."""
    rows = []
    for name in sorted(dir(torch.optim)):
        make = getattr(torch.optim, name)
        is_class = isinstance(make, type) and issubclass(make, torch.optim.Optimizer)
        if is_class and name not in ("Optimizer", "LBFGS", "SparseAdam"):
            result, remark = attempt(lambda make=make, name=name: one_optimizer(make, name))  # type: ignore[misc]
            rows.append([f"`torch.optim.{name}`", result, remark])
    return rows


def one_optimizer(make: Any, name: str) -> tuple[str, str]:
    """Return the result of a few steps on a small net."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(12, 16), nn.LayerNorm(16), nn.Linear(16, 4))
    ours = copy.deepcopy(plain)
    before = copy.deepcopy(plain)
    sift = ALL.build(ours)
    optimizers = make(sift.parameters_in_optimizer(), lr=1e-2), make(plain.parameters(), lr=1e-2)
    for step in range(5):
        batch = torch.randn(8, 12, generator=torch.Generator().manual_seed(step))
        for model, optimizer in zip((ours, plain), optimizers, strict=True):
            model(batch).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    return compared(before, plain, ours, name)


def compared(before: nn.Module, plain: nn.Module, ours: nn.Module, name: str) -> tuple[str, str]:
    """Return the result of two trainings that began with the same weights."""
    if same(before, plain) or same(before, ours):
        return WRONG, "nothing was trained"
    if same(plain, ours):
        return SAME, ""
    return (TRAINS, BY_MATRIX[name]) if name in BY_MATRIX else (WRONG, "other bits")


def of_names() -> list[list[str]]:
    """Return a row for each name that ``optim`` of TrainingArguments takes."""
    from transformers.training_args import OptimizerNames

    rows = []
    for name in (each.value for each in OptimizerNames):
        options: dict[str, Any] = {"optim": name, "max_steps": 8}
        if "galore" in name or "apollo" in name:
            options["optim_target_modules"] = ["q_proj"]
        result, remark = attempt(lambda o=options, n=name: one_name(o, n))  # type: ignore[misc]
        rows.append([f"`{name}`", result, remark])
    return rows


def one_name(options: dict[str, Any], name: str) -> tuple[str, str]:
    """Return the result of a few steps of the Trainer."""
    rows = [{"input_ids": [6, 7, 8, n % 8 + 4], "labels": [6, 7, 8, n % 8 + 4]} for n in range(12)]
    with tempfile.TemporaryDirectory() as folder:
        args = transformers.TrainingArguments(folder, **common(), **options)
        return both(transformers.Trainer, args, name, {"train_dataset": rows})


def common() -> dict[str, Any]:
    """Return the arguments of all trainings."""
    return {
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "use_cpu": True,
        "max_grad_norm": 0.0,
    }


def make_model(kind: str = "causal") -> Any:
    """Return a small Llama, always with the same weights."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    config.num_labels = 1
    kinds = {"causal": "LlamaForCausalLM", "reward": "LlamaForSequenceClassification"}
    return getattr(transformers, kinds[kind])(config)


def make_tokenizer() -> Any:
    """Return a tokenizer of words with a chat template."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    words = Tokenizer(WordLevel({w: n for n, w in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    make: Any = transformers.PreTrainedTokenizerFast
    found = make(
        tokenizer_object=words,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
    )
    found.chat_template = TEMPLATE
    return found


def both(
    trainer: Any, args: Any, name: str, options: dict[str, Any], kind: str = "causal"
) -> tuple[str, str]:
    """Return the result of a plain training and of one with SIFT at rate 1."""
    with_sift = type("WithSift", (SiftTrainerMixin, trainer), {})
    folder = Path(args.output_dir) / "model"  # some trainers load the model a second time
    make_model(kind).save_pretrained(folder)
    before, ours, plain = (type(make_model(kind)).from_pretrained(folder) for _ in range(3))
    for cls, model, more in ((with_sift, ours, {"sift": ALL}), (trainer, plain, {})):
        torch.manual_seed(0)
        with redirect_stdout(io.StringIO()):  # the Trainer prints its figures
            cls(model=model, args=copy.deepcopy(args), **options, **more).train()
    return compared(before, plain, ours, name)


def of_trainers() -> list[list[str]]:
    """Return a row for each trainer of TRL."""
    rows = []
    for cls, config, module, data in TRAINERS:
        result, remark = attempt(
            lambda *a, c=cls, g=config, m=module, d=data: one_trainer(c, g, m, d)
        )
        rows.append([f"`{module}.{cls}`", result, remark])
    return rows


def one_trainer(cls: str, config: str, module: str, data: str) -> tuple[str, str]:
    """Return the result of a few steps of a trainer of TRL."""
    datasets: Any = import_module("datasets")
    trl = import_module(module)
    options: dict[str, Any] = {"processing_class": make_tokenizer()}
    settings: dict[str, Any] = {"max_steps": 3, "bf16": False}
    if data == "prompt":
        options["reward_funcs"] = lambda completions, **_: [float(len(c)) for c in completions]
        settings |= {"num_generations": 2, "max_completion_length": 4}
    options["train_dataset"] = datasets.Dataset.from_list(rows_of(data))
    with tempfile.TemporaryDirectory() as folder:
        args = getattr(trl, config)(folder, **common(), **settings)
        kind = "reward" if cls == "RewardTrainer" else "causal"
        return both(getattr(trl, cls), args, cls, options, kind)


def rows_of(data: str) -> list[dict[str, Any]]:
    """Return rows of text of the kind that a trainer takes."""
    pairs = [(one, TEXTS[(n + 1) % len(TEXTS)]) for n, one in enumerate(TEXTS)] * 2
    rows: dict[str, list[dict[str, Any]]] = {
        "text": [{"text": text} for text, _ in pairs],
        "preference": [{"prompt": "the", "chosen": one, "rejected": other} for one, other in pairs],
        "label": [
            {"prompt": "the", "completion": text, "label": n % 2 == 0}
            for n, (text, _) in enumerate(pairs)
        ],
        "prompt": [{"prompt": text} for text, _ in pairs],
    }
    return rows[data]


PARTS: dict[str, tuple[str, Callable[[], list[list[str]]]]] = {
    "optimizers": ("optimizer", of_optimizers),
    "names": ("`optim` of the Trainer", of_names),
    "trainers": ("trainer", of_trainers),
}


def of_versions() -> str:
    """Return the table of the packages that the project needs: the accepted versions, and the tested one."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pairs = (line.partition("==") for line in lines)
    pinned = {_plain(name): found for name, mark, found in pairs if mark}
    rows = []
    for extra, needs in {"": project["dependencies"], **project["optional-dependencies"]}.items():
        for need in needs:
            name, accepted = re.fullmatch(r"([\w-]+)(.*)", need).groups()  # type: ignore[union-attr]
            rows.append([f"`{name}`", extra, f"`{accepted}`", pinned.get(_plain(name), "newest")])
    return table(["package", "extra", "accepted", "installed by `make test`"], rows)


def _plain(name: str) -> str:
    return name.lower().replace("_", "-")


def write(page: Path, place: str, sections: Sequence[str]) -> None:
    """Write sections between the marks of a place of a page."""
    start, end = f"<!-- {place} -->", f"<!-- end of {place} -->"
    text = page.read_text("utf-8")
    head, tail = text.partition(start)[0], text.partition(end)[2]
    page.write_text("\n\n".join([head + start, *sections, end]) + tail, "utf-8")


def main() -> int:
    """Try everything; return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--result", type=Path, help="a page with marks; default: print the tables")
    options = parser.parse_args()
    if options.result:
        write(options.result, VERSIONS, [of_versions()])
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    packages = ("torch", "transformers", "trl")
    sections = [f"With {', '.join(f'{name} {version(name)}' for name in packages)}:"]
    failed = False
    for part in options.only:
        title, find = PARTS[part]
        rows = find()
        failed = failed or any(result == WRONG for _, result, _ in rows)
        sections.append(table([title, "result", "remark"], rows))
        print(sections[-1], flush=True)
    if options.result and options.only == list(PARTS):
        write(options.result, TABLES, sections)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
