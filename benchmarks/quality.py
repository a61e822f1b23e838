"""Which way to train is best at which learning rate: SIFT by every rule, full fine-tuning, adapters.

    python benchmarks/quality.py --sets trec=trec.train.txt subj=subj.txt --minutes 60
    python benchmarks/quality.py --decoder build/pycode --parts small steps

A set is a file with one example per line: a label, a space, a text. With ``--decoder`` the model is a decoder that is first
pretrained on Python's code, and learns its docstrings; it needs no files. Every method's learning rate is
swept. Each run is appended to a file of JSON lines and is not repeated if it is already there, so an
interrupted study continues with the same command. ``--parts table`` only writes the tables.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from measuring import RESULTS, options_for, write_result
from quality_decoder import DATA as DOCSTRINGS
from quality_decoder import MODEL as DECODER
from quality_decoder import Docstrings, make_decoder
from quality_methods import Method, Task
from quality_plan import MINILM, PARTS, SEEDS, Row, Setting, cells_of, plan
from quality_run import HEAD_LR, MAX_NORM, WARMUP, Runner
from quality_tables import (
    by_method,
    curves_table,
    heading,
    means_table,
    quality_table,
    rule_table,
    settings_of,
)
from quality_tasks import BATCH, N_DEV, Sentences
from training import Record

HOW = f"""A linear head on the mean of the states is trained with each method, densely at {HEAD_LR:g}. AdamW without
weight decay, batches of {BATCH}, linear schedule with {WARMUP:.0%} warm-up, gradients clipped to {MAX_NORM:g}, fp32, one thread.
Full fine-tuning trains every parameter; the others train the linear layers of the blocks: adapters with the
rank that is shown, SIFT with as many components as an adapter of this rank (a rank below 1 is a rate).
Rates are from the series 1, 2, 5. The best is chosen on {N_DEV} held-out examples with the first seed, and is run
with the others. ``end``: the best rate is an end of the
sweep, which is then not finished. *CPU s*: a whole training without choosing. *Peak*: weights, and what the
process needs beside them."""

HOW_DECODER = """The decoder ``pycode`` is a Llama of 1.9 M parameters that reads bytes. It was pretrained on the code of Python's standard
library, and is trained on its docstrings, in windows of 96 bytes. It has no new head. Its accuracy is that of the next byte, its
loss in nats per byte."""

RULE = """## Does the learning rate transfer?

*Share*: what the chosen components hold of Σ|gradient| of all target components, on batches that did not choose. The
rule is: SIFT's rate = the best rate of full fine-tuning ÷ share. *Best × share ÷ full's* is 1 if it holds. First seed;
"by the rule": at the rate of the series nearest to the rule's."""

CURVES = """By the equivalent rate of full fine-tuning, rate × share, first seed: test accuracy, % · test loss ·
training loss:"""


class Study:
    """Runs what is missing.

    Args:
        model: name of the model.
        sets: names of the sets.
        make_task: a function of a set's name, the number of training examples, passes over them, and test examples.
        record: the measured runs.
    """

    def __init__(
        self,
        model: str,
        sets: Sequence[str],
        make_task: Callable[[str, int, int, int], Task],
        record: Record,
    ) -> None:
        self._model = model
        self._sets = sets
        self._make_task = make_task
        self._record = record
        self._runners: dict[Any, Runner] = {}

    def measure(self, spec: dict[str, Any]) -> None:
        """Do a run unless it was done."""
        method = Method(*(spec[key] for key in ("name", "rank", "rule", "n_batches")))
        setting = tuple(spec[key] for key in ("data", "n_train", "epochs", "n_test"))

        def run() -> dict[str, Any]:
            if setting not in self._runners:
                self._runners[setting] = Runner(self._make_task(*setting))
            return self._runners[setting].run(method, spec["lr"], spec["seed"])

        self._record.get(spec, run)

    def run(
        self,
        parts: Sequence[str],
        methods: Sequence[str],
        n_seeds: int,
        deadline: float,
        **size: int,
    ) -> None:
        """Do all missing runs in the order of the parts, until the deadline.

        Args:
            parts: their names.
            methods: labels of the methods; empty: all.
            n_seeds: seeds of each method's best learning rate.
            deadline: time on the monotonic clock after which no run starts.
            size: fields of ``Setting`` that differ from its defaults.
        """
        stages = [(part, n) for n in sorted({1, n_seeds}) for part in parts]
        for part, n in stages:
            cells = [
                cell
                for cell in cells_of(part, self._sets, self._model, **size)
                if not methods or cell.method.label in methods
            ]
            for spec in plan(cells, self._record.rows, n):
                if time.monotonic() > deadline:
                    return
                self.measure(spec)


def sections(rows: list[Row]) -> list[str]:
    """Return what was measured: means, the rule for the learning rate, and a part for each setting."""
    found = [HOW, "## Mean over the sets", means_table(rows), RULE, rule_table(rows)]
    if any(row["spec"]["model"] == DECODER for row in rows):
        found.insert(1, HOW_DECODER)
    found.append("## By setting")
    for setting in settings_of(rows):
        methods = by_method(rows, setting)
        found += [heading(setting), quality_table(methods), CURVES, curves_table(methods)]
    return found


def _study(options: Any, record: Record) -> Study:
    if options.decoder is not None:
        if set(options.parts) != {"table"}:
            make_decoder(options.decoder)
        return Study(
            DECODER,
            [DOCSTRINGS],
            lambda _, n_train, epochs, n_test: Docstrings(options.decoder, n_train, epochs, n_test),
            record,
        )
    paths = {name: Path(file) for name, _, file in (text.partition("=") for text in options.sets)}
    name, _, folder = (options.model or MINILM).partition("=")
    own = Path(folder) if folder else None
    return Study(
        name,
        list(paths),
        lambda data, n_train, epochs, n_test: Sentences(paths[data], n_train, epochs, n_test, own),
        record,
    )


def main() -> None:
    """Do the missing runs and write the tables."""
    parser = options_for(__doc__, "quality.md")
    parser.add_argument("--record", type=Path, default=RESULTS / "quality.jsonl")
    parser.add_argument("--sets", nargs="+", default=[], metavar="NAME=FILE")
    parser.add_argument(
        "--model", metavar="NAME=FOLDER", help="a pretrained encoder or decoder; by default MiniLM"
    )
    parser.add_argument(
        "--decoder",
        type=Path,
        metavar="FOLDER",
        help="train a decoder on docstrings; it is made in this folder if that does not exist",
    )
    for name in ("n_train", "epochs", "n_test"):
        default = getattr(Setting, name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--parts", nargs="+", choices=[*PARTS, "table"], default=[*PARTS])
    parser.add_argument(
        "--methods",
        nargs="+",
        default=[],
        help="names of methods, as in the tables; by default all",
    )
    parser.add_argument("--seeds", type=int, default=len(SEEDS), choices=range(1, len(SEEDS) + 1))
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no run later")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging: Any = transformers.utils.logging
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    parts = [part for part in options.parts if part != "table"]
    if parts and bool(options.sets) == bool(options.decoder):
        parser.error("give either --sets or --decoder, or --parts table")
    options.record.parent.mkdir(parents=True, exist_ok=True)
    record = Record(options.record)
    study = _study(options, record)
    size = {key: getattr(options, key) for key in ("n_train", "epochs", "n_test")}
    deadline = time.monotonic() + 60 * options.minutes
    study.run(parts, options.methods, options.seeds, deadline, **size)
    if record.rows:
        title = "Quality of training methods"
        write_result(options.result, title, sections(record.rows), where=options.record.parent)


if __name__ == "__main__":
    main()
