"""Rules, budgets by rows, blocks and masks: what they choose, and that training on it is exact."""

from __future__ import annotations

import logging
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rank_helpers import RankPool
from safetensors import safe_open
from safetensors.torch import load_file
from test_shards import sharded_odd
from torch import Tensor, nn
from train_helpers import bert_batches, make_bert, make_inputs, make_net, same_bits, square_loss

import sparsedelta
from sift_train import (
    SIFT,
    FitConfig,
    SiftConfig,
    export_delta,
    fit,
    intersect,
    load_mask,
    mask_of_delta,
    save_mask,
    unite,
)
from sift_train.structure import drawn, n_of_blocks, n_of_rows, top_blocks, top_of_rows
from sparsedelta.errors import BaseMismatch

WEIGHTS = ["first.weight", "last.weight"]
OPTIONS: list[dict[str, Any]] = [
    {"selection": "gallop"},
    {"selection": "proportional"},
    {"selection": "proportional", "budget": "global"},
    {"budget": "row"},
    {"selection": "random", "budget": "row"},
    {"block": "row"},
    {"block": "column", "selection": "magnitude"},
    {"block": (2, 5), "selection": "proportional"},
    {"selection": "mask.safetensors"},
    {"selection": "mask.npz"},
    {"selection": "mask.pt"},
    {"selection": "first.sd"},
]


