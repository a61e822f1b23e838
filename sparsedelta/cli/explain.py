"""``sparsedelta explain``: what an error means, and what to do."""

from __future__ import annotations

import inspect
from difflib import get_close_matches
from typing import TYPE_CHECKING

import click
from click.shell_completion import CompletionItem

from sparsedelta.cli._common import examples, json_option, print_json
from sparsedelta.cli._help import Command
from sparsedelta.errors import SparseDeltaError, by_code

if TYPE_CHECKING:
    from sparsedelta._typing import JSON


def _codes(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem | str]:
    """Return the codes that begin as given."""
    return [code for code in by_code() if code.startswith(incomplete)]


@click.command("explain", cls=Command, epilog=examples("sparsedelta explain base_mismatch"))
@click.argument("code", required=False, shell_complete=_codes)
@json_option
def command(*, code: str | None, as_json: bool) -> None:
    """Explain an error: what CODE means, and what to do.

    CODE is the code of an error, such as base_mismatch, or the name of its class, such as
    BaseMismatch. Without CODE, all codes are listed.
    """
    chosen = [*by_code().values()] if code is None else [_found(code)]
    if as_json:
        print_json({"errors": [_fields(one) for one in chosen]})
    elif code is not None:
        click.echo(_describe(*chosen))
    else:
        width = max(map(len, by_code()))
        for one in chosen:
            click.echo(f"{one.code:{width}}  {_meaning(one).replace('`', '')}")


def _found(text: str) -> type[SparseDeltaError]:
    """Return the error of a code or of the name of a class."""
    classes = by_code()
    names = {error.__name__.lower(): error for error in classes.values()}
    code = text.strip().lower().replace("-", "_")
    found = classes.get(code) or names.get(code)
    if found is None:
        near = get_close_matches(code, classes, n=1)
        hint = f"did you mean {near[0]}?" if near else f"the codes are {', '.join(classes)}"
        raise click.UsageError(f"no error has the code {text!r}; {hint}")
    return found


def _fields(error: type[SparseDeltaError]) -> dict[str, JSON]:
    return {
        "code": error.code,
        "class": error.__name__,
        "parents": [*_parents(error)],
        "meaning": _meaning(error),
        "remedy": error.remedy,
    }


def _describe(error: type[SparseDeltaError]) -> str:
    parents = ", ".join(_parents(error))
    python = f"In Python: sparsedelta.errors.{error.__name__}" + (
        f", a kind of {parents}" * bool(parents)
    )
    parts = (f"{error.code}: {_meaning(error)}", f"What to do: {error.remedy}", python)
    shown = (part.replace("`", "'") for part in parts)  # a terminal shows no Markdown
    return "\n\n".join(click.wrap_text(part, 80, "", "  ") for part in shown)


def _meaning(error: type[SparseDeltaError]) -> str:
    return (inspect.getdoc(error) or "").partition("\n")[0].replace("``", "`")


def _parents(error: type[SparseDeltaError]) -> list[str]:
    """Return the classes under which the error can be caught, the nearest first."""
    return [
        one.__name__ for one in error.__mro__[1:] if one not in (Exception, BaseException, object)
    ]
