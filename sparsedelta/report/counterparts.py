"""Why tensors of a target have no counterpart in its base: the likeliest cause, from names alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable


def no_counterpart(added: Collection[str], removed: Collection[str], *, is_adapter: bool) -> str:
    """Return the likely cause, and the way out, as a clause.

    Args:
        added: names that only the target has; at least one.
        removed: names that only the base has.
        is_adapter: the target is a PEFT adapter.
    """
    if is_adapter:
        return "the target is a PEFT adapter: merge it into the base and save that model"
    found = _common_prefix(added, removed)
    if found:
        prefix, holder = found
        return (
            f"{holder}'s names begin with {prefix!r}: save the model without what wraps it"
            " (torch.compile, DataParallel, a head)"
        )
    return "none of their names is in the base: is this the right base?"


def _common_prefix(added: Collection[str], removed: Collection[str]) -> tuple[str, str] | None:
    """Return the prefix that most names differ by, and which side has it; None if few do."""
    votes = Counter((prefix, "the target") for prefix in _prefixes(added, set(removed)))
    votes += Counter((prefix, "the base") for prefix in _prefixes(removed, set(added)))
    if not votes:
        return None
    best, n = votes.most_common(1)[0]
    return best if 2 * n > len(added) else None


def _prefixes(names: Iterable[str], others: Collection[str]) -> Iterable[str]:
    """Yield for each name every prefix of whole parts without which it is one of ``others``."""
    for name in names:
        start = name.find(".") + 1
        while start:
            if name[start:] in others:
                yield name[:start]
            start = name.find(".", start) + 1
