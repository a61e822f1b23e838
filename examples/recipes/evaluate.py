"""Scores a base and its deltas on tasks of the lm-evaluation-harness, side by side.

    python examples/recipes/evaluate.py --base org/model --delta tuned.sd --tasks mmlu --shots 5
    python examples/recipes/evaluate.py --base base/ --delta tuned.sd --mmlu-csv folder/ --shots 5

The deltas are applied to one model in memory and reverted, one after the other. No tuned model is written.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import transformers
from instruct_common import empty_causal, load_causal
from mmlu_csv import write_tasks
from recipe_common import check_folder, local_model, parse, run, table

import sparsedelta
from sparsedelta.errors import FormatError, MismatchError, StructureMismatch

BASE = "base"
INDEX_BYTES = 8  # bytes of a touched element's position in memory
MIB, GIB = 1 << 20, 1 << 30

Scores = Mapping[str, Any]


def options_of() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], add_help=False)
    parser.add_argument("--base", help="folder of the base, or its id on the Hub")
    parser.add_argument("--delta", type=Path, nargs="+", default=[], help=".sd files")
    what = parser.add_argument_group("tasks")
    what.add_argument(
        "--tasks",
        nargs="+",
        default=[],
        help="names of tasks of the harness: mmlu, humaneval, glue, sst2, ...",
    )
    what.add_argument("--tasks-dir", type=Path, help="folder with your own tasks, as YAML")
    what.add_argument(
        "--mmlu-csv", type=Path, help="folder of <subject>_test.csv and <subject>_dev.csv"
    )
    what.add_argument(
        "--shots", type=int, help="number of worked examples; default: the task's, or 0"
    )
    what.add_argument("--limit", type=int, help="use only this many questions of each task")
    what.add_argument("--chat", action="store_true", help="format questions with the chat template")
    what.add_argument(
        "--run-generated-code",
        action="store_true",
        help="allow humaneval to run code that a model writes",
    )
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--json", type=Path, help="file for all scores, as JSON")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parse(parser, plan)


def plan(options: argparse.Namespace) -> str:
    """Return the memory plan: the base's weights, from its config, and the largest delta."""
    if options.base is None:
        return "For the memory plan, give --base; only its config is read."
    empty = empty_causal(options.base)
    weights = sum(t.numel() * t.element_size() for t in {*empty.parameters(), *empty.buffers()})
    found = {"weights": weights}
    found |= {f"{path.name}, while applied": decoded_bytes(path) for path in options.delta}
    largest = max((n for name, n in found.items() if name != "weights"), default=0)
    found["sum, one delta at a time"] = weights + largest
    unit, size = ("MiB", MIB) if weights < GIB else ("GiB", GIB)
    rows = [(name, f"{n_bytes / size:.2f}") for name, n_bytes in found.items()]
    return "Memory, activations apart:\n" + table(("what", unit), rows)


def decoded_bytes(path: Path) -> int:
    """Return the bytes that a delta needs in memory while it is applied."""
    with sparsedelta.load(path) as delta:
        return sum(row.nnz * (INDEX_BYTES + 2 * row.target.dtype.width) for row in delta.tensors)


def main() -> None:
    """Evaluate the base, then each delta, and show the scores side by side."""
    options = options_of()
    check(options)
    print(plan(options), flush=True)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if options.run_generated_code:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"
    folder, _ = local_model(options.base)
    with tempfile.TemporaryDirectory() as work:
        names, manager = find_tasks(options, Path(work))
        found: dict[str, Scores] = {}
        try:
            for name, scores in measure_all(
                folder,
                options.delta,
                lambda model: measure(model, folder, names, manager, options),
                base=options.base,
            ):
                found[name] = scores
                if options.json:
                    options.json.write_text(json.dumps(found, indent=1, default=str), "utf-8")
        finally:  # the scores so far are shown even if a later delta fails
            if found:
                print(side_by_side(found), flush=True)


def check(options: argparse.Namespace) -> None:
    """Check the options.

    Raises:
        ValueError: an option is missing, or two columns would have the same name.
    """
    if options.base is None:
        raise ValueError("--base is missing; see --help")
    if not options.tasks and options.mmlu_csv is None:
        raise ValueError("nothing says what to evaluate on; give --tasks or --mmlu-csv")
    names = [path.stem for path in options.delta]
    for name in names:
        if names.count(name) > 1 or name == BASE:
            raise ValueError(f"two columns would be called {name!r}; rename a delta's file")
    check_folder(options.json)


