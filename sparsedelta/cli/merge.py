"""``sparsedelta merge``: merge deltas of one base into one delta."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

import sparsedelta
from sparsedelta.cli._common import (
    PATH,
    PATH_OR_REPOSITORY,
    Settings,
    check_output_file,
    examples,
    exclude_option,
    json_option,
)
from sparsedelta.cli._help import Command
from sparsedelta.cli._progress import progress_bar
from sparsedelta.cli._sources import Sources
from sparsedelta.cli._written import show_written

if TYPE_CHECKING:
    from sparsedelta.ops.merging.recipe import Method

METHODS = ("linear", "task-arithmetic", "ties", "dare", "dare-ties")


def parse_numbers(
    ctx: click.Context, param: click.Parameter, value: str | None
) -> list[float] | None:
    """Return the numbers in the value of an option, which are separated by commas."""
    if value is None:
        return None
    try:
        return [float(part) for part in value.split(",")]
    except ValueError as error:
        raise click.BadParameter(
            f"{value!r} is not a number or a list of numbers such as 0.7,0.3"
        ) from error


@click.command(
    "merge",
    cls=Command,
    epilog=examples("sparsedelta merge base/ sql.sd chat.sd -o both.sd --method ties"),
)
@click.argument("base", type=PATH_OR_REPOSITORY)
@click.argument("deltas", type=PATH_OR_REPOSITORY, nargs=-1, required=True, metavar="DELTA...")
@click.option("-o", "--output", type=PATH, required=True, metavar="OUT", help="The file to write.")
@click.option(
    "--method",
    type=click.Choice(METHODS),
    default="linear",
    show_default=True,
    help="How to combine the changes.",
)
@click.option(
    "--weights",
    callback=parse_numbers,
    metavar="W,W,...",
    help="One weight for each delta. [default: 1]",
)
@click.option(
    "--density",
    callback=parse_numbers,
    metavar="D[,D...]",
    help="Share of elements to keep, for ties and dare.",
)
@click.option(
    "--scale",
    type=float,
    default=1.0,
    show_default=True,
    help="Factor for the merged difference.",
)
@click.option(
    "--normalize/--no-normalize",
    default=None,
    help="Divide by the sum of weights. [default: yes for linear and ties]",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Random seed, for dare.")
@exclude_option("files of BASE")
@click.option("--overwrite", is_flag=True, help="Replace OUT if it exists.")
@json_option
@click.pass_obj
def command(
    settings: Settings,
    *,
    base: str,
    deltas: tuple[str, ...],
    output: Path,
    method: Method,
    weights: list[float] | None,
    density: list[float] | None,
    scale: float,
    normalize: bool | None,
    seed: int,
    exclude: tuple[str, ...],
    overwrite: bool,
    as_json: bool,
) -> None:
    """Merge deltas of BASE into one delta, in floating point.

    linear averages the targets. task-arithmetic adds the differences. ties keeps the largest
    differences of each delta and, for each element, only those with the sign of their weighted
    sum. dare keeps a random share of the differences and rescales it. dare-ties also applies the
    sign rule of ties. The result has the files of BASE. BASE and DELTA may be repositories on the
    Hub (org/name@revision).
    """
    with Sources(settings) as sources, progress_bar(settings) as progress:
        inputs = sources.paths(base, *deltas)
        check_output_file(output, overwrite=overwrite, inputs=inputs)
        paths = [sources.delta(delta) for delta in deltas]
        with sparsedelta.merge(
            sources.base_with_weights(base, paths[0]),
            *paths,
            method=method,
            weights=weights,
            density=density,
            seed=seed,
            normalize=normalize,
            scale=scale,
            exclude=exclude,
            progress=progress,
            spool_dir=str(output.parent),
        ) as merged:
            merged.save(output, overwrite=overwrite)
    show_written(output, as_json=as_json)
