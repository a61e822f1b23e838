"""Tests of ``top_k``, the rules, and the number of components that a rate selects."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import relaxed
from torch import Tensor

from sift_train import selection
from sift_train.rules import RULES, Rule, find_rule
from sift_train.selection import (
    index_dtype,
    n_selected,
    seeded_generator,
    top_k,
    top_k_of_all,
)


def generator(seed: int = 0) -> torch.Generator:
    return seeded_generator(seed, "weight")


@pytest.mark.parametrize(
    ("numel", "rate", "k"), [(100, 1e-9, 1), (100, 0.01, 2), (100, 1.0, 100), (1, 0.5, 1)]
)
def test_n_selected(numel: int, rate: float, k: int) -> None:
    assert n_selected(numel, rate) == k


@pytest.mark.parametrize("rate", [-0.1, 0, 0.0, 1.1, float("nan")])
def test_rate_out_of_range(rate: float) -> None:
    with pytest.raises(ValueError, match="above 0 and at most 1"):
        n_selected(10, rate)


def test_top_k_agrees_with_sorting() -> None:
    scores = torch.randn(37, 53, generator=torch.Generator().manual_seed(5))
    for k in (1, 2, 500, 1960, 1961):
        expected = scores.flatten().argsort(descending=True)[:k].sort().values
        assert top_k(scores, k, generator()).tolist() == expected.tolist()


def test_top_k_is_flat_increasing_int32() -> None:
    index = top_k(torch.tensor([[0.0, 9.0], [8.0, 7.0]]), 3, generator())
    assert index.dtype == torch.int32
    assert index.tolist() == [1, 2, 3]


def test_index_dtype_widens_at_two_to_the_31() -> None:
    assert index_dtype(2**31 - 1) == torch.int32
    assert index_dtype(2**31) == torch.int64


def test_non_finite_scores_rank_last() -> None:
    scores = torch.tensor([torch.inf, 1.0, torch.nan, 2.0, -torch.inf, -3.0])
    assert top_k(scores, 3, generator()).tolist() == [1, 3, 5]


def test_ties_are_drawn_by_the_seed() -> None:
    scores = torch.zeros(1000)
    scores[7] = 1.0
    first, again, other = (top_k(scores, 50, generator(seed)).tolist() for seed in (0, 0, 1))
    assert first == again
    assert first != other
    assert 7 in first
    assert 7 in other
    assert len(set(first)) == 50


def by_sorting(scores: Mapping[str, Tensor], k: int, generator: torch.Generator) -> list[int]:
    """Return the positions of the k largest of all joined scores, by sorting."""
    joined = torch.cat([each.flatten().float() for each in scores.values()])
    joined[~joined.isfinite()] = -torch.inf
    least = joined.sort(descending=True).values[k - 1]
    ties = (joined == least).nonzero().flatten()
    n_above = int((joined > least).sum())
    drawn = torch.randperm(len(ties), generator=generator)[: k - n_above]
    return sorted([*(joined > least).nonzero().flatten().tolist(), *ties[drawn].tolist()])


SCORES = st.one_of(
    st.floats(width=32),  # including non-finite ones, -0.0 and subnormal ones
    st.sampled_from([0.0, -0.0, 1.0, -1.0, float("nan"), float("inf"), -float("inf")]),
)


@relaxed(60)
@given(data=st.data(), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_the_choice_is_the_same_on_every_device(data: st.DataObject, dtype: torch.dtype) -> None:
    """Also among ties: with the slices of a CPU, those of other devices, by radix selection, and by sorting."""
    lists = data.draw(st.lists(st.lists(SCORES, min_size=1, max_size=40), min_size=1, max_size=3))
    scores = {str(n): torch.tensor(each).to(dtype) for n, each in enumerate(lists)}
    numel = sum(map(len, lists))
    k = data.draw(st.integers(1, max(1, numel // 8)) | st.integers(1, max(1, numel - 1)))
    expected = by_sorting(scores, k, generator()) if k < numel else list(range(numel))
    for length, radix in itertools.product((3, selection.DEVICE_SLICE), ((), ("cpu",))):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(selection, "CPU_SLICE", length)
            patch.setattr(selection, "RADIX_SELECT", radix)
            chosen = top_k_of_all(scores, k, generator())
        places, begin = [], 0
        for name, each in scores.items():
            assert chosen[name].dtype == torch.int32
            places += (chosen[name] + begin).tolist()
            begin += len(each)
        assert places == expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("radix", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_the_choice_is_that_of_the_cpu(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, radix: bool
) -> None:
    monkeypatch.setattr(selection, "DEVICE_SLICE", 1000)
    if not radix:
        monkeypatch.setattr(selection, "RADIX_SELECT", ())
    scores = torch.randn(97, 53, generator=torch.Generator().manual_seed(5)).to(dtype)
    scores[3], scores[7, ::2] = torch.nan, 0.0
    for k in (1, 500, 5000):
        on_gpu = top_k(scores.cuda(), k, generator())
        assert on_gpu.is_cuda
        assert on_gpu.tolist() == top_k(scores, k, generator()).tolist()


@pytest.mark.parametrize("k", [-1, 5])
def test_top_k_refuses_k_out_of_range(k: int) -> None:
    with pytest.raises(ValueError, match="cannot select"):
        top_k(torch.zeros(4), k, generator())


def test_top_k_in_low_precision() -> None:
    scores = torch.tensor([1.0, 3.0, 2.0], dtype=torch.bfloat16)
    assert top_k(scores, 2, generator()).tolist() == [1, 2]


def test_random_draws_evenly() -> None:
    rule = RULES["random"]
    assert rule.from_weight is not None
    counts = torch.zeros(20)
    for seed in range(400):
        draw = generator(seed)
        counts[top_k(rule.from_weight(torch.zeros(20), draw), 5, draw).long()] += 1
    assert counts.min() > 60  # 100 expected, standard deviation 9
    assert counts.max() < 140


def test_generators_depend_on_seed_and_name_only() -> None:
    assert seeded_generator(1, "a").initial_seed() == seeded_generator(1, "a").initial_seed()
    assert seeded_generator(1, "a").initial_seed() != seeded_generator(1, "b").initial_seed()
    assert seeded_generator(1, "a").initial_seed() != seeded_generator(2, "a").initial_seed()


def test_unknown_rule_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="gradient, accumulated, fisher, snip"):
        find_rule("gradients")


def test_a_rule_has_one_source() -> None:
    with pytest.raises(ValueError, match="not both"):
        Rule()
