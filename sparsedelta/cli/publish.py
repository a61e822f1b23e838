"""``sparsedelta publish``: a checkpoint on disk as the next version of a channel."""

from __future__ import annotations

from pathlib import Path

import click

from sparsedelta.cli._channel import describe, fields, opened
from sparsedelta.cli._common import (
    PATH,
    PATH_OR_REPOSITORY,
    Integer,
    Settings,
    examples,
    exclude_option,
    json_option,
    print_json,
)
from sparsedelta.cli._help import Command
from sparsedelta.cli._progress import progress_bar
from sparsedelta.report.text import printable


@click.command("publish", cls=Command, epilog=examples("sparsedelta publish channel/ target/"))
@click.argument("channel", type=PATH_OR_REPOSITORY)
@click.argument("checkpoint", type=PATH)
@click.option(
    "--base",
    type=PATH,
    metavar="BASE",
    help="The checkpoint that was published last; without it, publish in full.",
)
@click.option("--step", type=Integer(0, 2**63 - 1), metavar="N", help="Step of the training.")
@click.option(
    "--anchor-ratio",
    type=float,
    default=1.0,
    show_default=True,
    help="Write in full too when deltas weigh this times the last full version.",
)
@click.option(
    "--anchor-every",
    type=Integer(1),
    metavar="N",
    help="Write in full too every N versions.",
)
@click.option("--anchor-base", type=PATH, help="Write full versions as deltas on this checkpoint.")
@click.option("--anchor-base-id", metavar="ORG/MODEL@REV", help="Where followers find that one.")
@exclude_option("files of CHECKPOINT and BASE")
@json_option
@click.pass_obj
def command(
    settings: Settings,
    /,
    *,
    channel: str,
    checkpoint: Path,
    base: Path | None,
    step: int | None,
    anchor_ratio: float,
    anchor_every: int | None,
    anchor_base: Path | None,
    anchor_base_id: str | None,
    exclude: tuple[str, ...],
    as_json: bool,
) -> None:
    """Add CHECKPOINT to CHANNEL as its next version.

    CHANNEL is a folder, or the address of a bucket or a repository. The first version is written in full; so is every
    version without --base. With --base, a checkpoint with the weights that were published last, it is a delta on that version. If the
    latest version is CHECKPOINT already, with the step of --step if that is given, none is added.
    """
    from sparsedelta.channel.publisher import publish_checkpoint

    with opened(settings, channel) as found, progress_bar(settings) as progress:
        entry = publish_checkpoint(
            found,
            checkpoint,
            base=base,
            step=step,
            anchor_ratio=anchor_ratio,
            anchor_every=anchor_every,
            anchor_base=anchor_base,
            anchor_base_id=anchor_base_id,
            exclude=exclude,
            progress=progress,
        )
        head = entry or found.head()
        before = found.find(entry.version - 1) if entry and entry.version > 1 else None
    if (checkpoint / "adapter_config.json").is_file():
        click.echo(
            f"warning: '{printable(str(checkpoint))}' is a PEFT adapter, and followers get the adapter; to publish a model,"
            " merge it into the base and save that model",
            err=True,
        )
    if entry is None:
        settings.note("this is what the channel's latest version holds; nothing was published")
    elif before and before.target == entry.target:
        settings.note(f"version {entry.version} has the same weights as version {before.version}")
    if head and as_json:
        print_json(fields(head))
    elif head:
        click.echo(describe(head))
