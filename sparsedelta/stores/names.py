"""Names of objects: relative paths that are valid in a folder, in a bucket and in a URL."""

from __future__ import annotations

import re

MAX_NAME_BYTES = 512
_COMPONENT = r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,199}[A-Za-z0-9_-])?"
_NAME = re.compile(rf"{_COMPONENT}(?:/{_COMPONENT})*", re.ASCII)


def is_name(name: str) -> bool:
    """Return whether a string is a valid name of an object.

    A name has components joined by ``/``. A component has letters, digits, ``.``, ``_`` and ``-``. It does not
    begin with ``.`` or ``-``, and does not end with ``.``.
    """
    return len(name) <= MAX_NAME_BYTES and bool(_NAME.fullmatch(name))


def check_name(name: str) -> str:
    """Return ``name`` if it is a valid name of an object.

    Raises:
        ValueError: it is not valid.
    """
    if not is_name(name):
        raise ValueError(
            f"{name[:200]!r} cannot name an object; use letters, digits, '.', '_' and '-' in components"
            " joined by '/'"
        )
    return name
