"""``sparsedelta stack``: combine several deltas into one."""

from __future__ import annotations

from pathlib import Path

import click

import sparsedelta
from sparsedelta.cli._common import (
    DELTA_FILE,
    PATH_OR_REPOSITORY,
    Settings,
    check_output_file,
    examples,
    json_option,
)
from sparsedelta.cli._help import Command
from sparsedelta.cli._progress import progress_bar
from sparsedelta.cli._sources import Sources
from sparsedelta.cli._written import show_written


@click.command(
    "stack", cls=Command, epilog=examples("sparsedelta stack monday.sd tuesday.sd -o both.sd")
)
@click.argument("deltas", type=PATH_OR_REPOSITORY, nargs=-1, required=True, metavar="DELTA...")
@click.option(
    "-o", "--output", type=DELTA_FILE, required=True, metavar="OUT", help="The file to write."
)
@click.option(
    "--base",
    type=PATH_OR_REPOSITORY,
    metavar="BASE",
    help="The base of the first delta; some deltas require it.",
)
@click.option("--overwrite", is_flag=True, help="Replace OUT if it exists.")
@json_option
@click.pass_obj
def command(
    settings: Settings,
    *,
    deltas: tuple[str, ...],
    output: Path,
    base: str | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Combine several deltas into one delta with the same effect.

    Deltas that each start from the target of the one before are a chain: applying OUT equals
    applying them in order. Deltas of one base are siblings: OUT has the changes of all, and no
    two may touch the same element. The command detects which case it is. DELTA and BASE may be
    repositories on the Hub (org/name@revision).
    """
    with Sources(settings) as sources, progress_bar(settings) as progress:
        inputs = sources.paths(*deltas, *([base] if base else []))
        check_output_file(output, overwrite=overwrite, inputs=inputs)
        paths = [sources.delta(delta) for delta in deltas]
        base_path = None if base is None else sources.base_with_weights(base, paths[0])
        with sparsedelta.stack(
            *paths, base=base_path, progress=progress, spool_dir=str(output.parent)
        ) as delta:
            delta.save(output, overwrite=overwrite)
    show_written(output, as_json=as_json)
