"""``sparsedelta verify``: check a delta, and check it against its base and its target."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING

import click

import sparsedelta
from sparsedelta.cli._common import (
    PATH_OR_REPOSITORY,
    Settings,
    examples,
    exclude_option,
    json_option,
    print_json,
)
from sparsedelta.cli._help import Command
from sparsedelta.cli._progress import progress_bar
from sparsedelta.cli._sources import Sources
from sparsedelta.report.text import count, printable, size

if TYPE_CHECKING:
    from sparsedelta import VerifyReport
    from sparsedelta._typing import JSON
    from sparsedelta.hub.sources import RemoteBaseReport


@click.command(
    "verify", cls=Command, epilog=examples("sparsedelta verify delta.sd --base base/ --target out/")
)
@click.argument("delta", type=PATH_OR_REPOSITORY)
@click.option(
    "--base",
    type=PATH_OR_REPOSITORY,
    metavar="BASE",
    help="Check that this is the base and that the delta rebuilds the target from it.",
)
@click.option(
    "--target",
    type=PATH_OR_REPOSITORY,
    metavar="OUT",
    help="Check that this checkpoint is the target.",
)
@exclude_option("files of both")
@json_option
@click.pass_obj
def command(
    settings: Settings,
    *,
    delta: str,
    base: str | None,
    target: str | None,
    exclude: tuple[str, ...],
    as_json: bool,
) -> None:
    """Check DELTA and, if they are given, its base and its target.

    Nothing is written. The first problem found is reported, and the exit code is then 1. DELTA,
    BASE and OUT may be repositories on the Hub (org/name@revision). If DELTA is a repository and
    BASE is not given, the base is compared with the Hub's metadata, without downloading weights.
    """
    with Sources(settings) as sources, progress_bar(settings) as progress:
        path = sources.delta(delta)
        remote = sources.remote_base_report(delta) if base is None else None
        report = sparsedelta.verify(
            path,
            base=None if base is None else sources.base_with_weights(base, path),
            target=None if target is None else sources.checkpoint(target)[0],
            exclude=exclude,
            progress=progress,
        )
    if as_json:
        remote_base = {} if remote is None else {"remote_base": dataclasses.asdict(remote)}
        print_json({"delta": delta, **dataclasses.asdict(report), **remote_base})
    else:
        click.echo(_describe(delta, report, remote))


def _describe(delta: str, report: VerifyReport, remote: RemoteBaseReport | None) -> str:
    changes = (
        f"{count(report.nnz, 'changed value')} in {count(report.n_changed)} of"
        f" {count(report.n_tensors, 'tensor')}, {size(report.payload_bytes)} coded"
    )
    base = "not checked"
    if report.base_checked and report.n_from_base:
        base = "correct, the delta rebuilds the target from it"
    elif report.base_checked:
        base = "not used, the delta holds all tensors of the target"
    source = report.converted
    from_other = (
        [] if source is None else [f"converted from {source.get('form')}: {_proof(source)}"]
    )
    return "\n".join(
        [
            f"{printable(delta)} is valid: {changes}",
            *map(printable, from_other),
            "base: " + (base if remote is None else _remote_base(remote)),
            "target: " + ("correct, every file" if report.target_checked else "not checked"),
        ]
    )


def _proof(source: Mapping[str, JSON]) -> str:
    """Return what proves that a delta of another form rebuilds what its author had."""
    found = source.get("verified")
    if found == "none":
        return (
            "its file has no digests, so nothing proves that this is the target that its author had"
        )
    return f"verified by {'comparison with' if found == 'target' else 'its digests of'} {found}"


def _remote_base(remote: RemoteBaseReport) -> str:
    name = printable(remote.base)
    if remote.recorded:
        return f"{name} has the {count(remote.n_files, 'file')} verified by push"
    return f"{name} has the same tensors by name, dtype and shape; their content was not checked"
