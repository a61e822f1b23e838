"""``sparsedelta apply``: rebuild the target from a base and deltas."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

import sparsedelta
from sparsedelta.cli._common import (
    PATH_OR_REPOSITORY,
    Settings,
    examples,
    exclude_option,
    verify_option,
)
from sparsedelta.cli._help import Command
from sparsedelta.cli._progress import progress_bar
from sparsedelta.cli._sources import Sources
from sparsedelta.fs import check_absent

if TYPE_CHECKING:
    from sparsedelta.tensors.rebuild import Check


@click.command("apply", cls=Command, epilog=examples("sparsedelta apply base/ delta.sd out/"))
@click.argument("base", type=PATH_OR_REPOSITORY)
@click.argument("deltas_and_out", type=PATH_OR_REPOSITORY, nargs=-1, metavar="DELTA... OUT")
@verify_option
@exclude_option("files of BASE")
@click.option(
    "--any-size",
    is_flag=True,
    help="Allow a target that is much larger than the base and the delta.",
)
@click.option("--overwrite", is_flag=True, help="Replace OUT and everything in it.")
@click.pass_obj
def command(
    settings: Settings,
    *,
    base: str,
    deltas_and_out: tuple[str, ...],
    verify: Check,
    exclude: tuple[str, ...],
    any_size: bool,
    overwrite: bool,
) -> None:
    """Rebuild the target from BASE and DELTA, byte for byte.

    Several deltas are applied in order; each must start from the target of the one before it.
    OUT appears only when it is complete and checked. BASE is not changed. BASE and DELTA may be
    repositories on the Hub (org/name@revision).
    """
    if len(deltas_and_out) < 2:
        raise click.UsageError("give BASE, at least one DELTA, and OUT, in this order")
    from sparsedelta.ops.apply import check_apart, check_no_delta  # with numpy

    *deltas, last = deltas_and_out
    out = Path(last)
    with Sources(settings) as sources, progress_bar(settings) as progress:
        check_apart(sources.paths(base, *deltas), out)
        check_no_delta(out)
        check_absent(out, overwrite=overwrite)  # before a download
        paths = [sources.delta(delta) for delta in deltas]
        base_path, before = sources.base(base, paths[0])
        sparsedelta.apply(
            base_path,
            [*before, *paths],
            last,
            verify=verify,
            overwrite=overwrite,
            exclude=exclude,
            any_size=any_size,
            progress=progress,
        )
    settings.note(f"wrote {out}")