def find_tasks(options: argparse.Namespace, work: Path) -> tuple[list[str], Any]:
    """Return the names of all tasks, and the harness's task manager.

    Raises:
        ValueError: a task does not exist, or it runs generated code and that is not allowed.
    """
    from lm_eval.tasks import TaskManager  # type: ignore[import-untyped]

    for name in options.tasks:
        if name.startswith(("humaneval", "mbpp")) and not options.run_generated_code:
            raise ValueError(
                f"{name} runs code that a model wrote; if this machine may, say --run-generated-code"
            )
    names = list(options.tasks)
    folders = [str(options.tasks_dir)] if options.tasks_dir else []
    if options.mmlu_csv is not None:
        names.append(write_tasks(options.mmlu_csv, work, n_shots=options.shots or 0))
        folders.append(str(work))
    manager: Any = TaskManager(include_path=folders, include_defaults=False)
    if not all(name in manager.all_tasks for name in names):
        manager = TaskManager(include_path=folders or None)  # reads thousands of files
    for name in names:
        if name not in manager.all_tasks:
            raise ValueError(
                f"the harness has no task {name!r}; `lm-eval ls tasks` lists its tasks, and "
                "--tasks-dir adds your own tasks"
            )
    return names, manager


def check_deltas(model: Any, folder: Path, deltas: Sequence[Path], *, base: str) -> list[Path]:
    """Return the deltas that change more than values; check that all are deltas of the base.

    Args:
        model: the base in memory; it is not changed.
        folder: folder of the base.
        deltas: the deltas to evaluate.
        base: name of the base for messages.

    Raises:
        ValueError: a delta is of another base, or damaged.
    """
    apart = []
    for path in deltas:
        with sparsedelta.load(path) as delta:
            try:
                try:
                    with delta.applied(model):
                        pass
                except StructureMismatch:
                    sparsedelta.verify(delta, base=folder)
                    apart.append(path)
            except MismatchError as error:
                raise ValueError(f"'{path}' was not made from '{base}': {error}") from error
            except FormatError as error:
                raise ValueError(f"'{path}' is damaged: {error}") from error
    return apart


def measure_all(
    folder: Path, deltas: Sequence[Path], measure: Callable[[Any], Scores], *, base: str
) -> Iterator[tuple[str, Scores]]:
    """Yield the name and the scores of the base and of each delta's target.

    All deltas are checked first. A delta that changes more than values, such as the size of the
    vocabulary, is measured last, as a separate model built from the base's files.

    Args:
        folder: folder of the base.
        deltas: deltas of the base.
        measure: a function that returns the scores of a model.
        base: name of the base.

    Raises:
        ValueError: a delta is of another base, or damaged.
    """
    model = load_causal(folder).eval()
    device, apart = model.device, check_deltas(model, folder, deltas, base=base)
    yield BASE, measure(model)
    for path in deltas:
        if path in apart:
            continue
        with sparsedelta.load(path) as delta, delta.applied(model):
            scores = measure(model)
        yield path.stem, scores
    del model  # free the model before another is loaded
    for path in apart:
        other = sparsedelta.load_model(path, base=folder)
        yield path.stem, measure(other.to(device).eval())


def measure(
    model: Any, folder: Path, names: list[str], manager: Any, options: argparse.Namespace
) -> Scores:
    """Return the harness's scores of a model by task."""
    from lm_eval import evaluator, simple_evaluate  # type: ignore[import-untyped]
    from lm_eval.models.huggingface import HFLM  # type: ignore[import-untyped]

    # The harness runs git in the current folder; outside a repository git prints an error.
    evaluator.get_git_commit_hash = lambda: None
    auto: Any = transformers.AutoTokenizer
    wrapped: Any = HFLM(
        pretrained=model,
        tokenizer=auto.from_pretrained(folder),
        batch_size=options.batch_size,
    )
    found: Any = simple_evaluate(
        wrapped,
        tasks=list(names),
        num_fewshot=options.shots,
        limit=options.limit,
        task_manager=manager,
        apply_chat_template=options.chat,
        confirm_run_unsafe_code=options.run_generated_code,
        log_samples=False,
    )
    counts = {task: n["effective"] for task, n in found["n-samples"].items()}
    for group, members in found.get("group_subtasks", {}).items():
        counts.setdefault(group, sum(counts.get(member, 0) for member in members))
    return {task: {**scores, "n": counts.get(task)} for task, scores in found["results"].items()}


def side_by_side(found: Mapping[str, Scores]) -> str:
    """Return a table of the scores of the base and of each delta, and the differences."""
    tuned = [name for name in found if name != BASE]
    columns = ["task", "n", "score", BASE]
    for name in tuned:
        columns += [name, "difference"]
    rows = []
    for task, scores in found[BASE].items():
        for metric, value in scores.items():
            if "," not in metric or "_stderr" in metric or not isinstance(value, int | float):
                continue
            row = [scores.get("alias", task).strip(" -"), scores["n"] or "", metric.split(",")[0]]
            row.append(_with_error(scores, metric))
            for name in tuned:
                other = found[name][task]
                row += [_with_error(other, metric), f"{other[metric] - value:+.4f}"]
            rows.append(row)
    return table(columns, rows)


def _with_error(scores: Scores, metric: str) -> str:
    name, _, kind = metric.partition(",")
    error = scores.get(f"{name}_stderr,{kind}")
    shown = f"{scores[metric]:.4f}"
    return f"{shown} ± {error:.4f}" if isinstance(error, int | float) else shown


if __name__ == "__main__":
    run(main)
