"""The likely cause, as ``diff`` reports it, of tensors that have no counterpart in the base."""

from __future__ import annotations

from sparsedelta.cli.diff import no_counterpart

BASE = {f"layers.{i}.w": "BF16" for i in range(4)}


def test_an_adapter_is_named() -> None:
    assert "PEFT adapter" in no_counterpart({"a": "F32"}, BASE, is_adapter=True)


def test_another_dtype_is_named() -> None:
    found = no_counterpart({"layers.1.w": "F32", "new": "I8"}, BASE, is_adapter=False)
    assert "(BF16 instead of F32)" in found
    assert "convert one of the checkpoints" in found


def test_another_base() -> None:
    assert "right base" in no_counterpart({"a.b": "F32"}, BASE, is_adapter=False)
