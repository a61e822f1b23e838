"""``sparsedelta inspect``: what a delta changes and what its bytes are spent on."""

from __future__ import annotations

from pathlib import Path

import click

import sparsedelta
from sparsedelta.cli._common import PATH, examples, json_option, print_json


@click.command("inspect", epilog=examples("sparsedelta inspect delta.sd --tensors"))
@click.argument("delta", type=PATH)
@click.option("--tensors", is_flag=True, help="List the tensors it touches, too.")
@json_option
def command(*, delta: Path, tensors: bool, as_json: bool) -> None:
    """Show what DELTA changes and what its bytes are spent on.

    Only the beginning of the file is read. With --json every tensor is listed in any case.
    """
    found = sparsedelta.inspect(delta)
    if as_json:
        print_json({"delta": str(delta), **found.as_json()})
        return
    from sparsedelta.cli._summary import show_summary
    from sparsedelta.cli._tensors import show_tensors

    show_summary(delta, found)
    if tensors:
        show_tensors(found)