def train(sift: SIFT, optimizer: torch.optim.Optimizer, batches: list[Tensor]) -> None:
    for batch in batches:
        square_loss(sift.model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()


def optimizer_of(sift: SIFT) -> torch.optim.Optimizer:
    return torch.optim.AdamW(sift.parameters_in_optimizer(), lr=1e-2)


def make_files(folder: Path) -> None:
    """Write a delta of a first training, and its mask in all forms."""
    model = make_net()
    with SIFT(model, 0.1, WEIGHTS) as sift:
        train(sift, optimizer_of(sift), make_inputs(1))
        save_mask(sift, folder / "mask.safetensors")
        arrays: Any = {n: m.numpy() for n, m in load_mask(folder / "mask.safetensors").items()}
        np.savez(folder / "mask.npz", **arrays)
        torch.save(load_mask(folder / "mask.safetensors"), folder / "mask.pt")
        export_delta(model, folder / "first.sd", sift=sift)


@pytest.mark.parametrize("more", OPTIONS, ids=str)
def test_updates_choice_resume_and_export_are_exact(tmp_path: Path, more: dict[str, Any]) -> None:
    make_files(tmp_path)
    given = dict(more)
    is_file = str(given.get("selection", "")).endswith((".safetensors", ".npz", ".pt", ".sd"))
    if is_file:
        given["selection"] = tmp_path / given["selection"]
    else:
        given["sparse_module"] = WEIGHTS
    inputs = make_inputs(6)
    model = make_net()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with SIFT(model, 0.1, **given) as sift:
        optimizer = optimizer_of(sift)
        train(sift, optimizer, inputs[:3])
        index = {name: part.flat_index.clone() for name, part in sift.sparse_mapping.items()}
        state, steps = sift.state_dict(), deepcopy(optimizer.state_dict())
        train(sift, optimizer, inputs[3:])
        assert sum(map(len, index.values())) == sift.n_trained > 0
        for name, part in sift.sparse_mapping.items():
            flat = model.get_parameter(name).detach().flatten()
            # No update is lost: after a step the weights are the masters, and all have moved.
            assert same_bits(flat[index[name].long()], part.master)
            changed = (flat != before[name].flatten()).nonzero().flatten()
            # The choice does not drift.
            assert changed.tolist() == index[name].tolist() == part.flat_index.tolist()
        export_delta(model, tmp_path / "second.sd", sift=sift)
    rebuilt = make_net()
    with sparsedelta.load(tmp_path / "second.sd") as delta:
        assert delta.nnz == sum(map(len, index.values()))
        delta.apply_(rebuilt)
    resumed = make_net()
    with SIFT(resumed, 0.1, **given) as sift:
        optimizer = optimizer_of(sift)
        sift.load_state_dict(state)
        optimizer.load_state_dict(steps)
        train(sift, optimizer, inputs[3:])
    for name, parameter in model.named_parameters():
        assert same_bits(parameter, rebuilt.get_parameter(name))
        assert same_bits(parameter, resumed.get_parameter(name))


def scores_of(model: nn.Module, batches: list[Tensor]) -> Tensor:
    weight = model.get_parameter("first.weight")
    each = [torch.autograd.grad(square_loss(model, batch), weight)[0].abs() for batch in batches]
    return torch.stack(each).sum(0)


def test_gallop_takes_large_gradients_of_small_weights() -> None:
    inputs = make_inputs(3)
    expected = scores_of(make_net(), inputs) / (make_net().first.weight.detach().abs() + 1e-8)
    with SIFT(make_net(), 0.1, "first.weight", selection="gallop") as sift:
        with sift.selecting():
            for batch in inputs:
                square_loss(sift.model, batch).backward()
        part = sift.sparse_mapping["first.weight"]
        best = expected.flatten().topk(part.train_num).indices
        assert part.flat_index.tolist() == best.sort().values.tolist()


def test_a_draw_has_the_probabilities_of_the_scores() -> None:
    scores = torch.tensor([8.0, 4.0, 2.0, 1.0, 1.0, 0.0, torch.nan, torch.inf])
    generator = torch.Generator().manual_seed(0)
    n = 4000
    first = torch.stack([drawn(scores, generator).argmax() for _ in range(n)])
    found = torch.bincount(first, minlength=8) / n
    expected = torch.tensor([8, 4, 2, 1, 1, 0, 0, 0]) / 16
    # Four standard deviations of a share of one half.
    assert float((found - expected).abs().max()) < 4 * (0.25 / n) ** 0.5


def test_a_draw_is_seeded_and_differs_from_the_largest() -> None:
    def choose(selection: str, seed: int) -> list[int]:
        with SIFT(make_net(), 0.2, "first.weight", selection=selection, seed=seed) as sift:
            square_loss(sift.model, make_inputs(1)[0]).backward()
            found: list[int] = sift.sparse_mapping["first.weight"].flat_index.tolist()
            return found

    assert choose("proportional", 0) == choose("proportional", 0)
    assert choose("proportional", 0) != choose("proportional", 1)
    assert choose("proportional", 0) != choose("gradient", 0)


@pytest.mark.parametrize(
    ("shape", "is_experts"),
    [
        ((16, 12), False),
        ((3, 4, 6), False),
        ((3, 4, 6), True),
        ((5, 2, 3, 3), False),
        ((7,), False),
    ],
)
def test_each_row_gets_as_many(shape: tuple[int, ...], is_experts: bool) -> None:
    n_matrices = shape[0] if is_experts else 1
    scores = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    rows = scores.flatten(0, 1) if is_experts else scores.reshape(shape[0], -1)
    k = n_of_rows(scores.shape, n_matrices, 0.3)
    per_row = min(int(0.3 * rows.shape[1]) + 1, rows.shape[1])
    assert k == per_row * len(rows)
    found = top_of_rows(scores, n_matrices, k, torch.Generator().manual_seed(0))
    best = rows.topk(per_row, 1).indices.sort(1).values
    expected = best + torch.arange(len(rows))[:, None] * rows.shape[1]
    assert found.tolist() == expected.flatten().tolist()


def test_equal_and_bad_scores_in_a_row_are_drawn_and_last() -> None:
    scores = torch.zeros(2, 6)
    scores[:, 4] = torch.nan
    chosen = {
        tuple(top_of_rows(scores, 1, 4, torch.Generator().manual_seed(seed)).tolist())
        for seed in range(20)
    }
    assert len(chosen) > 3
    assert not any({4, 10} & set(each) for each in chosen)


def test_many_rows_are_chosen_in_slices() -> None:
    scores = torch.randn(3, 1 << 21, generator=torch.Generator().manual_seed(0))
    found = top_of_rows(scores, 1, 6, torch.Generator().manual_seed(0))
    best = scores.topk(2, 1).indices.sort(1).values + torch.arange(3)[:, None] * (1 << 21)
    assert found.tolist() == best.flatten().tolist()


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        ("row", [[1, 0], [1, 1], [1, 2], [1, 3], [1, 4]]),
        ("column", [[0, 3], [1, 3], [2, 3]]),
        ((2, 2), [[2, 4]]),  # at the edge, where the block has one component
        ((1, 3), [[2, 3], [2, 4]]),
        ((9, 9), [[r, c] for r in range(3) for c in range(5)]),
    ],
)
def test_the_blocks_with_the_largest_means(block: Any, expected: list[list[int]]) -> None:
    scores = torch.tensor([[0.0, 0, 0, 5, 0], [4, 4, 4, 5, 0], [0, 0, 0, 5, 5]])
    scores[0, 0] = torch.inf  # counts as 0
    found = top_blocks(scores, 1, 0.01, block, seed=0, name="", draw=False)
    assert found.tolist() == [row * 5 + column for row, column in expected]
    assert n_of_blocks(scores.shape, 1, 0.01, block) >= len(expected)


