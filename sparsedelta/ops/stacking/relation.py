"""How deltas relate by their fingerprints: a chain, siblings of one base, or neither."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Literal, TypeAlias

from sparsedelta.errors import ConflictError
from sparsedelta.format.delta import Delta
from sparsedelta.format.records import SideFile

Relation: TypeAlias = Literal["chain", "siblings"]


def relation(deltas: Sequence[Delta]) -> Relation:
    """Return whether each delta was made from the target of the one before it, or all from one base.

    Raises:
        ConflictError: neither; the message names the two fingerprints that do not meet.
        ValueError: there is none.
    """
    if not deltas:
        raise ValueError("no delta is given; give at least one")
    siblings = len({delta.base.fingerprint for delta in deltas}) == 1
    gap = _first_gap(deltas)
    if gap is None and not (siblings and len(deltas) > 1 and not _files_follow(deltas)):
        return "chain"
    if siblings:
        return "siblings"
    raise _conflict(deltas, gap or 0)


def base_files(delta: Delta) -> list[SideFile]:
    """Return the side files that the target takes from the base."""
    return [file for file in delta.target.side_files if not file.carried]


def _first_gap(deltas: Sequence[Delta]) -> int | None:
    for index, (one, following) in enumerate(itertools.pairwise(deltas)):
        if one.target.fingerprint != following.base.fingerprint:
            return index
    return None


def _files_follow(deltas: Sequence[Delta]) -> bool:
    """Return whether each delta finds the files it takes from its base in the target before it.

    Deltas that change no tensor are a chain and siblings by their fingerprints; files tell which.
    """
    for one, following in itertools.pairwise(deltas):
        there = {file.path: file.digest for file in one.target.side_files}
        if any(there.get(file.path) != file.digest for file in base_files(following)):
            return False
    return True


def _conflict(deltas: Sequence[Delta], gap: int) -> ConflictError:
    one, following = deltas[gap], deltas[gap + 1]
    made, wanted = one.target.fingerprint, following.base.fingerprint
    if made is None:
        return ConflictError(
            f"the fingerprint of delta {gap + 1}'s target is not known, delta {gap + 2} was made from"
            f" {wanted.hex()[:12]}…; make delta {gap + 1} again with its base (--base)",
            expected=wanted.hex(),
        )
    return ConflictError(
        f"delta {gap + 1} makes {made.hex()[:12]}…, but delta {gap + 2} was made from"
        f" {wanted.hex()[:12]}…; {_advice(deltas)}",
        expected=wanted.hex(),
        found=made.hex(),
    )


def _advice(deltas: Sequence[Delta]) -> str:
    nexts = {delta.base.fingerprint: number for number, delta in enumerate(deltas)}
    if len(nexts) == len(deltas):
        targets = {delta.target.fingerprint for delta in deltas}
        starts = [n for n, delta in enumerate(deltas) if delta.base.fingerprint not in targets]
        order = _walk(deltas, nexts, starts[0] if starts else 0)
        if len(order) == len(deltas):
            shown = ", ".join(str(number + 1) for number in order)
            if starts:
                return f"they are a chain in the order {shown}"
            return f"they are a cycle, {shown} and so on; begin with the one made from your base"
    return "a delta between them is missing, or one does not belong here"


def _walk(deltas: Sequence[Delta], nexts: dict[bytes, int], start: int) -> list[int]:
    order = [start]
    while True:
        fingerprint = deltas[order[-1]].target.fingerprint
        following = None if fingerprint is None else nexts.get(fingerprint)
        if following is None or following in order:
            return order
        order.append(following)
