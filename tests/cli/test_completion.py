"""Completion in the shell: arguments that may be paths are completed by the names of files."""

from __future__ import annotations

import click
import pytest
from click.shell_completion import ShellComplete

from sparsedelta.cli import COMMANDS, main

PATHS = {"base", "target", "delta", "deltas", "deltas_and_out", "out", "output"}


def parameters() -> list[tuple[str, click.Parameter]]:
    """Return the parameters that take paths, with the names of their commands."""
    context = click.Context(main)
    found = []
    for name in COMMANDS:
        command = main.get_command(context, name)
        assert command is not None
        found += [(name, one) for one in command.params if one.name in PATHS]
    return found


@pytest.mark.parametrize(("name", "parameter"), parameters())
def test_paths_are_completed(name: str, parameter: click.Parameter) -> None:
    complete = ShellComplete(main, {}, "sparsedelta", "_SPARSEDELTA_COMPLETE")
    before = [name, parameter.opts[0]] if isinstance(parameter, click.Option) else [name]
    found = complete.get_completions(before, "ba")
    assert [(item.value, item.type) for item in found] == [("ba", "file")]


def test_every_command_takes_a_path() -> None:
    assert {name for name, _ in parameters()} == set(COMMANDS)
