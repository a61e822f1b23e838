"""Averages the masters' gradients over all ranks, many tensors in one all-reduce."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from sift_train.masters import SparseParameter
from sift_train.ranks.group import Ranks

BUCKET = 1 << 26  # components that one all-reduce takes at most, unless one tensor has more
DTYPES = (torch.bfloat16, torch.float32, torch.float64)


def average_gradients(
    parts: Iterable[SparseParameter],
    ranks: Ranks,
    *,
    dtype: torch.dtype | None = None,
    weight: float | None = None,
) -> None:
    """Replace each master's gradient by its mean over all ranks.

    A rank without a gradient counts as a gradient of zeros. If no rank has one, there is none after
    the call either.

    Args:
        parts: the same on all ranks, in the same order, with the same components.
        ranks: the ranks.
        dtype: dtype in which the gradients are sent and summed, one of ``DTYPES``; None: the
            masters' dtype.
        weight: share of this rank in the mean, such as the number of its examples. All ranks must
            give one, or none, which means equal shares.

    Raises:
        ValueError: a weight is negative, or all are 0.
    """
    if ranks.size == 1:
        return
    share = None if weight is None else _share(weight, ranks)
    for bucket in _buckets(list(parts)):
        _average(bucket, ranks, dtype, share)


def _share(weight: float, ranks: Ranks) -> float:
    total = float(ranks.sum_(torch.tensor([weight, float(weight < 0)], dtype=torch.float64))[0])
    if weight < 0 or total <= 0:
        raise ValueError(
            f"weight is {weight} and the sum over ranks is {total}; give weights of 0 or more, not all 0"
        )
    return weight * ranks.size / total


def _average(
    parts: Sequence[SparseParameter],
    ranks: Ranks,
    dtype: torch.dtype | None,
    share: float | None,
) -> None:
    masters = [part.master for part in parts]
    sent = masters[0].dtype if dtype is None else dtype
    pieces = [_piece(part) for part in parts]
    flat = torch.cat([_flags(parts).to(masters[0]), *pieces])
    if share is not None:
        flat[len(parts) :] *= share
    mean = ranks.sum_(flat.to(sent)).div_(ranks.size).to(masters[0].dtype)
    flags, *means = mean.split([len(parts), *(len(piece) for piece in pieces)])
    # The flags are read only if a gradient is missing here, since reading them waits for the device.
    exists = (
        flags.ne(0).tolist()
        if any(part.pending_gradient is None for part in parts)
        else [True] * len(parts)
    )
    for at, (part, value) in enumerate(zip(parts, means, strict=True)):
        if not part.is_selected:
            _spread_overflow(part, flags[at])
        elif exists[at]:
            part.set_gradient(value)


def _piece(part: SparseParameter) -> Tensor:
    """Return what a part sends: its gradient, zeros if it has none, nothing if it is not chosen."""
    if not part.is_selected:
        return part.master.detach()[:0]
    gradient = part.pending_gradient
    return torch.zeros_like(part.master.detach()) if gradient is None else gradient


def _flags(parts: Sequence[SparseParameter]) -> Tensor:
    """Return 1 for each part with a gradient; for parts not chosen, a value that shows an overflow."""
    flags = [
        torch.zeros(())
        if g is None
        else g[0].float().cpu()
        if not part.is_selected
        else torch.ones(())
        for part in parts
        for g in [part.pending_gradient]
    ]
    return torch.stack(flags)


def _spread_overflow(part: SparseParameter, flag: Tensor) -> None:
    # A gradient scaler must skip the step on all ranks, not only where the gradient overflowed.
    if part.train_num and not bool(flag.isfinite()):
        part.set_gradient(flag.to(part.master).expand(part.train_num).clone())


def _buckets(parts: Sequence[SparseParameter]) -> Iterator[list[SparseParameter]]:
    """Yield the parts in order, in lists of one dtype and device and of limited size."""
    bucket: list[SparseParameter] = []
    n = 0
    for part in parts:
        master = part.master
        is_other = bool(bucket) and (
            (master.dtype, master.device) != (bucket[0].master.dtype, bucket[0].master.device)
        )
        if bucket and (is_other or n + part.train_num > BUCKET):
            yield bucket
            bucket, n = [], 0
        bucket.append(part)
        n += part.train_num
    if bucket:
        yield bucket
