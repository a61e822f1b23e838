"""The names of a delta's tensors in a model: given by the user, equal, or equal but for one prefix."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from sparsedelta._typing import Names
from sparsedelta.errors import StructureMismatch
from sparsedelta.format.records import TensorKey
from sparsedelta.live.slots import Slot
from sparsedelta.live.wrappers import plain_name

_N_TRIED = 8  # missing names that are tried to find a common prefix


def renamed(key: TensorKey, names: Names) -> str | None:
    """Return the name that the user gave to a tensor of a delta; its own name if none; None to leave it out."""
    if names is None:
        return key[1]
    if callable(names):
        return names(key[1])
    return names[key] if key in names else names.get(key[1], key[1])


def name_converter(
    changed: Sequence[str], slots: Mapping[str, Slot], *, closed: bool
) -> Callable[[str], str]:
    """Return a function from a name in the delta to the name in the model.

    Either the names are equal, or one prefix is removed from all names, or one is added.

    Args:
        changed: names in the delta of the tensors that it changes.
        slots: the tensors of the model by name.
        closed: the names must be equal; no prefix is tried.

    Raises:
        StructureMismatch: no prefix, or more than one, fits all changed tensors.
    """
    changed = list(dict.fromkeys(changed))
    missing = [name for name in changed if name not in slots]
    if not missing:
        return lambda name: name
    tried = () if closed else missing[:: len(missing) // _N_TRIED + 1]
    prefixes = {pair for name in tried for pair in _prefixes(name, slots)}
    not_found = {
        pair: [name for name in changed if _converted(name, pair) not in slots] for pair in prefixes
    }
    fewest = min(map(len, not_found.values()), default=len(missing))
    best = sorted(pair for pair in prefixes if len(not_found[pair]) == fewest)
    if len(best) == 1 and not fewest:
        return lambda name: _converted(name, best[0])
    if best and not fewest:
        shown = " and ".join(repr(_converted(missing[0], pair)) for pair in best)
        problem = f"tensor {missing[0]!r}, which the delta changes, may be one of several in the model, {shown}"
    else:
        missing = not_found[best[0]] if best else missing
        more = f", nor are {len(missing) - 1} more" if len(missing) > 1 else ""
        problem = f"tensor {missing[0]!r}, which the delta changes, is not in the model{more}"
    raise StructureMismatch(
        f"{problem}; give the model's names, and None for tensors to leave out (names)",
        tensor=missing[0],
        expected=missing[0],
        found="absent",
    )


def _prefixes(name: str, slots: Mapping[str, Slot]) -> Iterator[tuple[str, str]]:
    """Yield pairs (prefix to remove, prefix to add) that turn ``name`` into a name in the model."""
    for own in slots:
        if own.endswith("." + name) and own == plain_name(own):
            yield "", own.removesuffix(name)
    parts = name.split(".")
    for n_cut in range(1, len(parts)):
        if ".".join(parts[n_cut:]) in slots:
            yield ".".join(parts[:n_cut]) + ".", ""


def _converted(name: str, prefixes: tuple[str, str]) -> str:
    remove, add = prefixes
    return add + name.removeprefix(remove)
