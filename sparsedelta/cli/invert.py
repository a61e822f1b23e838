"""``sparsedelta invert``: from a delta to the one that undoes it."""

from __future__ import annotations

from pathlib import Path

import click

import sparsedelta
from sparsedelta.cli._common import PATH, Settings, check_output_file, examples, json_option
from sparsedelta.cli._progress import progress_bar
from sparsedelta.cli._sources import Sources
from sparsedelta.cli._written import show_written


@click.command("invert", epilog=examples("sparsedelta invert delta.sd --base base/ -o undo.sd"))
@click.argument("delta")
@click.option("-o", "--output", type=PATH, required=True, metavar="OUT", help="The file to write.")
@click.option("--base", help="The base of DELTA; needed for what only it tells.")
@click.option("--base-id", metavar="ID", help="Where others find the target of DELTA.")
@click.option(
    "--exclude", multiple=True, metavar="GLOB", help="Leave files of the base out. May be repeated."
)
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
    """Write the delta that makes the base of the target.

    Without --base the tensors of the base are laid out in files as the target's are; a delta does
    not know those of its base. Removed, retyped and cut tensors, new values and carried files
    cannot be inverted without it. DELTA and BASE may be repositories on the Hub: org/name@revision.
    """
    with Sources(settings) as sources, progress_bar(settings) as progress:
        inputs = sources.paths(delta, *([base] if base else []))
        check_output_file(output, overwrite=overwrite, inputs=inputs)
        path = sources.delta(delta)
        with sparsedelta.invert(
            path,
            base=None if base is None else sources.only_base(base, path),
            base_id=base_id,
            exclude=exclude,
            progress=progress,
            spool_dir=str(output.parent),
        ) as inverse:
            inverse.save(output, overwrite=overwrite)
    show_written(output, as_json=as_json)
