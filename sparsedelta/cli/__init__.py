"""The command line: parse, call one public function, show what it returned.

Each command is a module of this package named like the command, which defines ``command``; it is
imported when it is asked for. stdout gets results and nothing else.
"""

from __future__ import annotations

import io
import os
import signal
import sys
from importlib import import_module
from typing import Any

import click

import sparsedelta
from sparsedelta.cli._common import Settings, examples
from sparsedelta.cli._failures import (
    EXPECTED,
    ending_signals,
    guard_streams,
    report_failure,
    report_interrupt,
)

COMMANDS = (
    "diff", "apply", "verify", "inspect", "stack", "invert", "merge", "push", "pull",
    "publish", "follow", "log", "prune",
)  # fmt: skip
_DEBUG_HELP = "Show where an error comes from."
_QUIET_HELP = "Show neither progress nor notes."


def _shared_options() -> list[click.Option]:
    """Return the options of the whole program as those of one command: people type them there."""

    def quiet(ctx: click.Context, param: click.Parameter, value: bool) -> None:
        if value:
            ctx.obj = Settings(quiet=True)

    def debug(ctx: click.Context, param: click.Parameter, value: bool) -> None:
        if value and ctx.parent is not None:
            ctx.parent.params["debug"] = True

    return [
        click.Option(
            names, is_flag=True, expose_value=False, is_eager=True, callback=callback, help=text
        )
        for names, callback, text in (
            (["--debug"], debug, _DEBUG_HELP),
            (["-q", "--quiet"], quiet, _QUIET_HELP),
        )
    ]


class Commands(click.Group):
    """The commands, imported when first asked for; what they raise becomes one line and an exit code."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names in the order in which the help shows them."""
        return [*COMMANDS]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return a command by its name, None if there is none."""
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = import_module(f"{__name__}.{cmd_name}").command
        have = {param.name for param in command.params}
        command.params += [option for option in _shared_options() if option.name not in have]
        return command

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run the program; standard streams that are closed, as a daemon has them, lead nowhere."""
        _open_standard_streams()
        guard_streams()
        try:
            return super().main(*args, **kwargs)
        except OSError as error:  # outside commands: a help that cannot be written
            report_failure(error, with_traceback=False)
            sys.exit(1)

    def invoke(self, ctx: click.Context) -> None:
        """Run a command; exit with 1 on an expected failure and with 128 + its number on a signal."""
        try:
            with ending_signals():
                super().invoke(ctx)
        except KeyboardInterrupt as error:
            number = error.args[0] if error.args else signal.SIGINT
            report_interrupt(number)
            ctx.exit(128 + number)
        except EXPECTED as error:
            report_failure(error, with_traceback=ctx.params["debug"])
            ctx.exit(1)


def _open_standard_streams() -> None:
    # In order, so that each gets its own number; else a file opened later would take it.
    for fd, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
        if getattr(sys, name) is None:
            setattr(sys, name, open(fd, "r" if fd == 0 else "w", closefd=False))  # noqa: SIM115


@click.command(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=examples(
        "sparsedelta diff base/ target/ -o delta.sd",
        "sparsedelta inspect delta.sd",
        "sparsedelta apply base/ delta.sd out/",
    ),
)
@click.version_option(
    sparsedelta.__version__, prog_name="sparsedelta", message="%(prog)s %(version)s"
)
@click.option("--debug", is_flag=True, help=_DEBUG_HELP)
@click.option("-q", "--quiet", is_flag=True, help=_QUIET_HELP)
@click.pass_context
def main(ctx: click.Context, *, debug: bool, quiet: bool) -> None:
    """Keep only what changed between two model checkpoints, bit for bit."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # tensor names may hold any character
    ctx.obj = Settings(quiet=quiet)
