"""``sparsedelta merge``: from several deltas of one base to one that weighs them against each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

import sparsedelta
from sparsedelta.cli._common import (
    PATH,
    Settings,
    check_output_file,
    examples,
    exclude_option,
    json_option,
)
from sparsedelta.cli._progress import progress_bar
from sparsedelta.cli._sources import Sources
from sparsedelta.cli._written import show_written

METHODS = ("linear", "task-arithmetic", "ties", "dare", "dare-ties")


def numbers(ctx: click.Context, param: click.Parameter, value: str | None) -> list[float] | None:
    """Return the numbers of an option's value, which has commas between them."""
    if value is None:
        return None
    try:
        return [float(part) for part in value.split(",")]
    except ValueError as error:
        raise click.BadParameter(
            f"{value!r} is not a number, or several with commas between them"
        ) from error


@click.command(
    "merge",
    epilog=examples("sparsedelta merge base/ sql.sd chat.sd -o both.sd --method ties"),
)
@click.argument("base")
@click.argument("deltas", nargs=-1, required=True, metavar="DELTA...")
@click.option("-o", "--output", type=PATH, required=True, metavar="OUT", help="The file to write.")
@click.option(
    "--method",
    type=click.Choice(METHODS),
    default="linear",
    show_default=True,
    help="How to combine the changes.",
)
@click.option(
    "--weights", callback=numbers, metavar="W,W,...", help="One weight per delta. [default: 1 each]"
)
@click.option(
    "--density",
    callback=numbers,
    metavar="D[,D...]",
    help="Share of changes to keep, for ties and dare.",
)
@click.option(
    "--scale",
    type=float,
    default=1.0,
    show_default=True,
    help="Multiply the merged change by this.",
)
@click.option(
    "--normalize/--no-normalize",
    default=None,
    help="Divide by the sum of weights. [default: for linear and ties]",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Random seed, for dare.")
@exclude_option("files of BASE")
@click.option("--overwrite", is_flag=True, help="Replace OUT if it exists.")
@json_option
@click.pass_obj
def command(
    settings: Settings,
    /,
    *,
    base: str,
    deltas: tuple[str, ...],
    output: Path,
    overwrite: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Combine deltas of BASE in floating point into one delta.

    linear averages the targets; task-arithmetic adds the changes; ties keeps the largest changes
    and elects their signs; dare keeps a random share and rescales it. The result has the files of
    BASE. BASE and DELTA may be repositories on the Hub (org/name@revision).
    """
    with Sources(settings) as sources, progress_bar(settings) as progress:
        inputs = sources.paths(base, *deltas)
        check_output_file(output, overwrite=overwrite, inputs=inputs)
        paths = [sources.delta(delta) for delta in deltas]
        with sparsedelta.merge(
            sources.only_base(base, paths[0]),
            *paths,
            **options,
            progress=progress,
            spool_dir=str(output.parent),
        ) as merged:
            merged.save(output, overwrite=overwrite)
    show_written(output, as_json=as_json)
