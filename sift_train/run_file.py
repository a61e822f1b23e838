"""A training that a YAML file describes: model, data, output and the settings of ``fit``."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sift_train.config import FitConfig, FitResult
from sift_train.fit import fit
from sift_train.instructions import Steps, encode, plain_loss, read_conversations
from sift_train.labelled import LabelledBatches, accuracy, read_labelled
from sift_train.listeners import Report
from sift_train.loading import checkpoint_dtype, hidden_progress_bars
from sift_train.yaml_files import read_yaml, settings_of

TASKS = ("text-classification", "causal-lm")


@dataclass(frozen=True, kw_only=True)
class RunFile:
    """What ``python -m sift_train --config`` reads; paths are relative to the working directory.

    Attributes:
        task: ``"text-classification"`` or ``"causal-lm"``.
        model: folder of a transformers model, or a repository such as ``org/model`` or ``org/model@revision``.
        data: file of examples: labelled texts, or instructions with answers in JSON.
        output: path of the delta to write.
        evaluation: file of further examples, evaluated every ``eval_every`` steps and at the end.
        batch_size: examples per optimizer step.
        micro_batch: examples per forward pass; by default all of a step.
        max_tokens: longer examples are cut.
        template: ``"auto"``, ``"chat"`` or ``"alpaca"``: what writes the prompts of a causal language model.
        run_dir, save_target: as for ``fit``.
        train: settings of ``FitConfig``, but for ``accumulation``. By default, parameters that the model's files
            do not hold, such as a new head, are trained densely.

    Raises:
        ValueError: a setting is out of range.
    """

    task: str
    model: str
    data: str
    output: str
    evaluation: str | None = None
    batch_size: int = 16
    micro_batch: int | None = None
    max_tokens: int = 256
    template: str = "auto"
    run_dir: str | None = None
    save_target: str | None = None
    train: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ValueError(f"task is {self.task!r}; choose one of {', '.join(TASKS)}")
        for name in ("batch_size", "micro_batch", "max_tokens"):
            value: Any = getattr(self, name)
            if value is not None and (
                isinstance(value, bool) or not isinstance(value, int) or value < 1
            ):
                raise ValueError(f"{name} is {value!r}; it must be an integer of at least 1")
        if self.batch_size % self.size:
            raise ValueError(
                f"batch_size is {self.batch_size}, which is no multiple of micro_batch, {self.size}"
            )
        if not isinstance(self.train, Mapping):
            raise ValueError("train is no mapping of settings; indent them below 'train:'")
        if "accumulation" in self.train:
            raise ValueError("train has accumulation; set batch_size and micro_batch instead")
        settings_of(FitConfig, self.train, "train")

    @property
    def size(self) -> int:
        """Examples per forward pass."""
        return self.micro_batch or self.batch_size


def run_file(
    path: str | PathLike[str],
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = False,
) -> FitResult:
    """Train as a YAML file says, write the delta, and return the result.

    Args:
        path: the file; see ``RunFile``.
        resume: resume from the newest checkpoint in ``run_dir``.
        overwrite: replace existing outputs.
        progress: as for ``fit``.

    Raises:
        FileNotFoundError: a file or folder does not exist.
        ValueError: the file has a setting that is not known or out of range, or as ``fit``.
    """
    import transformers  # noqa: F401 - takes seconds; hidden_progress_bars needs it loaded

    run = settings_of(RunFile, read_yaml(path), f"'{path}'")
    Report(shown=progress)(f"loading '{run.model}' and '{run.data}'")
    with nullcontext() if progress else hidden_progress_bars():
        made = _classification(run) if run.task == TASKS[0] else _causal(run)
    given = {"exception": made.new_names, **made.settings, **run.train}
    config = settings_of(
        FitConfig, {**given, "accumulation": run.batch_size // run.size}, f"'{path}'"
    )
    return fit(
        made.model,
        made.data,
        output=run.output,
        config=config,
        loss=made.loss,
        base=made.base,
        base_id=made.base_id,
        save_target=run.save_target,
        overwrite=overwrite,
        evaluate=made.evaluate,
        progress=progress,
        run_dir=run.run_dir,
        resume=resume,
    )


@dataclass(frozen=True)
class _Made:
    """What ``fit`` needs of a task."""

    model: nn.Module
    base: Path
    base_id: str | None
    new_names: list[str]
    data: Iterable[Any]
    loss: Callable[[nn.Module, Any], Tensor] | None
    evaluate: Callable[[nn.Module], Mapping[str, float]] | None
    settings: Mapping[str, Any]


def _classification(run: RunFile) -> _Made:
    import transformers

    base, base_id = _find_base(run.model)
    examples = read_labelled(Path(run.data))
    names = sorted({label for _, label in examples})
    torch.manual_seed(int(run.train.get("seed", 0)))  # of the new head
    model, tokenizer, new = _load(
        transformers.AutoModelForSequenceClassification,
        base,
        id2label=dict(enumerate(names)),
        label2id={name: number for number, name in enumerate(names)},
    )

    def batches(rows: list[tuple[str, str]], *, shuffle: bool) -> LabelledBatches:
        return LabelledBatches(
            rows, names, tokenizer, size=run.size, max_tokens=run.max_tokens, shuffle=shuffle
        )

    evaluate = None
    if run.evaluation is not None:
        held_out = batches(read_labelled(Path(run.evaluation)), shuffle=False)

        def evaluate(model: nn.Module) -> Mapping[str, float]:
            return {"accuracy": accuracy(model, held_out)}

    return _Made(model, base, base_id, new, batches(examples, shuffle=True), None, evaluate, {})


def _causal(run: RunFile) -> _Made:
    import transformers

    base, base_id = _find_base(run.model)
    model, tokenizer, new = _load(transformers.AutoModelForCausalLM, base)
    pad = next((n for n in (tokenizer.pad_token_id, tokenizer.eos_token_id) if n is not None), 0)

    def steps(path: str) -> Steps:
        tokens, _ = encode(
            read_conversations(Path(path)),
            tokenizer,
            template=run.template,
            max_tokens=run.max_tokens,
        )
        return Steps(
            [[each] for each in tokens],
            batch=run.batch_size,
            micro_batch=run.size,
            pad_id=int(pad),
            is_packed=False,
        )

    evaluate = None
    if run.evaluation is not None:
        held_out = steps(run.evaluation)

        def evaluate(model: nn.Module) -> Mapping[str, float]:
            return {"loss": _mean_loss(model, held_out)}

    settings = {"higher_is_better": False}
    return _Made(model, base, base_id, new, steps(run.data), plain_loss, evaluate, settings)


def _mean_loss(model: nn.Module, batches: Steps) -> float:
    """Return the mean loss over all tokens of the answers."""
    device = next(model.parameters()).device
    total, n = 0.0, 0
    for batch in batches:
        own = {name: value.to(device) for name, value in batch.items()}
        total += float(plain_loss(model, {**own, "n_learnt": torch.ones((), device=device)}))
        n += int((batch["labels"] >= 0).sum())
    return total / n


def _load(make: Any, base: Path, **more: Any) -> tuple[nn.Module, Any, list[str]]:
    """Return a model, its tokenizer, and patterns of the parameters that its files do not hold.

    Raises:
        FileNotFoundError: the folder has no tokenizer that transformers can load.
    """
    import transformers

    auto: Any = transformers.AutoTokenizer
    try:
        tokenizer = auto.from_pretrained(base)
        # Without files, some classes give a tokenizer that knows no words.
        if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
            raise OSError("its vocabulary is empty")
    except (OSError, ValueError, ImportError) as error:
        raise FileNotFoundError(
            f"model '{base}' has no tokenizer that transformers can load"
            f" ({str(error).partition(chr(10))[0].strip()}); put the tokenizer's files into its folder"
        ) from error
    model, found = make.from_pretrained(
        base, dtype=checkpoint_dtype(base) or "auto", output_loading_info=True, **more
    )
    own = {name for name, _ in model.named_parameters()}
    missing = sorted(own & set(found["missing_keys"]))
    return model, tokenizer, [f"re:^{re.escape(name)}$" for name in missing]


def _find_base(model: str) -> tuple[Path, str | None]:
    """Return the folder of a model, and its repository at a commit, if it comes from the Hub."""
    if Path(model).is_dir():
        return Path(model), None
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    name, _, revision = model.partition("@")
    try:
        folder = Path(snapshot_download(name, revision=revision or None))
    except HFValidationError as error:
        raise FileNotFoundError(f"model '{model}' is neither a folder nor a repository") from error
    return folder, f"{name}@{folder.name}"
