"""Parts that several commands use: settings, options, examples of the help pages, checks of outputs."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from sparsedelta.fs import check_absent, check_no_slash
from sparsedelta.hub.references import parse_reference
from sparsedelta.report.text import printable

if TYPE_CHECKING:
    from sparsedelta._typing import JSON

_COMMIT = re.compile(r"[0-9a-f]{7,40}")  # git accepts the first digits


def _check_path(param: click.ParamType[Any], value: object, ctx: click.Context | None) -> None:
    """Fail for what is a path by mistake: nothing, or the sign for standard input and output."""
    if value == "":
        param.fail("the path is empty; give the path of a file or folder", ctx=ctx)
    if value == "-":
        param.fail("'-' is not supported; give the path of a file", ctx=ctx)


class _Path(click.Path):
    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """Return the path."""
        _check_path(self, value, ctx)
        return Path(os.fsdecode(super().convert(value, param, ctx)))


class _OutputFile(_Path):
    """An output that is one file, such as the one named by ``example``."""

    def __init__(self, example: str) -> None:
        super().__init__(path_type=Path)
        self._example = example

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """Return the path."""
        check_no_slash(os.fsdecode(value), self._example)  # the path has no slash at its end
        return super().convert(value, param, ctx)


class Integer(click.IntRange):
    """An integer in a range. Errors call it an integer, where click writes "integer range"."""

    name = "integer"


PATH = _Path(path_type=Path)
DELTA_FILE, PAGE_FILE = _OutputFile("delta.sd"), _OutputFile("delta.html")


class _PathOrRepository(click.types.StringParamType):
    """A path, a repository on the Hub or another address. A shell completes it as a path."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the text."""
        _check_path(self, value, ctx)
        return str(super().convert(value, param, ctx))

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """Return the request for completion by the names of files."""
        return [CompletionItem(incomplete, type="file")]


PATH_OR_REPOSITORY = _PathOrRepository()

json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
token_option = click.option(
    "--token",
    metavar="TOKEN",
    help="Access token for the Hub. [default: the token of `hf auth login`]",
)
verify_option = click.option(
    "--verify",
    type=click.Choice(["full", "touched", "none"]),
    default="full",
    show_default=True,
    help="Which digests to check: of all tensors, of the touched values only, or none.",
)

durable_option = click.option(
    "--durable/--no-durable",
    default=True,
    show_default=True,
    help="Sync OUT to disk before it gets its name, so that it survives a power failure.",
)


def check_base_id(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """Return the name of a base; print a warning if it may name another base later.

    Raises:
        ValueError: it is not the name of a repository.
    """
    if value is None:
        return None
    found = parse_reference(value)
    if found is None:
        raise ValueError(
            f"{param.opts[0]} {value!r} is not a repository on the Hub; write org/model@<commit>"
        )
    if not _COMMIT.fullmatch(found.revision or ""):
        click.echo(
            f"warning: '{printable(value)}' may name other weights later; org/model@<commit> never does",
            err=True,
        )
    return value


def exclude_option(files: str) -> Callable[[Any], Any]:
    """Return the option ``--exclude``.

    Args:
        files: which files it applies to, such as ``"files of BASE"``; used in the help text.
    """
    text = f"Leave out {files} that match GLOB. May be repeated."
    return click.option("--exclude", multiple=True, metavar="GLOB", help=text)


@dataclass(frozen=True, slots=True)
class Settings:
    """The options that apply to all commands."""

    quiet: bool

    def note(self, message: str) -> None:
        """Print a message on stderr, unless ``--quiet`` was given."""
        if not self.quiet:
            click.echo(message, err=True)


def examples(*lines: str) -> str:
    """Return the examples for the end of a help page; each line is a complete command."""
    title = "Example:" if len(lines) == 1 else "Examples:"
    return "\n".join(["\b", title, *(f"  {line}" for line in lines)])


def print_json(value: Mapping[str, JSON]) -> None:
    """Print an object on stdout as indented JSON. It is ASCII, so that every terminal can show it.

    Paths in it are printed as text.
    """
    click.echo(json.dumps(value, indent=2, default=os.fspath))


def quiet_client(settings: Settings) -> None:
    """Hide the progress bars and warnings of huggingface_hub where this program shows no progress."""
    from sparsedelta.hub.client import silence

    if settings.quiet or not sys.stderr.isatty():
        silence()


def check_output_file(output: Path, *, overwrite: bool, inputs: tuple[Path, ...]) -> None:
    """Check that an output file can be written, before the work starts.

    Args:
        output: path of the file.
        overwrite: whether an existing file may be replaced.
        inputs: files and folders; the output must be none of them and lie in none of them.

    Raises:
        FileExistsError: the output exists and ``overwrite`` is false, or it is or lies in an input.
        FileNotFoundError: the folder of the output does not exist.
        IsADirectoryError: the output is a folder.
    """
    if output.is_dir():
        raise IsADirectoryError(f"output '{output}' is a folder; give the name of a file")
    resolved = Path(os.path.realpath(output))
    for path in inputs:
        if resolved.is_relative_to(os.path.realpath(path)):
            raise FileExistsError(
                f"output '{output}' is or lies in the input '{path}'; choose another path"
            )
    check_absent(output, overwrite=overwrite)
    if not Path(os.path.abspath(output)).parent.is_dir():
        raise FileNotFoundError(f"the folder of output '{output}' does not exist; create it first")
