"""Shared code of the recipes: the memory plan, the best step, the delta, the command line.

``--help`` of a recipe already shows the memory plan. An error of the user is reported in one sentence.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from recipe_methods import (
    ADAPTERS,
    ALL_LINEAR,
    METHODS,
    Adapted,
    Choice,
    adapt,
    equalized,
    find_layers,
    is_of,
    rank_of,
    sift_names,
    sizes,
)
from torch import Tensor, nn
from transformers import TrainerCallback

import sift_train
import sparsedelta
from sift_train.loading import checkpoint_dtype

__all__ = [
    "ADAPTERS", "ALL_LINEAR", "METHODS", "Adapted", "Choice", "KeepBest", "adapt", "by_method",
    "check_folder", "count", "empty_model", "equalized", "export", "local_model", "model_config", "parse", "plan_table", "planned_dtype",
    "print_plan", "run", "share", "table",
]  # fmt: skip

GIB = 1 << 30
SMALL_FILES = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.txt", "*.model", "*.md")


# Memory ---------------------------------------------------------------------------------------


def planned_dtype(model: str, config: Any) -> torch.dtype:
    """Return the dtype of a checkpoint's weights, else that of its config."""
    folder = Path(model)
    found = checkpoint_dtype(folder) if folder.is_dir() else None
    stated = getattr(config, "dtype", None)
    return found or (stated if isinstance(stated, torch.dtype) else torch.float32)


def empty_model(make: Any, config: Any, dtype: torch.dtype) -> nn.Module:
    """Return a model without weights, on the meta device, for ``plan_table``.

    Args:
        make: an auto class, such as ``AutoModelForCausalLM``.
        config: a config of transformers.
        dtype: dtype of the weights.
    """
    with torch.device("meta"):
        model: nn.Module = make.from_config(config, dtype=dtype)
    return model


def plan_table(model: nn.Module, methods: Sequence[str], choice: Choice) -> str:
    """Return a table of each method's memory without activations; the model may have no weights."""
    choice = equalized(model, choice, methods)
    rows = []
    planned = {method: _planned(model, method, choice) for method in methods}
    is_small = max(sum(parts[1:]) for parts in planned.values()) < GIB
    unit, n_bytes = ("MiB", 1 << 20) if is_small else ("GiB", GIB)
    for method, (n_trained, *parts) in planned.items():
        cells = [f"{part / n_bytes:.2f}" for part in (*parts, sum(parts))]
        rows.append((method, f"{n_trained:,}", *cells))
    columns = ("method", "trained", "weights", "gradients", "optimizer", "other", "sum")
    lines = [
        f"Memory in {unit}, activations apart{_other(methods)}:",
        table(columns, rows),
    ]
    if "sift" in methods:
        lines.append(f"sift: {_sift_plan(model, choice).fits()}")
    return "\n".join(lines)


def _other(methods: Sequence[str]) -> str:
    """Return the contents of the column "other" for these methods, in brackets."""
    parts = ["indices", "masters"] if "sift" in methods else []
    if any(method in ADAPTERS for method in methods):
        parts.append("adapters")
    if "shira" in methods:
        parts.append("the dense weights that SHiRA makes for a forward pass")
    if len(parts) < 3:
        return f" (other: {' and '.join(parts)})" if parts else ""
    return f" (other: {', '.join(parts[:-1])}, and {parts[-1]})"


def print_plan(model: nn.Module, methods: Sequence[str], choice: Choice) -> None:
    """Print ``plan_table``."""
    print(plan_table(model, methods, choice), flush=True)


