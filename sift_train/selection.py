"""Which components of a tensor, or of many, are trained: the k with the largest scores.

Chosen indices are flat, row-major and strictly increasing; non-finite scores rank below all others,
and equal scores are told apart by a seeded draw, so a choice depends on nothing but its inputs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import SupportsFloat

import torch
from torch import Tensor

_Bins = Callable[[Tensor], Tensor]

SLICE = 1 << 17  # elements looked at together: what the search for a threshold holds beside them


def n_selected(numel: int, rate: float) -> int:
    """Return how many of ``numel`` components a rate selects: min(int(rate * numel) + 1, numel).

    Raises:
        ValueError: the rate is not between 0 and 1.
    """
    if isinstance(rate, bool) or not isinstance(rate, SupportsFloat):
        raise ValueError(f"sparse rate is {rate!r}, a {type(rate).__name__}; it must be a number")
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
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
    return torch.nan_to_num(wide, nan=0.0, posinf=0.0, neginf=0.0)


def top_k(scores: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """Return the flat indices of the k largest scores, strictly increasing.

    Args:
        scores: any shape, floating; non-finite ones rank below all others. Compared in fp32.
        k: between 0 and the number of scores.
        generator: of the CPU; draws which of the scores equal to the k-th largest are taken.

    Raises:
        ValueError: k is out of range.
    """
    return top_k_of_all({"": scores}, k, generator)[""]


def top_k_of_all(
    scores: Mapping[str, Tensor], k: int, generator: torch.Generator
) -> dict[str, Tensor]:
    """Return the flat indices of the k largest of all scores together, by tensor.

    The k-th largest value is found by counting, without sorting: two passes over the scores.

    Args:
        scores: by tensor; as for ``top_k``.
        k: between 0 and the number of scores.
        generator: as for ``top_k``.

    Raises:
        ValueError: k is out of range.
    """
    numel = sum(each.numel() for each in scores.values())
    if not 0 <= k <= numel:
        raise ValueError(f"cannot select {k} of {numel} components; ask for 0 to {numel}")
    flat = {name: each.detach().reshape(-1) for name, each in scores.items()}
    if k in (0, numel):
        return {
            name: torch.arange(min(k, len(each)), device=each.device, dtype=index_dtype(len(each)))
            for name, each in flat.items()
        }
    least = _kth_largest(list(flat.values()), k)
    found = {name: _split(each, least) for name, each in flat.items()}
    n_missing = k - sum(len(above) for above, _ in found.values())
    n_ties = [len(ties) for _, ties in found.values()]
    drawn = torch.randperm(sum(n_ties), generator=generator)[:n_missing].sort().values
    chosen = {}
    begin = 0
    for (name, (above, ties)), n in zip(found.items(), n_ties, strict=True):
        own = drawn[(drawn >= begin) & (drawn < begin + n)] - begin
        both = torch.cat([above, ties[own.to(ties.device)]])
        chosen[name] = both.sort().values.to(index_dtype(len(flat[name])))
        begin += n
    return chosen


def _order(part: Tensor) -> Tensor:
    """Return int32 keys that sort as the scores do, non-finite ones as the least."""
    wide = part.float()
    wide = torch.where(wide.isfinite(), wide, -torch.inf) + 0.0  # + 0.0: -0.0 is 0.0
    bits = wide.view(torch.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _kth_largest(all_scores: Sequence[Tensor], k: int) -> int:
    """Return the key of the k-th largest: first its upper 16 bits, then its lower."""
    counts = _count(all_scores, lambda keys: (keys >> 16) + (1 << 15))
    upper, n_above = _bin_of(counts, k)
    upper -= 1 << 15
    counts = _count(all_scores, lambda keys: keys[keys >> 16 == upper] & 0xFFFF)
    lower, _ = _bin_of(counts, k - n_above)
    return (upper << 16) + lower


def _count(all_scores: Sequence[Tensor], bins: _Bins) -> Tensor:
    total = torch.zeros(1 << 16, dtype=torch.int64)
    for scores in all_scores:
        own = torch.zeros_like(total, device=scores.device)  # one wait for the device a tensor
        for part in scores.split(SLICE):
            own += torch.bincount(bins(_order(part)), minlength=1 << 16)
        total += own.cpu()
    return total


def _bin_of(counts: Tensor, k: int) -> tuple[int, int]:
    """Return the bin that holds the k-th largest, and how many lie in the bins above it."""
    from_above = counts.flip(0).cumsum(0)
    at = int(torch.searchsorted(from_above, k))
    return len(counts) - 1 - at, int(from_above[at] - counts.flip(0)[at])


def _split(flat: Tensor, least: int) -> tuple[Tensor, Tensor]:
    """Return the indices of the scores above the threshold, and of those equal to it; int64."""
    above, ties = [], []
    for number, part in enumerate(flat.split(SLICE)):
        keys = _order(part)
        above.append((keys > least).nonzero().flatten() + number * SLICE)
        ties.append((keys == least).nonzero().flatten() + number * SLICE)
    return torch.cat(above), torch.cat(ties)
