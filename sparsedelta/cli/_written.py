"""What is said of a delta that a command has made of others."""

from __future__ import annotations

from pathlib import Path

import click

import sparsedelta
from sparsedelta.cli._common import print_json
from sparsedelta.report.text import count, percent, printable, size


def show_written(output: Path, *, as_json: bool) -> None:
    """Print what a delta just written holds: lines, or one JSON object."""
    found = sparsedelta.inspect(output)
    file_bytes = output.stat().st_size
    if as_json:
        print_json(
            {
                "delta": str(output),
                "file_bytes": file_bytes,
                "nnz": found.nnz,
                "numel": found.numel,
                "density": found.density,
                "states": {**found.states},
                "base_fingerprint": found.base_fingerprint,
                "target_fingerprint": found.target_fingerprint,
            }
        )
        return
    n_rows = len(found.tensors) - found.states["unchanged"]
    click.echo(
        f"{printable(str(output))}: {size(file_bytes)}, {count(found.nnz)} of"
        f" {count(found.numel, 'element')} changed ({percent(found.density)}), in {count(n_rows)} of"
        f" {count(len(found.tensors), 'tensor')}"
    )
    if found.target_fingerprint is None:
        click.echo(
            "what the target must be is known of the touched values only; with --base it is of all"
        )
