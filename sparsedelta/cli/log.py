"""``sparsedelta log``: the versions of a channel."""

from __future__ import annotations

import click

from sparsedelta.cli._channel import describe, fields, opened
from sparsedelta.cli._common import (
    PATH_OR_REPOSITORY,
    Integer,
    Settings,
    examples,
    json_option,
    print_json,
)
from sparsedelta.cli._help import Command


@click.command("log", cls=Command, epilog=examples("sparsedelta log channel/"))
@click.argument("channel", type=PATH_OR_REPOSITORY)
@click.option(
    "-n", "--limit", type=Integer(1), default=20, show_default=True, help="Versions shown."
)
@json_option
@click.pass_obj
def command(settings: Settings, /, *, channel: str, limit: int, as_json: bool) -> None:
    """Show the latest versions of CHANNEL, the latest first.

    Each entry is checked against the one after it. The entries of pruned versions stay.
    """
    with opened(settings, channel, must_exist=True) as found:
        entries = found.log(limit=limit)
        segments = {entry.segment: entry for entry in entries}
        pruned = {segment for segment, entry in segments.items() if found.is_pruned(entry)}
    if as_json:
        print_json(
            {"versions": [fields(each) | {"pruned": each.segment in pruned} for each in entries]}
        )
        return
    for entry in entries:
        click.echo(describe(entry) + ("  pruned" if entry.segment in pruned else ""))
    if not entries:
        settings.note("the channel has no version")
