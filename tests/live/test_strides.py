"""Maps between strided regions of memory, compared with lists of addresses."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import relaxed

from sparsedelta.live.held import Joined, Part, in_order
from sparsedelta.live.moves import find_moves
from sparsedelta.live.strides import NotStrided, Piece, Region, compose, identity, whole

SHAPES = [
    (24,),
    (2, 12),
    (4, 6),
    (6, 4),
    (2, 3, 4),
    (4, 3, 2),
    (2, 2, 6),
    (5, 7),
    (1, 24),
    (3, 1, 8),
]


def addresses(region: Region) -> list[int]:
    found = [region.offset]
    for size, step in zip(region.shape, region.strides, strict=True):
        found = [address + i * step for address in found for i in range(size)]
    return found


@st.composite
def regions(draw: st.DrawFn) -> Region:
    """Return a box of a contiguous tensor, with its directions in any order."""
    tensor = whole(draw(st.sampled_from(SHAPES)))
    shape, strides, offset = [], [], 0
    for axis in draw(st.permutations(range(len(tensor.shape)))):
        low = draw(st.integers(0, tensor.shape[axis] - 1))
        shape.append(draw(st.integers(1, tensor.shape[axis] - low)))
        strides.append(tensor.strides[axis])
        offset += low * tensor.strides[axis]
    return Region(tuple(shape), offset, tuple(strides))


def entries(*pieces: Piece) -> list[tuple[int, int]]:
    return [
        pair
        for piece in pieces
        for pair in zip(addresses(piece.source), addresses(piece.target), strict=True)
    ]


@relaxed(100)
@given(regions(), regions())
@example(Region((12, 2), 0, (2, 1)), Region((3, 8), 0, (1, 3)))
@example(Region((10,), 3, (1,)), Region((4, 6), 0, (6, 1)))  # over the ends of rows
def test_compose(middle: Region, other: Region) -> None:
    first, second = Piece(whole(middle.shape), middle), Piece(other, whole(other.shape))
    onwards = dict(entries(second))
    wanted = {x: onwards[y] for x, y in entries(first) if y in onwards}
    try:
        found = entries(*compose(first, second))
    except NotStrided:
        return
    assert len(found) == len(wanted)
    assert dict(found) == wanted


@relaxed(100)
@given(regions())
def test_a_map_and_its_inverse(region: Region) -> None:
    piece = Piece(whole(region.shape), region)
    back = compose(piece, Piece(piece.target, piece.source))
    assert all(x == y for x, y in entries(*back))
    assert sum(one.source.numel for one in back) == region.numel
    assert compose(piece, identity(1000)) == compose(piece, identity(10**9))


def test_the_fewest_axes() -> None:
    shape = (3, 4, 5)
    assert compose(Piece(whole(shape), whole(shape)), identity(60)) == (identity(60),)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (Region((5,), 0, (2,)), Region((5,), 0, (3,))),
        (Region((5, 5), 0, (1, 1)), Region((9,), 0, (1,))),
        (Region((5,), 0, (0,)), Region((1,), 0, (1,))),
        (Region((4, 3), 2, (4, 1)), Region((20,), 0, (1,))),
    ],
    ids=["no multiples", "twice the same", "expanded", "over the end of a row"],
)
def test_what_strides_cannot_express(first: Region, second: Region) -> None:
    with pytest.raises(NotStrided):
        compose(Piece(whole(first.shape), first), Piece(second, whole(second.shape)))


class TestMoves:
    def test_copies_and_views(self) -> None:
        def run(given: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
            one, other, third = given
            experts = torch.stack([one, other])
            half = third.shape[0] // 2
            interleaved = third.reshape(half, 2, -1).transpose(0, 1).reshape(third.shape)
            return {
                "experts": torch.cat([experts, experts.new_zeros(2, 3, 1)], dim=2).mT.contiguous(),
                "rows": interleaved[:half],
                "columns": interleaved[half:].to(torch.float64).clone(),
            }

        shapes = [(3, 4), (3, 4), (6, 4)]
        ends = torch.tensor([math.prod(shape) for shape in shapes]).cumsum(0).tolist()
        positions = [
            torch.arange(1 + end - math.prod(shape), 1 + end, dtype=torch.float64).view(shape)
            for shape, end in zip(shapes, ends, strict=True)
        ]
        results = run(positions)
        moves = find_moves(shapes, run)
        for start, pieces in zip(positions, moves, strict=True):
            for name, piece in pieces:
                flat = results[name].reshape(-1).tolist()
                assert all(start.view(-1)[x] == flat[y] for x, y in entries(piece))
            assert sum(piece.source.numel for _, piece in pieces) == start.numel()

    def test_computed_values_have_no_source(self) -> None:
        assert find_moves([(3, 4)], lambda given: {"sum": given[0] + 1}) == [[]]
        assert find_moves([(3, 4)], lambda given: {"flipped": given[0].flip(0)}) == [[]]

    def test_a_result_that_is_expanded(self) -> None:
        with pytest.raises(NotStrided):
            find_moves([(1, 4)], lambda given: {"rows": given[0].expand(3, 4)})


@relaxed(100)
@given(st.data())
def test_joined(data: st.DataObject) -> None:
    shape = data.draw(st.sampled_from(SHAPES))
    axis = data.draw(st.integers(0, len(shape) - 1))
    cut = data.draw(st.integers(0, shape[axis]))
    tensor = torch.arange(math.prod(shape), dtype=torch.int16).view(torch.bfloat16).view(shape)
    parts = []
    for view in tensor.split([cut, shape[axis] - cut], axis):
        if view.numel():
            region = Region(tuple(view.shape), int(view.storage_offset()), view.stride())
            parts.append(Part(region, view.clone()))
    joined = Joined(shape, parts)
    assert torch.equal(in_order(joined).view(torch.int16), tensor.view(torch.int16))
    index = torch.arange(0, tensor.numel(), data.draw(st.integers(1, 5)), dtype=torch.int32)
    assert joined.gather(index).tolist() == index.tolist()
    joined.scatter(index, torch.full((len(index),), -1, dtype=torch.int16))
    wanted = tensor.view(torch.int16).view(-1).clone()
    wanted[index.long()] = -1
    assert torch.equal(in_order(joined).view(torch.int16).view(-1), wanted)
