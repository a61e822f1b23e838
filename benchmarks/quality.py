"""Which way to train is best at which learning rate: SIFT by every rule, full fine-tuning, adapters.

    python benchmarks/quality.py --sets trec=trec.train.txt subj=subj.txt --minutes 60

A set is a file with one example per line: a label, a space, a text. Every method's learning rate is
swept. Each run is appended to a file of JSON lines and is not repeated if it is already there, so an
interrupted study continues with the same command. ``--parts table`` only writes the tables.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from measuring import RESULTS, options_for, write_result
from quality_methods import Method
from quality_plan import PARTS, SEEDS, cells_of, plan
from quality_run import Runner
from quality_tasks import Sentences
from training import Record


class Study:
    """Runs what is missing.

    Args:
        paths: files by the name of the set.
        record: the measured runs.
    """

    def __init__(self, paths: dict[str, Path], record: Record) -> None:
        self._paths = paths
        self._record = record
        self._runners: dict[Any, Runner] = {}

    def measure(self, spec: dict[str, Any]) -> None:
        """Do a run unless it was done."""
        method = Method(*(spec[key] for key in ("name", "rank", "rule", "n_batches")))
        setting = spec["data"], spec["n_train"], spec["epochs"]

        def run() -> dict[str, Any]:
            if setting not in self._runners:
                name, n_train, epochs = setting
                task = Sentences(self._paths[name], n_train, epochs)
                self._runners[setting] = Runner(task)
            return self._runners[setting].run(method, spec["lr"], spec["seed"])

        self._record.get(spec, run)

    def run(self, parts: Sequence[str], n_seeds: int, deadline: float) -> None:
        """Do all missing runs in the order of the parts, until the deadline."""
        stages = [(part, n) for n in sorted({1, 2, n_seeds}) if n <= n_seeds for part in parts]
        for part, n in sorted(stages, key=lambda stage: (stage[1] > 2, parts.index(stage[0]))):
            for spec in plan(cells_of(part, list(self._paths)), self._record.rows, n):
                if time.monotonic() > deadline:
                    return
                self.measure(spec)


def main() -> None:
    """Do the missing runs and write the tables."""
    parser = options_for(__doc__, "quality.md")
    parser.add_argument("--record", type=Path, default=RESULTS / "quality.jsonl")
    parser.add_argument("--sets", nargs="+", default=[], metavar="NAME=FILE")
    parser.add_argument("--parts", nargs="+", choices=[*PARTS, "table"], default=[*PARTS])
    parser.add_argument("--seeds", type=int, default=len(SEEDS), choices=range(1, len(SEEDS) + 1))
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no run later")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging: Any = transformers.utils.logging
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    parts = [part for part in options.parts if part != "table"]
    if parts and not options.sets:
        parser.error("give --sets, or --parts table")
    options.record.parent.mkdir(parents=True, exist_ok=True)
    paths = {name: Path(file) for name, _, file in (text.partition("=") for text in options.sets)}
    study = Study(paths, Record(options.record))
    study.run(parts, options.seeds, time.monotonic() + 60 * options.minutes)


if __name__ == "__main__":
    main()
