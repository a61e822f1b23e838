"""Where a computation moves elements, found without data and compared with the computation on real positions."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from sparsedelta.live.loading import Moved, Renamed, Unknown, _complete
from sparsedelta.live.moves import find_moves
from sparsedelta.live.strides import NotStrided, Piece, Region, are_disjoint, compose, whole

Run = Callable[[Sequence[torch.Tensor]], dict[str, torch.Tensor]]


def rope(x: torch.Tensor) -> torch.Tensor:
    return x.view(2, 3, 2, 5).transpose(1, 2).reshape(12, 5)


def filled(parts: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    made = parts[0].new_empty(24, 5)
    made[0::2], made[1::2] = parts[0], parts[1]
    return {"y": made}


MOVES: dict[str, Run] = {
    "same": lambda p: {"y": p[0]},
    "clone": lambda p: {"y": p[0].clone()},
    "transposed": lambda p: {"y": p[0].t().contiguous()},
    "transposed view": lambda p: {"y": p[0].t()},
    "permuted": lambda p: {"y": rope(p[0])},
    "split": lambda p: dict(zip("abc", p[0].chunk(3), strict=True)),
    "split in columns": lambda p: dict(zip("ab", p[0].split([2, 3], 1), strict=True)),
    "joined": lambda p: {"y": torch.cat([p[0], p[1]])},
    "joined in columns": lambda p: {"y": torch.cat([p[0], p[1]], dim=1)},
    "stacked": lambda p: {"y": torch.stack([p[0], p[1]])},
    "stacked inside": lambda p: {"y": torch.stack([p[0], p[1]], dim=-1)},
    "interleaved": filled,
    "split, permuted, joined": lambda p: {
        "y": torch.cat([rope(half) for half in torch.cat([p[0], p[1]]).chunk(2)])
    },
}


def positions(n_inputs: int) -> list[torch.Tensor]:
    return [torch.arange(60).view(12, 5) + 60 * number for number in range(n_inputs)]


def read(region: Region, memory: torch.Tensor) -> list[int]:
    flat = memory.reshape(-1).clone()
    found = torch.as_strided(flat, region.shape, region.strides, region.offset).reshape(-1)
    return [int(value) for value in found]


@pytest.mark.parametrize("name", MOVES)
def test_elements_are_where_they_really_are(name: str) -> None:
    inputs = positions(2)
    wanted = MOVES[name](inputs)
    found = find_moves([(12, 5)] * 2, MOVES[name])
    n_found = 0
    for given, moves in zip(inputs, found, strict=True):
        for result, piece in moves:
            there = wanted[result]
            assert read(piece.source, given) == read(piece.target, there)
            n_found += piece.source.numel
    assert n_found == sum(tensor.numel() for tensor in wanted.values())


@pytest.mark.parametrize(
    "run",
    [
        lambda p: {"y": p[0] + 1},
        lambda p: {"y": p[0] * 1},
        lambda p: {"y": p[0].flip(0)},
        lambda p: {"y": p[0].double().float()[:6]},
        lambda p: {"y": p[0][torch.arange(12)]},
    ],
)
def test_a_computation_is_not_followed_by_mistake(run: Run) -> None:
    (moves,) = find_moves([(12, 5)], run)
    assert sum(piece.source.numel for _, piece in moves) < 60


@pytest.mark.parametrize("half", [slice(0, 6), slice(3, 9), slice(0, 12, 2)])
def test_half_of_the_elements_twice_is_not_all_of_them(half: slice) -> None:
    (moves,) = find_moves([(12, 5)], lambda p: {"y": torch.cat([p[0][half], p[0][half]])})
    assert sum(piece.source.numel for _, piece in moves) == 60
    assert _complete((12, 5), {"y": (12, 5)}, moves) == Unknown(
        "some of its elements are in the model twice"
    )


def test_a_move_that_strides_cannot_express() -> None:
    with pytest.raises(NotStrided, match="do not divide each other"):
        find_moves([(12, 5)], lambda p: {"y": rope(rope(p[0]))})


def test_results() -> None:
    own = {"y": (12, 5), "a": (4, 5), "b": (4, 5), "c": (4, 5)}
    (same,), (split,) = (find_moves([(12, 5)], MOVES[name]) for name in ("clone", "split"))
    assert _complete((12, 5), own, same) == Renamed("y")
    moved = _complete((12, 5), own, split)
    assert isinstance(moved, Moved)
    assert [name for name, _ in moved.pieces] == ["a", "b", "c"]
    assert isinstance(_complete((12, 5), own, split[:2]), Unknown)


def test_regions() -> None:
    even, odd = Region((6,), 0, (2,)), Region((6,), 1, (2,))
    assert are_disjoint([even, odd])
    assert not are_disjoint([even, odd, Region((1,), 4, (1,))])
    assert compose(Piece(whole((3,)), Region((3,), 0, (2,))), Piece(odd, odd)) == ()
