"""Selection: rules, masks, budgets, and targets by regular expression."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from train_helpers import make_inputs, make_net, same_bits, square_loss

from sift_train import RULES, SIFT, FitConfig, Rule, principal
from sift_train.selection import seeded_generator, top_k, top_k_of_all


def gradients(model: nn.Module, name: str, inputs: list[Tensor]) -> list[Tensor]:
    found: list[Tensor] = []
    for batch in inputs:
        found += torch.autograd.grad(square_loss(model, batch), model.get_parameter(name))
    return found


@pytest.mark.parametrize("rule", ["gradient", "fisher", "snip", "own"])
def test_rules_by_gradients(rule: str) -> None:
    model, inputs = make_net(), make_inputs(3)
    weight = make_net().first.weight.detach()
    each = gradients(make_net(), "first.weight", inputs)
    total = {
        "gradient": sum(g.abs() for g in each),
        "fisher": sum(g.square() for g in each),
        "snip": sum((g * weight).abs() for g in each),
        "own": sum(-g for g in each),
    }[rule]
    selection: Any = (lambda w, g: -g) if rule == "own" else rule
    with SIFT(model, 0.1, "first.weight", selection=selection) as sift:
        with sift.selecting():
            for batch in inputs:
                square_loss(model, batch).backward()
        part = sift.sparse_mapping["first.weight"]
        best = torch.as_tensor(total).flatten().topk(part.train_num).indices
        assert part.flat_index.tolist() == best.sort().values.tolist()


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (3, 16, 24), (16, 3, 2, 2), (50,)])
def test_principal_ranks_by_the_low_rank_approximation(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape)
    rule = principal(3)
    assert rule.from_weight is not None
    scores = rule.from_weight(weight, seeded_generator(0, "w"))
    if len(shape) == 1:
        expected = weight.abs()
    else:
        matrices = weight if len(shape) == 3 else weight.flatten(1)[None]
        left, values, right = torch.linalg.svd(matrices, full_matrices=False)
        values[..., 3:] = 0
        expected = ((left * values[..., None, :]) @ right).abs().reshape(shape)
    # A random matrix has no gap after the third value: the hardest case for a sketch.
    assert torch.allclose(scores, expected, atol=0.05)
    best = expected.flatten().topk(8).indices.tolist()
    found = scores.flatten().topk(12).indices.tolist()
    assert len(set(best) & set(found)) >= 7


def test_principal_is_reproducible_and_leaves_the_global_generator() -> None:
    def choose(seed: int) -> list[int]:
        with SIFT(make_net(), 0.2, "first.weight", selection="principal", seed=seed) as sift:
            found: list[int] = sift.sparse_mapping["first.weight"].flat_index.tolist()
            return found

    before = torch.get_rng_state()
    first = choose(0)
    torch.manual_seed(5)
    assert choose(0) == first
    torch.set_rng_state(before)
    with pytest.raises(ValueError, match="rank is 0"):
        principal(0)


def test_half_precision_gradients_are_squared_in_full_precision() -> None:
    rule = RULES["fisher"].from_gradient
    assert rule is not None
    squared = rule(torch.zeros(1), torch.tensor([1e-5], dtype=torch.float16))
    assert float(squared) == pytest.approx(1e-10, rel=1e-2)


def test_a_rule_must_give_one_score_per_component() -> None:
    model = make_net()
    message = "return one score per component"
    with SIFT(model, 0.1, "first.weight", selection=lambda w, g: g.sum()):  # noqa: SIM117
        with pytest.raises(ValueError, match=message):
            square_loss(model, make_inputs(1)[0]).backward()


@pytest.mark.parametrize("form", ["mask", "flat", "coordinates"])
def test_an_explicit_choice(form: str) -> None:
    model = make_net()
    positions = torch.tensor([190, 3, 17])
    mask = torch.zeros(16, 12, dtype=torch.bool)
    mask.view(-1)[positions] = True
    first: Any = {"mask": mask, "flat": positions, "coordinates": mask.nonzero().T.numpy()}[form]
    chosen = {"first.weight": first, "last.bias": [0, 3]}
    with SIFT(model, selection=chosen, exception="norm") as sift:
        assert sift.sparse_mapping["first.weight"].flat_index.tolist() == [3, 17, 190]
        assert sift.sparse_mapping["last.bias"].flat_index.tolist() == [0, 3]
        assert sift.n_trained == 3 + 2 + 32
    assert FitConfig(selection=chosen).as_json()["selection"] == "mask"


def test_a_wrong_choice_is_refused() -> None:
    with pytest.raises(ValueError, match=r"has shape \(2, 2\), expected \(16, 12\)"):
        SIFT(make_net(), selection={"first.weight": torch.ones(2, 2, dtype=torch.bool)})
    with pytest.raises(ValueError, match="names 'first', which is no parameter of Net"):
        SIFT(make_net(), selection={"first": [1]})
    with pytest.raises(ValueError, match="leave sparse_module out"):
        SIFT(make_net(), 0.1, "last", selection={"first.weight": [1]})
    with pytest.raises(TypeError, match="selection is of type int"):
        SIFT(make_net(), 0.1, selection=3)  # type: ignore[arg-type]


@pytest.mark.parametrize("by", ["selecting", "first step", "weights"])
def test_a_global_budget_goes_where_the_scores_are(by: str) -> None:
    model, probe = make_net(), make_net()
    for each in (model, probe):
        with torch.no_grad():
            each.last.weight.mul_(20)
    names = ["first.weight", "last.weight"]
    batch = make_inputs(1)[0]
    if by == "weights":
        scores = [probe.get_parameter(n).detach().abs().flatten() for n in names]
    else:
        scores = [gradients(probe, n, [batch])[0].abs().flatten() for n in names]
    selection = "magnitude" if by == "weights" else "gradient"
    total = 20 + 7
    best = torch.cat(scores).topk(total).indices.sort().values
    expected = [best[best < 192].tolist(), (best[best >= 192] - 192).tolist()]
    with SIFT(model, 0.1, names, selection=selection, budget="global") as sift:
        if by == "selecting":
            with sift.selecting():
                square_loss(model, batch).backward()
        optimizer = torch.optim.AdamW(sift.parameters_in_optimizer(), lr=1e-2)
        square_loss(model, batch).backward()
        optimizer.step()
        parts = sift.sparse_mapping.values()
        assert [part.flat_index.tolist() for part in parts] == expected
        assert sift.n_trained == total
        for part in parts:
            before = probe.get_parameter(part.name)
            changed = (before != part.parameter).flatten().nonzero().flatten()
            assert changed.tolist() == part.flat_index.tolist()


def test_a_tensor_may_get_nothing_of_a_global_budget() -> None:
    model = make_net()
    with torch.no_grad():
        model.last.weight.mul_(1000)
    names = ["first.weight", "last.weight"]
    with SIFT(model, 0.1, names, selection="magnitude", budget="global") as sift:
        assert [p.train_num for p in sift.sparse_mapping.values()] == [0, 27]
        for kind in ("foreach", "fused"):
            optimizer = torch.optim.AdamW(sift.parameters_in_optimizer(), **{kind: True})  # type: ignore[arg-type]
            square_loss(model, make_inputs(1)[0]).backward()
            sift.clip_grad_norm_(1.0)
            optimizer.step()
        assert same_bits(model.first.weight, make_net().first.weight)
    with pytest.raises(ValueError, match="budget is 'model'"):
        SIFT(model, 0.1, names, budget="model")


def test_a_global_choice_is_that_of_one_long_tensor() -> None:
    generator = torch.Generator().manual_seed(3)
    parts = {str(n): torch.randn(n, generator=generator).round(decimals=1) for n in (5, 400, 37)}
    whole = torch.cat(list(parts.values()))
    for k in (1, 40, 300, 441):
        chosen = top_k_of_all(parts, k, seeded_generator(0, ""))
        assert sum(len(index) for index in chosen.values()) == k
        taken = torch.cat([parts[name][index] for name, index in chosen.items()])
        assert taken.sort().values.tolist() == whole.topk(k).values.sort().values.tolist()


def test_top_k_at_the_edges_of_floats() -> None:
    scores = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 3.4e38, -3.4e38, torch.nan, torch.inf])
    order = [4, 2, 0, 3, 5]
    for k in (1, 2):
        assert top_k(scores, k, seeded_generator(0, "")).tolist() == sorted(order[:k])
    assert top_k(scores, 4, seeded_generator(0, "")).tolist() == [0, 1, 2, 4]
    assert top_k(scores, 6, seeded_generator(0, "")).tolist() == [0, 1, 2, 3, 4, 5]
    zeros = {top_k(scores, 3, seeded_generator(seed, "")).tolist()[0] for seed in range(20)}
    assert zeros == {0, 1}  # signed zeros are equal


@pytest.mark.parametrize("pattern", [re.compile(r"^(first|last)\.weight$"), r"re:^(first|last)\.w"])
def test_targets_by_regular_expression(pattern: Any) -> None:
    for given in (pattern, [pattern]):
        with SIFT(make_net(), 0.1, given, [re.compile("norm")]) as sift:
            names = ["first.weight", "norm.weight", "norm.bias", "last.weight"]
            assert list(sift.sparse_mapping) == names
    plain = FitConfig(sparse_module=[pattern]).as_json()["sparse_module"]
    assert isinstance(plain, list)
    assert str(plain[0]).startswith("re:^(first|last)")


def test_an_invalid_or_unused_regular_expression_is_refused() -> None:
    with pytest.raises(ValueError, match="is not a regular expression"):
        SIFT(make_net(), 0.1, "re:(")
    with pytest.raises(ValueError, match=r"'re:\^weight', which occurs in no"):
        SIFT(make_net(), 0.1, re.compile("^weight"))


def test_no_device_holds_more_than_one_tensor_s_scores() -> None:
    """Summed scores are on the CPU for every device; the meta device stands for another device."""
    from sift_train.scores import GradientScores

    scores = GradientScores(RULES["gradient"], is_summed=True, keeps_gradient=False)
    scores.add(torch.ones(3), torch.tensor([1.0, torch.nan, -2.0], dtype=torch.bfloat16))
    scores.add(torch.ones(3), torch.tensor([1.0, 1.0, torch.inf], dtype=torch.bfloat16))
    assert scores.total.device.type == "cpu"
    assert scores.total.tolist() == [2.0, 1.0, 2.0]
    assert scores.gradient is None


def test_rules_are_named() -> None:
    assert list(RULES) == [
        "gradient",
        "accumulated",
        "fisher",
        "snip",
        "gallop",
        "proportional",
        "magnitude",
        "principal",
        "random",
    ]
    with pytest.raises(ValueError, match="not both"):
        Rule(from_gradient=lambda w, g: g, from_weight=lambda w, g: w)
