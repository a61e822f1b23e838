"""Finds the k largest scores of one tensor, or of many tensors together.

The result is flat indices, row-major and strictly increasing. Non-finite scores rank below all
others. A seeded random draw decides among equal scores, so the result depends only on the inputs
and is the same on every device.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping, Sequence
from typing import SupportsFloat

import torch
from torch import Tensor

CPU_SLICE = 1 << 17  # elements processed together; they fit in a processor's cache
DEVICE_SLICE = 1 << 23  # larger on other devices, where each operation on a slice is one launch
RADIX_SELECT = frozenset({"cuda"})  # devices on which torch.topk is quicker than counting

_N_BINS = 1 << 16  # one bin for each value of 16 bits
_NEGATIVE = 1 << 15  # the smallest upper half of a negative fp32 number
_FEW = 8  # "few" means at most one component in eight


def n_selected(numel: int, rate: float) -> int:
    """Return the number of components that a rate selects: min(int(rate * numel) + 1, numel).

    Raises:
        ValueError: the rate is not above 0 and at most 1.
    """
    if isinstance(rate, bool) or not isinstance(rate, SupportsFloat):
        raise ValueError(
            f"sparse rate is {rate!r}, of type {type(rate).__name__}; it must be a number"
        )
    if rate == 0:
        raise ValueError(
            "sparse rate is 0, so nothing would be trained; it must be above 0 and at most 1"
        )
    if not 0.0 < rate <= 1.0:
        raise ValueError(f"sparse rate is {rate}; it must be above 0 and at most 1")
    return min(int(rate * numel) + 1, numel)


def index_dtype(numel: int) -> torch.dtype:
    """Return int32 if it can hold every flat index of a tensor, else int64."""
    return torch.int32 if numel < 2**31 else torch.int64


def seeded_generator(seed: int, name: str) -> torch.Generator:
    """Return a generator seeded by the seed and a tensor's name only."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def finite_or_zero(scores: Tensor) -> Tensor:
    """Return the scores in fp32 (fp64 stays), with infinities and NaNs replaced by 0."""
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
    return torch.nan_to_num(wide, nan=0.0, posinf=0.0, neginf=0.0)


