"""``sparsedelta stack``: from several deltas to one."""

from __future__ import annotations

from pathlib import Path

import click

import sparsedelta
from sparsedelta.cli._common import PATH, Settings, check_output_file, examples, json_option
from sparsedelta.cli._progress import progress_bar
from sparsedelta.cli._written import show_written


@click.command("stack", epilog=examples("sparsedelta stack monday.sd tuesday.sd -o both.sd"))
@click.argument("deltas", type=PATH, nargs=-1, required=True, metavar="DELTA...")
@click.option("-o", "--output", type=PATH, required=True, metavar="OUT", help="The file to write.")
@click.option("--base", type=PATH, help="The base of the first; needed for some deltas.")
@click.option("--overwrite", is_flag=True, help="Replace OUT if it exists.")
@json_option
@click.pass_obj
def command(
    settings: Settings,
    *,
    deltas: tuple[Path, ...],
    output: Path,
    base: Path | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Write the one delta that does what every DELTA does.

    Deltas each made from the target of the one before it are a chain: applying OUT is applying
    them in order. Deltas of one base are siblings: where none touches what another does, OUT has
    the changes of all. Their fingerprints tell which they are.
    """
    inputs = deltas if base is None else (*deltas, base)
    check_output_file(output, overwrite=overwrite, inputs=inputs)
    with (
        progress_bar(settings) as progress,
        sparsedelta.stack(
            *deltas, base=base, progress=progress, spool_dir=str(output.parent)
        ) as delta,
    ):
        delta.save(output, overwrite=overwrite)
    show_written(output, as_json=as_json)
