"""Which runs quality.py does, and in which order.

A sweep starts with five learning rates around an expected one, from the series 1, 2, 5, 10 … A method's sweep
is extended while its best rate is an end. The best rate of the first seed is then run with further seeds. So
the next run depends on the runs before it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from quality_methods import Method

STEPS = (1, 2, 5)
SWEEP = (0, -1, 1, -2, 2)
MAX_EXTENSIONS = 4
SEEDS = (0, 1, 2, 3, 4)

# Ranks of equal trained counts: 0.78 % and 5.1 % of MiniLM's targets, 1.6 % and 5.0 % (MIDDLE) of the decoder's. TINY is a share.
SMALL, MIDDLE, LARGE, TINY = 2, 6, 13, 0.001

MINILM = "minilm"

Row = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """What all methods of a comparison have in common.

    Attributes:
        model: name of the pretrained model.
        data: name of the set.
        n_train: training examples.
        epochs: passes over them.
        n_test: examples of the test set.
    """

    model: str
    data: str
    n_train: int = 640
    epochs: int = 2
    n_test: int = 1000


@dataclass(frozen=True)
class Cell:
    """A method in a setting, and where its sweep starts.

    Attributes:
        setting: what it is compared in.
        method: the method.
        centre: place of the expected learning rate in the series.
    """

    setting: Setting
    method: Method
    centre: int


def rate_at(place: int) -> float:
    """Return a learning rate of the series; 1 is at place 0, 2 at 1, 0.5 at -1."""
    return float(f"{STEPS[place % 3]}e{place // 3}")


def place_of(lr: float) -> int:
    """Return the place in the series that is nearest to a learning rate, on a log scale."""
    near = round(3 * math.log10(lr))
    return min(range(near - 2, near + 3), key=lambda at: abs(math.log(rate_at(at) / lr)))


def _sift(rule: str, n_batches: int, rank: float) -> Method:
    return Method("sift", rank, rule, n_batches)


PARTS: dict[str, list[tuple[Method, float]]] = {
    "small": [
        (Method("full"), 1e-4),
        (_sift("random", 0, SMALL), 1e-2),
        (_sift("gradient", 8, SMALL), 2e-3),
        (_sift("snip", 8, SMALL), 5e-3),
        (Method("lora", SMALL), 5e-3),
    ],
    "large": [
        (_sift("random", 0, LARGE), 2e-3),
        (_sift("gradient", 8, LARGE), 5e-4),
        (_sift("snip", 8, LARGE), 1e-3),
        (Method("lora", LARGE), 2e-3),
    ],
    "middle": [
        (_sift("random", 0, MIDDLE), 2e-2),
        (_sift("gradient", 8, MIDDLE), 5e-3),
        (_sift("snip", 8, MIDDLE), 5e-3),
        (Method("lora", MIDDLE), 5e-3),
    ],
    "adapters": [
        (Method("shira", SMALL), 1e-2),
        (Method("rslora", SMALL), 5e-3),
        (Method("shira", LARGE), 2e-3),
        (Method("rslora", LARGE), 1e-3),
    ],
    "rules": [
        (_sift("gradient", 1, SMALL), 2e-3),
        (_sift("proportional", 8, SMALL), 5e-3),
        (_sift("magnitude", 0, SMALL), 5e-3),
        (_sift("principal", 0, SMALL), 5e-3),
    ],
    "tiny": [
        (_sift("random", 0, TINY), 5e-2),
        (_sift("gradient", 8, TINY), 1e-2),
        (_sift("snip", 8, TINY), 2e-2),
    ],
}
PARTS["steps"] = PARTS["small"][:4]
SIZES: dict[str, list[dict[str, int]]] = {
    "steps": [{"n_train": 160, "epochs": 2}, {"n_train": 640, "epochs": 8}]
}


def cells_of(part: str, sets: Sequence[str], model: str = MINILM, **size: int) -> list[Cell]:
    """Return the cells of a part; those of one method in all sets follow each other.

    Args:
        part: its name.
        sets: names of the sets.
        model: name of the model.
        size: fields of ``Setting`` that differ from its defaults.
    """
    settings = [Setting(model, name, **each) for name in sets for each in SIZES.get(part, [size])]
    return [
        Cell(each, method, place_of(centre)) for method, centre in PARTS[part] for each in settings
    ]


def spec_of(cell: Cell, place: int, seed: int) -> dict[str, Any]:
    """Return the settings of a run, as they are stored with its result."""
    return {**vars(cell.setting), **vars(cell.method), "lr": rate_at(place), "seed": seed}


def runs_of(cell: Cell, rows: Iterable[Row]) -> list[Row]:
    """Return the measured runs of a cell."""
    wanted = {**vars(cell.setting), **vars(cell.method)}
    return [row for row in rows if wanted.items() <= row["spec"].items()]


def best_rate(runs: Sequence[Row]) -> float:
    """Return the learning rate of the highest held-out accuracy, then of the lowest held-out loss.

    Rates that were run with fewer seeds than others do not count. A diverged run has a loss of NaN
    and counts as accuracy 0.
    """
    by_rate: dict[float, list[Row]] = {}
    for run in runs:
        by_rate.setdefault(run["spec"]["lr"], []).append(run)
    most = max(len(each) for each in by_rate.values())
    full = {lr: each for lr, each in by_rate.items() if len(each) == most}
    return max(full, key=lambda lr: (_mean(full[lr], "accuracy"), -_mean(full[lr], "loss")))


def _mean(runs: Sequence[Row], score: str) -> float:
    values = [run["result"]["dev"].get(score, 0.0) for run in runs]
    return statistics.mean(value if math.isfinite(value) else math.inf for value in values)


def plan(cells: Sequence[Cell], rows: list[Row], n_seeds: int) -> Iterator[dict[str, Any]]:
    """Yield the settings of all runs in their order, those already in ``rows`` included.

    Args:
        cells: what to compare.
        rows: the measured runs; the caller adds the result of each run before it takes the next.
        n_seeds: 1 sweeps with the first seed only; more adds the best rate with further seeds.
    """
    for offset in SWEEP:
        for cell in cells:
            yield spec_of(cell, cell.centre + offset, SEEDS[0])
    for cell in cells:
        yield from _extensions(cell, rows)
    for seed in SEEDS[1:n_seeds]:
        for cell in cells:
            yield spec_of(cell, place_of(best_rate(_first(cell, rows))), seed)


def _first(cell: Cell, rows: list[Row]) -> list[Row]:
    return [run for run in runs_of(cell, rows) if run["spec"]["seed"] == SEEDS[0]]


def _extensions(cell: Cell, rows: list[Row]) -> Iterator[dict[str, Any]]:
    for _ in range(MAX_EXTENSIONS):
        first = _first(cell, rows)
        places = [place_of(run["spec"]["lr"]) for run in first]
        best = place_of(best_rate(first))
        if best not in (min(places), max(places)):
            return
        yield spec_of(cell, best + (1 if best == max(places) else -1), SEEDS[0])
