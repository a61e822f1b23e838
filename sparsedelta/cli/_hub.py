"""What commands that use the Hub share: options, and how much its client says."""

from __future__ import annotations

import sys

import click

from sparsedelta.cli._common import Settings

token_option = click.option(
    "--token", metavar="TOKEN", help="Token of the Hub; without it the one that is logged in."
)


def quiet_client(settings: Settings) -> None:
    """Let the Hub's client show its bars and warnings only where ours would be."""
    from sparsedelta.hub.client import silence

    if settings.quiet or not sys.stderr.isatty():
        silence()
