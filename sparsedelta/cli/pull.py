"""``sparsedelta pull``: from a delta repository on the Hub to the target on disk."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import click

import sparsedelta
from sparsedelta.cli._common import (
    PATH,
    Settings,
    examples,
    json_option,
    print_json,
    quiet_client,
    token_option,
    verify_option,
)
from sparsedelta.cli._progress import progress_bar
from sparsedelta.report.text import printable


@click.command("pull", epilog=examples("sparsedelta pull me/tuned out/"))
@click.argument("repo_id", metavar="ORG/NAME")
@click.argument("out", type=PATH)
@click.option("--revision", metavar="REV", help="Branch, tag or commit of ORG/NAME.")
@click.option("--subfolder", metavar="NAME", help="Folder of the delta, if there are several.")
@click.option("--base", metavar="BASE", help="A local copy of the base, or a repository of it.")
@click.option(
    "--base-revision",
    metavar="REV",
    help="Commit of the base, instead of the one that DELTA names.",
)
@click.option("--keep-delta", is_flag=True, help="Also keep the delta, as OUT.sd.")
@verify_option
@click.option("--overwrite", is_flag=True, help="Replace OUT, a folder with all that is in it.")
@token_option
@json_option
@click.pass_obj
def command(
    settings: Settings,
    /,
    *,
    repo_id: str,
    out: Path,
    as_json: bool,
    **options: Any,
) -> None:
    """Download a delta and its base, and rebuild the model.

    Files that the cache of the Hub's client holds already are not downloaded again. If the base is
    itself a delta, it is rebuilt first. OUT appears only when it is complete and checked.
    """
    quiet_client(settings)
    with progress_bar(settings) as progress:
        report = sparsedelta.pull(repo_id, out, **options, progress=progress)
    if as_json:
        print_json(dataclasses.asdict(report))
        return
    settings.note(f"base: {printable(report.base)}")
    for reference in report.applied:
        settings.note(f"delta: {printable(reference)}")
    settings.note(f"wrote {printable(str(out))}")
