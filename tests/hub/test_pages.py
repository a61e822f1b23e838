"""The commands and Python in the README, in docs/hub.md and in the help pages run unchanged."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest
from helpers import assert_same_files
from hub.hub_helpers import SOURCE, Person

from sparsedelta.cli import main

COMMAND = re.compile(r"^(?:\$|  ) *sparsedelta (.*?)(?: +#.*)?$", re.MULTILINE)


def commands(text: str) -> list[list[str]]:
    found = [shlex.split(line) for line in COMMAND.findall(text)]
    assert found
    return found


def page(name: str) -> str:
    text = (SOURCE / name).read_text(encoding="utf-8")
    if name == "README.md":
        text = text.partition("\n## The Hub\n")[2].partition("\n## ")[0]
    return text


def help_of(name: str) -> str:
    context = click.Context(main, info_name="sparsedelta")
    found = main.get_command(context, name)
    assert found is not None
    return found.get_help(click.Context(found, info_name=name, parent=context))


@pytest.mark.parametrize("name", ["README.md", "docs/hub.md"])
def test_commands_and_python_of_a_page(
    me: Person, delta: Path, checkpoints: tuple[Path, Path], name: str
) -> None:
    before = {place.name for place in me.folder.iterdir()}
    text = page(name)
    for arguments in commands(text):
        me.good(*arguments)
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        done = me.python("-c", block)
        assert done.returncode == 0, done.stderr
    made = {place for place in me.folder.iterdir() if place.is_dir() and place.name not in before}
    made -= {me.folder / "home", me.folder / ".cache"}
    assert made
    for out in made:
        assert_same_files(checkpoints[1], out)


def test_examples_of_the_help(me: Person, delta: Path, checkpoints: tuple[Path, Path]) -> None:
    for name in ("push", "pull"):
        (arguments,) = commands(help_of(name).partition("Example")[2])
        me.good(*arguments)
    assert_same_files(checkpoints[1], me.folder / "out")
