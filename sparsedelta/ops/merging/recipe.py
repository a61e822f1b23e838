"""How changes are weighed against each other: the methods of merging, as formulas on touched elements.

An element that a delta does not touch has difference 0 there, which no method tells from one that was
never looked at: so the formulas for whole tensors need only the touched ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from sparsedelta.ops.merging.floats import Numbers

Method: TypeAlias = Literal["linear", "task-arithmetic", "ties", "dare", "dare-ties"]

_SMALLEST_SUM = 1e-8  # of weights; below it they are not divided by


@dataclass(frozen=True, slots=True)
class Recipe:
    """A method of merging with its settings.

    Attributes:
        method: the name of the method.
        weights: one of each delta.
        densities: which share of the elements of a tensor each delta keeps.
        normalize: whether the sum is divided by the sum of the weights that went into it.
        scale: what the merged difference is multiplied by at the end.
        seed: of the random choice of elements.
    """

    method: Method
    weights: tuple[float, ...]
    densities: tuple[float, ...]
    normalize: bool
    scale: float
    seed: int

    @property
    def elects_signs(self) -> bool:
        """Whether differences of the minority's sign are left out (TIES)."""
        return self.method in ("ties", "dare-ties")

    @property
    def drops_at_random(self) -> bool:
        """Whether elements are dropped at random and the others scaled up (DARE)."""
        return self.method in ("dare", "dare-ties")

    def merge(self, differences: Numbers) -> Numbers:
        """Return the merged difference of every element.

        Args:
            differences: (n_deltas, n_elements), those dropped being 0; changed in place.
        """
        work = differences.dtype
        merged: Numbers
        weights = np.array(self.weights, work)[:, None]
        differences *= weights
        if self.elects_signs:
            positive = differences.sum(axis=0) >= 0
            agrees = np.sign(differences) == np.where(positive, 1, -1)
            merged = np.where(agrees, differences, 0).sum(axis=0, dtype=work)
            divisor = np.where(agrees, weights, 0).sum(axis=0, dtype=work)
            divisor[divisor == 0] = 1
        else:
            merged = differences.sum(axis=0, dtype=work)
            divisor = weights.sum(axis=0)
            divisor[np.abs(divisor) < _SMALLEST_SUM] = 1
        if self.normalize:
            merged /= divisor
        if self.scale != 1:
            merged *= work.type(self.scale)
        return merged


def make_recipe(
    n_deltas: int,
    method: str,
    weights: Sequence[float] | None,
    density: float | Sequence[float] | None,
    *,
    normalize: bool | None,
    scale: float,
    seed: int,
) -> Recipe:
    """Return a recipe from settings, each checked; None stands for the method's default.

    Raises:
        ValueError: a setting is wrong, or of no use to the method.
    """
    known = get_args(Method)
    if method not in known:
        raise ValueError(f"method is {method!r}, expected one of {', '.join(known)}")
    chosen: Method = known[known.index(method)]
    weights = [1.0] * n_deltas if weights is None else [float(weight) for weight in weights]
    if density is not None and chosen in ("linear", "task-arithmetic"):
        raise ValueError(f"method {method!r} keeps all changes, so a density means nothing to it")
    densities = [density] if isinstance(density, float | int) else [*(density or [1.0])]
    densities = densities * n_deltas if len(densities) == 1 else densities
    for what, values in (("weights", weights), ("densities", densities)):
        if len(values) != n_deltas:
            raise ValueError(f"{len(values)} {what} are given for {n_deltas} deltas")
    if not all(np.isfinite([*weights, scale])):
        raise ValueError(f"weights are {weights} and scale is {scale}; give finite numbers")
    if not all(0 < value <= 1 for value in densities):
        raise ValueError(f"density is {densities}, expected above 0 and at most 1")
    if normalize is None:
        normalize = chosen in ("linear", "ties")
    return Recipe(
        chosen, tuple(weights), tuple(map(float, densities)), normalize, float(scale), seed
    )


def kept_largest(magnitudes: Numbers, n_kept: int) -> tuple[np.floating[Any], int]:
    """Return the smallest magnitude that is kept of the largest, and how many of just that size.

    Args:
        magnitudes: of all touched elements of a tensor.
        n_kept: how many are kept; fewer than there are.
    """
    least = np.partition(magnitudes, len(magnitudes) - n_kept)[len(magnitudes) - n_kept]
    return least, n_kept - int(np.count_nonzero(magnitudes > least))


def dropped_at_random(key: bytes, density: float, n_elements: int) -> npt.NDArray[np.bool_]:
    """Return which elements are dropped, each with probability 1 − density.

    Args:
        key: 16 bytes; the same key gives the same choice everywhere.
        density: the share that is kept.
        n_elements: how many there are.
    """
    raw = np.random.Philox(key=int.from_bytes(key, "little")).random_raw(n_elements)
    dropped: npt.NDArray[np.bool_] = raw.astype(np.float64) >= density * 2.0**64
    return dropped
