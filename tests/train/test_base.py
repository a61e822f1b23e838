"""A wrong base is found before training, and a right base is accepted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file, save_model
from torch import Tensor, nn
from train_helpers import bert_batches, make_bert, make_inputs, make_net, snapshot, square_loss

import sparsedelta
from sift_train import SIFT, FitConfig, SiftTrainerMixin, export_delta, fit
from sift_train.basecheck import check_base


def never(model: nn.Module, batch: Any) -> Tensor:
    raise AssertionError("a batch was trained on")


def saved(model: nn.Module, path: Path, **changed: Tensor) -> Path:
    save_file({**snapshot(model), **changed}, path)
    return path


def trained(rate: float = 0.1) -> tuple[nn.Module, SIFT]:
    model = make_net()
    sift = SIFT(model, rate, ["first.weight"])
    optimizer = torch.optim.AdamW(sift.parameters_in_optimizer(), lr=1e-2)
    for batch in make_inputs(2):
        optimizer.zero_grad()
        square_loss(model, batch).backward()
        optimizer.step()
    sift.close()
    return model, sift


def test_a_module_without_a_base_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = saved(make_net(), tmp_path / "base.safetensors")
    for given in (base, None):
        caplog.clear()
        output = tmp_path / f"{given is None}.sd"
        fit(make_net(), make_inputs(2), output=output, loss=square_loss, base=given)
        warned = [message.startswith("no base is given: the delta") for message in caplog.messages]
        assert warned == [True] * (given is None)
    sparsedelta.verify(output, base=base)  # the module had the same bits


def test_a_folder_without_safetensors_is_refused_before_training(tmp_path: Path) -> None:
    import transformers

    base = make_bert(tmp_path / "base", torch.float32)
    load: Any = transformers.BertForSequenceClassification
    model = load.from_pretrained(base)
    (base / "model.safetensors").unlink()
    torch.save(model.state_dict(), base / "pytorch_model.bin")
    places: dict[str, Any] = {"output": tmp_path / "d.sd", "loss": never}
    message = r"has no \.safetensors file, only pytorch_model\.bin; load its model and save it"
    with pytest.raises(ValueError, match=message):
        fit(base, bert_batches(1), **places)
    with pytest.raises(ValueError, match=message):
        fit(model, bert_batches(1), base=base, **places)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_a_base_that_is_not_a_safetensors_file_is_refused_before_training(tmp_path: Path) -> None:
    base = tmp_path / "base.safetensors"
    base.write_bytes(b"not weights")
    with pytest.raises(ValueError, match=r"base\.safetensors' is not a safetensors file"):
        fit(make_net(), make_inputs(1), output=tmp_path / "d.sd", base=base, loss=never)


def test_fit_refuses_another_base_before_training(tmp_path: Path) -> None:
    base = saved(make_net(seed=1), tmp_path / "base.safetensors")
    with pytest.raises(ValueError, match=r"16 of 16 components of 'first\.bias' differ") as told:
        fit(make_net(), make_inputs(1), output=tmp_path / "d.sd", base=base, loss=never)
    assert "give the checkpoint that the model was loaded from" in str(told.value)


def test_the_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    other = {name: torch.zeros(2, 2) for name in make_net().state_dict()}
    base = tmp_path / "base.safetensors"
    save_file(other, base)
    with pytest.raises(ValueError, match="is not the checkpoint of this model") as told:
        fit(make_net(), make_inputs(1), output=tmp_path / "d.sd", base=base, loss=never)
    assert "have other shapes there" in str(told.value)


@pytest.mark.parametrize("names", [["other.weight"], []])
def test_a_base_without_any_name_of_the_model_is_refused(tmp_path: Path, names: list[str]) -> None:
    base = tmp_path / "base.safetensors"
    save_file({name: torch.zeros(2) for name in names}, base)
    with pytest.raises(ValueError, match=rf"none of its {len(names)} tensors") as told:
        fit(make_net(), make_inputs(1), output=tmp_path / "d.sd", base=base, loss=never)
    assert "'first.bias'; give the checkpoint" in str(told.value)
    assert all(f"'{name}'" in str(told.value) for name in names)


def test_a_base_in_another_dtype_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = saved(make_net(), tmp_path / "base.safetensors")
    model = make_net().to(torch.bfloat16)
    model.load_state_dict(load_file(base))
    config = FitConfig(sparse_module=["first.weight"], lr=1e-2)
    batches = [batch.to(torch.bfloat16) for batch in make_inputs(1)]
    fit(model, batches, output=tmp_path / "d.sd", base=base, loss=square_loss, config=config)
    (message,) = caplog.messages
    assert (
        "6 of the model's 6 parameters as torch.float32, and the model as torch.bfloat16" in message
    )


def test_arguments_of_export_in_another_order_are_said(tmp_path: Path) -> None:
    swapped: Any = "d.sd"
    with pytest.raises(TypeError, match=r"model is of type str, .* export_delta\(model, output\)"):
        export_delta(swapped, make_net(), base=tmp_path)  # type: ignore[arg-type]


def test_a_delta_that_changes_nothing_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = make_net()
    base = saved(model, tmp_path / "base.safetensors")
    with SIFT(model, 0.1, ["first.weight"]) as sift:
        assert export_delta(model, tmp_path / "d.sd", sift=sift, base=base) == 0
    (message,) = caplog.messages
    assert "d.sd' changes no weight" in message


@pytest.mark.parametrize("place", ["frozen", "chosen", "not chosen"])
def test_export_names_the_tensor_that_differs_from_the_base(tmp_path: Path, place: str) -> None:
    first = make_net()
    model, sift = trained()
    chosen = set(sift.sparse_mapping["first.weight"].flat_index.tolist())
    name = "last.weight" if place == "frozen" else "first.weight"
    at = next(n for n in range(64) if place == "frozen" or (n in chosen) == (place == "chosen"))
    other = first.get_parameter(name).detach().clone()
    other.view(-1)[at] += 1
    base = saved(first, tmp_path / "base.safetensors", **{name: other})
    with pytest.raises(ValueError, match=rf": 1 of {other.numel()} components of '{name}' differ"):
        export_delta(model, tmp_path / "d.sd", sift=sift, base=base)
    assert not (tmp_path / "d.sd").exists()
    assert export_delta(model, tmp_path / "d.sd", base=base) > 0  # any base


def test_a_changed_structure_is_accepted(tmp_path: Path) -> None:
    """A new head, a larger tensor and a base in another dtype are accepted."""
    first = make_net()
    weights = {k: v.to(torch.float64) for k, v in snapshot(first).items() if "last" not in k}
    weights["norm.weight"] = weights["norm.weight"][:3].clone()
    save_file(weights, tmp_path / "base.safetensors")
    model, sift = trained()
    delta = tmp_path / "d.sd"
    assert export_delta(model, delta, sift=sift, base=tmp_path / "base.safetensors") > 0
    sparsedelta.apply(tmp_path / "base.safetensors", delta, tmp_path / "out.safetensors")
    assert torch.equal(
        load_file(tmp_path / "out.safetensors")["first.weight"], model.get_parameter("first.weight")
    )


def test_a_base_may_store_tied_weights_separately(tmp_path: Path) -> None:
    model = nn.ModuleDict({"a": nn.Linear(8, 8, bias=False), "b": nn.Linear(8, 8, bias=False)})
    save_file(snapshot(model), tmp_path / "base.safetensors")
    model["b"].weight = model["a"].weight
    with SIFT(model, 0.1, "weight", selection="magnitude") as sift:
        export_delta(model, tmp_path / "d.sd", sift=sift, base=tmp_path / "base.safetensors")


def test_tied_weights_are_compared_under_the_name_that_the_base_has(tmp_path: Path) -> None:
    model = nn.ModuleDict({"z": nn.Linear(8, 8, bias=False), "a": nn.Linear(8, 8, bias=False)})
    model["a"].weight = model["z"].weight
    other = snapshot(model)["z.weight"] + 1
    base = tmp_path / "base.safetensors"
    with SIFT(model, 0.1, "weight", selection="magnitude") as sift:
        save_file({"a.weight": other}, base)
        with pytest.raises(ValueError, match=r"64 of 64 components of 'a\.weight' differ"):
            check_base(model, base, sift)
        save_model(model, str(base))
        check_base(model, base, sift)


def test_a_base_may_have_the_names_of_the_state_dict_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def renamed(_: Any, state: dict[str, Tensor], *others: Any) -> dict[str, Tensor]:
        return {f"x_{name}": value for name, value in state.items()}

    model = nn.Linear(8, 8)
    model._register_state_dict_hook(renamed)
    save_file(model.state_dict(), tmp_path / "base.safetensors")
    check_base(model, tmp_path / "base.safetensors")
    (message,) = caplog.messages
    assert "2 of the model's 2 parameters, such as 'bias'; these were not compared" in message


def sharded(folder: Path, model: Any) -> None:
    model.save_pretrained(folder, max_shard_size="5KB")


def whole(folder: Path, model: Any) -> None:
    model.save_pretrained(folder)


@pytest.mark.parametrize("save", [whole, sharded])
def test_every_file_of_a_folder_is_compared(
    tmp_path: Path, save: Callable[[Path, Any], None]
) -> None:
    import transformers

    load: Any = transformers.BertForSequenceClassification
    model = load.from_pretrained(make_bert(tmp_path / "made", torch.bfloat16))
    save(tmp_path / "base", model)
    config = FitConfig(sparse_module=["query"], lr=1e-2)
    arguments: dict[str, Any] = {"config": config, "base": tmp_path / "base", "overwrite": True}
    assert fit(model, bert_batches(1), output=tmp_path / "d.sd", **arguments).nnz > 0
    with pytest.raises(ValueError, match=r"of 'bert\.encoder\.layer\..*query\..*' differ"):
        fit(model, bert_batches(1), output=tmp_path / "d.sd", **arguments)  # trained now


def test_the_trainer_refuses_another_base_before_training(tmp_path: Path) -> None:
    import transformers

    class Trainer(SiftTrainerMixin, transformers.Trainer):
        pass

    base = make_bert(tmp_path / "base", torch.float32)
    load: Any = transformers.BertForSequenceClassification
    model = load.from_pretrained(base)
    with torch.no_grad():
        model.classifier.weight[0, 0] += 1
    arguments: Any = transformers.TrainingArguments(output_dir=str(tmp_path / "run"), use_cpu=True)
    with (
        SIFT(model, 0.1, "query") as sift,
        pytest.raises(ValueError, match=r"1 of 48 components of 'classifier\.weight' differ"),
    ):
        Trainer(model, arguments, train_dataset=bert_batches(1), sift=sift, base=base)


def test_a_wrong_base_is_found_under_a_prefix_too(tmp_path: Path) -> None:
    import transformers

    base = make_bert(tmp_path / "base", torch.float32)
    encoder: Any = transformers.AutoModel.from_pretrained(base)
    encoder.save_pretrained(tmp_path / "encoder")
    classifier: Any = transformers.BertForSequenceClassification
    model = classifier.from_pretrained(tmp_path / "encoder", num_labels=3)
    with torch.no_grad():
        model.bert.encoder.layer[0].output.dense.bias += 1
    with pytest.raises(ValueError, match=r"'encoder\.layer\.0\.output\.dense\.bias' differ"):
        fit(model, bert_batches(1), base=tmp_path / "encoder", output=tmp_path / "d.sd", loss=never)


def mixture(folder: Path) -> Any:
    """Save a tiny mixture of experts, which has one tensor for each expert on disk; return it."""
    import transformers

    make_config: Any = transformers.Qwen3MoeConfig
    config = make_config(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        moe_intermediate_size=8,
        num_experts=4,
        num_experts_per_tok=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_hidden_layers=2,
        head_dim=8,
    )
    torch.manual_seed(0)
    model: Any = transformers.Qwen3MoeForCausalLM(config)
    model = model.bfloat16()
    model.save_pretrained(folder)
    return transformers.Qwen3MoeForCausalLM.from_pretrained(folder, dtype="auto")


def tokens() -> list[dict[str, Tensor]]:
    ids = torch.randint(0, 32, (2, 16), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": ids, "labels": ids}] * 2


@pytest.mark.parametrize("kind", ["gate_up_proj", "down_proj"])
def test_fused_experts_are_compared(tmp_path: Path, kind: str) -> None:
    model = mixture(tmp_path / "base")
    config = FitConfig(sparse_rate=0.05, sparse_module=["q_proj", "experts"], lr=1e-2)
    arguments: dict[str, Any] = {"config": config, "base": tmp_path / "base"}
    with torch.no_grad():
        dict(model.named_parameters())[f"model.layers.1.mlp.experts.{kind}"][3, 2, 1] += 1
    one = "gate" if kind == "gate_up_proj" else "down"
    with pytest.raises(
        ValueError,
        match=rf": 1 of 128 components of 'model.layers.1.mlp.experts.3.{one}_proj.weight'",
    ):
        fit(model, tokens(), output=tmp_path / "d.sd", loss=never, **arguments)
    again = mixture(tmp_path / "base")
    result = fit(again, tokens(), output=tmp_path / "d.sd", **arguments)
    assert 0 < result.nnz <= result.n_trained


def test_trained_experts_are_compared_as_they_were(tmp_path: Path) -> None:
    model = mixture(tmp_path / "base")
    with SIFT(model, 0.1, ["experts"]) as sift:
        optimizer = torch.optim.AdamW(sift.parameters_in_optimizer(), lr=1e-2)
        model(**tokens()[0]).loss.backward()
        optimizer.step()
        nnz = export_delta(model, tmp_path / "d.sd", sift=sift, base=tmp_path / "base")
        assert 0 < nnz <= sift.n_trained
        path = tmp_path / "base" / "model.safetensors"
        weights = load_file(path)
        name = "model.layers.0.mlp.experts.1.up_proj.weight"
        weights[name][0, 0] += 1
        save_file(weights, path, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=f": 1 of 128 components of '{name}' differ"):
            export_delta(model, tmp_path / "e.sd", sift=sift, base=tmp_path / "base")


def test_what_is_not_compared_is_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import core_model_loading

    def fails(*given: Any) -> Any:
        raise RuntimeError("no such conversion")

    model = mixture(tmp_path / "base")
    config = FitConfig(sparse_rate=0.05, sparse_module=["q_proj"], lr=1e-2)
    fit(model, tokens(), output=tmp_path / "d.sd", config=config, base=tmp_path / "base")
    assert not caplog.messages
    model = mixture(tmp_path / "base")
    monkeypatch.setattr(core_model_loading, "revert_weight_conversion", fails)
    monkeypatch.setattr(model, "save_pretrained", lambda folder: mixture(folder))
    fit(model, tokens(), output=tmp_path / "e.sd", config=config, base=tmp_path / "base")
    message, unchanged = caplog.messages
    assert "changes no weight" in unchanged  # of what was saved
    assert (
        "4 of the model's 25 parameters, such as 'model.layers.0.mlp.experts.down_proj'" in message
    )


def test_base_of_a_sentence_transformer_is_compared(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("sentence_transformers")
    import transformers
    from sentence_transformers import SentenceTransformer

    encoder: Any = transformers.AutoModel.from_pretrained(
        make_bert(tmp_path / "made", torch.float32)
    )
    encoder.save_pretrained(tmp_path / "base")
    tokenizer: Any = transformers.BertTokenizer
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]))
    tokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "base")
    model = SentenceTransformer(str(tmp_path / "base"), device="cpu")
    caplog.clear()
    with SIFT(model, 0.1, ["query"]) as sift:
        check_base(model, tmp_path / "base", sift)
        assert not caplog.messages
        name = "encoder.layer.1.output.dense.weight"
        weights = load_file(tmp_path / "base" / "model.safetensors")
        weights[name][0, 0] += 1
        save_file(weights, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=f": 1 of 512 components of '{name}' differ"):
            check_base(model, tmp_path / "base", sift)
