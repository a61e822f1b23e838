"""``sparsedelta follow``: a checkpoint on disk that keeps up with a channel."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

import sparsedelta
from sparsedelta.cli._channel import opened
from sparsedelta.cli._common import (
    PATH,
    PATH_OR_REPOSITORY,
    Integer,
    Settings,
    examples,
    json_option,
)
from sparsedelta.cli._failures import describe
from sparsedelta.cli._help import Command
from sparsedelta.cli._progress import progress_bar
from sparsedelta.errors import Behind, ChannelError, RemoteError
from sparsedelta.report.text import size

if TYPE_CHECKING:
    from sparsedelta.channel.following import SyncReport


@click.command("follow", cls=Command, epilog=examples("sparsedelta follow channel/ out/ --once"))
@click.argument("channel", type=PATH_OR_REPOSITORY)
@click.argument("out", type=PATH_OR_REPOSITORY)  # as text: a Path has no slash at its end
@click.option("--once", is_flag=True, help="Move to the latest version and end.")
@click.option("--version", type=Integer(1), metavar="N", help="Move to version N and end.")
@click.option(
    "--interval",
    type=click.FloatRange(0.01),
    default=5.0,
    show_default=True,
    metavar="SECONDS",
    help="How often to look for a new version.",
)
@click.option(
    "--run",
    metavar="COMMAND",
    help="Run this in a shell after each move, with SPARSEDELTA_VERSION and SPARSEDELTA_OUT set; again if it failed.",
)
@click.option(
    "--base",
    type=PATH,
    metavar="BASE",
    help="The checkpoint that full versions are deltas on, if any.",
)
@click.option("--overwrite", is_flag=True, help="Replace OUT even if no follower has written it.")
@json_option
@click.pass_obj
def command(
    settings: Settings,
    /,
    *,
    channel: str,
    out: str,
    once: bool,
    version: int | None,
    interval: float,
    run: str | None,
    base: Path | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Keep OUT at the latest version of CHANNEL.

    OUT is a folder, or one file if that is what was published. It is replaced in one step, by a version that is complete
    and checked; files that were added to it are not kept. A hidden file beside it says which version it is. If this is
    killed, at whatever moment, run it again.
    """
    with opened(settings, channel) as found, progress_bar(settings) as progress:
        follower = sparsedelta.Follower(
            found, out, base=base, overwrite=overwrite, progress=progress
        )
        while True:
            report = _sync(settings, follower, version, patient=not (once or version))
            if report:
                _tell(report, as_json=as_json)
                _note_kind(settings, report, out)
                if run is not None:
                    _run(run, report, out, found.entry(report.version).digest, to_stderr=as_json)
            if once or version:
                return
            time.sleep(interval)


def _sync(
    settings: Settings, follower: sparsedelta.Follower, version: int | None, *, patient: bool
) -> SyncReport | None:
    """Return what was done; None if nothing was, or what failed may succeed later."""
    before = follower.version
    try:
        report = follower.sync(version)
    except (ChannelError, RemoteError, OSError) as error:
        if not patient or (before is None and not isinstance(error, Behind)):
            raise
        settings.note(f"still at version {before or 'none'}: {describe(error)}")
        return None
    return report if report.version != before or not patient else None


def _tell(report: SyncReport, *, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(report)))
        return
    how = f"{size(report.n_bytes)} read" if report.n_versions else "there already"
    step = "" if report.step is None else f", step {report.step}"
    click.echo(f"version {report.version}{step}: {how}")


def _note_kind(settings: Settings, report: SyncReport, out: str) -> None:
    """Say that what was written first is one file, if its name does not."""
    if report.before is None and not out.endswith(".safetensors") and Path(out).is_file():
        settings.note(
            f"the versions are single files, so '{out}' is a safetensors file, not a folder"
        )


def _run(command: str, report: SyncReport, out: str, entry: bytes, *, to_stderr: bool) -> None:
    """Run a person's command in a shell, if OUT has moved or the command has not succeeded for this version.

    Args:
        command: the command.
        report: what was done before.
        out: OUT; a file beside it says for which version of which channel the command has succeeded last.
        entry: digest of the version's entry.
        to_stderr: whether what the command prints goes to stderr.

    Raises:
        OSError: it fails.
    """
    place = Path(os.path.abspath(out))
    noted = place.with_name(f".{place.name[:200]}.sparsedelta-ran")
    done_for = entry.hex().encode()
    if not report.n_versions and noted.is_file() and noted.read_bytes() == done_for:
        return
    noted.unlink(missing_ok=True)
    variables = {"SPARSEDELTA_VERSION": str(report.version), "SPARSEDELTA_OUT": str(place)}
    stdout = sys.stderr.fileno() if to_stderr else None
    done = subprocess.run(
        command, shell=True, env=os.environ | variables, stdout=stdout, check=False
    )
    if done.returncode:
        raise OSError(f"the command given with --run ended with exit code {done.returncode}")
    noted.write_bytes(done_for)
