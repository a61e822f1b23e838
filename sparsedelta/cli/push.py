"""``sparsedelta push``: a delta into a repository on the Hub."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
)
from sparsedelta.cli._progress import progress_bar
from sparsedelta.report.text import printable, size

if TYPE_CHECKING:
    from sparsedelta import PushReport


@click.command("push", epilog=examples("sparsedelta push delta.sd me/tuned --base-id org/model"))
@click.argument("delta", type=PATH)
@click.argument("repo_id", metavar="ORG/NAME")
@click.option(
    "--base-id",
    metavar="ORG/MODEL[@REV]",
    help="Repository of the base; without it the one that DELTA names.",
)
@click.option("--base", type=PATH, help="A local copy of the base, to save a download.")
@click.option(
    "--subfolder", metavar="NAME", help="Folder for the delta, if the repository holds several."
)
@click.option("--private", is_flag=True, default=None, help="Make the repository private, if new.")
@click.option(
    "--revision", metavar="BRANCH", help="Branch to push to; created if it does not exist."
)
@click.option("--create-pr", is_flag=True, help="Open a pull request instead.")
@click.option("-m", "--commit-message", metavar="TEXT", help="First line of the commit message.")
@click.option("--commit-description", metavar="TEXT", help="The rest of the commit message.")
@click.option("--tag", metavar="TAG", help="Set a tag on the commit.")
@token_option
@click.option("--dry-run", is_flag=True, help="Send nothing; show what would be sent and the card.")
@click.option(
    "--allow-secrets", is_flag=True, help="Push what looks like a credential all the same."
)
@json_option
@click.pass_obj
def command(
    settings: Settings,
    /,
    *,
    delta: Path,
    repo_id: str,
    as_json: bool,
    **options: Any,
) -> None:
    """Upload DELTA to a repository on the Hub.

    A model card is written, or its section about DELTA updated. Before anything is sent, the base
    is pinned to a commit and checked to be the base of the delta. Everything goes into one commit;
    files that the repository has already are not sent again.
    """
    quiet_client(settings)
    with progress_bar(settings) as progress:
        report = sparsedelta.push(delta, repo_id, **options, progress=progress)
    if as_json:
        print_json(dataclasses.asdict(report))
    else:
        click.echo(_describe(report))


def _describe(report: PushReport) -> str:
    lines = [f"base: {printable(report.base)}, proved by {printable(report.proof)}"]
    if report.dry_run:
        lines.append(f"would push to {report.url}:")
        for file in report.files:
            state = "" if file.changed else ", there already"
            lines.append(f"  {printable(file.path)}: {size(file.n_bytes)}{state}")
        return "\n".join([*lines, "", report.card])
    if report.pull_request:
        lines.append(f"pull request: {report.pull_request}")
    elif report.committed:
        n_bytes = sum(file.n_bytes for file in report.files if file.changed)
        lines.append(f"pushed {size(n_bytes)} to {report.url}, commit {report.commit}")
    else:
        lines.append(f"{report.url} has it all already, nothing was pushed")
    if report.tag:
        lines.append(f"tag: {printable(report.tag)}")
    return "\n".join(lines)
