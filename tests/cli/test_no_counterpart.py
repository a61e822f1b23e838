"""The likely cause, as ``diff`` reports it, of tensors that have no counterpart in the base."""

from __future__ import annotations

import pytest

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
    assert "names" not in found


@pytest.mark.parametrize("prefix", ["bert.", "model.encoder."])
def test_another_dtype_below_a_prefix_is_named(prefix: str) -> None:
    below = {prefix + name: "F32" for name in BASE}
    for added, base in (({**below, "head": "F32"}, BASE), (BASE, below)):
        found = no_counterpart(added, base)
        assert "instead of" in found
        assert f"with other names (prefix '{prefix}')" in found


def test_another_base() -> None:
    assert "right base" in no_counterpart({"a.b": "F32"}, BASE)
