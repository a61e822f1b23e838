"""The real protocol under a scheduler that owns every call of the store.

A party is a function that calls a store. It is run again from its beginning with the answers that its calls were given so
far, up to the first call that has none: so a history of answers is the whole state of a party, and what is explored are
states: a history of each party, and what the store holds. At every call any party may run next, be killed before or
after it, get an error although it took place, or see an old list.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any

from sparsedelta.channel.layout import object_version
from sparsedelta.stores.stream import Stream

Objects = Mapping[str, bytes]
Answer = tuple[str, Any]  # "value", "error" or "killed"


@dataclass(frozen=True)
class Call:
    """What a party asks of the world."""

    kind: str  # read, create, write, delete, list; clock, note, claim: not seen by others, and answered at once
    name: str = ""
    content: bytes = b""


class Paused(BaseException):
    """A party has come to a call that has no answer yet."""

    def __init__(self, call: Call) -> None:
        self.call = call


class Killed(BaseException):
    """A party's process was killed."""


class Violation(AssertionError):
    """A property does not hold; with what has led there."""


class SimStore:
    """A store whose calls are answered by a script (``sparsedelta.stores.objects.ObjectStore``)."""

    name = "sim"
    writable = True
    has_create = True

    def __init__(self, answers: Sequence[Answer]) -> None:
        self._answers = answers
        self._at = 0
        self._is_killed = False

    def call(self, call: Call) -> Any:
        if self._is_killed:
            raise Killed
        if self._at == len(self._answers):
            raise Paused(call)
        kind, value = self._answers[self._at]
        self._at += 1
        if kind == "killed":
            self._is_killed = True
            raise Killed
        if kind == "error":
            raise OSError("the store failed")
        return value

    def revive(self) -> None:
        """Begin a new process after one was killed."""
        self._is_killed = False

    def read(self, name: str, max_bytes: int) -> bytes | None:
        found: bytes | None = self.call(Call("read", name))
        return found

    def open(self, name: str) -> Stream | None:
        found = self.call(Call("read", name))
        return None if found is None else Stream(BytesIO(found))

    def create(self, name: str, content: Any) -> bool:
        return bool(self.call(Call("create", name, content)))

    def write(self, name: str, content: Any) -> None:
        self.call(Call("write", name, content))

    def delete(self, name: str) -> None:
        self.call(Call("delete", name))

    def list(self, prefix: str) -> list[str]:
        return [*self.call(Call("list", prefix))]

    def close(self) -> None:
        pass


Party = Callable[[SimStore], object]


@dataclass(frozen=True)
class World:
    """What all parties share.

    Attributes:
        objects: the store's, by name.
        clock: seconds.
        leases: what followers believe to hold: (holder, segment, until).
    """

    objects: frozenset[tuple[str, bytes]]
    clock: int = 1_000_000
    leases: frozenset[tuple[str, int, int]] = frozenset()


@dataclass
class History:
    """The answers that a party was given, and what it does next."""

    answers: tuple[Answer, ...]
    next: Call | None = None  # None: it has ended
    result: object = None
    children: dict[Answer, History] = field(default_factory=dict)


@dataclass(frozen=True)
class State:
    """A point of a run."""

    world: World
    parties: tuple[int, ...]  # histories, by number
    faults: int  # that may still happen
    ticks: int  # times that the clock may still jump


@dataclass(frozen=True)
class Faults:
    """What may go wrong, and how often in all."""

    budget: int = 0
    kinds: frozenset[str] = frozenset({"killed", "error", "late error", "late kill", "old list"})
    ticks: int = 0
    tick_seconds: int = 2 * 60 * 60


