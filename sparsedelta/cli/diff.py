"""``sparsedelta diff``: compare two checkpoints and write a delta."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

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
    print_json,
)
from sparsedelta.cli._help import Command
from sparsedelta.cli._progress import progress_bar
from sparsedelta.cli._sources import Sources
from sparsedelta.cli._written import changed_text, show_warnings, written_json
from sparsedelta.report.text import count, listed, percent, printable, size

if TYPE_CHECKING:
    from sparsedelta import Inspection

Globs: TypeAlias = Mapping[str, Sequence[str]]  # the arguments exclude and include of diff
_MAX_LISTED = 5


@click.command(
    "diff",
    cls=Command,
    epilog=examples("sparsedelta diff base/ target/ -o delta.sd --base-id org/model@4f1e2d9"),
)
@click.argument("base", type=PATH_OR_REPOSITORY)
@click.argument("target", type=PATH_OR_REPOSITORY)
@click.option(
    "-o", "--output", type=DELTA_FILE, required=True, metavar="DELTA", help="The file to write."
)
@click.option(
    "--base-id",
    metavar="ID",
    callback=check_base_id,
    help="Record which repository holds the base: org/model@<commit>.",
)
@click.option(
    "--values",
    type=click.Choice(["ulp", "target"]),
    default="ulp",
    show_default=True,
    help="Store differences in units in the last place (smaller) or the bits of the target.",
)
@click.option(
    "--level",
    type=click.Choice(["fast", "default", "max"]),
    default="default",
    show_default=True,
    help="Effort of compression; a higher level takes longer and gives a smaller file.",
)
@click.option(
    "--standalone",
    is_flag=True,
    help="Write a delta that stack and invert can process without the base.",
)
@exclude_option("files")
@click.option(
    "--include",
    multiple=True,
    metavar="GLOB",
    help="Keep files that are left out by default, such as .git or checkpoint-*. May be repeated.",
)
@click.option("--overwrite", is_flag=True, help="Replace DELTA if it exists.")
@json_option
@click.pass_obj
def command(
    settings: Settings,
    *,
    base: str,
    target: str,
    output: Path,
    base_id: str | None,
    values: str,
    level: str,
    standalone: bool,
    exclude: tuple[str, ...],
    include: tuple[str, ...],
    overwrite: bool,
    as_json: bool,
) -> None:
    """Compare BASE and TARGET and write the difference as a delta.

    BASE and TARGET may each be a .safetensors file, a checkpoint folder (with shards,
    configuration, tokenizer and other files), or a repository on the Hub (org/name@revision).
    """
    with Sources(settings) as sources:
        check_output_file(output, overwrite=overwrite, inputs=sources.paths(base, target))
        base_path, repository = sources.checkpoint(base)
        target_path, _ = sources.checkpoint(target)
        progress = sources.enter_context(progress_bar(settings))
        with sparsedelta.diff(
            base_path,
            target_path,
            base_id=base_id or repository,
            values=values,
            level=level,
            standalone=standalone,
            exclude=exclude,
            include=include,
            progress=progress,
            spool_dir=str(output.parent),  # the file system of the output; /tmp may be in memory
        ) as delta:
            delta.save(output, overwrite=overwrite)
        globs = {"exclude": exclude, "include": include}
        _show(output, base_path, target_path, globs, as_json=as_json)


def _show(output: Path, base: Path, target: Path, globs: Globs, *, as_json: bool) -> None:
    """Print the report on the delta on stdout, and the warnings on stderr."""
    found = sparsedelta.inspect(output)
    target_bytes = _target_bytes(target, found)
    if as_json:
        more = {
            "target_bytes": target_bytes,
            "n_unused": found.n_unused,
            "payload_bytes_per_change": found.payload_bytes_per_change,
            "file_bytes_per_change": found.file_bytes_per_change,
        }
        print_json(written_json(output, found) | more)
    else:
        click.echo(_describe(output, target_bytes, found))
    show_warnings(found, target_bytes, lambda: _dtypes(base, globs))
    if left_out := _left_out(target, globs):
        shown = listed(left_out, _MAX_LISTED)
        click.echo(f"left out: {shown} (not part of a checkpoint; --include keeps them)", err=True)


def _dtypes(base: Path, globs: Globs) -> dict[str, str]:
    from sparsedelta.ops.base_check import open_side

    include = globs["include"]
    with open_side(base, exclude=globs["exclude"], include=include, whole=False) as opened:
        return {tensor.name: tensor.spec.dtype.name for tensor in opened.tensors.values()}


def _left_out(target: Path, globs: Globs) -> list[str]:
    """Return the files of the target that were left out because they are not part of a checkpoint."""
    from sparsedelta.files.checkpoint import list_folder

    return list_folder(target, **globs, whole=False)[2] if target.is_dir() else []


def _target_bytes(target: Path, found: Inspection) -> int:
    """Return the size on disk of the files of the target that the delta describes."""
    from sparsedelta.files.unread import is_distributed

    if not target.is_dir():
        return target.stat().st_size
    if is_distributed(target):  # the delta names parts of its files
        return sum(path.stat().st_size for path in target.iterdir() if path.is_file())
    paths = [file.path for file in found.weight_files] + [file.path for file in found.side_files]
    return sum((target / path).stat().st_size for path in paths)


def _describe(output: Path, target_bytes: int, found: Inspection) -> str:
    file_bytes = found.sizes.file_bytes or 0
    lines = [
        f"{printable(str(output))}: {size(file_bytes)},"
        f" {percent(file_bytes / target_bytes)} of the target's {size(target_bytes)}"
    ]
    unused = f", {count(found.n_unused, 'tensor')} of the base not used" if found.n_unused else ""
    if found.states["unchanged"] == len(found.tensors):
        return "\n".join([*lines, f"no tensor changed{unused}"])
    lines.append(changed_text(found) + unused)
    if found.nnz:
        lines.append(
            f"{found.payload_bytes_per_change:.2f} bytes per changed value,"
            f" {found.file_bytes_per_change:.2f} including the rest of the file"
        )
    return "\n".join(lines)
