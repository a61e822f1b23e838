"""Settings as plain JSON, to be recorded in deltas and checkpoints."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from sift_train.reselection import Reselection
from sift_train.targets import REGEX
from sparsedelta import Delta

PlainJSON = bool | int | float | str | list[float] | list[str] | dict[str, Any] | None


def plain(value: Any) -> PlainJSON:
    """Return a setting as plain JSON; a mask or a delta becomes ``"mask"``, a ``Rule`` or a function ``"custom"``."""
    if isinstance(value, re.Pattern):
        return f"{REGEX}{value.pattern}"
    if isinstance(value, Reselection):
        return {name: plain(each) for name, each in vars(value).items()}
    if isinstance(value, Mapping | Delta):
        return "mask"
    if isinstance(value, PathLike):
        return str(Path(value))
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, tuple) and all(isinstance(n, int) for n in value):
        return list(value)
    if isinstance(value, Sequence):
        return [REGEX + v.pattern if isinstance(v, re.Pattern) else v for v in value]
    return "custom"
