"""Reads a text file that a user names; each reason why it cannot be read is one sentence."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

logger = logging.getLogger(__name__)
# Columns that tell one row from another.
_OF_ROWS = {"", "id", "idx", "index", "Unnamed: 0", "__index_level_0__"}
_N_SHOWN = 10


def read_text(path: Path, what: str) -> str:
    """Return the text of a file in UTF-8, without a byte order mark.

    Args:
        path: the file.
        what: it should hold, for the errors.

    Raises:
        FileNotFoundError: there is no such file.
        IsADirectoryError: it is a folder.
        ValueError: it is not UTF-8.
    """
    if path.is_dir():
        raise IsADirectoryError(f"'{path}' is a folder; give the file of {what}")
    try:
        return path.read_text("utf-8-sig")  # some programs write a mark in front of the first word
    except FileNotFoundError as error:
        raise FileNotFoundError(f"'{path}' does not exist; give the file of {what}") from error
    except UnicodeDecodeError as error:
        raise ValueError(
            f"'{path}' is not text in UTF-8 (byte {error.start}); give a file of text"
        ) from error


def tell_unused(path: Path, names: Iterable[str]) -> None:
    """Log a warning that a file has columns or keys that are not used, except for numbers of rows."""
    unused = sorted(set(names) - _OF_ROWS)
    if unused:
        shown = ", ".join(map(repr, unused[:_N_SHOWN])) + (", …" * (len(unused) > _N_SHOWN))
        logger.warning("'%s' also has %s, which the training does not use", path, shown)
