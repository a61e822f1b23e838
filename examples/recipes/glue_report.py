"""Summarizes the runs of ``glue.py``: means and deviations over seeds, one row per method."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from recipe_common import table

Run = dict[str, Any]
SHARED = ("n_trained", "n_dense", "lr", "rate", "rank")


def summary(runs: Sequence[Run], deltas: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return mean and sample deviation over the seeds, and the delta, by method."""
    found = []
    for method in dict.fromkeys(one["method"] for one in runs):
        own = [one for one in runs if one["method"] == method]
        values = {
            f"{split} {name}": [float(one["scores"][split][name]) for one in own]
            for split, scores in own[0]["scores"].items()
            for name in scores
            if name != "score" or len(scores) > 2  # with one score, "score" is the same
        }
        found.append(
            {
                "method": method,
                **{key: own[0][key] for key in SHARED},
                "seeds": [one["seed"] for one in own],
                "mean": {name: statistics.mean(of) for name, of in values.items()},
                "deviation": {
                    name: statistics.stdev(of) if len(of) > 1 else None
                    for name, of in values.items()
                },
                "seconds": round(sum(one["seconds"] for one in own), 1),
                "delta": deltas.get(method),
            }
        )
    return found


def comparison(found: Sequence[Mapping[str, Any]]) -> str:
    """Return a table of the methods; scores in percent."""
    names = list(found[0]["mean"])
    rows = []
    for row in found:
        scores = [_percent(row["mean"][name], row["deviation"][name]) for name in names]
        size = "" if row["delta"] is None else f"{row['delta']['bytes'] / 1e6:.3f}"
        rows.append(
            (
                row["method"],
                f"{row['n_trained']:,}",
                f"{row['n_dense']:,}",
                f"{row['lr']:g}",
                *scores,
                f"{row['seconds']:.0f}",
                size,
            )
        )
    return table(["method", "trained", "dense", "lr", *names, "s", "delta, MB"], rows)


def _percent(mean: float, deviation: float | None) -> str:
    spread = "" if deviation is None else f" ± {100 * deviation:.1f}"
    return f"{100 * mean:.1f}{spread}"
