"""The report on a delta that a command has written."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

import sparsedelta
from sparsedelta.cli._common import print_json
from sparsedelta.report.text import count, percent, printable, size

if TYPE_CHECKING:
    from sparsedelta import Inspection
    from sparsedelta._typing import JSON


def written_json(output: Path, found: Inspection) -> dict[str, JSON]:
    """Return the report as a JSON object."""
    return {
        "delta": str(output),
        "file_bytes": found.sizes.file_bytes,
        "nnz": found.nnz,
        "numel": found.numel,
        "density": found.density,
        "states": {**found.states},
        "base_fingerprint": found.base_fingerprint,
        "target_fingerprint": found.target_fingerprint,
    }


def changed_text(found: Inspection) -> str:
    """Return how many elements and tensors a delta changes, as text."""
    n_rows = len(found.tensors) - found.states["unchanged"]
    return (
        f"{count(found.nnz)} of {count(found.numel, 'element')} changed ({percent(found.density)}),"
        f" in {count(n_rows)} of {count(len(found.tensors), 'tensor')}"
    )


def show_written(output: Path, *, as_json: bool) -> None:
    """Print the report on a delta just written, as text or as JSON."""
    found = sparsedelta.inspect(output)
    if as_json:
        print_json(written_json(output, found))
        return
    click.echo(f"{printable(str(output))}: {size(output.stat().st_size)}, {changed_text(found)}")
    if found.target_fingerprint is None:
        click.echo(
            "the delta has digests of the touched values only; with --base it has those of the whole target"
        )
