"""Find out how deltas are related: a chain, siblings of one base, or neither."""

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
    """Return "chain" or "siblings".

    Deltas are a chain if each was made from the target of the one before it, and siblings if all were
    made from the same base.

    Raises:
        ConflictError: they are neither; the message names a tensor that does not fit.
        ValueError: ``deltas`` is empty.
    """
    if not deltas:
        raise ValueError("no delta is given; give at least one")
    siblings = all(base_conflict(deltas[0], delta) is None for delta in deltas[1:])
    gap = next((i for i, (a, b) in enumerate(itertools.pairwise(deltas)) if first_gap(a, b)), None)
    if gap is None and not (siblings and not _may_be_chain(deltas)):
        return "chain"
    if siblings:
        return "siblings"
    raise _conflict(deltas, gap or 0)


def base_files(delta: Delta) -> list[SideFile]:
    """Return the side files that the target takes from the base."""
    return [file for file in delta.target.side_files if not file.stored]


def _may_be_chain(deltas: Sequence[Delta]) -> bool:
    """Return whether to treat deltas as a chain although they could also be siblings.

    The answer is no if a delta takes a side file from its base that the target before it lacks. It is
    also no if a target has an unknown digest, because its tensor may differ from the next delta's base.
    """
    for one, following in itertools.pairwise(deltas):
        if any(row.target.digest is None for row in one.tensors):
            return False
        digests = {file.path: file.digest for file in one.target.side_files}
        if any(digests.get(file.path) != file.digest for file in base_files(following)):
            return False
    return True


def _conflict(deltas: Sequence[Delta], gap: int) -> ConflictError:
    one, following = deltas[gap], deltas[gap + 1]
    order = _order(deltas)
    retyped = _retyped(one, following)
    if retyped and not order:
        name, before, after = retyped
        return ConflictError(
            f"tensor {name!r} is {before} in the target of delta {gap + 1} and {after} in the base of delta {gap + 2}; make both"
            " from models of one dtype, or give the delta between them that changes the dtype",
            tensor=name,
        )
    missing = first_gap(one, following)
    name = missing.name if missing else ""
    advice = (
        f"they are a chain in the order {', '.join(str(n + 1) for n in order)}"
        if order
        else "a delta is missing between them, or one does not belong to them"
    )
    return ConflictError(
        f"tensor {name!r}: delta {gap + 2} was not made from the target of delta {gap + 1}, and not all"
        f" deltas were made from the same base; {advice}",
        tensor=name,
    )


def _retyped(one: Delta, following: Delta) -> tuple[str, str, str] | None:
    """Return the name and both dtypes of a tensor that ``following`` needs in another dtype than ``one`` leads to."""
    dtypes = {row.name: row.target.dtype.name for row in one.tensors}
    for base in (row.base for row in following.tensors if row.base):
        if dtypes.get(base.name, base.spec.dtype.name) != base.spec.dtype.name:
            return base.name, dtypes[base.name], base.spec.dtype.name
    return None


def _order(deltas: Sequence[Delta]) -> list[int]:
    """Return the order in which deltas are a chain, by their places; empty if there is none."""
    for start in range(len(deltas)):
        order = [start]
        while len(order) < len(deltas):
            rest = (n for n in range(len(deltas)) if n not in order)
            following = next((n for n in rest if not first_gap(deltas[order[-1]], deltas[n])), None)
            if following is None:
                break
            order.append(following)
        else:
            return order
    return []
