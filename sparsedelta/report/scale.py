"""How deep the colour of a value is, on the maps of a page and of a picture."""

from __future__ import annotations

import math
from collections.abc import Iterable

_EVEN = 1.5  # values within this factor of each other have one colour
_MIDDLE = 0.3


class Scale:
    """Depth of colour of positive values, 0 to 1, on a square-root scale, because values range over decades."""

    def __init__(self, values: Iterable[float]) -> None:
        known = [value for value in values if value > 0]
        self.low, self.high = min(known, default=0.0), max(known, default=0.0)

    @property
    def is_even(self) -> bool:
        """Whether the values are nearly equal, so that their colours would say nothing."""
        return self.high < _EVEN * self.low

    def strength(self, value: float) -> float:
        """Return the depth of colour of a value; a middle depth if all are nearly equal."""
        if self.is_even:
            return _MIDDLE
        return math.sqrt(value / self.high) if self.high else 0.0
