"""``sparsedelta pull``: download a delta and its base from the Hub, and rebuild the target."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import click

import sparsedelta
from sparsedelta.cli._common import (
    PATH,
    PATH_OR_REPOSITORY,
    Settings,
    durable_option,
    examples,
    json_option,
    print_json,
    quiet_client,
    token_option,
    verify_option,
)
from sparsedelta.cli._help import Command
from sparsedelta.cli._progress import progress_bar
from sparsedelta.report.text import printable

if TYPE_CHECKING:
    from sparsedelta.tensors.rebuild import Check


@click.command("pull", cls=Command, epilog=examples("sparsedelta pull me/tuned out/"))
@click.argument("repo_id", metavar="ORG/NAME")
@click.argument("out", type=PATH)
@click.option("--revision", metavar="REV", help="Branch, tag or commit of ORG/NAME.")
@click.option(
    "--subfolder", metavar="NAME", help="Folder of the delta, if the repository holds several."
)
@click.option(
    "--base",
    type=PATH_OR_REPOSITORY,
    metavar="BASE",
    help="A local copy of the base, or its repository.",
)
@click.option(
    "--base-revision",
    metavar="REV",
    help="Use this revision of the base, instead of the one that the delta names.",
)
@click.option("--keep-delta", is_flag=True, help="Also keep the delta, as OUT.sd.")
@verify_option
@durable_option
@click.option("--overwrite", is_flag=True, help="Replace OUT and everything in it.")
@token_option
@json_option
@click.pass_obj
def command(
    settings: Settings,
    *,
    repo_id: str,
    out: Path,
    revision: str | None,
    subfolder: str | None,
    base: str | None,
    base_revision: str | None,
    keep_delta: bool,
    verify: Check,
    durable: bool,
    overwrite: bool,
    token: str | None,
    as_json: bool,
) -> None:
    """Download a delta and its base, and rebuild the model.

    Files that are already in the cache of huggingface_hub are not downloaded again. If the base
    is itself a delta, it is rebuilt first. OUT appears only when it is complete and checked.
    """
    quiet_client(settings)
    with progress_bar(settings) as progress:
        report = sparsedelta.pull(
            repo_id,
            out,
            revision=revision,
            subfolder=subfolder,
            base=base,
            base_revision=base_revision,
            keep_delta=keep_delta,
            verify=verify,
            durable=durable,
            overwrite=overwrite,
            token=token,
            progress=progress,
        )
    if as_json:
        print_json(dataclasses.asdict(report))
        return
    settings.note(f"base: {printable(report.base)}")
    for reference in report.applied:
        settings.note(f"delta: {printable(reference)}")
    settings.note(f"wrote {printable(str(out))}")
