"""Listeners of a run: the caller's functions, a progress bar, and the trackers of accelerate."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sift_train.config import Evaluation, StepReport

if TYPE_CHECKING:
    from accelerate import Accelerator  # type: ignore[import-untyped]


class Listener(Protocol):
    """An object whose methods are called during a run."""

    def on_step(self, report: StepReport) -> None:
        """Called with the report of an optimizer step."""

    def on_evaluation(self, evaluation: Evaluation) -> None:
        """Called with the result of an evaluation."""


class Callbacks:
    """Calls the functions ``on_step`` and ``on_evaluation`` that the caller gave."""

    def __init__(
        self,
        on_step: Callable[[StepReport], None] | None,
        on_evaluation: Callable[[Evaluation], None] | None,
    ) -> None:
        self._on_step = on_step
        self._on_evaluation = on_evaluation

    def on_step(self, report: StepReport) -> None:
        """Call ``on_step`` with the report."""
        if self._on_step is not None:
            self._on_step(report)

    def on_evaluation(self, evaluation: Evaluation) -> None:
        """Call ``on_evaluation`` with the evaluation."""
        if self._on_evaluation is not None:
            self._on_evaluation(evaluation)


class Tracker:
    """Logs to the trackers of an accelerator."""

    def __init__(self, accelerator: Accelerator, settings: Mapping[str, Any]) -> None:
        self._accelerator = accelerator
        plain = {
            key: value if isinstance(value, bool | int | float | str) else str(value)
            for key, value in settings.items()
        }
        accelerator.init_trackers("sift", config=plain)

    def on_step(self, report: StepReport) -> None:
        """Log the loss, the learning rate and the gradient norm."""
        values = {"loss": report.loss, "lr": report.lr}
        if report.sparse_lr != report.lr:
            values["sparse_lr"] = report.sparse_lr
        if report.grad_norm is not None:
            values["grad_norm"] = report.grad_norm
        self._accelerator.log(values, step=report.step)

    def on_evaluation(self, evaluation: Evaluation) -> None:
        """Log the values; each name gets the prefix ``eval/``."""
        values = {f"eval/{name}": value for name, value in evaluation.values.items()}
        self._accelerator.log(values, step=evaluation.step)


def _shown(evaluation: Evaluation) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in evaluation.values.items())


class Bar:
    """A progress bar on standard error."""

    def __init__(self, progress: Progress, n_steps: int, n_done: int) -> None:
        self._progress = progress
        self._task = progress.add_task(
            "training", total=n_steps, completed=n_done, loss="", value=""
        )

    def on_step(self, report: StepReport) -> None:
        """Show the step and its loss."""
        self._progress.update(self._task, completed=report.step, loss=f"loss {report.loss:.4f}")

    def on_evaluation(self, evaluation: Evaluation) -> None:
        """Show the values of the evaluation."""
        self._progress.update(self._task, value=_shown(evaluation))


class Lines:
    """Prints losses and evaluations as lines, where a bar cannot move: in a file, such as the log of a job.

    Args:
        console: where they are printed.
        seconds: the least time between two losses, except that of the last step.
    """

    def __init__(self, console: Console, seconds: float = 10.0) -> None:
        self._console = console
        self._seconds = seconds
        self._last = -math.inf

    def on_step(self, report: StepReport) -> None:
        """Print the step and its loss, if it is time to."""
        now = time.monotonic()
        if now - self._last >= self._seconds or report.step == report.n_steps:
            self._last = now
            self._print(f"step {report.step} of {report.n_steps}: loss {report.loss:.4f}")

    def on_evaluation(self, evaluation: Evaluation) -> None:
        """Print the values of the evaluation."""
        self._print(f"evaluation after step {evaluation.step}: {_shown(evaluation)}")

    def _print(self, line: str) -> None:
        self._console.print(line, markup=False, soft_wrap=True)


class Report:
    """Says on standard error what is being done, in the first process only.

    Attributes:
        console: where it is printed; a progress bar on it stays below the text.
        has_bars: whether progress bars are shown, which need a terminal or a notebook.
    """

    def __init__(self, *, shown: bool) -> None:
        self.console = Console(
            stderr=True, quiet=not shown or os.environ.get("RANK", "0") != "0", highlight=False
        )
        self.has_bars = shown and self.console.is_terminal

    def __call__(self, text: str) -> None:
        """Print what begins now."""
        self.console.print(f"{text} …", markup=False, soft_wrap=True)


@contextmanager
def shown_steps(n_steps: int, *, n_done: int, report: Report) -> Iterator[Listener]:
    """Show inside the block how far the run is; ``n_done`` steps were done by the run that is resumed."""
    if not report.has_bars:
        yield Lines(report.console)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[loss]}"),
        TextColumn("{task.fields[value]}"),
    )
    with Progress(*columns, console=report.console) as progress:
        yield Bar(progress, n_steps, n_done)
