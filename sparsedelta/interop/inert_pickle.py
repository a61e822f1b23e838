"""A pickle as data: what it would call is recorded, and nothing is imported or called.

Only the names of tensors are wanted. A pickle that uses anything else than the operations of
``torch.save`` is refused, and the caller goes on without names.
"""

from __future__ import annotations

import io
import pickletools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

MAX_BYTES = 64 << 20
MAX_OPERATIONS = 1 << 20  # about 15,000 tensors with their names
_MARK = object()
_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "MARK": _MARK}
_PLAIN = {
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT",
    "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "STRING", "BINSTRING", "SHORT_BINSTRING",
    "BINBYTES", "SHORT_BINBYTES", "BINBYTES8",
}  # fmt: skip
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_PUT, _GET = {"PUT", "BINPUT", "LONG_BINPUT"}, {"GET", "BINGET", "LONG_BINGET"}


class PickleRefused(ValueError):
    """The pickle is damaged, or uses operations that ``torch.save`` does not."""


@dataclass(frozen=True, slots=True)
class Global:
    """A name that the pickle refers to, such as ``torch.FloatStorage``."""

    name: str


@dataclass(frozen=True, slots=True)
class Persistent:
    """A reference to something outside of the pickle: for ``torch.save``, a storage."""

    key: Any


@dataclass(eq=False, slots=True)
class Made:
    """An object that the pickle would make: a list, a dict or set, or the result of a call.

    Attributes:
        call: what is called; None for a list, dict or set.
        args: its arguments.
        state: what is set on the result.
        values: items of a list or set; None if it has none.
        pairs: keys and values of a dict; None if it has none.
    """

    call: Any = None
    args: Any = ()
    state: Any = None
    values: list[Any] | None = None
    pairs: list[tuple[Any, Any]] | None = None

    def get(self, key: str) -> Any:
        """Return the value of a key, in the state if it is an object; None if there is none."""
        holder = self.state if isinstance(self.state, Made) else self
        return next((value for found, value in holder.pairs or () if found == key), None)


def read_inert(data: bytes) -> Any:
    """Return what a pickle holds, without executing it.

    Raises:
        PickleRefused: it is too large, damaged, or uses another operation.
    """
    if len(data) > MAX_BYTES:
        raise PickleRefused(f"it has {len(data)} bytes, the limit is {MAX_BYTES}")
    machine = _Machine()
    try:
        for number, (operation, argument, _) in enumerate(pickletools.genops(io.BytesIO(data))):
            if operation.name == "STOP":
                return machine.pop()
            if number >= MAX_OPERATIONS:
                raise PickleRefused(f"it has more than {MAX_OPERATIONS} operations")
            machine.do(operation.name, argument)
    except (ValueError, IndexError, KeyError, TypeError, AttributeError) as error:
        raise PickleRefused(str(error)) from error
    raise PickleRefused("it has no end")


def children(node: Any) -> Iterator[tuple[str, Any]]:
    """Yield the parts of a value; each with its key or index, or "" if it has none of its own."""
    if isinstance(node, tuple):
        yield from ((str(number), value) for number, value in enumerate(node))
    elif isinstance(node, Made):
        yield from (("", value) for value in (node.args if isinstance(node.args, tuple) else ()))
        yield from ((str(number), value) for number, value in enumerate(node.values or ()))
        yield from ((str(k), v) for k, v in node.pairs or () if _is_key(k))
        if node.state is not None:
            yield "", node.state


def _is_key(key: Any) -> bool:
    """Return whether the key of a dict is part of a name: a text, or an integer that is not absurdly long."""
    return isinstance(key, str) or (isinstance(key, int) and abs(key) < 1 << 64)


class _Machine:
    """The stack and the memo of a pickle."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def pop(self) -> Any:
        value = self.stack.pop()
        if value is _MARK:
            raise PickleRefused("an operand is missing")
        return value

    def marked(self) -> list[Any]:
        """Remove and return everything above the last mark."""
        for at in range(len(self.stack) - 1, -1, -1):
            if self.stack[at] is _MARK:
                found = self.stack[at + 1 :]
                del self.stack[at:]
                return found
        raise PickleRefused("a mark is missing")

    def several(self, n: int) -> list[Any]:
        return [self.pop() for _ in range(n)][::-1]

    def made(self) -> Made:
        top = self.stack[-1]
        if not isinstance(top, Made):
            raise PickleRefused("items are added to something that holds none")
        return top

    def do(self, name: str, argument: Any) -> None:
        """Carry out one operation."""
        push = self.stack.append
        if name in _PLAIN:
            push(argument)
        elif name in _CONSTANTS:
            push(_CONSTANTS[name])
        elif name in _TUPLES:
            push(tuple(self.several(_TUPLES[name])))
        elif name in _PUT:
            self.memo[argument] = self.stack[-1]
        elif name in _GET:
            push(self.memo[argument])
        else:
            self._do_other(name, argument)

    def _do_other(self, name: str, argument: Any) -> None:
        push = self.stack.append
        match name:
            case "PROTO" | "FRAME":
                pass
            case "MEMOIZE":
                self.memo[len(self.memo)] = self.stack[-1]
            case "TUPLE":
                push(tuple(self.marked()))
            case "EMPTY_LIST" | "EMPTY_DICT" | "EMPTY_SET":
                push(Made())
            case "LIST" | "FROZENSET":
                push(Made(values=self.marked()))
            case "APPEND":
                self._add([self.pop()])
            case "APPENDS" | "ADDITEMS":
                self._add(self.marked())
            case "DICT":
                push(Made(pairs=_paired(self.marked())))
            case "SETITEM":
                self._set(self.several(2))
            case "SETITEMS":
                self._set(self.marked())
            case "GLOBAL":
                push(Global(argument.replace(" ", ".")))
            case "STACK_GLOBAL":
                module, inner = self.several(2)
                if not (isinstance(module, str) and isinstance(inner, str)):
                    raise PickleRefused("a name is no text")
                push(Global(f"{module}.{inner}"))
            case "REDUCE" | "NEWOBJ":
                push(Made(*self.several(2)))
            case "NEWOBJ_EX":
                call, args, _ = self.several(3)
                push(Made(call, args))
            case "BUILD":
                state = self.pop()
                self.made().state = state
            case "BINPERSID":
                push(Persistent(self.pop()))
            case "POP":
                self.stack.pop()
            case "POP_MARK":
                self.marked()
            case _:
                raise PickleRefused(f"it uses the operation {name}")

    def _add(self, values: list[Any]) -> None:
        made = self.made()
        made.values = made.values or []
        made.values += values

    def _set(self, flat: list[Any]) -> None:
        made = self.made()
        made.pairs = made.pairs or []
        made.pairs += _paired(flat)


def _paired(flat: list[Any]) -> list[tuple[Any, Any]]:
    return list(zip(flat[::2], flat[1::2], strict=True))
