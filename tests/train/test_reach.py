"""What ``all-linear`` and ``all-conv`` select, and the budget of each expert."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from train_helpers import make_net, same_bits

import sparsedelta
from sift_train import SIFT, export_delta, plan
from sift_train.reach import left_out, linear_weights, n_matrices


def small(architecture: str, **more: Any) -> Any:
    import transformers

    sizes: dict[str, Any] = {
        "vocab_size": 40,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        **more,
    }
    config = getattr(transformers, f"{architecture}Config")(**sizes)
    torch.manual_seed(0)
    return getattr(transformers, f"{architecture}ForCausalLM")(config)


def names(model: nn.Module, found: set[nn.Parameter]) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter in found}


def mixtral() -> Any:
    return small("Mixtral", num_local_experts=3)


def test_all_linear_takes_experts_and_routers() -> None:
    model = mixtral()
    attention = {f"model.layers.0.self_attn.{kind}_proj.weight" for kind in "qkvo"}
    assert names(model, linear_weights(model)) == attention | {
        "model.layers.0.mlp.gate.weight",
        "model.layers.0.mlp.experts.gate_up_proj",
        "model.layers.0.mlp.experts.down_proj",
    }
    stacked = n_matrices(model)
    assert names(model, set(stacked)) == {
        "model.layers.0.mlp.experts.gate_up_proj",
        "model.layers.0.mlp.experts.down_proj",
    }
    assert set(stacked.values()) == {3}


@pytest.mark.parametrize("selection", ["gradient", "magnitude"])
def test_each_expert_has_its_budget(selection: str) -> None:
    model = mixtral()
    with SIFT(model, 0.1, selection=selection) as sift:
        with torch.no_grad():  # without budgets, this expert would get all components
            model.model.layers[0].mlp.experts.down_proj[1].mul_(100)
        with sift.selecting():
            model(input_ids=torch.arange(40)[None], labels=torch.arange(40)[None]).loss.backward()
        for name in ("gate_up_proj", "down_proj"):
            part = sift.sparse_mapping[f"model.layers.0.mlp.experts.{name}"]
            numel = part.parameter[0].numel()
            per_expert = torch.bincount(part.flat_index.long() // numel, minlength=3)
            assert per_expert.tolist() == [int(0.1 * numel) + 1] * 3
            if selection == "magnitude":
                continue
            assert bool((part.flat_index[1:] > part.flat_index[:-1]).all())


def test_the_largest_of_each_expert_are_chosen() -> None:
    model = mixtral()
    part = SIFT(model, 0.1, selection="magnitude").sparse_mapping[
        "model.layers.0.mlp.experts.down_proj"
    ]
    k = part.train_num // 3
    for at, matrix in enumerate(part.parameter.detach()):
        chosen = part.flat_index[k * at : k * (at + 1)].long() - at * matrix.numel()
        expected = matrix.abs().flatten().topk(k).indices.sort().values
        assert torch.equal(chosen, expected)


def test_experts_are_trained_exported_and_applied_by_the_names_of_the_checkpoint(
    tmp_path: Path,
) -> None:
    made = mixtral()
    made.save_pretrained(tmp_path / "base")
    model = type(made).from_pretrained(tmp_path / "base")
    with SIFT(model, 0.1) as sift:
        optimizer = torch.optim.AdamW(sift.parameters_in_optimizer(), lr=1e-2)
        for _ in range(2):
            model(input_ids=torch.arange(40)[None], labels=torch.arange(40)[None]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        export_delta(model, tmp_path / "d.sd", sift=sift, base=tmp_path / "base")
    found = sparsedelta.inspect(tmp_path / "d.sd")
    changed = {tensor.name for tensor in found.tensors if tensor.nnz}
    assert "model.layers.0.block_sparse_moe.experts.2.w2.weight" in changed
    means: Any = found.info["mean_change"]
    assert means.keys() == changed
    sparsedelta.apply(tmp_path / "base", tmp_path / "d.sd", tmp_path / "out")
    before, after = (load_file(tmp_path / n / "model.safetensors") for n in ("base", "out"))
    for name, mean in means.items():
        moved = (after[name] - before[name]).abs()
        assert mean == pytest.approx(float(moved[moved > 0].mean()), rel=1e-2), name
    again = type(made).from_pretrained(tmp_path / "out")
    assert all(same_bits(v, again.state_dict()[n]) for n, v in model.state_dict().items())
    name = "model.layers.0.block_sparse_moe.experts.1.w3.weight"
    before[name][0, 0] += 1
    save_file(before, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"'{name}' differ"):
        export_delta(model, tmp_path / "e.sd", sift=sift, base=tmp_path / "base")


def test_other_modules_that_apply_matrices() -> None:
    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.input_gate_weight = nn.Parameter(torch.ones(2, 4, 4))
            self.input_gate_bias = nn.Parameter(torch.ones(2, 4))
            self.position_embeddings = nn.Parameter(torch.ones(5, 4))
            self.scale_weight = nn.Parameter(torch.ones(1, 1, 4))

    model = nn.Sequential(
        Gate(), nn.MultiheadAttention(4, 2), nn.Conv2d(3, 4, 2), nn.LSTM(4, 4), nn.Embedding(3, 4)
    )
    assert names(model, linear_weights(model)) == {
        "0.input_gate_weight",
        "1.in_proj_weight",
        "1.out_proj.weight",
        "3.weight_ih_l0",
        "3.weight_hh_l0",
    }
    assert [n for p, n in n_matrices(model).items()] == [2]


def test_heads_of_3_d_weights_are_one_matrix() -> None:
    import transformers

    config = transformers.XLNetConfig(vocab_size=40, d_model=16, n_layer=1, n_head=2, d_inner=24)
    model = transformers.XLNetLMHeadModel(config)
    found = names(model, linear_weights(model))
    assert {f"transformer.layer.0.rel_attn.{letter}" for letter in "qkvor"} <= found
    assert "transformer.layer.0.rel_attn.r_r_bias" not in found
    assert not n_matrices(model)


def test_an_output_layer_of_another_width_is_a_linear_weight() -> None:
    import transformers

    sizes = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    make: Any = transformers.RemBertConfig
    config = make(**sizes, input_embedding_size=8, output_embedding_size=12, intermediate_size=24)
    model = transformers.RemBertForMaskedLM(config)
    assert "cls.predictions.decoder.weight" in names(model, linear_weights(model))
    tied = small("Llama")
    assert "lm_head.weight" not in names(tied, linear_weights(tied))


def test_all_conv_alone_and_together_with_all_linear() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 2), nn.ConvTranspose1d(4, 4, 2), nn.BatchNorm2d(4), nn.Linear(4, 2)
    )
    assert list(SIFT(model, 0.1, "all-conv").sparse_mapping) == ["0.weight", "1.weight"]
    SIFT.of(model).close()  # type: ignore[union-attr]
    both = SIFT(model, 0.1, ["all-conv", "all-linear"])
    assert list(both.sparse_mapping) == ["0.weight", "1.weight", "3.weight"]
    both.close()
    dense = SIFT(model, 0.1, "all-linear", "all-conv")
    assert {name for name, part in dense.sparse_mapping.items() if part.is_dense} == {
        "0.weight",
        "1.weight",
    }
    with pytest.raises(
        ValueError, match="no parameter is selected for training, because none matches"
    ):
        SIFT(make_net(), 0.1, "all-conv")


def test_what_is_left_out_is_named_with_its_share(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Linear(10, 10, bias=False), nn.Conv1d(10, 10, 3, bias=False))
    with caplog.at_level(logging.INFO):
        SIFT(model, 0.1).close()
    assert caplog.messages == [
        "'all-linear': components of 25.0% of the weights can be trained; left out: convolutions 75.0%"
    ]
    assert caplog.records[0].levelno == logging.WARNING
    assert left_out(model, set(model.parameters())).endswith("left out: nothing")


def test_a_plan_counts_experts_and_says_what_is_left_out() -> None:
    model = mixtral()
    planned = plan(model, 0.1)
    sift = SIFT(model, 0.1)
    assert planned.n_trained == sift.n_trained
    assert planned.left_out in str(planned)
    assert "left out: embeddings" in planned.left_out


@pytest.mark.parametrize("source", [{"a": 1}, 3, None])
def test_a_plan_of_something_else_is_refused(source: Any) -> None:
    with pytest.raises(TypeError, match=r"^model is of type \w+; give a folder"):
        plan(source, 0.1)
