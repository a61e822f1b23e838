"""``sparsedelta invert``: write the delta that undoes a delta."""

from __future__ import annotations

from pathlib import Path

import click

import sparsedelta
from sparsedelta.cli._common import (
    DELTA_FILE,
    PATH_OR_REPOSITORY,
    Settings,
    check_base_id,
    check_output_file,
    examples,
    exclude_option,
    json_option,
)
from sparsedelta.cli._help import Command
from sparsedelta.cli._progress import progress_bar
from sparsedelta.cli._sources import Sources
from sparsedelta.cli._written import show_written


@click.command(
    "invert", cls=Command, epilog=examples("sparsedelta invert delta.sd --base base/ -o undo.sd")
)
@click.argument("delta", type=PATH_OR_REPOSITORY)
@click.option(
    "-o", "--output", type=DELTA_FILE, required=True, metavar="OUT", help="The file to write."
)
@click.option(
    "--base",
    type=PATH_OR_REPOSITORY,
    metavar="BASE",
    help="The base of DELTA; required for some deltas.",
)
@click.option(
    "--base-id",
    metavar="ID",
    callback=check_base_id,
    help="Record which repository holds the target of DELTA: org/model@<commit>.",
)
@exclude_option("files of the base")
@click.option("--overwrite", is_flag=True, help="Replace OUT if it exists.")
@json_option
@click.pass_obj
def command(
    settings: Settings,
    *,
    delta: str,
    output: Path,
    base: str | None,
    base_id: str | None,
    exclude: tuple[str, ...],
    overwrite: bool,
    as_json: bool,
) -> None:
    """Write the delta that turns the target back into the base.

    Without --base the rebuilt base has the file names and shards of the target. The base is
    required if DELTA removes, retypes or truncates tensors, stores new values or carries files.
    DELTA and BASE may be repositories on the Hub (org/name@revision).
    """
    with Sources(settings) as sources, progress_bar(settings) as progress:
        inputs = sources.paths(delta, *([base] if base else []))
        check_output_file(output, overwrite=overwrite, inputs=inputs)
        path = sources.delta(delta)
        with sparsedelta.invert(
            path,
            base=None if base is None else sources.base_with_weights(base, path),
            base_id=base_id,
            exclude=exclude,
            progress=progress,
            spool_dir=str(output.parent),
        ) as inverse:
            inverse.save(output, overwrite=overwrite)
    show_written(output, as_json=as_json)
