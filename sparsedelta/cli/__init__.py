"""The command line: parse the arguments, call one public function, print its result.

The module ``sparsedelta.cli.NAME`` defines the command NAME as ``command``. It is imported when the
command is run. Only results are printed on stdout.
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
    shown_warnings,
)
from sparsedelta.cli._help import COMMANDS, format_commands

__all__ = ["COMMANDS", "main"]

_DEBUG_HELP = "Show the traceback of an error."
_QUIET_HELP = "Show only results, warnings and errors."


def _shared_options() -> list[click.Option]:
    """Return the options that are also accepted after the name of a command."""

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


def _show_version(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        # It fails if the environment names unknown kernels, so it is not imported with this module.
        from sparsedelta.codecs.kernels import in_use

        click.echo(f"sparsedelta {sparsedelta.__version__} ({in_use()} kernels)")
        ctx.exit()


class Commands(click.Group):
    """The group of all commands. It imports a command on first use, and reports the errors of each."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of the commands in the order of the help page."""
        return [*COMMANDS]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return the command of this name, or None if there is none."""
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = import_module(f"{__name__}.{cmd_name}").command
        names = {param.name for param in command.params}
        command.params += [option for option in _shared_options() if option.name not in names]
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Return the command that the arguments name. The error of an unknown name proposes a similar one."""
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError:
            from difflib import get_close_matches

            similar = get_close_matches(args[0], COMMANDS, n=1)
            advice = f"did you mean {similar[0]!r}?" if similar else "see sparsedelta --help"
            message = f"no command is named {args[0]!r}; {advice}"
            raise click.UsageError(message, ctx) from None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands in groups."""
        format_commands(self, ctx, formatter)

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run the program. Standard streams that are closed, as in a daemon, are opened on the null device."""
        _open_standard_streams()
        guard_streams()
        try:
            return super().main(*args, **kwargs)
        except (OSError, ValueError) as error:  # a help page that cannot be written, or no kernels
            report_failure(error, with_traceback=False)
            sys.exit(1)

    def invoke(self, ctx: click.Context) -> None:
        """Run a command. Exit with 1 on an expected error, and with 128 + N on signal N."""
        try:
            with ending_signals(), shown_warnings():
                super().invoke(ctx)
        except KeyboardInterrupt as error:
            number = error.args[0] if error.args else signal.SIGINT
            report_interrupt(number)
            ctx.exit(128 + number)
        except EXPECTED as error:
            report_failure(error, with_traceback=ctx.params["debug"])
            ctx.exit(1)


def _open_standard_streams() -> None:
    # os.open returns the lowest free number, so each stream gets its own if they are opened in order.
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
@click.option(
    "--version",
    is_flag=True,
    expose_value=False,
    is_eager=True,
    callback=_show_version,
    help="Show the version and exit.",
)
@click.option("--debug", is_flag=True, help=_DEBUG_HELP)
@click.option("-q", "--quiet", is_flag=True, help=_QUIET_HELP)
@click.pass_context
def main(ctx: click.Context, *, debug: bool, quiet: bool) -> None:
    """Store the difference between two model checkpoints, and rebuild one from the other bit for bit."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # tensor names may hold any character
    ctx.obj = Settings(quiet=quiet)
