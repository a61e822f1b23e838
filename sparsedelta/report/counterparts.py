"""Why tensors of a target are made from none of its base: the likeliest cause, from names and dtypes."""

from __future__ import annotations

from collections.abc import Mapping


def no_counterpart(added: Mapping[str, str], base: Mapping[str, str], *, is_adapter: bool) -> str:
    """Return the likely cause, and the way out, as a clause.

    Args:
        added: dtype by name of the target's tensors that are made from none of the base; at least one.
        base: dtype by name of the base's tensors.
        is_adapter: the target is a PEFT adapter.
    """
    if is_adapter:
        return "the target is a PEFT adapter: merge it into the base and save that model"
    pairs = {(base[name], dtype) for name, dtype in added.items() if name in base}
    if pairs:
        before, after = min(pairs)
        return (
            f"the base has them in another dtype or shape ({before} for {after}): convert one of the two"
            " and diff again for a small delta"
        )
    return "none of their names is in the base: is this the right base?"
