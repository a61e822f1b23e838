"""The scores of a model before and after, as a training recorded them in the info of a delta."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Scores:
    """The first and the last evaluation of a training.

    Attributes:
        before_step, after_step: number of the step after which each was made; step 0 is the base.
        values: name, value before, and value after, of each score that both have.
    """

    before_step: int
    after_step: int
    values: tuple[tuple[str, float, float], ...]


def recorded_scores(info: Mapping[str, Any]) -> Scores | None:
    """Return the first and the last evaluation in a delta's ``info``.

    None if there are not two evaluations that have a score in common. ``evaluations`` is a list of objects
    ``{"step": integer, "values": {name: number}}``, as ``sift_train.fit`` records it.
    """
    raw: Any = info.get("evaluations")
    if not isinstance(raw, Sequence) or isinstance(raw, str) or len(raw) < 2:
        return None
    (before_step, before), (after_step, after) = _evaluation(raw[0]), _evaluation(raw[-1])
    values = tuple((name, before[name], after[name]) for name in before if name in after)
    return Scores(before_step, after_step, values) if values and before_step < after_step else None


def _evaluation(entry: object) -> tuple[int, dict[str, float]]:
    step = entry.get("step") if isinstance(entry, Mapping) else None
    values = entry.get("values") if isinstance(entry, Mapping) else None
    if type(step) is not int or not isinstance(values, Mapping):
        return 0, {}
    return step, {
        name: float(value)
        for name, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e15
    }
