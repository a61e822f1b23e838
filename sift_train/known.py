"""Checks of settings and arguments: whether a name is known, with a proposal if not, and whether a number is an integer."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection
from difflib import get_close_matches
from numbers import Integral
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")


def proposal(
    name: str, known: Collection[str], *, elsewhere: Collection[str] = (), where: str = ""
) -> str:
    """Return a clause that proposes a known name in place of an unknown one.

    Args:
        name: the unknown name.
        known: the known names.
        elsewhere: names that are known in another place.
        where: what those are, such as "a setting of FitConfig".
    """
    if name in elsewhere:
        return f"it is {where}"
    similar = get_close_matches(name, [*known, *elsewhere], n=1, cutoff=0.75)
    if similar:
        return f"did you mean {similar[0]!r}{'' if similar[0] in known else f', {where}'}?"
    return f"choose from {', '.join(known)}"


def as_int(value: Any) -> Any:
    """Return an integer of numpy as one of Python, and anything else unchanged."""
    is_integer = isinstance(value, Integral) and not isinstance(value, bool)
    return int(value) if is_integer else value


def check_integer(name: str, value: object, *, least: int | None = None) -> None:
    """Check that a setting is an integer, not a bool.

    Raises:
        ValueError: it is something else, or below ``least``.
    """
    if (
        isinstance(value, bool)
        or not isinstance(value, int)
        or (least is not None and value < least)
    ):
        limit = "" if least is None else f" of at least {least}"
        raise ValueError(f"{name} is {value!r}; it must be an integer{limit}")


def names_checked(
    *, elsewhere: Collection[str] = (), where: str = ""
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Return a decorator: the TypeError about an unknown keyword argument has a proposal."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        names = [name for name in inspect.signature(function).parameters if name != "self"]
        owner, _, method = function.__qualname__.rpartition(".")
        what = f"{owner} has no setting" if method == "__init__" else f"{method} has no argument"

        @functools.wraps(function)
        def checked(*args: P.args, **given: P.kwargs) -> R:
            for name in given:
                if name not in names:
                    clause = proposal(name, names, elsewhere=elsewhere, where=where)
                    raise TypeError(f"{what} {name!r}; {clause}")
            return function(*args, **given)

        return checked

    return decorate


def settings_checked(kind: type[T]) -> type[T]:
    """Return a dataclass of settings whose TypeError about an unknown one has a proposal."""
    made: Any = kind
    made.__init__ = names_checked()(made.__init__)
    return kind
