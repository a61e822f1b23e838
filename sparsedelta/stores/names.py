"""Names of objects: plain relative paths, that mean the same in a folder, a bucket and an address."""

from __future__ import annotations

import re

MAX_NAME_BYTES = 512
_COMPONENT = r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,199}[A-Za-z0-9_-])?"
_NAME = re.compile(rf"{_COMPONENT}(?:/{_COMPONENT})*", re.ASCII)


def is_name(name: str) -> bool:
    """Return whether a text can name an object.

    Components of letters, digits, ``.``, ``_`` and ``-`` are joined by ``/``. None begins with ``.`` or ``-``,
    or ends with ``.``.
    """
    return len(name) <= MAX_NAME_BYTES and bool(_NAME.fullmatch(name))


def check_name(name: str) -> str:
    """Return the name of an object.

    Raises:
        ValueError: it is none.
    """
    if not is_name(name):
        raise ValueError(
            f"{name[:200]!r} cannot name an object; use letters, digits, '.', '_' and '-' in components"
            " joined by '/'"
        )
    return name