def _planned(model: nn.Module, method: str, choice: Choice) -> tuple[int, ...]:
    """Return the number of trained components, and bytes of weights, gradients, optimizer and other."""
    if method == "sift":
        plan = _sift_plan(model, choice)
        gradients = plan.gradient_bytes + plan.largest_gradient_bytes
        other = plan.master_bytes + plan.index_bytes
        return plan.n_trained, plan.weight_bytes, gradients, plan.optimizer_bytes, other
    weights = sum(t.numel() * t.element_size() for t in {*model.parameters(), *model.buffers()})
    if method == "full":
        own = [(p.numel(), p.element_size()) for p in model.parameters()]
        other = 0
    else:
        layers = find_layers(model, choice)
        n = rank_of(choice, layers) * sizes(layers)[1]
        dense = [p for name, p in model.named_parameters() if is_of(name, choice.dense)]
        own = [(n, 4), *((p.numel(), p.element_size()) for p in dense)]  # PEFT's adapters are fp32
        other = sum(count * size for count, size in own)  # PEFT trains a copy of the dense ones
        if method == "shira":  # int32 coordinates, and each layer's weight with the adapter added
            other += 8 * n + sum(
                m.weight.numel() * m.weight.element_size() for m in layers.values()
            )
    gradients = sum(count * size for count, size in own)
    return sum(count for count, _ in own), weights, gradients, 2 * gradients, other


def _sift_plan(model: nn.Module, choice: Choice) -> sift_train.Plan:
    sparse, dense = sift_names(find_layers(model, choice), choice)
    return sift_train.plan(model, choice.rate, sparse_module=sparse, exception=dense)


# Training -------------------------------------------------------------------------------------


class KeepBest(TrainerCallback):
    """Keeps the state of the evaluation with the highest value, and restores it at the end.

    Attributes:
        step: the step of the best evaluation; None before the first evaluation.
        value: the value of the best evaluation.
    """

    def __init__(self, adapted: Adapted, metric: str) -> None:
        self._adapted = adapted
        self._metric = metric
        self._state: dict[str, Tensor] = {}
        self.step: int | None = None
        self.value = -math.inf

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> Any:
        """Request an evaluation after the last step too."""
        control.should_evaluate |= state.global_step >= state.max_steps
        return control

    def on_evaluate(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Keep the state if its value is higher than all before."""
        value = float(given["metrics"][self._metric])
        if self.step is None or value > self.value:
            self.step = state.global_step
            self.value = -math.inf if math.isnan(value) else value
            self._state = self._adapted.snapshot()
        print(f"step {state.global_step}: {self._metric} {value:.4f}", file=sys.stderr, flush=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Restore the best state."""
        if self._state:
            self._adapted.restore(self._state)


# Checkpoints ----------------------------------------------------------------------------------


def local_model(model: str) -> tuple[Path, str | None]:
    """Return a model's folder, downloaded from the Hub if it is a Hub id, and where others find it.

    Raises:
        OSError: it is neither a folder nor an id of the Hub.
        ValueError: it has no safetensors file, which a delta needs.
    """
    folder, base_id = Path(model), None
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(model, allow_patterns=list(SMALL_FILES)))
        except (OSError, ValueError) as error:
            raise OSError(_short_reason(model, error)) from error
        base_id = f"{model}@{folder.name}"
    if not any(folder.glob("*.safetensors")):
        raise ValueError(f"'{folder}' holds no safetensors weights, which a delta is made from")
    return folder, base_id


def model_config(model: str) -> Any:
    """Return the config of a folder or of a model on the Hub.

    Raises:
        OSError: there is no config.
    """
    try:
        return transformers.AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise OSError(_short_reason(model, error)) from error


def _short_reason(model: str, error: Exception) -> str:
    """Return one sentence for the long message of a library."""
    if (Path(model) / "config.json").is_file():
        return f"'{model}/config.json' cannot be used: {error}"
    if Path(model).is_dir():
        return f"folder '{model}' has no config.json, so it is not a model folder; give another"
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    causes: list[BaseException] = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None:
        causes.append(cause)
    why = "offline, or the Hub does not answer"
    if any(isinstance(cause, RepositoryNotFoundError | HFValidationError) for cause in causes):
        why = "not found"
    if any(isinstance(cause, GatedRepoError) for cause in causes):
        why = "its owners must grant access to your account, and you must be logged in"
    return f"'{model}' is not a folder, and the Hub has no model of that name ({why})"


