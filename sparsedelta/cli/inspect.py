"""``sparsedelta inspect``: show what a delta changes, and the size of each part of it."""

from __future__ import annotations

from pathlib import Path

import click

import sparsedelta
from sparsedelta.cli._common import (
    PAGE_FILE,
    PATH,
    PATH_OR_REPOSITORY,
    Settings,
    check_output_file,
    examples,
    json_option,
    print_json,
)
from sparsedelta.cli._help import Command
from sparsedelta.cli._sources import Sources


@click.command("inspect", cls=Command, epilog=examples("sparsedelta inspect delta.sd --tensors"))
@click.argument("delta", type=PATH_OR_REPOSITORY)
@click.option(
    "--base",
    type=PATH,
    metavar="BASE",
    help="The base of DELTA; needed for the forms of other projects.",
)
@click.option("--tensors", is_flag=True, help="Also list the changed tensors.")
@click.option(
    "--info", is_flag=True, help="Also print all information recorded about how DELTA was made."
)
@click.option(
    "--html",
    type=PAGE_FILE,
    metavar="FILE",
    help="Write an HTML page with figures to this file instead of the text.",
)
@click.option("--overwrite", is_flag=True, help="Replace the HTML page if it exists.")
@json_option
@click.pass_obj
def command(
    settings: Settings,
    *,
    delta: str,
    base: Path | None,
    tensors: bool,
    info: bool,
    html: Path | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Show what DELTA changes and how large each part is.

    Only the beginning of the file is read. DELTA may be a repository on the Hub
    (org/name@revision). --json always lists every tensor. With --html, the text is
    printed only if --tensors or --info is given, too.
    """
    with Sources(settings) as sources:
        source = sources.delta_metadata(delta)
        found = sparsedelta.inspect(source, base=base)
    if html is not None:
        from sparsedelta.report.html import write_page

        inputs = tuple(path for path in (source, base) if isinstance(path, Path))
        # The page may be shared, so it does not show the folder of a local file.
        title = Path(delta).name if Path(delta).exists() else delta
        check_output_file(html, overwrite=overwrite, inputs=inputs)
        write_page(found, html, title=title, overwrite=overwrite)
        settings.note(f"wrote {html}")
    if as_json:
        print_json({"delta": delta, **found.as_json()})
        return
    if html is not None and not (tensors or info):
        return
    from sparsedelta.report.summary import info_text, new_console, summary_text
    from sparsedelta.report.tables import tensors_text

    console = new_console()
    # click.echo, unlike Console.print, ends without an error when the reader closes the pipe.
    click.echo(summary_text(delta, found, console), color=console.is_terminal)
    if info:
        click.echo("\n" + info_text(found))
    if tensors:
        click.echo(tensors_text(found))
