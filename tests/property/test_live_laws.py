"""Laws of deltas on models in memory, which agree with those of deltas on disk."""

from __future__ import annotations

import torch
from helpers import Raw
from hypothesis import given
from hypothesis import strategies as st
from property.algebra_strategies import IN_PLACE, Place, State, place, states, values
from strategies import relaxed

import sparsedelta

FEW = relaxed(40)
DTYPES = {
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F8_E4M3": torch.float8_e4m3fn,
    "I64": torch.int64,
    "BOOL": torch.bool,
}


def in_memory(state: State) -> dict[str, torch.Tensor]:
    """Return the tensors that torch has the dtype of."""
    return {name: tensor(raw) for name, raw in state.tensors.items() if raw.dtype in DTYPES}


def tensor(raw: Raw) -> torch.Tensor:
    data = torch.tensor(list(raw.data), dtype=torch.uint8)
    return data.view(DTYPES[raw.dtype]).view(raw.shape)


def bits(model: dict[str, torch.Tensor]) -> dict[str, list[int]]:
    return {name: t.contiguous().view(-1).view(torch.uint8).tolist() for name, t in model.items()}


def without_others(state: State) -> dict[str, None]:
    return {name: None for name, raw in state.tensors.items() if raw.dtype not in DTYPES}


def delta_of(here: Place, before: State, after: State, code: str) -> sparsedelta.Delta:
    folder = here.path / f"{len(list(here.path.iterdir()))}"
    folder.mkdir()
    return here.diff(before.write(folder / "b"), after.write(folder / "t"), values=code)


@FEW
@given(states(2, IN_PLACE), values, st.sampled_from(["touched", "full", "none"]))
def test_applying_in_memory_is_applying(sequence: list[State], code: str, verify: str) -> None:
    with place() as here:
        before, after = sequence
        delta, model = delta_of(here, before, after, code), in_memory(before)
        if not any(name in model for name in changed(delta)):
            return
        names = without_others(before)
        with delta.applied(model, verify=verify, names=names):  # type: ignore[arg-type]
            assert bits(model) == bits(in_memory(after))
        assert bits(model) == bits(in_memory(before))
        delta.apply_(model, names=names)
        if code == "ulp":
            delta.revert_(model, names=names)
            assert bits(model) == bits(in_memory(before))


@FEW
@given(states(4, IN_PLACE), st.lists(st.integers(0, 3), max_size=6), values)
def test_a_bank_is_where_it_was_sent(sequence: list[State], order: list[int], code: str) -> None:
    with place() as here:
        base, *variants = sequence
        model = in_memory(base)
        bank = sparsedelta.DeltaBank(model, names=without_others(base))
        for number, variant in enumerate(variants, 1):
            delta = delta_of(here, base, variant, code)
            if any(name in model for name in changed(delta)):
                bank.add(str(number), delta)
        for number in order:
            name = str(number) if str(number) in bank else None
            bank.activate(name)
            assert bits(model) == bits(in_memory(sequence[number] if name else base))


def changed(delta: sparsedelta.Delta) -> list[str]:
    """Return the tensors with changed elements; a delta of none is applied as soon as it is made."""
    return [row.name for row in delta.tensors if row.chunks]
