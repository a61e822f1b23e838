"""Help pages with options and commands in groups."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

import click

GROUPS: Mapping[str, Sequence[str]] = {
    "Compare and rebuild": ("diff", "apply", "verify", "inspect", "convert"),
    "Combine deltas": ("stack", "invert", "merge"),
    "The Hub": ("push", "pull"),
    "Channels": ("publish", "follow", "log", "prune"),
    "Help": ("explain", "doctor", "completion"),
}
"""The commands, by the title under which the help lists them."""

COMMANDS = tuple(name for names in GROUPS.values() for name in names)

# An option that is in no group is listed under "Options".
_OPTION_GROUPS: Mapping[str, Sequence[str]] = {
    "Output": ("output", "keep_delta", "html", "tensors", "info", "overwrite", "as_json"),
    "Base and target": ("base", "target", "base_id", "base_revision", "exclude", "include"),
    "The Hub": (
        "subfolder", "private", "revision", "create_pr", "commit_message", "commit_description", "tag", "token",
    ),
    "Checks": ("verify", "durable", "any_size", "lossy", "dry_run", "allow_secrets"),
    "General": ("debug", "quiet"),
}  # fmt: skip
_FIRST = "Options"


def option_groups(params: Iterable[click.Parameter]) -> dict[str, list[click.Option]]:
    """Return the options by the title of their group. What only one command has comes first, under "Options"."""
    titles = {name: title for title, names in _OPTION_GROUPS.items() for name in names}
    found: dict[str, list[click.Option]] = {title: [] for title in (_FIRST, *_OPTION_GROUPS)}
    for param in params:
        if isinstance(param, click.Option):
            title = (
                "General" if param.opts[-1] == "--help" else titles.get(param.name or "", _FIRST)
            )
            found[title].append(param)
    return {title: inside for title, inside in found.items() if inside}


_FOR_PATHS = ("base", "target", "output")


class Command(click.Command):
    """A command whose help page lists options in groups, and whose errors say where an argument belongs."""

    allow_extra_args = True  # parse_args refuses them with its own message

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the arguments. The error of a missing or surplus one shows how the command is called."""
        try:
            surplus = super().parse_args(ctx, args)
        except click.MissingParameter as error:
            raise click.MissingParameter(
                f"Example: {self.example}",
                error.ctx,
                error.param,
                error.param_hint,
                error.param_type,
            ) from None
        except click.NoSuchOption as error:
            argument = self._argument_for(error.option_name, ctx)
            if argument is None:
                raise
            message = f"no such option {error.option_name!r}; give {argument} as an argument, in this order: {self.example}"
            raise click.UsageError(message, ctx) from None
        if surplus and not ctx.resilient_parsing:
            taken = [p.make_metavar(ctx) for p in self.params if isinstance(p, click.Argument)]
            options = [
                f"{p.opts[-1]} {p.make_metavar(ctx)}"
                for p in self.params
                if p.name in _FOR_PATHS
                if isinstance(p, click.Option)
            ]
            more = f", and as options {' and '.join(options)}" if options else ""
            ctx.fail(
                f"unexpected argument {surplus[0]!r}: this command takes {' '.join(taken) or 'no argument'}{more}"
            )
        return surplus

    @property
    def example(self) -> str:
        """The first example of the help page."""
        lines = map(str.strip, (self.epilog or "").splitlines())
        return next(line for line in lines if line.startswith("sparsedelta "))

    def _argument_for(self, option: str, ctx: click.Context) -> str | None:
        """Return the argument in whose place an option of another command was given; None if there is none."""
        name = {"-o": "OUT", "--output": "OUT"}.get(option, option.lstrip("-").upper())
        taken = [p.make_metavar(ctx) for p in self.params if isinstance(p, click.Argument)]
        return name if any(name in re.findall(r"[A-Z]+", metavar) for metavar in taken) else None

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options of each group."""
        for title, params in option_groups(self.get_params(ctx)).items():
            records = [record for p in params if (record := p.get_help_record(ctx)) is not None]
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)


def format_commands(group: click.Group, ctx: click.Context, formatter: click.HelpFormatter) -> None:
    """Write the name and the first sentence of each command, under the titles of ``GROUPS``."""
    width = max(map(len, COMMANDS))
    limit = formatter.width - 6 - width
    for title, names in GROUPS.items():
        commands = ((name, group.get_command(ctx, name)) for name in names)
        with formatter.section(title):
            formatter.write_dl(
                [(name.ljust(width), c.get_short_help_str(limit)) for name, c in commands if c]
            )
