"""Rules that score the components of a tensor, by its gradients or by its weights alone.

A rule depends on nothing but one tensor, so every rule works for every model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from os import PathLike
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from sift_train.masks import is_mask
from sparsedelta import Delta

MAX_RANK = 128
_SMALL = 1e-8  # added to |weight| before a division


@dataclass(frozen=True)
class Rule:
    """A rule that scores the components of one tensor; give exactly one of the two functions.

    Attributes:
        from_gradient: a function of the weight and the gradient of one micro-batch, both of the
            tensor's shape. It returns the scores for this micro-batch; those of several are summed.
        from_weight: a function of the weight and a random generator that returns the scores.
        is_drawn: components are drawn at random, with a probability proportional to their scores, which must be
            0 or more; otherwise the largest scores are chosen.
        is_uniform: every component is chosen with the same probability, so the share of the gradient
            that the choice holds is the rate; ``lr_transfer`` does not measure it then.
        is_signed: the scores of a micro-batch have signs, and the absolute value of their sum ranks.
    """

    from_gradient: Callable[[Tensor, Tensor], Tensor] | None = None
    from_weight: Callable[[Tensor, torch.Generator], Tensor] | None = None
    is_drawn: bool = False
    is_uniform: bool = False
    is_signed: bool = False

    def __post_init__(self) -> None:
        if (self.from_gradient is None) == (self.from_weight is None):
            raise ValueError("a selection rule needs from_gradient or from_weight, and not both")


Score = Callable[[Tensor, Tensor], Tensor]
Selection = str | Rule | Score | Mapping[str, Any] | PathLike[str] | Delta


def principal(rank: int | None = None) -> Rule:
    """Return the rule of LIFT (arXiv 2506.00772): |entries| of the weight's low-rank approximation.

    Args:
        rank: rank of the approximation; by default an eighth of the matrix's smaller side, at least
            1 and at most 128. In a 3-D tensor each matrix is approximated separately. A tensor with
            more dimensions is reshaped to a matrix of shape (first dimension, rest). The score of a
            vector's entry is its absolute value.

    Raises:
        ValueError: the rank is below 1.
    """
    if rank is not None and rank < 1:
        raise ValueError(f"rank is {rank}; it must be 1 or more")

    def score(weight: Tensor, generator: torch.Generator) -> Tensor:
        if weight.dim() < 2:
            return weight.detach().abs()
        if weight.dim() > 3:
            return score(weight.detach().flatten(1), generator).view(weight.shape)
        if weight.dim() == 3:
            return torch.stack([score(matrix, generator) for matrix in weight.detach()])
        return _low_rank(weight.detach().float(), rank, generator).abs()

    return Rule(from_weight=score)


def _low_rank(matrix: Tensor, rank: int | None, generator: torch.Generator) -> Tensor:
    smaller = min(matrix.shape)
    rank = max(1, min(rank or min(MAX_RANK, smaller // 8), smaller))
    # Halko et al. 2011 with 4 power iterations; svd_lowrank would use the global random generator.
    sketch = torch.randn(matrix.shape[1], min(rank + 8, smaller), generator=generator)
    basis = torch.linalg.qr(matrix @ sketch.to(matrix.device)).Q
    for _ in range(4):
        basis = torch.linalg.qr(matrix @ (matrix.T @ basis)).Q
    left, values, right = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    approximation: Tensor = (basis @ left[:, :rank] * values[:rank]) @ right[:rank]
    return approximation


def _gradient(weight: Tensor, gradient: Tensor) -> Tensor:
    return gradient.abs()


def _fisher(weight: Tensor, gradient: Tensor) -> Tensor:
    # In fp32, since the squares of small fp16 gradients would be zero.
    return gradient.to(torch.promote_types(gradient.dtype, torch.float32)).square()


def _snip(weight: Tensor, gradient: Tensor) -> Tensor:
    wide = torch.promote_types(gradient.dtype, torch.float32)
    return (weight.detach().to(wide) * gradient).abs()


def _accumulated(weight: Tensor, gradient: Tensor) -> Tensor:
    return gradient


def _gallop(weight: Tensor, gradient: Tensor) -> Tensor:
    wide = torch.promote_types(gradient.dtype, torch.float32)
    return gradient.to(wide).abs() / (weight.detach().to(wide).abs() + _SMALL)


def _magnitude(weight: Tensor, generator: torch.Generator) -> Tensor:
    return weight.detach().abs()


def _random(weight: Tensor, generator: torch.Generator) -> Tensor:
    return torch.rand(weight.shape, generator=generator)


RULES: Mapping[str, Rule] = MappingProxyType(
    {
        "gradient": Rule(from_gradient=_gradient),
        "accumulated": Rule(from_gradient=_accumulated, is_signed=True),
        "fisher": Rule(from_gradient=_fisher),
        "snip": Rule(from_gradient=_snip),
        "gallop": Rule(from_gradient=_gallop),
        "proportional": Rule(from_gradient=_gradient, is_drawn=True),
        "magnitude": Rule(from_weight=_magnitude),
        "principal": principal(),
        "random": Rule(from_weight=_random, is_uniform=True),
    }
)


def find_rule(selection: Selection) -> Rule | None:
    """Return the rule of a selection, which may be a name or a function; None for a mask or a delta.

    Raises:
        TypeError: the selection is not a name, rule, function, mapping, path or delta.
        ValueError: no rule has that name.
    """
    if is_mask(selection):
        return None
    if isinstance(selection, str):
        if selection not in RULES:
            raise ValueError(
                f"selection {selection!r} is not known; choose one of {', '.join(RULES)}, or give a file that ends"
                " in .safetensors, .npz, .pt or .sd"
            )
        return RULES[selection]
    if isinstance(selection, Rule):
        return selection
    if not callable(selection):
        raise TypeError(
            f"selection is of type {type(selection).__name__}; give a rule's name, a Rule, a function of "
            "weight and gradient, a mapping of parameter names to masks, a delta, or a path of a mask or delta"
        )
    score: Any = selection
    return Rule(from_gradient=score)
