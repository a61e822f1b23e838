"""The tables of quality.py, from its measured runs.

Intervals are of 95 %, by Student's t over the seeds. A difference from full fine-tuning is taken seed by
seed: both runs then have the same examples, in the same order, and the same head at the start.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from measuring import table
from quality_methods import Method
from quality_plan import SEEDS, Row, best_rate, place_of, rate_at

# Student's t for 95 %, two-sided, by degrees of freedom from 1 on; scipy is not needed for this.
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179)
T_95_LIMIT = 1.96
FIELDS = ("model", "data", "n_train", "epochs", "n_test")
Key = tuple[Any, ...]


def half_width(values: Sequence[float]) -> float | None:
    """Return half the width of the mean's interval; None for fewer than two values."""
    if len(values) < 2:
        return None
    return t_95(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))


def t_95(df: int) -> float:
    """Return Student's t for 95 %; above the table's end its last value, which is a little too large."""
    return T_95[min(df, len(T_95)) - 1]


def mean_over_sets(groups: Sequence[Sequence[float]]) -> tuple[float, float | None]:
    """Return the mean of the groups' means and half the width of its interval.

    The sets are fixed, so only the spread over the seeds within each set counts.

    Args:
        groups: the values of each set, one per seed.
    """
    mean = statistics.mean(statistics.mean(values) for values in groups)
    df = sum(len(values) - 1 for values in groups)
    if any(len(values) < 2 for values in groups):
        return mean, None
    pooled = sum(statistics.variance(values) / len(values) for values in groups)
    return mean, t_95(df) * math.sqrt(pooled) / len(groups)


def shown(mean: float, half: float | None, digits: int = 1, *, sign: bool = False) -> str:
    """Return a mean with its interval."""
    text = f"{mean:{'+' if sign else ''}.{digits}f}"
    return text if half is None else f"{text} ± {half:.{digits}f}"


def settings_of(rows: Iterable[Row]) -> list[Key]:
    """Return the settings in the order in which they were first measured."""
    return list(dict.fromkeys(tuple(row["spec"][key] for key in FIELDS) for row in rows))


def by_method(rows: Iterable[Row], setting: Key) -> dict[Method, list[Row]]:
    """Return the runs of each method in a setting; full fine-tuning first, then by trained number."""
    found: dict[Method, list[Row]] = {}
    for row in rows:
        if tuple(row["spec"][key] for key in FIELDS) == setting:
            method = Method(*(row["spec"][key] for key in ("name", "rank", "rule", "n_batches")))
            found.setdefault(method, []).append(row)
    return dict(sorted(found.items(), key=lambda each: -float(each[1][0]["result"]["n_trained"])))


def heading(setting: Key) -> str:
    """Return the heading of a setting."""
    model, data, n_train, epochs, n_test = setting
    return f"### {model}, {data}: {n_train} examples, {epochs} passes; {n_test} to test on"


def at_rate(runs: Iterable[Row], lr: float) -> list[Row]:
    """Return the runs with a learning rate."""
    return [run for run in runs if run["spec"]["lr"] == lr]


def by_seed(runs: Iterable[Row], score: str = "accuracy") -> dict[int, float]:
    """Return a test score by seed; accuracy in per cent."""
    factor = 100 if score == "accuracy" else 1
    return {run["spec"]["seed"]: factor * run["result"]["test"][score] for run in runs}


def differences(runs: Iterable[Row], reference: Iterable[Row]) -> list[float]:
    """Return the differences of the test accuracy, for the seeds that both have."""
    own, other = by_seed(runs), by_seed(reference)
    return [own[seed] - other[seed] for seed in sorted(own.keys() & other.keys())]


def is_end_best(runs: Sequence[Row]) -> bool:
    """Return whether the best rate is an end of the sweep, which is then not finished."""
    rates = {run["spec"]["lr"] for run in runs}
    return best_rate(runs) in (min(rates), max(rates))


def swept(runs: Sequence[Row]) -> str:
    """Return the range of the sweep, and whether the best rate is an end of it."""
    rates = {run["spec"]["lr"] for run in runs}
    return f"{min(rates):g}–{max(rates):g}" + (", end" if is_end_best(runs) else "")


def quality_table(methods: dict[Method, list[Row]]) -> str:
    """Return the scores of each method at its best learning rate, and what it cost."""
    full = methods.get(Method("full"))
    at_full = at_rate(full, best_rate(full)) if full else []
    lines = []
    for method, runs in methods.items():
        best = best_rate(runs)
        own = at_rate(runs, best)
        accuracy = list(by_seed(own).values())
        loss = statistics.mean(by_seed(own, "loss").values())
        training = statistics.mean(run["result"]["train_loss"] for run in own)
        change = differences(own, at_full)
        is_compared = change and method.name != "full"
        share = mean_share(own)
        results = [run["result"] for run in runs]
        cells = (
            method.label,
            f"{own[0]['result']['n_trained']:,}",
            swept(runs),
            f"{best:g}",
            "" if share is None else f"{best * share:.1e}",
            shown(statistics.mean(accuracy), half_width(accuracy)),
            shown(statistics.mean(change), half_width(change), sign=True) if is_compared else "",
            str(len(own)),
            f"{loss:.3f}",
            f"{training:.3f}",
            f"{statistics.median(result['train_seconds'] for result in results):.0f}",
            f"{max(result['choose_seconds'] for result in results):.1f}",
            f"{statistics.median(result['peak_bytes'] for result in results) / 2**20:.0f}",
        )
        lines.append(cells)
    columns = (
        "method", "trained", "rates swept", "best rate", "× share", "test accuracy, %", "− full",
        "seeds", "test loss", "training loss", "CPU s", "choosing, CPU s", "peak, MiB",
    )  # fmt: skip
    return table(columns, lines)


