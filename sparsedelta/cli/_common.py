"""What commands share: settings, options, the example at the end of a help, checks of outputs.

Options that a command only hands on to the function of its name, which has them as arguments, are its
``options``.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from sparsedelta._typing import JSON

PATH = click.Path(path_type=Path)

json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
token_option = click.option(
    "--token", metavar="TOKEN", help="Token of the Hub; without it the one that is logged in."
)
verify_option = click.option(
    "--verify",
    type=click.Choice(["full", "touched", "none"]),
    default="full",
    show_default=True,
    help="Check the digests of all tensors, of the touched values only, or none.",
)


def exclude_option(of: str) -> Callable[[Any], Any]:
    """Return the option of globs of files that are left out; ``of``: which files they are."""
    text = f"Leave out {of} that match. May be repeated."
    return click.option("--exclude", multiple=True, metavar="GLOB", help=text)


@dataclass(frozen=True, slots=True)
class Settings:
    """The options that stand before the command."""

    quiet: bool

    def note(self, message: str) -> None:
        """Say something on stderr that is not a result, unless notes are not wanted."""
        if not self.quiet:
            click.echo(message, err=True)


def examples(*lines: str) -> str:
    """Return the end of a command's help: lines that can be typed as they stand."""
    title = "Example:" if len(lines) == 1 else "Examples:"
    return "\n".join(["\b", title, *(f"  {line}" for line in lines)])


def print_json(value: Mapping[str, JSON]) -> None:
    """Print an object on stdout as indented JSON, in ASCII so that any terminal and pipe takes it.

    Paths, of which reports hold some, are printed as text.
    """
    click.echo(json.dumps(value, indent=2, default=os.fspath))


def quiet_client(settings: Settings) -> None:
    """Let the Hub's client show its bars and warnings only where ours would be."""
    from sparsedelta.hub.client import silence

    if settings.quiet or not sys.stderr.isatty():
        silence()


def check_output_file(output: Path, *, overwrite: bool, inputs: tuple[Path, ...]) -> None:
    """Find out before the work whether a file can be written.

    Args:
        output: the file.
        overwrite: whether it may replace another.
        inputs: files and folders that it must not replace or alter.

    Raises:
        FileExistsError: it exists and may not be replaced, or would be part of an input.
        FileNotFoundError: its folder does not exist.
        IsADirectoryError: it is a folder.
    """
    from sparsedelta.fs import check_absent

    if output.is_dir():
        raise IsADirectoryError(f"output '{output}' is a folder; give the name of a file")
    check_absent(output, overwrite=overwrite)
    if not Path(os.path.abspath(output)).parent.is_dir():
        raise FileNotFoundError(f"the folder of output '{output}' does not exist; create it first")
    place = Path(os.path.realpath(output))
    for path in inputs:
        if place.is_relative_to(os.path.realpath(path)):
            raise FileExistsError(
                f"output '{output}' would be a part of '{path}'; choose another place"
            )