class Simulation:
    """Parties, a store and what may go wrong."""

    def __init__(
        self, parties: Mapping[str, Party], *, objects: Objects | None = None, faults: Faults
    ) -> None:
        self.names = [*parties]
        self._parties = [*parties.values()]
        self._faults = faults
        self._histories: list[History] = []
        self._numbers: dict[tuple[int, int, Answer], int] = {}
        self._worlds: dict[tuple[World, Call], World] = {}
        self._old_lists = (frozenset(objects or {}), frozenset[str]())
        world = World(frozenset((objects or {}).items()))
        self.start = State(world, (), faults.budget, faults.ticks)
        for index in range(len(self._parties)):
            number = self._new_history(index, ())
            self.start = State(
                self.start.world,
                (*self.start.parties, number),
                faults.budget,
                faults.ticks,
            )
            self.start = self._settled(self.start, index)

    def explore(self, on_end: Callable[[State], None], limit: int | None = None) -> int:
        """Visit all states that can be reached, or ``limit`` of them; return how many.

        Raises:
            Violation: a property does not hold; with what has led there.
        """
        came_from: dict[State, tuple[State, str] | None] = {self.start: None}
        todo = [self.start]
        while todo and (limit is None or len(came_from) < limit):
            state = todo.pop()
            try:
                is_end = True
                for step, new in self.following(state):
                    is_end = False
                    if new not in came_from:
                        came_from[new] = state, step
                        todo.append(new)
                if is_end:
                    on_end(state)
            except AssertionError as error:
                raise Violation("\n".join([*_path(came_from, state), str(error)])) from error
        return len(came_from)

    def walk(self, seed: int, on_end: Callable[[State], None] | None = None) -> int:
        """Go one way at random to the end; return how many steps it took."""
        choose = random.Random(seed)
        state, steps = self.start, []
        try:
            while True:
                following = [*self.following(state)]
                if not following:
                    break
                plain = [one for one in following if one[1].faults == state.faults]
                chosen = plain if plain and choose.random() < 0.95 else following
                step, state = choose.choice(chosen)
                steps.append(step)
            if on_end:
                on_end(state)
        except AssertionError as error:
            raise Violation(f"seed {seed}: {error}\n" + "\n".join(steps)) from error
        return len(steps)

    def following(self, state: State) -> Iterator[tuple[str, State]]:
        """Yield what may happen next: a description, and the state then.

        A read of an object that is there for ever is no matter of order: the party that does so goes first.
        """
        for index, number in enumerate(state.parties):
            if _is_constant(state.world, self._histories[number].next):
                yield from self._steps(state, index)
                return
        if state.ticks and any(self._histories[number].next for number in state.parties):
            world = state.world
            later = World(world.objects, world.clock + self._faults.tick_seconds, world.leases)
            yield "time passes", State(later, state.parties, state.faults, state.ticks - 1)
        for index in range(len(state.parties)):
            yield from self._steps(state, index)

    def _steps(self, state: State, index: int) -> Iterator[tuple[str, State]]:
        """Yield what one party may do next."""
        call = self._histories[state.parties[index]].next
        if call is None:
            return
        for label, answer, happens, cost in self._outcomes(state, call):
            world = self._after(state.world, call) if happens else state.world
            if answer is None:
                answer = "value", self._value(state.world, call)
            new = self._moved(state, index, world, answer, cost)
            yield f"{self.names[index]}: {label} {call.kind} {call.name}", new

    def results(self, state: State) -> list[object]:
        """Return what each party has returned; None: it has not ended."""
        return [self._histories[number].result for number in state.parties]

    def _outcomes(self, state: State, call: Call) -> Iterator[tuple[str, Answer | None, bool, int]]:
        yield "", None, True, 0
        if not state.faults:
            return
        kinds = self._faults.kinds
        if "killed" in kinds:
            yield "killed before", ("killed", None), False, 1
        if "error" in kinds:
            yield "error without", ("error", None), False, 1
        if call.kind in ("create", "write", "delete"):
            if "late kill" in kinds:
                yield "killed after", ("killed", None), True, 1
            if "late error" in kinds:
                yield "error after", ("error", None), True, 1
        if call.kind == "list" and "old list" in kinds:
            for old in self._old_lists:
                names = tuple(sorted(name for name in old if name.startswith(call.name)))
                yield "old", ("value", names), True, 1

    def _moved(self, state: State, index: int, world: World, answer: Answer, cost: int) -> State:
        parties = [*state.parties]
        parties[index] = self._child(index, parties[index], answer)
        new = State(world, tuple(parties), state.faults - cost, state.ticks)
        return self._settled(new, index)

    def _settled(self, state: State, index: int) -> State:
        """Answer the calls of a party that others do not see."""
        while True:
            number = state.parties[index]
            call = self._histories[number].next
            if call is None or call.kind not in ("clock", "claim", "note"):
                return state
            world = state.world
            if call.kind == "claim" and (call.name, call.content) not in world.objects:
                raise Violation(f"{call.name} was published, and is another")
            if call.kind == "note":
                holder, segment, until = call.content.decode().split()
                lease = (holder, int(segment), int(until))
                world = World(world.objects, world.clock, world.leases | {lease})
            parties = [*state.parties]
            parties[index] = self._child(index, number, ("value", state.world.clock))
            state = State(world, tuple(parties), state.faults, state.ticks)

    def _child(self, index: int, number: int, answer: Answer) -> int:
        key = index, number, answer
        if key not in self._numbers:
            self._numbers[key] = self._new_history(
                index, (*self._histories[number].answers, answer)
            )
        return self._numbers[key]

    def _new_history(self, index: int, answers: tuple[Answer, ...]) -> int:
        history = History(answers)
        try:
            history.result = self._parties[index](SimStore(answers))
        except Paused as paused:
            history.next = paused.call
        self._histories.append(history)
        return len(self._histories) - 1

    def _value(self, world: World, call: Call) -> Any:
        objects = dict(world.objects)
        if call.kind == "read":
            return objects.get(call.name)
        if call.kind == "create":
            return call.name not in objects
        if call.kind == "list":
            return tuple(sorted(name for name in objects if name.startswith(call.name)))
        return None

    def _after(self, world: World, call: Call) -> World:
        if call.kind in ("read", "list"):
            return world
        key = world, call
        if key not in self._worlds:
            objects = dict(world.objects)
            if call.kind == "delete":
                check_deletion(world, call.name)
                objects.pop(call.name, None)
            elif call.kind == "write" or call.name not in objects:
                check_write(objects, call)
                objects[call.name] = call.content
            new = World(frozenset(objects.items()), world.clock, world.leases)
            check_world(objects)
            self._worlds[key] = new
        return self._worlds[key]


