"""In a large chunk, the choice by a sample is within 1 % of the smallest of all codings, and leaves out most of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from helpers import assert_bit_equal
from kernel_cases import Bits, Draw, both, encoded, reader

from sparsedelta.codecs import choice
from sparsedelta.codecs.chunk import Span, decode_chunk
from sparsedelta.codecs.context import Positions
from sparsedelta.codecs.exponent_classes import keys_of
from sparsedelta.codecs.zstd import Level
from sparsedelta.dtypes import DTYPES

N, COLUMNS = 1 << 21, 1 << 10
BF16 = DTYPES["BF16"]
Changed = Callable[[Draw, Bits], Any]  # which elements change


def by_exponent(draw: Draw, before: Bits) -> Any:
    return draw.random(N) < np.minimum(0.9, 0.02 * 2.0 ** (121 - keys_of(before).astype(float)))


def crowded(draw: Draw, before: Bits) -> Any:
    rows, columns = draw.random((N // COLUMNS, 1)) ** 4, draw.random(COLUMNS) ** 4
    return (draw.random((N // COLUMNS, COLUMNS)) < 2 * rows * columns).ravel()


WORKLOADS: dict[str, Changed] = {
    "at random": lambda draw, before: draw.random(N) < 0.05,
    "half": lambda draw, before: draw.random(N) < 0.5,
    "all": lambda draw, before: np.ones(N, np.bool_),
    "by exponent": by_exponent,
    "rows and columns": crowded,
    "one part": lambda draw, before: (np.arange(N) < N // 8) & (draw.random(N) < 0.5),
    "blocks": lambda draw, before: (draw.random(N // 64) < 0.1).repeat(64),
}
FEW_TRIED = {"at random", "half", "all", "by exponent"}


def drawn(changed: Changed) -> tuple[Positions, Bits, Bits]:
    """Return the positions, their codes, and the bits before the change."""
    draw = np.random.default_rng(1)
    before = (draw.normal(0, 0.02, N).astype("<f4").view("<u4") >> 16).astype("<u2")
    positions = np.flatnonzero(changed(draw, before)).astype(np.uint32)
    codes = (2 * draw.geometric(0.7, len(positions)) - draw.integers(0, 2, len(positions))).astype(
        "<u2"
    )
    return positions, codes, before


@pytest.mark.parametrize("name", WORKLOADS)
def test_choice_by_a_sample_is_close_to_the_smallest(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    positions, codes, before = drawn(WORKLOADS[name])
    assert len(positions) >= choice._LARGE
    place = Span(0, N, COLUMNS, reader(before))
    tried: list[choice.Way] = []
    for part in (choice._indices, choice._packings):

        def noted(changes: Any, ways: Sequence[choice.Way], level: Level, part: Any = part) -> Any:
            tried.extend(ways if changes.n == N else ())
            return part(changes, ways, level)

        monkeypatch.setattr(choice, part.__name__, noted)
    chunk, coded = encoded(place, positions, codes, Level.DEFAULT)
    n_tried = len(tried)
    monkeypatch.setattr(choice, "_LARGE", N + 1)
    smallest, _ = encoded(place, positions, codes, Level.DEFAULT)
    assert chunk.stored_bytes <= 1.01 * smallest.stored_bytes
    n_ways = len(tried) - n_tried
    assert n_tried <= 4 < n_ways if name in FEW_TRIED else n_tried <= n_ways
    found, numbers = decode_chunk(chunk, BF16, coded, before=reader(before))
    assert_bit_equal(found, positions)
    assert_bit_equal(numbers, codes)
    monkeypatch.undo()
    compiled, reference = both(encoded, place, positions, codes, Level.DEFAULT)
    assert compiled == reference
