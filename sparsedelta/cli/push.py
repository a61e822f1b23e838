"""``sparsedelta push``: upload a delta to a repository on the Hub."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

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
from sparsedelta.cli._help import Command
from sparsedelta.cli._progress import progress_bar
from sparsedelta.report.text import printable, size

if TYPE_CHECKING:
    from sparsedelta import PushReport


@click.command(
    "push", cls=Command, epilog=examples("sparsedelta push delta.sd me/tuned --base-id org/model")
)
@click.argument("delta", type=PATH)
@click.argument("repo_id", metavar="ORG/NAME")
@click.option(
    "--base-id",
    metavar="ORG/MODEL[@REV]",
    help="Repository of the base. [default: the one that DELTA names]",
)
@click.option(
    "--base", type=PATH, metavar="BASE", help="A local copy of the base; it saves a download."
)
@click.option(
    "--subfolder", metavar="NAME", help="Folder for the delta, if the repository holds several."
)
@click.option(
    "--private", is_flag=True, default=None, help="Make the repository private, if it is new."
)
@click.option(
    "--revision", metavar="BRANCH", help="Branch to push to; created if it does not exist."
)
@click.option(
    "--create-pr", is_flag=True, help="Open a pull request instead of pushing to the branch."
)
@click.option("-m", "--commit-message", metavar="TEXT", help="First line of the commit message.")
@click.option("--commit-description", metavar="TEXT", help="The rest of the commit message.")
@click.option("--tag", metavar="TAG", help="Set a tag on the commit.")
@token_option
@click.option(
    "--dry-run", is_flag=True, help="Upload nothing; show the files to upload and the model card."
)
@click.option(
    "--allow-secrets", is_flag=True, help="Push even if DELTA holds what looks like a credential."
)
@json_option
@click.pass_obj
def command(
    settings: Settings,
    *,
    delta: Path,
    repo_id: str,
    base_id: str | None,
    base: Path | None,
    subfolder: str | None,
    private: bool | None,
    revision: str | None,
    create_pr: bool,
    commit_message: str | None,
    commit_description: str | None,
    tag: str | None,
    token: str | None,
    dry_run: bool,
    allow_secrets: bool,
    as_json: bool,
) -> None:
    """Upload DELTA to a repository on the Hub.

    The command refuses a DELTA that holds what looks like a credential. It resolves the base to a
    commit and checks that DELTA was made from it. It writes a model card, or updates the section
    about DELTA. All files that are new or changed are uploaded in one commit.
    """
    quiet_client(settings)
    with progress_bar(settings) as progress:
        report = sparsedelta.push(
            delta,
            repo_id,
            base_id=base_id,
            base=base,
            subfolder=subfolder,
            private=private,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message,
            commit_description=commit_description,
            tag=tag,
            token=token,
            dry_run=dry_run,
            allow_secrets=allow_secrets,
            progress=progress,
        )
    if as_json:
        print_json(dataclasses.asdict(report))
    else:
        click.echo(_describe(report))


def _describe(report: PushReport) -> str:
    lines = [f"base: {printable(report.base)}, verified with {printable(report.proof)}"]
    if report.dry_run:
        lines.append(f"would push to {report.url}:")
        for file in report.files:
            state = "" if file.changed else ", already there"
            lines.append(f"  {printable(file.path)}: {size(file.n_bytes)}{state}")
        return "\n".join([*lines, "", report.card])
    if report.pull_request:
        lines.append(f"pull request: {report.pull_request}")
    elif report.committed:
        n_bytes = sum(file.n_bytes for file in report.files if file.changed)
        lines.append(f"pushed {size(n_bytes)} to {report.url}, commit {report.commit}")
    else:
        lines.append(f"nothing to push: {report.url} already has these files")
    if report.tag:
        lines.append(f"tag: {printable(report.tag)}")
    return "\n".join(lines)
