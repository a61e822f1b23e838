"""Which components of a tensor are trained: a rule scores all of them, the k best are chosen.

Chosen indices are flat, row-major and strictly increasing; non-finite scores rank below all others,
and equal scores are told apart by a seeded draw, so a choice depends on nothing but its inputs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rule:
    """How the components of one tensor are scored; exactly one of the two functions is given.

    Attributes:
        from_gradient: maps weight and the gradient of one micro-batch, both of the tensor's shape,
            to what that micro-batch adds to the scores. The sum ranks as the mean does.
        from_weight: maps the weight and a generator to the scores; needs no gradient.
    """

    from_gradient: Callable[[Tensor, Tensor], Tensor] | None = None
    from_weight: Callable[[Tensor, torch.Generator], Tensor] | None = None

    def __post_init__(self) -> None:
        if (self.from_gradient is None) == (self.from_weight is None):
            raise ValueError(
                "a selection rule needs one of from_gradient and from_weight, not both"
            )


def _gradient(weight: Tensor, gradient: Tensor) -> Tensor:
    return gradient.abs()


def _magnitude(weight: Tensor, generator: torch.Generator) -> Tensor:
    return weight.detach().abs()


def _random(weight: Tensor, generator: torch.Generator) -> Tensor:
    return torch.rand(weight.shape, generator=generator)


RULES: Mapping[str, Rule] = MappingProxyType(
    {
        "gradient": Rule(from_gradient=_gradient),
        "magnitude": Rule(from_weight=_magnitude),
        "random": Rule(from_weight=_random),
    }
)


def find_rule(selection: str | Rule) -> Rule:
    """Return the rule of a name, or the rule itself.

    Raises:
        ValueError: there is no rule of that name.
    """
    if isinstance(selection, Rule):
        return selection
    if selection not in RULES:
        raise ValueError(
            f"selection {selection!r} is not known; choose one of {', '.join(sorted(RULES))}"
        )
    return RULES[selection]


def n_selected(numel: int, rate: float) -> int:
    """Return how many of ``numel`` components a rate selects: min(int(rate * numel) + 1, numel).

    Raises:
        ValueError: the rate is not between 0 and 1.
    """
    if not 0.0 <= rate <= 1.0:
        raise ValueError(f"sparse rate is {rate}; it is a share and must lie between 0 and 1")
    return min(int(rate * numel) + 1, numel)


def index_dtype(numel: int) -> torch.dtype:
    """Return the smallest dtype that holds every flat index of a tensor: int32 or int64."""
    return torch.int32 if numel < 2**31 else torch.int64


def seeded_generator(seed: int, name: str) -> torch.Generator:
    """Return a generator that depends on the seed and a tensor's name alone, not on any order."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def finite_or_zero(scores: Tensor) -> Tensor:
    """Return the scores in at least fp32 with 0 in place of infinities and NaNs."""
    wide = scores if scores.dtype == torch.float64 else scores.float()
    return torch.where(wide.isfinite(), wide, torch.zeros_like(wide))


def top_k(scores: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """Return the flat indices of the k largest scores, strictly increasing.

    The k-th largest value is found by selection rather than by sorting: linear in the size.

    Args:
        scores: any shape, floating; non-finite ones rank below all others.
        k: between 0 and the number of scores.
        generator: of the CPU; draws which of the scores equal to the k-th largest are taken.

    Raises:
        ValueError: k is out of range.
    """
    numel = scores.numel()
    if not 0 <= k <= numel:
        raise ValueError(f"cannot select {k} of {numel} components; ask for 0 to {numel}")
    if k in (0, numel):
        return torch.arange(k, device=scores.device, dtype=index_dtype(numel))
    flat = scores.detach().reshape(-1)
    flat = flat if flat.dtype == torch.float64 else flat.float()
    flat = torch.where(flat.isfinite(), flat, torch.full_like(flat, -torch.inf))
    least = _kth_largest(flat, k)
    chosen = flat > least
    ties = torch.nonzero(flat == least).flatten()
    n_missing = k - int(torch.count_nonzero(chosen))
    drawn = torch.randperm(ties.numel(), generator=generator)[:n_missing]
    chosen[ties[drawn.to(ties.device)]] = True
    return torch.nonzero(chosen).flatten().to(index_dtype(numel))


def _kth_largest(flat: Tensor, k: int) -> Tensor:
    if flat.device.type == "cpu":
        return torch.kthvalue(flat, flat.numel() - k + 1).values
    return torch.topk(flat, k, sorted=False).values.min()
