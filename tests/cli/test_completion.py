"""Completion in the shell: arguments that may be paths are completed by the names of files."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
from cli.cli_helpers import command as command_line
from cli.cli_helpers import environment
from click.shell_completion import ShellComplete

from sparsedelta.cli import COMMANDS, main
from sparsedelta.cli._help import GROUPS

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


def test_every_command_but_help_takes_a_path() -> None:
    assert {name for name, _ in parameters()} == {*COMMANDS} - {*GROUPS["Help"]}


def test_codes_of_errors_are_completed() -> None:
    complete = ShellComplete(main, {}, "sparsedelta", "_SPARSEDELTA_COMPLETE")
    found = complete.get_completions(["explain"], "base_")
    assert [item.value for item in found] == ["base_mismatch", "base_needed"]


def install(home: Path, shell: str | None, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command_line("completion", *([shell] if shell else []), "--install"),
        env=environment(HOME=str(home), **variables),
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_installed_once(tmp_path: Path, shell: str) -> None:
    settings = tmp_path / f".{shell}rc"
    settings.write_text("alias ll='ls -l'")
    for _ in range(2):
        done = install(tmp_path, None, SHELL=f"/usr/bin/{shell}")
        assert (done.returncode, done.stdout) == (0, "")
    script = tmp_path / f".local/share/sparsedelta/completion.{shell}"
    assert "_SPARSEDELTA_COMPLETE" in script.read_text()
    kept, line = settings.read_text().splitlines()
    assert kept == "alias ll='ls -l'"
    assert line.startswith(f'[ -f "{script}" ] && . "{script}"')


def test_fish_needs_no_line(tmp_path: Path) -> None:
    assert install(tmp_path, "fish").returncode == 0
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["sparsedelta.fish"]


def test_unknown_shell(tmp_path: Path) -> None:
    done = install(tmp_path, None, SHELL="/bin/tcsh")
    assert done.returncode == 2
    assert "name the shell: bash, zsh, fish" in done.stderr


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_a_new_bash_completes_commands_and_files(tmp_path: Path) -> None:
    install(tmp_path, "bash")
    (tmp_path / "base.safetensors").touch()
    program = tmp_path / "bin" / "sparsedelta"
    program.parent.mkdir()
    program.write_text(
        f"#!{sys.executable}\nimport sys\nfrom sparsedelta.cli import main\n"
        "sys.argv[0] = 'sparsedelta'\nmain()\n"
    )
    program.chmod(0o755)
    script = (
        f'cd "{tmp_path}"; . .bashrc; PATH="{program.parent}:$PATH"\n'
        "COMP_WORDS=(sparsedelta com); COMP_CWORD=1; _sparsedelta_completion sparsedelta\n"
        'echo "${COMPREPLY[@]}"\n'
        "complete -p sparsedelta\n"
    )
    done = subprocess.run(
        ["bash", "-c", script], env=environment(), capture_output=True, text=True, check=False
    )
    first, second = done.stdout.splitlines()
    assert first == "completion", done.stderr
    assert second.startswith("complete -o nosort -F _sparsedelta_completion")
