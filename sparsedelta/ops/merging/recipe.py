"""The methods of merging as formulas on the touched elements of a tensor.

The difference of an element that no delta touches is 0 in every delta, and so is its merged difference.
The formulas for whole tensors therefore need only the touched elements.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from sparsedelta.ops.merging.floats import Numbers

Method: TypeAlias = Literal["linear", "task-arithmetic", "ties", "dare", "dare-ties"]

# Of the largest weight; a sum of weights below this is rounding, and no divisor.
_SMALLEST_SUM = 1e-6


@dataclass(frozen=True, slots=True)
class Recipe:
    """A method of merging with its settings.

    Attributes:
        method: the name of the method.
        weights: the weight of each delta.
        densities: for each delta, the share of a tensor's elements that it keeps.
        normalize: whether the weighted sum is divided by the sum of its weights.
        scale: factor for the merged difference.
        seed: seed of the random choice of elements.
    """

    method: Method
    weights: tuple[float, ...]
    densities: tuple[float, ...]
    normalize: bool
    scale: float
    seed: int

    @property
    def elects_signs(self) -> bool:
        """Whether only differences of the sign with the larger sum are kept (TIES)."""
        return self.method in ("ties", "dare-ties")

    @property
    def drops_at_random(self) -> bool:
        """Whether elements are dropped at random and the kept ones scaled up (DARE)."""
        return self.method in ("dare", "dare-ties")

    def n_kept(self, number: int, n_elements: int) -> int:
        """Return how many elements of a tensor TIES keeps of delta ``number``, at most."""
        return max(1, int(self.densities[number] * n_elements))

    def merge(self, differences: Numbers) -> Numbers:
        """Return the merged difference of every element, (n_elements,).

        Args:
            differences: (n_deltas, n_elements), 0 where an element was dropped; changed in place.
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
    """Return the recipe for the settings of ``merge``; None selects the default of the method.

    Raises:
        ValueError: a setting is wrong, or the method does not use it.
    """
    known = get_args(Method)
    if method not in known:
        raise ValueError(f"method is {method!r}, expected one of {', '.join(known)}")
    chosen: Method = known[known.index(method)]
    weights = [1.0] * n_deltas if weights is None else [float(weight) for weight in weights]
    if density is not None and chosen in ("linear", "task-arithmetic"):
        raise ValueError(f"density is given, but method {method!r} keeps all changes; leave it out")
    densities = [density] if isinstance(density, float | int) else [*(density or [1.0])]
    densities = densities * n_deltas if len(densities) == 1 else densities
    for one, more, values in (("weight", "weights", weights), ("density", "densities", densities)):
        if len(values) != n_deltas:
            given = f"1 {one} is" if len(values) == 1 else f"{len(values)} {more} are"
            raise ValueError(
                f"{given} given for {n_deltas} delta{'s' * (n_deltas != 1)}; give one for each delta"
            )
    if not all(np.isfinite([*weights, scale])):
        raise ValueError(f"weights are {weights} and scale is {scale}; give finite numbers")
    wrong = next((value for value in densities if not 0 < value <= 1), None)
    if wrong is not None:
        raise ValueError(
            f"density is {wrong:g}, but it is the share that is kept: give a number above 0 and at most 1"
        )
    if normalize is None:
        normalize = chosen in ("linear", "ties")
    recipe = Recipe(
        chosen, tuple(weights), tuple(map(float, densities)), normalize, float(scale), seed
    )
    _check_weights(recipe)
    return recipe


def _check_weights(recipe: Recipe) -> None:
    """Raise ValueError if the weights leave nothing to merge, or their sum is a divisor and is 0."""
    weights = ",".join(f"{weight:g}" for weight in recipe.weights)
    if recipe.weights and not any(recipe.weights):
        raise ValueError(
            f"weights are {weights}, so the merged model would be the base; give one that is not 0"
        )
    smallest = _SMALLEST_SUM * max(map(abs, recipe.weights), default=0.0)
    if recipe.normalize and not recipe.elects_signs and abs(sum(recipe.weights)) < smallest:
        raise ValueError(
            f"weights are {weights} and sum to 0, so the sum of the changes cannot be divided by it; give other weights,"
            " or do not divide (normalize=False, --no-normalize)"
        )


def kept_largest(magnitudes: Numbers, n_kept: int) -> tuple[np.floating[Any], int]:
    """Return which magnitudes are the ``n_kept`` largest.

    Args:
        magnitudes: the magnitudes of all touched elements of a tensor.
        n_kept: how many to keep; less than the number of magnitudes.

    Returns:
        The smallest magnitude that is kept, and how many elements of exactly this magnitude are kept.
    """
    least = np.partition(magnitudes, len(magnitudes) - n_kept)[len(magnitudes) - n_kept]
    return least, n_kept - int(np.count_nonzero(magnitudes > least))


def dropped_at_random(key: bytes, density: float, n_elements: int) -> npt.NDArray[np.bool_]:
    """Return which elements are dropped, each with probability 1 − density.

    Args:
        key: 16 bytes; the same key gives the same choice on every machine.
        density: probability that an element is kept.
        n_elements: number of elements.
    """
    raw = np.random.Philox(key=int.from_bytes(key, "little")).random_raw(n_elements)
    dropped: npt.NDArray[np.bool_] = raw.astype(np.float64) >= density * 2.0**64
    return dropped