def export(
    model: Any,
    output: Path,
    *,
    base: Path,
    base_id: str | None = None,
    info: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> int:
    """Write the delta from the base's folder to a trained model; return its size in bytes.

    The target is the base's folder with the trained weights and config. New tensors, such as a head, are
    in the delta in full; tensors that the model does not have are removed.
    """
    sift_train.export_delta(
        model, output, base=base, base_id=base_id, info=info, overwrite=overwrite
    )
    return output.stat().st_size


# Command line ---------------------------------------------------------------------------------


def parse(
    parser: argparse.ArgumentParser, plan: Callable[[argparse.Namespace], str]
) -> argparse.Namespace:
    """Return the options of the command line; ``--help`` ends with the memory plan for them.

    Args:
        parser: a parser with ``add_help=False`` and without required arguments.
        plan: a function of the options that returns the text of the memory plan.
    """
    parser.add_argument("-h", "--help", action="store_true", help="show this and the memory plan")
    options = parser.parse_args()
    if options.help:
        print(parser.format_help())
        print(plan(options))
        sys.exit(0)
    return options


def check_folder(path: Path | None) -> None:
    """Check before any work that a file can be written at a path.

    Raises:
        FileNotFoundError: its folder does not exist.
        IsADirectoryError: the path is a folder.
    """
    if path is None:
        return
    if not path.parent.is_dir():
        raise FileNotFoundError(f"folder '{path.parent}' does not exist; create it first")
    if path.is_dir():
        raise IsADirectoryError(f"'{path}' is a folder; name a file in it")


def count(text: str) -> int:
    """Return an integer of at least 1, as a type for argparse.

    Raises:
        ArgumentTypeError: the text has another value.
    """
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def share(text: str) -> float:
    """Return a number from 0 to 1, as a type for argparse.

    Raises:
        ArgumentTypeError: the text has another value.
    """
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 1")
    return number


def by_method(given: Sequence[str], defaults: Mapping[str, float], what: str) -> dict[str, float]:
    """Return a number for each method, from words such as ``1e-4`` or ``sift=1e-4``.

    A number without a method is for all methods that are not named.

    Raises:
        ValueError: a word has another form, or a method is given two numbers.
    """
    numbers: dict[str, float] = {}
    for word in given:
        name, equals, number = word.rpartition("=")
        if equals and name not in defaults:
            choices = ", ".join(defaults)
            raise ValueError(f"{what} {word!r} names no method; choose one of {choices}")
        try:
            value = float(number)
        except ValueError:
            raise ValueError(
                f"{what} {word!r} is not a number, nor a method and a number as in sift=1e-4"
            ) from None
        if name in numbers:
            raise ValueError(
                f"{what} gives {f'method {name}' if name else 'every method'} two numbers,"
                f" {numbers[name]:g} and {value:g}; give one, and run the recipe again for the other"
            )
        numbers[name] = value
    return {name: numbers.get(name, numbers.get("", own)) for name, own in defaults.items()}


def run(main: Callable[[], None]) -> None:
    """Run a recipe and exit; an error of the user is printed as one sentence.

    An interrupted recipe exits with 130, as is usual in a shell, and prints the message of the
    ``KeyboardInterrupt``, which says how to resume.
    """
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        main()
    except (ValueError, OSError, sparsedelta.SparseDeltaError) as error:
        if "--debug" in sys.argv:
            raise
        sys.exit(f"error: {' '.join(str(error).split())}")
    except KeyboardInterrupt as stop:
        print(str(stop) or "stopped", file=sys.stderr, flush=True)
        sys.exit(130)
    sys.exit(0)


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a Markdown table with aligned columns."""
    cells = [list(columns), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[at]) for row in cells) for at in range(len(columns))]
    lines = [
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |"
        for row in cells
    ]
    lines.insert(1, "| " + " | ".join("-" * width for width in widths) + " |")
    return "\n".join(lines)
