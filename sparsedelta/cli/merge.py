"""``sparsedelta merge``: merge deltas of one base into one delta."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

import sparsedelta
from sparsedelta.cli._common import (
    DELTA_FILE,
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
    from sparsedelta.interop.mergekit import MergeOptions
    from sparsedelta.ops.merging.recipe import Method

_GIVEN = click.core.ParameterSource.COMMANDLINE
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


def _check_alone(base: str | None) -> None:
    """Raise UsageError if arguments are given that the configuration states."""
    context = click.get_current_context()
    names = ("method", "weights", "density", "scale", "normalize")
    given = [name for name in names if context.get_parameter_source(name) is _GIVEN]
    if base is not None or given:
        what = "BASE and DELTA" if base is not None else f"--{given[0]}"
        raise click.UsageError(f"--config states what {what} would; give one or the other")


def _check_no_number(inputs: tuple[str, ...]) -> None:
    """Raise UsageError if an argument is a number instead of a path, as after `--weights 0.7 0.3`."""
    for text in inputs:
        try:
            float(text)
        except ValueError:
            continue
        if not Path(text).exists():
            raise click.UsageError(
                f"'{text}' is not the path of a delta; separate numbers by commas, as in --weights 0.7,0.3"
            )


def _check_not_delta(base: str) -> None:
    """Raise UsageError if the base is a delta: most likely BASE was forgotten."""
    from sparsedelta.format.container import is_delta_file  # with numpy

    if is_delta_file(base):
        raise click.UsageError(
            f"'{base}' is a delta, but the first argument is the base of the deltas: sparsedelta merge BASE DELTA... -o OUT"
        )


@click.command(
    "merge",
    cls=Command,
    epilog=examples("sparsedelta merge base/ sql.sd chat.sd -o both.sd --method ties"),
)
@click.argument("base", type=PATH_OR_REPOSITORY, required=False)
@click.argument("deltas", type=PATH_OR_REPOSITORY, nargs=-1, metavar="DELTA...")
@click.option(
    "-o", "--output", type=DELTA_FILE, required=True, metavar="OUT", help="The file to write."
)
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
    help="For ties, the share of a tensor's elements to keep; for dare, the share of the changes. [default: 1]",
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
@click.option(
    "--config",
    "configuration",
    type=PATH,
    metavar="FILE",
    help="A merge configuration of mergekit (YAML), in place of BASE, DELTA and the settings.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Random seed, for dare.")
@exclude_option("files of BASE")
@click.option("--overwrite", is_flag=True, help="Replace OUT if it exists.")
@json_option
@click.pass_obj
def command(
    settings: Settings,
    *,
    base: str | None,
    deltas: tuple[str, ...],
    output: Path,
    configuration: Path | None,
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
    options: MergeOptions = {
        "method": method,
        "weights": weights,
        "density": density,
        "normalize": normalize,
        "scale": scale,
    }
    plan = None
    if configuration is not None:
        _check_alone(base)
        from sparsedelta.interop.mergekit import read_configuration

        plan = read_configuration(configuration)
        base, deltas, options = plan.base, plan.deltas, plan.options
    if base is None or not deltas:
        raise click.UsageError(
            "give BASE and at least one DELTA, or --config. Example: sparsedelta merge base/ sql.sd chat.sd -o both.sd"
        )
    _check_no_number((base, *deltas))
    _check_not_delta(base)
    with Sources(settings) as sources, progress_bar(settings) as progress:
        inputs = sources.paths(base, *deltas)
        check_output_file(output, overwrite=overwrite, inputs=inputs)
        paths = [sources.delta(delta) for delta in deltas]
        base_path = sources.base_with_weights(base, paths[0])
        if plan is not None:
            plan.check_dtypes(base_path)
        with sparsedelta.merge(
            base_path,
            *paths,
            **options,
            seed=seed,
            exclude=exclude,
            progress=progress,
            spool_dir=str(output.parent),
        ) as merged:
            merged.save(output, overwrite=overwrite)
    show_written(output, as_json=as_json)
