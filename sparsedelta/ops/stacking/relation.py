"""How deltas relate: a chain, siblings of one base, or neither."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Literal, TypeAlias

from sparsedelta.errors import ConflictError
from sparsedelta.format.delta import Delta
from sparsedelta.format.records import SideFile
from sparsedelta.ops.apply import first_gap
from sparsedelta.ops.lookup import base_conflict

Relation: TypeAlias = Literal["chain", "siblings"]


def relation(deltas: Sequence[Delta]) -> Relation:
    """Return whether each delta was made from the target of the one before it, or all from one base.

    Raises:
        ConflictError: neither; the message names a tensor in which two do not meet.
        ValueError: there is none.
    """
    if not deltas:
        raise ValueError("no delta is given; give at least one")
    siblings = all(base_conflict(deltas[0], delta) is None for delta in deltas[1:])
    gap = next((i for i, (a, b) in enumerate(itertools.pairwise(deltas)) if first_gap(a, b)), None)
    if gap is None and not (siblings and not _follow(deltas)):
        return "chain"
    if siblings:
        return "siblings"
    raise _conflict(deltas, gap or 0)


def base_files(delta: Delta) -> list[SideFile]:
    """Return the side files that the target takes from the base."""
    return [file for file in delta.target.side_files if not file.stored]


def _follow(deltas: Sequence[Delta]) -> bool:
    """Return whether what was made from one base may nevertheless be a chain.

    Not if a delta takes a file from its base that the target before it lacks, or if only an unknown
    digest of that target hides that it has other tensors.
    """
    for one, following in itertools.pairwise(deltas):
        if any(row.target.digest is None for row in one.tensors):
            return False
        there = {file.path: file.digest for file in one.target.side_files}
        if any(there.get(file.path) != file.digest for file in base_files(following)):
            return False
    return True


def _conflict(deltas: Sequence[Delta], gap: int) -> ConflictError:
    missing = first_gap(deltas[gap], deltas[gap + 1])
    name = missing.name if missing else ""
    return ConflictError(
        f"delta {gap + 2} was made from another tensor {name!r} than delta {gap + 1} makes, and not all"
        f" were made from one base; {_advice(deltas)}",
        tensor=name,
    )


def _advice(deltas: Sequence[Delta]) -> str:
    for start in range(len(deltas)):
        order = [start]
        while len(order) < len(deltas):
            rest = (n for n in range(len(deltas)) if n not in order)
            following = next((n for n in rest if not first_gap(deltas[order[-1]], deltas[n])), None)
            if following is None:
                break
            order.append(following)
        else:
            return f"they are a chain in the order {', '.join(str(n + 1) for n in order)}"
    return "a delta between them is missing, or one does not belong here"
