"""``sparsedelta completion``: completion of commands, options and file names in the shell."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import click
from click.shell_completion import BashComplete, FishComplete, ShellComplete, ZshComplete

from sparsedelta.cli._common import Settings, examples
from sparsedelta.cli._help import Command

_SHELLS: Mapping[str, type[ShellComplete]] = {
    "bash": BashComplete,
    "zsh": ZshComplete,
    "fish": FishComplete,
}
_VARIABLE = "_SPARSEDELTA_COMPLETE"
_MARK = "# completion of sparsedelta"
# zsh defines compdef only after compinit.
_BEFORE = {"zsh": "(( $+functions[compdef] )) || { autoload -Uz compinit && compinit }\n"}


@click.command("completion", cls=Command, epilog=examples("sparsedelta completion bash"))
@click.argument("shell", type=click.Choice([*_SHELLS]), metavar="[SHELL]", required=False)
@click.option("--install", is_flag=True, help="Write the script, and load it in new shells.")
@click.pass_context
def command(ctx: click.Context, *, shell: str | None, install: bool) -> None:
    """Print or install completion for bash, zsh or fish.

    SHELL is bash, zsh or fish; without it, the shell that you use. --install writes the script
    into your home folder and adds one line to ~/.bashrc or ~/.zshrc; fish needs no line.
    """
    chosen = shell or Path(os.environ.get("SHELL", "")).name
    if chosen not in _SHELLS:
        raise click.UsageError(f"name the shell: {', '.join(_SHELLS)}")
    script = _script(ctx.find_root().command, chosen)
    if install:
        settings = ctx.find_object(Settings) or Settings(quiet=False)
        settings.note(f"installed {_install(chosen, script)}; it works in new shells")
    else:
        click.echo(script, nl=False)


def _script(program: click.Command, shell: str) -> str:
    return _BEFORE.get(shell, "") + _SHELLS[shell](program, {}, "sparsedelta", _VARIABLE).source()


def _install(shell: str, script: str) -> Path:
    """Write the script where the shell finds it, and return its path. A second call changes nothing else."""
    home = Path.home()
    if shell == "fish":
        path = home / ".config/fish/completions/sparsedelta.fish"
    else:
        path = home / f".local/share/sparsedelta/completion.{shell}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(script, encoding="utf-8")
    if shell != "fish":
        _load_at_start(home / f".{shell}rc", path)
    return path


def _load_at_start(settings_file: Path, script: Path) -> None:
    text = settings_file.read_text(encoding="utf-8") if settings_file.exists() else ""
    if _MARK in text:
        return
    with settings_file.open("a", encoding="utf-8") as stream:
        stream.write(f'\n[ -f "{script}" ] && . "{script}"  {_MARK}\n')
