"""All orders of a few parties, and many random ones of more: what the protocol promises holds in every state.

The properties are checked by the simulation (a visible version can be read until its segment is closed, nothing that a
follower leases is deleted, entries never change) and by the parties (a follower holds the bits of the version that it
reports and never goes back, a publisher's copy moves only with its version). At every end each follower reaches the head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from blake3 import blake3
from channel.parties import CatchUp, disk_with, follower, prefilled, pruner, publisher, quick
from channel.simulation import Faults, Party, Simulation, Violation

from sparsedelta.channel import leases
from sparsedelta.channel.entry import Anchor, Entry
from sparsedelta.channel.layout import slot_name
from sparsedelta.channel.objects import put
from sparsedelta.format.strict_json import compact_json

THREE = ("w1", "w2", "w3")  # version 1 and version 3 begin a segment
AT_1 = disk_with(prefilled(*THREE), 1, "w1")  # reads version 2 of the first segment

Configuration = tuple[dict[str, Party], tuple[str, ...], Faults]
FEW: dict[str, Configuration] = {
    "a publisher": ({"p": publisher("p", ["w1", "w2"])}, (), Faults(2)),
    "a follower": ({"f": follower("f")}, THREE, Faults(2)),
    "two publishers": (
        {"p": publisher("p", ["w1"]), "q": publisher("q", ["v1"])},
        (),
        Faults(1),
    ),
    "publisher and follower": (
        {"p": publisher("p", ["w1", "w2"]), "f": follower("f")},
        (),
        Faults(1, frozenset({"killed", "late error"})),
    ),
    "pruner and follower": (
        {"r": pruner(1), "f": follower("f", n_syncs=1, disk=AT_1)},
        THREE,
        Faults(0, ticks=1),
    ),
    "publisher, follower and pruner": (
        {
            "p": publisher("p", ["w4"], start="w3"),
            "f": follower("f", n_syncs=1, disk=AT_1),
            "r": pruner(1),
        },
        THREE,
        Faults(),
    ),
    "two pruners and a follower": (
        {"r": pruner(1), "s": pruner(1), "f": follower("f", n_syncs=1, disk=AT_1)},
        THREE,
        Faults(),
    ),
    "a pruner and two followers": (
        {
            "r": pruner(1),
            "f": follower("f", n_syncs=1, disk=AT_1),
            "g": follower("g", n_syncs=1, disk=AT_1),
        },
        THREE,
        Faults(),
    ),
}


@pytest.fixture(autouse=True)
def quickly() -> Iterator[None]:
    with quick():
        yield


def simulation(configuration: Configuration) -> Simulation:
    parties, words, faults = configuration
    return Simulation(parties, objects=prefilled(*words), faults=faults)


def crowd() -> Simulation:
    """Return everybody at once, with many faults."""
    parties = {
        "p": publisher("p", ["w4", "w5", "w6"], start="w3"),
        "q": publisher("q", ["v4"], start="w3"),
        "f": follower("f", n_syncs=3, disk=AT_1),
        "g": follower("g", n_syncs=3),
        "r": pruner(1),
        "s": pruner(2),
    }
    return Simulation(parties, objects=prefilled(*THREE), faults=Faults(4, ticks=1))


@pytest.mark.parametrize("name", FEW)
def test_all_orders(name: str) -> None:
    found = simulation(FEW[name])
    assert found.explore(CatchUp(found)) > 200


@pytest.mark.parametrize("name", FEW)
def test_random_orders_with_more_faults(name: str) -> None:
    parties, words, _ = FEW[name]
    found = Simulation(parties, objects=prefilled(*words), faults=Faults(2, ticks=1))
    on_end = CatchUp(found)
    assert sum(found.walk(seed, on_end) for seed in range(40)) > 400


def test_random_orders_of_everybody() -> None:
    found = crowd()
    on_end = CatchUp(found)
    assert sum(found.walk(seed, on_end) for seed in range(60)) > 3000


def take_lease_without_looking_again(channel: Any, segment: int, holder: str) -> int | None:
    if leases.is_closed(channel, segment):
        return None
    until: int = channel.now + leases.LEASE_SECONDS
    content = compact_json({"holder": holder, "until": until})
    at = leases._first_missing(channel, segment)
    while not leases._create(channel, slot_name(segment, at), content):
        at += 1
    return until


def close_at_once(channel: Any, segment: int) -> bool:
    slot = leases._read(channel, segment, 0)
    if slot and not slot.is_closed and slot.until > channel.now - 60:
        return False
    channel.store.write(slot_name(segment, 0), leases._CLOSED)
    return True


def finish_and_move_first(run: Any) -> Entry | None:
    pending = run._pending
    if pending is None:
        return None
    run._source.advance(pending.change)
    found: Entry = run._created(pending.entry)
    run._head, run._is_at_head, run._pending = found, True, None
    return found


def finish_without_looking_whose_it_is(run: Any) -> Entry | None:
    pending = run._pending
    if pending is None:
        return None
    found: Entry = run._created(pending.entry)
    run._source.advance(pending.change)
    run._head, run._is_at_head, run._pending = found, True, None
    return pending.entry  # type: ignore[no-any-return]


def entry_before_objects(run: Any, captured: Any, change: Any, target: bytes) -> Entry:
    head = run._head
    version = head.version + 1 if head else 1
    anchor, _, _ = captured.weights.anchor()
    raw = b"".join(anchor.blocks())
    entry = Entry(
        version, head.digest if head else None, run.id, 0, captured.step, target, version, None,
        Anchor(blake3(raw).digest(), len(raw), None), captured.info,
    )  # fmt: skip
    run._created(entry)
    put(run._channel, "anchors", version, anchor.blocks())
    return entry


BROKEN: dict[str, tuple[str, Callable[..., Any], str]] = {
    "a lease without looking again": (
        "following.take_lease", take_lease_without_looking_again, "two pruners and a follower"
    ),
    "a segment is closed in its first slot": (
        "pruning.close", close_at_once, "a pruner and two followers"
    ),
    "the copy moves first": (
        "publishing.Run._finish", finish_and_move_first, "two publishers"
    ),
    "a conflict counts as success": (
        "publishing.Run._finish", finish_without_looking_whose_it_is, "two publishers"
    ),
    "the entry comes first": (
        "publishing.Run._entry", entry_before_objects, "publisher and follower"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_protocol_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    what, instead, configuration = BROKEN[name]
    monkeypatch.setattr(f"sparsedelta.channel.{what}", instead)
    with quick():  # again, so that the leases of the broken protocol are noted
        found = simulation(FEW[configuration])
        with pytest.raises(Violation):
            found.explore(CatchUp(found), limit=100_000)
