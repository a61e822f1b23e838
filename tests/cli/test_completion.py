"""Completion in the shell: arguments that may be paths are completed by the names of files."""

from __future__ import annotations

import click
import pytest
from click.shell_completion import ShellComplete

from sparsedelta.cli import COMMANDS, main

PATHS = {
    "anchor_base", "base", "channel", "checkpoint", "delta", "deltas", "deltas_and_out", "out", "output",
    "target",
}  # fmt: skip


def parameters() -> list[tuple[str, click.Parameter]]:
    """Return the parameters that take paths, with the names of their commands."""
    return [(name, one) for name in COMMANDS for one in command(name).params if one.name in PATHS]


def command(name: str) -> click.Command:
    """Return a command."""
    found = main.get_command(click.Context(main), name)
    assert found is not None
    return found


def arguments_of(name: str) -> list[click.Parameter]:
    """Return the arguments of a command, in order."""
    return [one for one in command(name).params if isinstance(one, click.Argument)]


@pytest.mark.parametrize(("name", "parameter"), parameters())
def test_paths_are_completed(name: str, parameter: click.Parameter) -> None:
    complete = ShellComplete(main, {}, "sparsedelta", "_SPARSEDELTA_COMPLETE")
    if isinstance(parameter, click.Option):
        before = [name, parameter.opts[0]]
    else:
        before = [name, *["given"] * arguments_of(name).index(parameter)]
    found = complete.get_completions(before, "ba")
    assert [(item.value, item.type) for item in found] == [("ba", "file")]


def test_every_command_takes_a_path() -> None:
    assert {name for name, _ in parameters()} == set(COMMANDS)
