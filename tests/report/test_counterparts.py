"""The likeliest cause of tensors without a counterpart."""

from __future__ import annotations

import pytest

from sparsedelta.report.counterparts import no_counterpart

NAMES = [f"layers.{i}.w" for i in range(4)]


@pytest.mark.parametrize("prefix", ["model.", "module.", "_orig_mod.", "base_model.model."])
def test_prefix_is_found_on_either_side(prefix: str) -> None:
    longer = [prefix + name for name in NAMES]
    assert f"the target's names begin with {prefix!r}" in no_counterpart(
        longer, NAMES, is_adapter=False
    )
    assert f"the base's names begin with {prefix!r}" in no_counterpart(
        NAMES, longer, is_adapter=False
    )


def test_other_causes() -> None:
    assert "PEFT adapter" in no_counterpart(["a"], NAMES, is_adapter=True)
    assert "right base" in no_counterpart(["a.b"], NAMES, is_adapter=False)
    few = ["model." + NAMES[0], "x", "y", "z"]
    assert "right base" in no_counterpart(few, NAMES, is_adapter=False)
