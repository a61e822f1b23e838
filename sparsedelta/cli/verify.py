"""``sparsedelta verify``: whether a delta is sound, and belongs to a base and a target."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import click

import sparsedelta
from sparsedelta.cli._common import PATH, Settings, examples, json_option, print_json
from sparsedelta.cli._progress import progress_bar
from sparsedelta.cli._text import count, printable, size

if TYPE_CHECKING:
    from sparsedelta import VerifyReport


@click.command("verify", epilog=examples("sparsedelta verify delta.sd --base base/ --target out/"))
@click.argument("delta", type=PATH)
@click.option("--base", type=PATH, help="Check that this is the base, and becomes the target.")
@click.option("--target", type=PATH, metavar="OUT", help="Check that this is the target.")
@json_option
@click.pass_obj
def command(
    settings: Settings, *, delta: Path, base: Path | None, target: Path | None, as_json: bool
) -> None:
    """Check all of DELTA, and that BASE and OUT belong to it.

    Nothing is written. The first thing found wrong is told, and the exit code is 1.
    """
    with progress_bar(settings) as progress:
        report = sparsedelta.verify(delta, base=base, target=target, progress=progress)
    if as_json:
        print_json({"delta": str(delta), **dataclasses.asdict(report)})
    else:
        click.echo(_describe(delta, report))


def _describe(delta: Path, report: VerifyReport) -> str:
    changes = (
        f"{count(report.nnz, 'changed value')} in {count(report.n_changed)} of"
        f" {count(report.n_tensors, 'tensor')}, {size(report.payload_bytes)} coded"
    )
    return "\n".join(
        [
            f"{printable(str(delta))} is sound: {changes}",
            "base: " + ("right, it becomes the target" if report.base_checked else "not checked"),
            "target: " + ("right, every file" if report.target_checked else "not checked"),
        ]
    )
