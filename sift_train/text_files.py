"""Reads a text file that a user names; each reason why it cannot be read is one sentence."""

from __future__ import annotations

from pathlib import Path


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