def test_every_expert_gets_its_own_blocks() -> None:
    scores = torch.stack([torch.full((4, 3), 9.0), torch.ones(4, 3)])
    found = top_blocks(scores, 2, 0.3, "row", seed=0, name="", draw=False)
    assert torch.bincount(found // 12).tolist() == [6, 6]


def test_a_row_of_a_linear_layer_is_trained_whole() -> None:
    model = make_net()
    with SIFT(model, 0.1, "first.weight", block="row", lr_transfer=True) as sift:
        square_loss(model, make_inputs(1)[0]).backward()
        index = sift.sparse_mapping["first.weight"].flat_index
        rows = index.view(-1, 12) // 12
        assert (rows == rows[:, :1]).all()
        assert len(rows) == int(0.1 * 16) + 1
        assert sift.n_trained == 24


@pytest.mark.parametrize("block", ["rows", (0, 2), (1, 2, 3), (True, 2), 4, [1.5, 2]])
def test_a_wrong_block_is_refused(block: Any) -> None:
    for make in (lambda: SIFT(make_net(), block=block), lambda: FitConfig(block=block),
                 lambda: SiftConfig(block=block)):  # fmt: skip
        with pytest.raises(ValueError, match="block is"):
            make()


def test_blocks_have_a_budget_for_each_tensor_only() -> None:
    for budget in ("row", "global"):
        with pytest.raises(ValueError, match="blocks have the budget 'tensor' only"):
            SIFT(make_net(), block="row", budget=budget)


def refused_on_a_shard(rank: int, more: dict[str, Any]) -> str:
    with pytest.raises(ValueError, match="is sharded") as caught:
        SIFT(sharded_odd("layers"), 0.2, **more)
    return str(caught.value)


def test_rows_and_blocks_of_shards_are_refused(pool: RankPool) -> None:
    for more in ({"budget": "row"}, {"block": "row"}):
        for message in pool.results(refused_on_a_shard, more):
            assert "so no rank holds all of its rows or blocks" in message


def test_one_micro_batch_that_chooses_is_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    def messages(n: int, **more: Any) -> list[str]:
        caplog.clear()
        with SIFT(make_net(), 0.1, WEIGHTS, **more) as sift:
            optimizer = optimizer_of(sift)
            if n:
                with sift.selecting():
                    for batch in make_inputs(n):
                        square_loss(sift.model, batch).backward()
            train(sift, optimizer, make_inputs(3))
        return [text for text in caplog.messages if "micro-batch" in text]

    with caplog.at_level(logging.WARNING, "sift_train"):
        assert len(messages(0, selection="gradient")) == 1
        assert messages(4, selection="gradient") == []
        assert messages(0) == []


def test_a_mask_has_the_form_that_convert_writes(tmp_path: Path) -> None:
    base = make_bert(tmp_path / "base", torch.float32)
    config = FitConfig(
        sparse_module=["query"], exception=["classifier"], max_steps=2, selection_batches=1
    )
    fit(base, bert_batches(2), output=tmp_path / "d.sd", config=config)
    sparsedelta.convert(
        tmp_path / "d.sd", tmp_path / "c.safetensors", base=base, write_as="mask", lossy=True
    )
    import transformers

    make: Any = transformers.AutoModelForSequenceClassification
    model = make.from_pretrained(base, num_labels=3)
    converted = load_mask(tmp_path / "c.safetensors")
    other = make.from_pretrained(base, num_labels=3)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    with pytest.raises(BaseMismatch, match=r"does not hold the base of the delta .* --to mask\)"):
        mask_of_delta(tmp_path / "d.sd", other)
    taken = mask_of_delta(tmp_path / "d.sd", model)
    assert taken.keys() == converted.keys()
    assert all(torch.equal(taken[name], converted[name]) for name in taken)
    assert all(same_bits(p, q) for p, q in zip(
        model.parameters(), make.from_pretrained(base, num_labels=3).parameters(), strict=True))  # fmt: skip
    with SIFT(model, selection=str(tmp_path / "c.safetensors")) as sift:
        save_mask(sift, tmp_path / "s.safetensors")
    for name in ("s", "c"):
        with safe_open(tmp_path / f"{name}.safetensors", "pt") as file:
            assert file.metadata() == {"format": "mask"}
    saved = load_file(tmp_path / "s.safetensors")
    assert all(torch.equal(saved[name], converted[name]) for name in converted)
    # A model without the head has names without the prefix.
    bare: Any = transformers.BertModel
    converted.pop("classifier.weight")
    converted.pop("classifier.bias")
    with SIFT(bare.from_pretrained(base), selection=converted) as sift:
        assert all(not name.startswith("bert.") for name in sift.sparse_mapping)
        assert sift.n_trained == sum(int(mask.sum()) for mask in converted.values())


def test_masks_are_united_and_intersected() -> None:
    left = {"a": torch.tensor([True, True, False]), "b": torch.tensor([True])}
    right = {"a": torch.tensor([False, True, True]), "c": torch.tensor([[True, False]])}
    united, both = unite(left, right), intersect(left, right)
    assert {name: mask.tolist() for name, mask in united.items()} == {
        "a": [True, True, True], "b": [True], "c": [[True, False]],
    }  # fmt: skip
    assert {name: mask.tolist() for name, mask in both.items()} == {"a": [False, True, False]}
    assert left["a"].tolist() == [True, True, False]
    assert unite() == intersect() == {}
    assert intersect(left, {"a": torch.tensor([False, False, True])}) == {}
    with pytest.raises(ValueError, match=r"shape \(2,\), expected torch.bool and \(3,\)"):
        unite(left, {"a": torch.tensor([True, False])})


def test_a_wrong_mask_is_one_clear_sentence(tmp_path: Path) -> None:
    make_files(tmp_path)
    torch.save({}, tmp_path / "a.safetensors")
    np.savez(tmp_path / "b.npz", w=np.zeros(3, np.int64))
    np.savez(tmp_path / "empty.npz", **{"first.weight": np.zeros((16, 12), bool)})  # type: ignore[arg-type]
    np.savez(tmp_path / "other.npz", w=np.ones(3, bool))
    (tmp_path / "c.npz").write_bytes(b"")
    (tmp_path / "c.pt").write_bytes(b"")
    torch.save({"w": torch.zeros(3, dtype=torch.int64)}, tmp_path / "b.pt")
    torch.save({"first.weight": torch.zeros(16, 12, dtype=torch.bool)}, tmp_path / "empty.pt")
    cases = {
        "a.safetensors": "is not a mask", "c.npz": "is not a mask", "b.npz": "has dtype torch.int64",
        "empty.npz": "chooses no component", "other.npz": "names 'w', which is no parameter of Net",
    }  # fmt: skip
    cases |= {
        "c.pt": "is not a mask", "b.pt": "'w' .* is not a bool tensor", "empty.pt": "chooses no component",
    }  # fmt: skip
    for name, message in cases.items():
        with pytest.raises(ValueError, match=message):
            SIFT(make_net(), selection=tmp_path / name)
    with pytest.raises(sparsedelta.SparseDeltaError):
        SIFT(make_net(seed=5), selection=tmp_path / "first.sd")
    with pytest.raises(ValueError, match="leave sparse_module out"):
        SIFT(make_net(), 0.1, WEIGHTS, selection=tmp_path / "mask.npz")
    with pytest.raises(ValueError, match="not selected yet"):
        save_mask(SIFT(make_net(), 0.1, WEIGHTS, selection="gradient"), tmp_path / "x.safetensors")


def test_an_existing_mask_is_kept(tmp_path: Path) -> None:
    with SIFT(make_net(), 0.1, WEIGHTS) as sift:
        save_mask(sift, tmp_path / "mask.safetensors")
        with pytest.raises(FileExistsError, match=r"mask.safetensors' exists; choose another name"):
            save_mask(sift, tmp_path / "mask.safetensors")
        save_mask(sift, tmp_path / "mask.safetensors", overwrite=True)


def test_selecting_what_is_chosen_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with SIFT(make_net(), 0.1, WEIGHTS, selection="magnitude") as sift:
        with sift.selecting():  # measures the share
            square_loss(sift.model, make_inputs(1)[0]).backward()
        assert not caplog.messages
        with sift.selecting():
            pass
        (message,) = caplog.messages
        assert message.startswith("selecting() has no effect, because all components are chosen")


def test_fit_takes_a_mask_and_records_it(tmp_path: Path) -> None:
    make_files(tmp_path)
    config = FitConfig(selection=tmp_path / "mask.safetensors", max_steps=2, lr=1e-2)
    result = fit(
        make_net(), make_inputs(2), output=tmp_path / "d.sd", config=config, loss=square_loss
    )
    mask = load_mask(tmp_path / "mask.safetensors")
    assert result.n_trained == result.nnz == sum(int(each.sum()) for each in mask.values())
    with sparsedelta.load(tmp_path / "d.sd") as delta:
        settings: Any = delta.info["settings"]
        assert settings["selection"] == str(tmp_path / "mask.safetensors")
    assert FitConfig(block=(2, 3)).as_json()["block"] == [2, 3]
