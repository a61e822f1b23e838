"""A training that a YAML file describes: model, data, output and the settings of ``fit``."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sift_train.config import FitConfig, FitResult
from sift_train.fit import fit
from sift_train.instructions import (
    TEMPLATES,
    Batch,
    Conversation,
    Steps,
    count_empty,
    encode,
    plain_loss,
    read_conversations,
)
from sift_train.known import check_integer
from sift_train.labelled import (
    LabelledBatches,
    accuracy,
    check_labels,
    in_order_of,
    labels_of,
    own_labels,
    set_padding,
)
from sift_train.labelled_files import Example, read_labelled
from sift_train.listeners import Report
from sift_train.loading import (
    check_has_no_code,
    check_model_folder,
    check_positions,
    checkpoint_dtype,
    hidden_progress_bars,
)
from sift_train.starting import check_apart, check_start
from sift_train.yaml_files import names_of, read_yaml, settings_of

logger = logging.getLogger(__name__)
_CLASSIFICATION, _CAUSAL = TASKS = ("text-classification", "causal-lm")
_N_SHOWN = 10  # of the labels, in a warning
_LOCAL = re.compile(r"^[./~]|^[A-Za-z]:|\\|/$")  # how paths are written, and repositories are not


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
        if self.template not in TEMPLATES:
            raise ValueError(f"template is {self.template!r}; choose one of {', '.join(TEMPLATES)}")
        if self.task != _CAUSAL and self.template != "auto":
            raise ValueError(
                f"template is {self.template!r}, which is for the task {_CAUSAL}; leave it out for {self.task}"
            )
        for name in ("model", "data", "output", "evaluation", "run_dir", "save_target"):
            given: Any = getattr(self, name)
            is_left_out = given is None and name in ("evaluation", "run_dir", "save_target")
            if not is_left_out and (not isinstance(given, str) or not given):
                raise ValueError(f"{name} is {given!r}; it must be the text of a path")
        for name in ("batch_size", "micro_batch", "max_tokens"):
            value: Any = getattr(self, name)
            if value is not None:
                check_integer(name, value, least=1)
        if self.batch_size % self.size:
            raise ValueError(
                f"batch_size is {self.batch_size}, which is no multiple of micro_batch, {self.size}"
            )
        if not isinstance(self.train, Mapping):
            raise ValueError("train is no mapping of settings; indent them below 'train:'")
        if "accumulation" in self.train:
            raise ValueError("train has accumulation; set batch_size and micro_batch instead")
        settings_of(
            FitConfig,
            self.train,
            "train",
            elsewhere=names_of(RunFile),
            other="a setting of the file itself, not of 'train:'",
        )

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
        OSError: a path does not exist, cannot be read or written, or is a folder in place of a file; or as ``fit``.
        ValueError: the file has a setting that is not known or out of range, an output is something that the run
            reads, the examples have another form or another label; or as ``fit``.
    """
    run = settings_of(
        RunFile,
        read_yaml(path),
        f"'{path}'",
        elsewhere=names_of(FitConfig),
        other="a setting of 'train:', so it is indented below it",
    )
    config = settings_of(
        FitConfig, {**run.train, "accumulation": run.batch_size // run.size}, f"'{path}'"
    )
    folder = _local_folder(run.model)
    check_start(
        config,
        output=run.output,
        base=folder,
        save_target=run.save_target,
        run_dir=run.run_dir,
        resume=resume,
        overwrite=overwrite,
        evaluates=run.evaluation is not None,
    )
    report = Report(shown=progress)
    read = _read_classification if run.task == _CLASSIFICATION else _read_causal
    make = read(run, report)
    inputs = {"the YAML file": path, "the data": run.data, "the evaluation": run.evaluation}
    check_apart((run.output, run.save_target), inputs)
    report(f"loading '{run.model}'")
    import transformers  # noqa: F401 - takes seconds; hidden_progress_bars needs it loaded

    with nullcontext() if report.has_bars else hidden_progress_bars():
        base, base_id = _download(run.model) if folder is None else (folder, None)
        check_model_folder(base)
        check_has_no_code(base)
        made = make(base)
    given = {"exception": made.new_names, **made.settings, **run.train}
    config = replace(config, **{name: given[name] for name in given.keys() - run.train.keys()})
    return fit(
        made.model,
        made.data,
        output=run.output,
        config=config,
        loss=made.loss,
        base=base,
        base_id=base_id,
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
    new_names: list[str]
    data: Iterable[Any]
    loss: Callable[[nn.Module, Any], Tensor] | None
    evaluate: Callable[[nn.Module], Mapping[str, float]] | None
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class _Evaluation:
    """Measures a model on batches.

    Attributes:
        name: of the value.
        measure: returns it.
        batches: of the examples.
        fingerprint: as for ``fit``.
    """

    name: str
    measure: Callable[[nn.Module, Any], float]
    batches: LabelledBatches | Steps

    @property
    def fingerprint(self) -> str:
        return self.batches.fingerprint

    def __call__(self, model: nn.Module) -> Mapping[str, float]:
        return {self.name: self.measure(model, self.batches)}


def _read_classification(run: RunFile, report: Report) -> Callable[[Path], _Made]:
    """Read labelled texts; return a function that makes the rest, given the model's folder."""
    examples = read_labelled(Path(run.data))
    names = labels_of(examples, Path(run.data))
    held_out = [] if run.evaluation is None else read_labelled(Path(run.evaluation))
    check_labels(held_out, names, Path(run.evaluation or ""))

    def make(base: Path) -> _Made:
        import transformers

        tokenizer = _load_tokenizer(base)
        if run.max_tokens > tokenizer.model_max_length:
            raise ValueError(
                f"max_tokens is {run.max_tokens}, and the model reads at most {tokenizer.model_max_length} tokens, as its tokenizer"
                " states; give a smaller number"
            )
        if run.max_tokens <= tokenizer.num_special_tokens_to_add():
            raise ValueError(
                f"max_tokens is {run.max_tokens}, which leaves nothing of the texts; give a larger number"
            )
        known = transformers.AutoConfig.from_pretrained(base)
        ordered = in_order_of(known, names)
        labels = ordered or names
        torch.manual_seed(int(run.train.get("seed", 0)))  # of the new head
        model, new = _load(
            transformers.AutoModelForSequenceClassification,
            base,
            id2label=dict(enumerate(labels)),
            label2id={name: number for number, name in enumerate(labels)},
            problem_type="single_label_classification",
            ignore_mismatched_sizes=True,
        )
        if ordered is None and not new:
            _warn_of_head(known, labels)
        check_positions(model, run.max_tokens)
        tested = f", evaluating on {len(held_out):,}" if held_out else ""
        report(
            f"training on {len(examples):,} examples of {len(names)} labels ({_shown(names)}){tested}"
        )
        set_padding(tokenizer, model)

        def batches(rows: list[Example], *, shuffle: bool) -> LabelledBatches:
            return LabelledBatches(
                rows, labels, tokenizer, size=run.size, max_tokens=run.max_tokens, shuffle=shuffle
            )

        evaluation = _Evaluation("accuracy", accuracy, batches(held_out, shuffle=False))
        return _Made(
            model, new, batches(examples, shuffle=True), None, evaluation if held_out else None, {}
        )

    return make


def _warn_of_head(known: Any, labels: list[str]) -> None:
    """Warn that a model has a classifier of other labels than the data, whose outputs get those of the data."""
    logger.warning(
        "the model has a classifier of the labels %s, and the data have others: its outputs are trained for %s, in this order",
        _shown(own_labels(known)), ", ".join(map(repr, labels)),
    )  # fmt: skip


def _shown(labels: list[str]) -> str:
    return ", ".join(map(repr, labels[:_N_SHOWN])) + (", …" * (len(labels) > _N_SHOWN))


def _read_causal(run: RunFile, report: Report) -> Callable[[Path], _Made]:
    """Read instructions; return a function that makes the rest, given the model's folder."""
    examples = read_conversations(Path(run.data))
    held_out = [] if run.evaluation is None else read_conversations(Path(run.evaluation))

    def make(base: Path) -> _Made:
        import transformers

        tokenizer = _load_tokenizer(base)
        data = _steps(
            run, examples, run.data, tokenizer, lambda text: report(f"training on {text}")
        )
        evaluation = None
        if held_out:
            tests = _steps(
                run,
                held_out,
                str(run.evaluation),
                tokenizer,
                lambda text: report(f"evaluating on {text}"),
            )
            evaluation = _Evaluation("loss", _mean_loss, tests)
        model, new = _load(transformers.AutoModelForCausalLM, base)
        check_positions(model, run.max_tokens)
        return _Made(model, new, data, plain_loss, evaluation, {"higher_is_better": False})

    return make


def _steps(
    run: RunFile,
    examples: list[Conversation],
    path: str,
    tokenizer: Any,
    report: Callable[[str], None],
) -> Steps:
    try:
        tokens, n_left_out = encode(
            examples, tokenizer, template=run.template, max_tokens=run.max_tokens
        )
    except ValueError as error:
        raise ValueError(f"'{path}': {error}") from error
    n_empty, left_out = count_empty(examples), ""
    if n_empty:
        left_out += f"; {n_empty:,} have empty answers, of which only the end is learnt"
    if n_left_out:
        left_out += (
            f"; {n_left_out:,} left out, since their answers begin after {run.max_tokens} tokens"
        )
    report(f"{len(tokens):,} examples of '{path}'{left_out}")
    pad = next((n for n in (tokenizer.pad_token_id, tokenizer.eos_token_id) if n is not None), 0)
    return Steps(
        [[each] for each in tokens],
        batch=run.batch_size,
        micro_batch=run.size,
        pad_id=int(pad),
        is_packed=False,
    )


def _mean_loss(model: nn.Module, batches: Iterable[Batch]) -> float:
    """Return the mean loss over all tokens of the answers."""
    device = next(model.parameters()).device
    total, n = 0.0, 0
    for batch in batches:
        own = {name: value.to(device) for name, value in batch.items()}
        total += float(plain_loss(model, {**own, "n_learnt": torch.ones((), device=device)}))
        n += int((batch["labels"] >= 0).sum())
    return total / n


def _load_tokenizer(base: Path) -> Any:
    """Return the tokenizer of a model.

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
            f" ({_first_line(error)}); put the tokenizer's files into its folder"
        ) from error
    return tokenizer


def _load(make: Any, base: Path, **more: Any) -> tuple[nn.Module, list[str]]:
    """Return a model, and patterns of the parameters that its files do not hold."""
    model, found = make.from_pretrained(
        base, dtype=checkpoint_dtype(base) or "auto", output_loading_info=True, **more
    )
    own = {name for name, _ in model.named_parameters()}
    resized = {name: (old, now) for name, old, now in found["mismatched_keys"]}
    body = f"{model.base_model_prefix}."
    for name, (old, now) in resized.items():
        is_head = now[:1] == (len(more.get("id2label", ())),) and not name.startswith(body)
        if not is_head:
            raise ValueError(
                f"parameter {name!r} has shape {tuple(old)} in '{base}' and {tuple(now)} by its config.json; give a model whose files"
                " fit together"
            )
    if resized:
        logger.warning(
            "the model has a head of size %d, and the data have %d labels: a new head is trained",
            min(old[0] for old, _ in resized.values()), len(more["id2label"]),
        )  # fmt: skip
    missing = sorted(own & {*found["missing_keys"], *resized})
    return model, [f"re:^{re.escape(name)}$" for name in missing]


def _first_line(error: Exception) -> str:
    first, _, rest = str(error).strip().partition("\n")
    if first.rstrip().endswith(":"):  # the reason is a list on the lines below
        first += " " + " ".join(rest.split())[:200]
    return first.strip().rstrip(".")


def _local_folder(model: str) -> Path | None:
    """Return the folder of a model, None if it is the name of a repository on the Hub.

    Raises:
        FileNotFoundError: it is written like a path, and does not exist.
        ValueError: it is a path of something else than a model's folder.
    """
    path = Path(model).expanduser()
    if path.exists():
        check_model_folder(path)
        return path
    if _LOCAL.search(model) or model.partition("@")[0].count("/") > 1:
        raise FileNotFoundError(
            f"model '{model}' does not exist, and no repository can have this name; give the folder of a model, or a"
            " repository such as org/model"
        )
    return None


def _download(model: str) -> tuple[Path, str]:
    """Download a repository; return its folder, and its name at a commit.

    Raises:
        FileNotFoundError: there is no such repository.
        PermissionError: it is gated.
        OSError: it could not be downloaded.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    name, _, revision = model.partition("@")
    try:
        folder = Path(snapshot_download(name, revision=revision or None))
    except GatedRepoError as error:
        raise PermissionError(
            f"model '{model}' is gated; ask for access on its page on the Hub, and log in (hf auth login)"
        ) from error
    except (HFValidationError, RepositoryNotFoundError) as error:
        raise FileNotFoundError(f"model '{model}' is neither a folder nor a repository") from error
    except OSError as error:
        raise OSError(
            f"model '{model}' is no folder, and could not be downloaded: {_first_line(error)}"
        ) from error
    return folder, f"{name}@{folder.name}"
