"""Which components of a tensor, or of many, are trained: the k with the largest scores.

Chosen indices are flat, row-major and strictly increasing; non-finite scores rank below all others,
and equal scores are told apart by a seeded draw, so a choice depends on nothing but its inputs: it
is the same on every device.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping, Sequence
from typing import SupportsFloat

import torch
from torch import Tensor

CPU_SLICE = 1 << 17  # elements looked at together: as many as suit a processor's cache
DEVICE_SLICE = 1 << 23  # elsewhere every operation on a slice is a launch: few slices

_N_BINS = 1 << 16  # of 16 bits
_NEGATIVE = 1 << 15  # the upper halves of negative numbers begin here


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

    The k-th largest value is found by counting, without sorting: two passes over the scores. Until
    it is known everything stays on the device, and the host waits once, and once more a tensor.

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
    least, n_missing, n_ties = _kth_largest(list(flat.values()), k)
    if n_missing == n_ties:
        return {name: _at_least(each, least) for name, each in flat.items()}
    drawn = torch.randperm(n_ties, generator=generator)[:n_missing]
    is_taken = torch.zeros(n_ties + 1, dtype=torch.bool)  # by rank among the ties, from 1 on
    is_taken[drawn + 1] = True
    n_before = torch.zeros(1, dtype=index_dtype(n_ties + 1))
    chosen = {}
    for name, each in flat.items():
        taken, n_before = _uploaded(is_taken, each.device), n_before.to(each.device)
        chosen[name], n_before = _above_or_taken(each, least, taken, n_before)
    return chosen


def slices_of(flat: Tensor) -> Sequence[Tensor]:
    """Return the parts of a tensor that are looked at one after the other, as suits its device."""
    parts: Sequence[Tensor] = flat.split(CPU_SLICE if flat.device.type == "cpu" else DEVICE_SLICE)
    return parts


def search_bytes(numel: int, k: int) -> int:
    """Return what choosing k of a tensor's scores holds on a device beside them, at most.

    A mask and the draw among ties take a byte an element each, a slice's copies and ranks 14 bytes
    for each of its elements, and the indices found 8 bytes each.
    """
    return 2 * numel + max(14 * min(numel, DEVICE_SLICE), 8 * k)


def _kth_largest(all_scores: Sequence[Tensor], k: int) -> tuple[float, int, int]:
    """Return the k-th largest score, how many of those equal to it are needed, and how many there are.

    Counted are the bits of scores in fp32: first their upper 16, which are all that bf16 has, then
    the lower 16 where the upper ones are those of the k-th largest. Larger bits are larger scores,
    or smaller negative ones.
    """
    counts = _count(all_scores)
    by_score = torch.cat([counts[:_NEGATIVE].flip(0), counts[_NEGATIVE:]])  # the largest first
    at, nth, n_there = _bin_of(by_score, torch.full((1,), k, device=counts.device))
    upper = torch.where(at < _NEGATIVE, _NEGATIVE - 1 - at, at)
    lower_at = []
    if any(scores.dtype != torch.bfloat16 for scores in all_scores):
        counts = _count(all_scores, upper.int())
        by_score = torch.where(at < _NEGATIVE, counts.flip(0), counts)
        found, nth, n_there = _bin_of(by_score, nth)
        lower_at = [found]
    rank, n_ties, high, *low = torch.cat([nth, n_there, upper, *lower_at]).tolist()  # waits
    bits = (high << 16) + sum(each if high >= _NEGATIVE else _N_BINS - 1 - each for each in low)
    (least,) = struct.unpack("<f", struct.pack("<I", bits))
    return least, rank, n_ties


def _count(all_scores: Sequence[Tensor], upper: Tensor | None = None) -> Tensor:
    """Return how many scores have each upper half, or each lower half beside one upper half.

    Returns:
        Shape (65536,), integers, on the device of the first scores.
    """
    counts = _count_one(all_scores[0], upper)
    for scores in all_scores[1:]:
        counts = counts.long() + _count_one(scores, upper).to(counts.device)
    return counts


def _count_one(scores: Tensor, upper: Tensor | None) -> Tensor:
    counts = torch.zeros(_N_BINS, dtype=index_dtype(len(scores)), device=scores.device)
    for part in slices_of(scores):
        # In place where possible: no more than 8 bytes an element lie beside a slice.
        bits = _finite_first(part).float().add_(0.0).view(torch.int32)  # -0.0 + 0.0 is 0.0
        lower = bits if upper is None else bits & (_N_BINS - 1)
        bits.bitwise_right_shift_(16).bitwise_and_(_N_BINS - 1)
        if upper is None:
            counts.index_add_(0, bits, counts.new_ones(1).expand(len(bits)))
        else:
            counts.index_add_(0, lower, bits.eq_(upper.to(bits.device)).to(counts.dtype))
    return counts


def _bin_of(counts: Tensor, nth: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the bin of the n-th, the how manieth of its bin it is, how many are in it; shape (1,)."""
    up_to = counts.cumsum(0)
    at = torch.searchsorted(up_to, nth)
    n_there = counts.gather(0, at)
    return at, nth - up_to.gather(0, at) + n_there, n_there


def _at_least(flat: Tensor, least: float) -> Tensor:
    """Return the indices of the scores that are not below a threshold."""
    mask = torch.empty(len(flat), dtype=torch.bool, device=flat.device)
    for part, chosen in zip(slices_of(flat), slices_of(mask), strict=True):
        torch.ge(_finite_first(part), least, out=chosen)
    return _indices(mask)


def _above_or_taken(
    flat: Tensor, least: float, is_taken: Tensor, n_before: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the indices of the scores above a threshold and of ties that are taken.

    Args:
        flat: scores.
        least: the threshold.
        is_taken: of the ties, by rank from 1 on.
        n_before: ties in the tensors before this one, shape (1,); returned with this one's added.
    """
    mask = torch.empty(len(flat), dtype=torch.bool, device=flat.device)
    for part, chosen in zip(slices_of(flat), slices_of(mask), strict=True):
        scores = _finite_first(part)
        torch.gt(scores, least, out=chosen)
        ties = scores.eq(least)
        rank = ties.cumsum(0, dtype=n_before.dtype).add_(n_before)
        chosen |= ties.logical_and_(is_taken.index_select(0, rank))
        n_before = rank[-1:].clone()
    return _indices(mask), n_before


def _indices(mask: Tensor) -> Tensor:
    return mask.nonzero().flatten().to(index_dtype(len(mask)))  # waits for the device


def _finite_first(part: Tensor) -> Tensor:
    """Return a copy in at most fp32 with -inf in place of infinities and NaNs."""
    narrow = part.float() if part.itemsize > 4 else part
    return narrow.nan_to_num(nan=-torch.inf, posinf=-torch.inf, neginf=-torch.inf)


def _uploaded(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor of the host on a device, without waiting for the device."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
