"""Chooses equally many components of each row, or whole rows, columns and blocks of a matrix.

A row is what belongs to one index of the first dimension; in a 3-D tensor of experts, to one of an expert's. The entries of a
vector are rows of one component.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sift_train.ranks.shard import Shard
from sift_train.selection import (
    finite_or_zero,
    index_dtype,
    n_selected,
    non_finite_lowest,
    seeded_generator,
    top_k,
)

Block = str | tuple[int, int]
ROW, COLUMN = "row", "column"


def check_block(block: Any) -> None:
    """Check a setting ``block``.

    Raises:
        ValueError: it is neither None, ``"row"``, ``"column"`` nor a pair of positive integers.
    """
    is_pair = isinstance(block, Sequence) and not isinstance(block, str) and len(block) == 2
    if block in (None, ROW, COLUMN) or (
        is_pair and all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in block)
    ):
        return
    raise ValueError(
        f"block is {block!r}; it must be None, 'row', 'column', or a pair of positive integers"
    )


def n_rows(shape: torch.Size, n_matrices: int) -> int:
    """Return the number of rows of all matrices of a tensor."""
    return n_matrices * _matrix(shape, n_matrices)[0]


def n_of_rows(shape: torch.Size, n_matrices: int, rate: float) -> int:
    """Return the number of components if the rate holds for each row."""
    rows, columns = _matrix(shape, n_matrices)
    return n_matrices * rows * n_selected(columns, rate)


def n_of_blocks(shape: torch.Size, n_matrices: int, rate: float, block: Block) -> int:
    """Return the largest number of components if the rate holds for the blocks of each matrix."""
    rows, columns = _matrix(shape, n_matrices)
    height, width = _size(block, rows, columns)
    n_blocks = math.ceil(rows / height) * math.ceil(columns / width)
    n = n_selected(n_blocks, rate) * height * width
    return n_matrices * min(n, rows * columns)


def top_of_rows(scores: Tensor, n_matrices: int, k: int, generator: torch.Generator) -> Tensor:
    """Return the flat indices of the largest scores of each row, strictly increasing.

    Args:
        scores: of the parameter's shape.
        n_matrices: number of matrices in it.
        k: number of components in all rows, a multiple of their number.
        generator: decides among equal scores: a seeded order of the columns that all rows share.
    """
    _, columns = _matrix(scores.shape, n_matrices)
    matrix = scores.detach().reshape(-1, columns)
    per_row = k // len(matrix)
    order = torch.randperm(columns, generator=generator).to(matrix.device)
    found = []
    for start in range(0, len(matrix), step := max(1, (1 << 22) // columns)):
        rows = non_finite_lowest(matrix[start : start + step])[:, order]
        best = rows.sort(dim=1, descending=True, stable=True).indices[:, :per_row]
        chosen = order[best].sort(dim=1).values
        chosen += torch.arange(start, start + len(rows), device=matrix.device)[:, None] * columns
        found.append(chosen.flatten())
    return torch.cat(found).to(index_dtype(scores.numel()))


def top_blocks(
    scores: Tensor, n_matrices: int, rate: float, block: Block, *, seed: int, name: str, draw: bool
) -> Tensor:
    """Return the flat indices of the blocks with the largest mean scores, strictly increasing.

    Args:
        scores: of the parameter's shape; non-finite ones count as 0.
        n_matrices: number of matrices in it.
        rate: share of the blocks of each matrix.
        block: as for ``SIFT``.
        seed: seeds the choice among equal blocks, and the draw, together with the name.
        name: of the parameter.
        draw: draw blocks with a probability proportional to their mean score.
    """
    rows, columns = _matrix(scores.shape, n_matrices)
    height, width = _size(block, rows, columns)
    generator = seeded_generator(seed, name)
    found = []
    for at, matrix in enumerate(scores.detach().reshape(n_matrices, rows, columns)):
        means = _means(finite_or_zero(matrix), height, width)
        means = drawn(means, generator) if draw else means
        mask = torch.zeros(means.numel(), dtype=torch.bool, device=means.device)
        mask[top_k(means, n_selected(means.numel(), rate), generator).long()] = True
        whole = mask.view(means.shape).repeat_interleave(height, 0).repeat_interleave(width, 1)
        inside = whole[:rows, :columns].flatten().nonzero().flatten()
        found.append(inside + at * rows * columns)
    return torch.cat(found).to(index_dtype(scores.numel()))


def drawn(scores: Tensor, generator: torch.Generator, shard: Shard | None = None) -> Tensor:
    """Return scores whose largest k are a draw of k components without replacement.

    The probability of a component is proportional to its score (Efraimidis and Spirakis 2006).

    Args:
        scores: 0 or more; non-finite ones count as 0.
        generator: a CPU generator.
        shard: the part of the whole tensor that the scores are of; the random numbers are those of the whole.
    """
    noise = torch.empty(scores.shape if shard is None else shard.shape)
    noise.exponential_(generator=generator)
    noise = noise if shard is None else shard.cut(noise)
    return finite_or_zero(scores) / noise.clamp_min_(1e-12).to(scores.device)


def _matrix(shape: torch.Size | tuple[int, ...], n_matrices: int) -> tuple[int, int]:
    """Return rows and columns of one of the equal matrices of a tensor."""
    own = shape[1:] if n_matrices > 1 else shape
    rows = own[0] if len(own) else 1
    return rows, math.prod(own[1:])


def _size(block: Block, rows: int, columns: int) -> tuple[int, int]:
    if block == ROW:
        return 1, columns
    if block == COLUMN:
        return rows, 1
    height, width = (int(n) for n in block)
    return min(height, rows), min(width, columns)


def _means(matrix: Tensor, height: int, width: int) -> Tensor:
    """Return the mean of each block; blocks at the edge may be smaller."""
    rows, columns = matrix.shape
    below, beside = -rows % height, -columns % width
    padded = nn.functional.pad(matrix, (0, beside, 0, below))
    shape = (padded.shape[0] // height, height, padded.shape[1] // width, width)
    sums = padded.view(shape).sum((1, 3))
    heights = torch.full((shape[0], 1), height, device=matrix.device)
    widths = torch.full((1, shape[2]), width, device=matrix.device)
    heights[-1] -= below
    widths[0, -1] -= beside
    means: Tensor = sums / (heights * widths)
    return means