def mean_share(runs: Iterable[Row], key: str = "share") -> float | None:
    """Return the mean share of Σ|gradient| that SIFT holds; None for other methods."""
    shares = [run["result"][key] for run in runs if key in run["result"]]
    return statistics.mean(shares) if shares else None


def means_table(rows: Sequence[Row]) -> str:
    """Return each method's mean difference from full fine-tuning over the sets, per size of a run."""
    groups: dict[tuple[Key, Method], dict[str, list[float]]] = {}
    unfinished: dict[tuple[Key, Method], list[str]] = {}
    for setting in settings_of(rows):
        methods = by_method(rows, setting)
        full = methods.get(Method("full"))
        if full is None:
            continue
        reference = at_rate(full, best_rate(full))
        model, data, *size = setting
        for method, runs in methods.items():
            change = differences(at_rate(runs, best_rate(runs)), reference)
            if method.name != "full" and change:
                group = (model, *size), method
                groups.setdefault(group, {})[data] = change
                ends = [name for name, each in (("full", full), (data, runs)) if is_end_best(each)]
                unfinished.setdefault(group, []).extend(ends)
    lines = []
    for group, sets in groups.items():
        (model, n_train, epochs, _), method = group
        mean, half = mean_over_sets(list(sets.values()))
        size_text = f"{model}, {n_train} × {epochs}"
        seeds = " + ".join(str(len(values)) for values in sets.values())
        rank = f"{method.rank:g}"
        change_text = shown(mean, half, sign=True)
        still_open = ", ".join(dict.fromkeys(unfinished[group]))
        lines.append(
            (size_text, method.label, rank, ", ".join(sets), seeds, change_text, still_open)
        )
    columns = (
        "model, examples × passes", "method", "rank or rate", "sets", "seeds", "− full, points",
        "unfinished sweeps",
    )  # fmt: skip
    return table(columns, lines)


def rule_table(rows: Sequence[Row]) -> str:
    """Return how well "the rate of full fine-tuning ÷ the share held" predicts SIFT's best rate, first seed."""
    lines = []
    for setting in settings_of(rows):
        methods = by_method(rows, setting)
        full = methods.pop(Method("full"), None)
        if full is None:
            continue
        known = best_rate([run for run in full if run["spec"]["seed"] == SEEDS[0]])
        for method, runs in methods.items():
            share, own_share = mean_share(runs), mean_share(runs, "own_share")
            if share is None:
                continue
            runs = [run for run in runs if run["spec"]["seed"] == SEEDS[0]]  # both rates have it
            predicted = rate_at(place_of(known / share))
            best = best_rate(runs)
            there = at_rate(runs, predicted)
            loss = statistics.mean(by_seed(there, "loss").values()) if there else None
            cells = (
                f"{setting[0]}, {setting[1]}, {setting[2]} × {setting[3]}",
                f"{method.label}, {method.rank:g}",
                f"{100 * share:.2f}",
                "" if own_share is None else f"{100 * own_share:.2f}",
                f"{known:g}",
                f"{known / share:.1e}",
                f"{best:g}",
                f"{best * share / known:.2f}",
                shown(statistics.mean(by_seed(at_rate(runs, best)).values()), None),
                shown(statistics.mean(by_seed(there).values()), None) if there else "not run",
                f"{statistics.mean(by_seed(at_rate(runs, best), 'loss').values()):.3f}",
                "not run" if loss is None else f"{loss:.3f}",
            )
            lines.append(cells)
    columns = (
        "setting", "SIFT", "share, %", "on choosing batches, %", "full's best rate", "÷ share",
        "best rate", "best × share ÷ full's", "accuracy at best", "by the rule", "test loss at best",
        "by the rule",
    )  # fmt: skip
    return table(columns, lines)


def curves_table(methods: dict[Method, list[Row]]) -> str:
    """Return test accuracy, test loss and training loss by the equivalent rate of full fine-tuning.

    Only the first seed's runs of full fine-tuning and SIFT are shown. A column is the nearest place in
    the series to rate × share.
    """
    cells: dict[Method, dict[int, str]] = {}
    for method, runs in methods.items():
        for run in runs:
            share = 1.0 if method.name == "full" else run["result"].get("share")
            if share is None or run["spec"]["seed"] != SEEDS[0]:
                continue
            test, training = run["result"]["test"], run["result"]["train_loss"]
            text = f"{100 * test['accuracy']:.1f} · {test['loss']:.3f} · {training:.3f}"
            cells.setdefault(method, {})[place_of(run["spec"]["lr"] * share)] = text
    places = sorted({place for own in cells.values() for place in own})
    lines = [
        (f"{method.label}, {method.rank:g}", *(own.get(place, "") for place in places))
        for method, own in cells.items()
    ]
    return table(("method, rank", *(f"{rate_at(place):g}" for place in places)), lines)
