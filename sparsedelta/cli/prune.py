"""``sparsedelta prune``: delete old versions of a channel."""

from __future__ import annotations

import dataclasses

import click

from sparsedelta.cli._channel import opened
from sparsedelta.cli._common import (
    PATH_OR_REPOSITORY,
    Integer,
    Settings,
    examples,
    json_option,
    print_json,
)
from sparsedelta.cli._help import Command


@click.command("prune", cls=Command, epilog=examples("sparsedelta prune channel/ --keep 100"))
@click.argument("channel", type=PATH_OR_REPOSITORY)
@click.option(
    "--keep",
    type=Integer(1),
    required=True,
    metavar="N",
    help="Keep what followers need to reach the latest N versions.",
)
@json_option
@click.pass_obj
def command(settings: Settings, /, *, channel: str, keep: int, as_json: bool) -> None:
    """Delete what followers of CHANNEL do not need.

    What a follower is reading stays, and so does all after it. The log of versions stays.
    """
    from sparsedelta.channel.leases import LEASE_SECONDS

    with opened(settings, channel, must_exist=True) as found:
        report = found.prune(keep=keep)
    if as_json:
        print_json(dataclasses.asdict(report))
        return
    first = f"; version {report.first} is the oldest left" if report.first else ""
    click.echo(f"deleted {report.n_deleted} objects{first}")
    if report.leased:
        minutes = LEASE_SECONDS // 60
        settings.note(
            f"version {report.leased} was read by a follower in the last {minutes} minutes, which may still need it;"
            f" run this again in {minutes} minutes"
        )