def _is_constant(world: World, call: Call | None) -> bool:
    """Return whether a call reads an object that never changes again."""
    if (
        call is None
        or call.kind != "read"
        or not call.name.startswith(("channel.json", "versions/"))
    ):
        return False
    return any(name == call.name for name, _ in world.objects)


def _path(came_from: Mapping[State, tuple[State, str] | None], state: State) -> list[str]:
    steps = []
    while before := came_from[state]:
        state, step = before
        steps.append(step)
    return steps[::-1]


def check_deletion(world: World, name: str) -> None:
    """Check that no entry is deleted, and nothing that a follower leases."""
    if name.startswith("versions/"):
        raise Violation(f"entry {name} is deleted")
    version = object_version(name)
    if version is None or not is_named(dict(world.objects), name, version):
        return
    for holder, segment, until in world.leases:
        if until > world.clock and segment <= version:
            raise Violation(f"{name} is deleted, and {holder} leases segment {segment}")


def check_write(objects: Objects, call: Call) -> None:
    """Check that an entry never changes, and comes after the one before it."""
    if not call.name.startswith("versions/"):
        return
    if call.kind == "write":
        raise Violation(f"entry {call.name} is written in place")
    version = int(call.name[9:19])
    if version > 1 and f"versions/{version - 1:010}.json" not in objects:
        raise Violation(f"entry {call.name} has none before it")


def check_world(objects: Objects) -> None:
    """Check that every visible version whose segment is open can be read."""
    from sparsedelta.channel.entry import parse_entry

    for name, raw in objects.items():
        if not name.startswith("versions/"):
            continue
        entry = parse_entry(raw, int(name[9:19]))
        if is_closed(objects, entry.segment):
            continue
        for kind, found in (("deltas", entry.delta), ("anchors", entry.anchor)):
            if found and f"{kind}/{entry.version:010}-{found.digest.hex()[:16]}.sd" not in objects:
                raise Violation(f"version {entry.version} can be seen and not be read")


def is_named(objects: Objects, name: str, version: int) -> bool:
    """Return whether the entry of its version names an object."""
    raw = objects.get(f"versions/{version:010}.json")
    return raw is not None and name.partition("-")[2][:16].encode() in raw


def is_closed(objects: Objects, segment: int) -> bool:
    """Return whether any slot of a segment says that it is closed."""
    prefix = f"leases/{segment:010}/"
    return any(
        name.startswith(prefix) and raw == b'{"closed":true}' for name, raw in objects.items()
    )