def top_k(scores: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """Return the flat indices of the k largest scores, strictly increasing.

    Args:
        scores: any shape, floating; they are compared in fp32.
        k: between 0 and the number of scores.
        generator: a CPU generator; it decides which of the scores equal to the k-th largest are
            taken.

    Raises:
        ValueError: k is out of range.
    """
    return top_k_of_all({"": scores}, k, generator)[""]


def top_k_of_each(scores: Tensor, n_matrices: int, k: int, generator: torch.Generator) -> Tensor:
    """Return the flat indices of the k / n largest scores of each of n matrices, strictly increasing.

    Args:
        scores: shape (n, ...) if n is above 1; otherwise as for ``top_k``.
        n_matrices: n.
        k: a multiple of n.
        generator: as for ``top_k``.
    """
    if n_matrices == 1:
        return top_k(scores, k, generator)
    size = scores.numel() // n_matrices
    indices = [
        top_k(matrix, k // n_matrices, generator).to(index_dtype(scores.numel())) + at * size
        for at, matrix in enumerate(scores)
    ]
    return torch.cat(indices)


def top_k_of_all(
    scores: Mapping[str, Tensor], k: int, generator: torch.Generator
) -> dict[str, Tensor]:
    """Return, for each tensor, the flat indices of its scores among the k largest of all tensors.

    The k-th largest score is found by counting in two passes over the scores, without sorting; on a
    GPU, that of a single tensor is found by ``torch.topk``. The host waits for the device once for
    this score, and once or twice per tensor for the indices.

    Args:
        scores: the scores of each tensor by its name, as for ``top_k``.
        k: between 0 and the number of all scores.
        generator: as for ``top_k``.

    Raises:
        ValueError: k is out of range.
    """
    numel = sum(each.numel() for each in scores.values())
    if not 0 <= k <= numel:
        raise ValueError(
            f"cannot select {k} of {numel} components; k must be between 0 and {numel}"
        )
    flat = {name: each.detach().reshape(-1) for name, each in scores.items()}
    if k in (0, numel):
        return {
            name: torch.arange(min(k, len(each)), device=each.device, dtype=index_dtype(len(each)))
            for name, each in flat.items()
        }
    if len(flat) == 1:
        ((name, each),) = flat.items()
        if each.device.type in RADIX_SELECT and _is_few(k, numel):
            return {name: _top_k_by_radix(each, k, generator)}
    least, n_missing, n_ties = _kth_largest(list(flat.values()), k)
    if n_missing == n_ties:
        return {name: _at_least(each, least) for name, each in flat.items()}
    is_taken = _draw(n_ties, n_missing, generator)
    n_before = torch.zeros(1, dtype=index_dtype(n_ties + 1))
    chosen = {}
    for name, each in flat.items():
        taken, n_before = _uploaded(is_taken, each.device), n_before.to(each.device)
        chosen[name], n_before = _above_or_taken(each, least, taken, n_before)
    return chosen


def slices_of(flat: Tensor) -> Sequence[Tensor]:
    """Return a flat tensor as slices to process one at a time; their size suits the device."""
    parts: Sequence[Tensor] = flat.split(CPU_SLICE if flat.device.type == "cpu" else DEVICE_SLICE)
    return parts


def search_bytes(numel: int, k: int) -> int:
    """Return the most bytes that ``top_k`` allocates on a device, beside the scores.

    By counting: the mask and the draw among ties take 1 byte per element each. The copies and ranks
    of a slice take 14 bytes for each of its elements. The indices found take 8 bytes each. By
    ``torch.topk``: a copy of the scores takes at most 4 bytes per element, and its mask 1; each of
    the components, which are few, takes 12. Later, the mask, the draw and the few candidates take less.
    """
    by_counting = 2 * numel + max(14 * min(numel, DEVICE_SLICE), 8 * k)
    return max(by_counting, 5 * numel + 12 * numel // _FEW)


def _kth_largest(all_scores: Sequence[Tensor], k: int) -> tuple[float, int, int]:
    """Return the k-th largest score, how many scores equal to it are needed, and how many exist.

    The first pass counts the upper 16 bits of the scores in fp32, which are all the bits of bf16.
    The second pass counts the lower 16 bits of the scores whose upper bits are those of the k-th
    largest. For scores of 0 and more, larger bits mean larger scores; for negative ones, smaller.
    """
    counts = _count(all_scores)
    by_score = torch.cat([counts[:_NEGATIVE].flip(0), counts[_NEGATIVE:]])  # descending scores
    at, nth, n_in_bin = _find_bin(by_score, torch.full((1,), k, device=counts.device))
    upper = torch.where(at < _NEGATIVE, _NEGATIVE - 1 - at, at)
    lower_at = []
    if any(scores.dtype != torch.bfloat16 for scores in all_scores):
        counts = _count(all_scores, upper.int())
        by_score = torch.where(at < _NEGATIVE, counts.flip(0), counts)
        found, nth, n_in_bin = _find_bin(by_score, nth)
        lower_at = [found]
    rank, n_ties, high, *low = torch.cat(
        [nth, n_in_bin, upper, *lower_at]
    ).tolist()  # waits for the device
    bits = (high << 16) + sum(each if high >= _NEGATIVE else _N_BINS - 1 - each for each in low)
    (least,) = struct.unpack("<f", struct.pack("<I", bits))
    return least, rank, n_ties


def _top_k_by_radix(flat: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """Return what ``top_k`` returns, on a device that selects by radix.

    Only the candidates, which are the scores not below the k-th largest, are looked at one by one.
    """
    comparable = non_finite_lowest(flat)
    largest = comparable.topk(k, sorted=False).values
    least = largest.min()
    mask = comparable >= least
    counts = [largest.gt(least).sum(), mask.sum()]
    n_above, n_candidates = torch.stack(counts).tolist()  # waits for the device
    if n_candidates == k:
        return _indices(mask)
    is_taken = _uploaded(_draw(n_candidates - n_above, k - n_above, generator), flat.device)
    if not _is_few(n_candidates, len(flat)):
        del comparable, mask
        n_before = torch.zeros(1, dtype=index_dtype(len(flat)), device=flat.device)
        return _above_or_taken(flat, float(least), is_taken, n_before)[0]
    candidates = _indices(mask)
    ties = comparable.index_select(0, candidates).eq(least)
    del comparable, mask
    rank = ties.cumsum(0, dtype=torch.int32)
    is_chosen = is_taken.index_select(0, rank).logical_or_(ties.logical_not())
    return candidates[is_chosen]  # waits for the device


def _draw(n_ties: int, n_taken: int, generator: torch.Generator) -> Tensor:
    """Draw among equal scores; entry n of the result is whether to take the n-th, n from 1 on."""
    is_taken = torch.zeros(n_ties + 1, dtype=torch.bool)
    is_taken[torch.randperm(n_ties, generator=generator)[:n_taken] + 1] = True
    return is_taken


def _is_few(n: int, numel: int) -> bool:
    """Return whether ``n`` components are so few of all that they are better handled one by one."""
    return n <= numel // _FEW


def _count(all_scores: Sequence[Tensor], upper: Tensor | None = None) -> Tensor:
    """Return how many scores have each value of the upper 16 bits.

    With ``upper``, only scores with these upper 16 bits count, and the lower 16 bits are counted.

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
        # In place where possible, so that at most 8 bytes per element are allocated beside a slice.
        bits = non_finite_lowest(part).float().add_(0.0).view(torch.int32)  # -0.0 + 0.0 is 0.0
        lower = bits if upper is None else bits & (_N_BINS - 1)
        bits.bitwise_right_shift_(16).bitwise_and_(_N_BINS - 1)
        if upper is None:
            counts.index_add_(0, bits, counts.new_ones(1).expand(len(bits)))
        else:
            counts.index_add_(0, lower, bits.eq_(upper.to(bits.device)).to(counts.dtype))
    return counts


def _find_bin(counts: Tensor, nth: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the bin that contains the n-th item, its rank in that bin, and the bin's count."""
    up_to = counts.cumsum(0)
    at = torch.searchsorted(up_to, nth)
    n_in_bin = counts.gather(0, at)
    return at, nth - up_to.gather(0, at) + n_in_bin, n_in_bin


def _at_least(flat: Tensor, least: float) -> Tensor:
    """Return the indices of the scores that are at least a threshold."""
    mask = torch.empty(len(flat), dtype=torch.bool, device=flat.device)
    for part, chosen in zip(slices_of(flat), slices_of(mask), strict=True):
        torch.ge(non_finite_lowest(part), least, out=chosen)
    return _indices(mask)


def _above_or_taken(
    flat: Tensor, least: float, is_taken: Tensor, n_before: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the indices of the scores above a threshold and of the ties to take, and a tie count.

    Args:
        flat: scores.
        least: the threshold; scores equal to it are the ties.
        is_taken: whether to take the n-th tie of all tensors, n from 1 on.
        n_before: the number of ties in the tensors before this one, shape (1,). The count returned
            also contains this tensor's ties.
    """
    mask = torch.empty(len(flat), dtype=torch.bool, device=flat.device)
    for part, chosen in zip(slices_of(flat), slices_of(mask), strict=True):
        scores = non_finite_lowest(part)
        torch.gt(scores, least, out=chosen)
        ties = scores.eq(least)
        rank = ties.cumsum(0, dtype=n_before.dtype).add_(n_before)
        chosen |= ties.logical_and_(is_taken.index_select(0, rank))
        n_before = rank[-1:].clone()
    return _indices(mask), n_before


def _indices(mask: Tensor) -> Tensor:
    return mask.nonzero().flatten().to(index_dtype(len(mask)))  # waits for the device


def non_finite_lowest(part: Tensor) -> Tensor:
    """Return a copy, fp64 rounded to fp32, with infinities and NaNs replaced by -inf."""
    narrow = part.float() if part.itemsize > 4 else part
    return narrow.nan_to_num(nan=-torch.inf, posinf=-torch.inf, neginf=-torch.inf)


def _uploaded(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a copy of a host tensor on a device, without waiting for the device."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
