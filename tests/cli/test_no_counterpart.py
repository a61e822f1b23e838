"""The likely cause, as ``diff`` reports it, of tensors that have no counterpart in the base."""

from __future__ import annotations

from sparsedelta.cli._written import no_counterpart

ADAPTER = "base_model.model.layers.0.w.lora_A.weight"
BASE = {f"layers.{i}.w": "BF16" for i in range(4)}


def test_an_adapter_is_named() -> None:
    assert "PEFT adapter" in no_counterpart({ADAPTER: "F32"}, BASE)


def test_an_adapter_as_base_is_named() -> None:
    found = no_counterpart({"layers.1.w": "F32"}, {ADAPTER: "F32"})
    assert found == "the base is a PEFT adapter: give the model that it was trained on"


def test_another_dtype_is_named() -> None:
    found = no_counterpart({"layers.1.w": "F32", "new": "I8"}, BASE)
    assert "(BF16 instead of F32)" in found
    assert "convert one of the checkpoints" in found


def test_another_base() -> None:
    assert "right base" in no_counterpart({"a.b": "F32"}, BASE)
