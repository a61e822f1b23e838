"""``sparsedelta diff``: from two checkpoints to a delta."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

import sparsedelta
from sparsedelta.cli._common import (
    PATH,
    Settings,
    check_output_file,
    examples,
    exclude_option,
    json_option,
    print_json,
)
from sparsedelta.cli._progress import progress_bar
from sparsedelta.cli._sources import Sources
from sparsedelta.cli._written import changed_text, written_json
from sparsedelta.report.counterparts import no_counterpart
from sparsedelta.report.text import count, listed, percent, printable, size

if TYPE_CHECKING:
    from sparsedelta import Inspection

_MOST_SHOWN = 5
_SMALL_BYTES = 1 << 20  # below it nobody minds the size


@click.command(
    "diff",
    epilog=examples("sparsedelta diff base/ target/ -o delta.sd --base-id org/model@4f1e2d9"),
)
@click.argument("base")
@click.argument("target")
@click.option(
    "-o", "--output", type=PATH, required=True, metavar="DELTA", help="The file to write."
)
@click.option(
    "--base-id", metavar="ID", help="Record where others can find the base: org/model@<commit>."
)
@click.option(
    "--values",
    type=click.Choice(["ulp", "target"]),
    default="ulp",
    show_default=True,
    help="Store differences in units of the last place (small) or the target's bits.",
)
@click.option(
    "--level",
    type=click.Choice(["fast", "default", "max"]),
    default="default",
    show_default=True,
    help="Spend more time for a smaller file.",
)
@click.option(
    "--standalone",
    is_flag=True,
    help="Write a delta that stack and invert can read without the base.",
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
    """Compare BASE and TARGET and write the difference to a delta file.

    BASE and TARGET are each a .safetensors file, a folder with such files (sharded or not) and
    config, tokenizer and other files, or a repository on the Hub (org/name@revision).
    """
    with Sources(settings) as sources:
        check_output_file(output, overwrite=overwrite, inputs=sources.paths(base, target))
        old, name = sources.checkpoint(base)
        new, _ = sources.checkpoint(target)
        progress = sources.enter_context(progress_bar(settings))
        with sparsedelta.diff(
            old,
            new,
            base_id=base_id or name,
            values=values,
            level=level,
            standalone=standalone,
            exclude=exclude,
            include=include,
            progress=progress,
            spool_dir=str(output.parent),  # has to have the room anyway; /tmp may be memory
        ) as delta:
            delta.save(output, overwrite=overwrite)
        _report(output, old, new, exclude, include, as_json=as_json)
        _report_left_out(new, exclude, include)


def _report(
    output: Path,
    base: Path,
    target: Path,
    exclude: Sequence[str],
    include: Sequence[str],
    *,
    as_json: bool,
) -> None:
    """Tell what was written, and say so if that was not worth it."""
    found = sparsedelta.inspect(output)
    file_bytes, target_bytes = output.stat().st_size, _target_bytes(target, found)
    if as_json:
        more = {
            "target_bytes": target_bytes,
            "n_unused": found.n_unused,
            "payload_bytes_per_change": found.payload_bytes_per_change,
            "file_bytes_per_change": found.file_bytes_per_change,
        }
        print_json(written_json(output, found) | more)
    else:
        click.echo(_describe(output, file_bytes, target_bytes, found))
    if file_bytes >= target_bytes:
        click.echo(
            f"warning: the delta ({size(file_bytes)}) is not smaller than the target"
            f" ({size(target_bytes)}); keeping the target itself takes less",
            err=True,
        )
    elif 3 * file_bytes > target_bytes > _SMALL_BYTES:
        click.echo(
            f"warning: the delta is {percent(file_bytes / target_bytes)} of the target; deltas pay off where"
            " less changes, as after sparse training or a few steps",
            err=True,
        )
    renamed = [t for t in found.tensors if t.base_name not in (None, t.name)]
    if 2 * len(renamed) > len(found.tensors):
        click.echo(
            f"warning: {count(len(renamed))} of {count(len(found.tensors), 'tensor')} have another name than in"
            f" the base, such as {printable(renamed[0].name)} for {printable(renamed[0].base_name or '')}; to keep"
            " the base's names, save the model without what wraps it (torch.compile, DataParallel)",
            err=True,
        )
    n_added = found.states["added"]
    if found.n_unused and 2 * n_added > len(found.tensors):
        click.echo(
            f"warning: {count(n_added)} of {count(len(found.tensors), 'tensor')} have no counterpart in the"
            f" base; {_no_counterpart(base, target, found, exclude, include)}",
            err=True,
        )


def _no_counterpart(
    base: Path,
    target: Path,
    found: Inspection,
    exclude: Sequence[str],
    include: Sequence[str],
) -> str:
    """Return the likely cause of most tensors being made from none of the base."""
    from sparsedelta.files.checkpoint import Checkpoint

    with Checkpoint(base, exclude=exclude, include=include, whole=False) as old:
        known = {tensor.name: tensor.spec.dtype.name for tensor in old.tensors.values()}
    added = {t.name: t.dtype for t in found.tensors if t.state == "added"}
    return no_counterpart(added, known, is_adapter=(target / "adapter_config.json").is_file())


def _report_left_out(target: Path, exclude: Sequence[str], include: Sequence[str]) -> None:
    """Say which files of the target are not in the delta because they are no part of a checkpoint."""
    from sparsedelta.files.checkpoint import list_folder

    if not target.is_dir():
        return
    _, _, left_out = list_folder(target, exclude, include, whole=False)
    if left_out:
        shown = listed(left_out, _MOST_SHOWN)
        click.echo(f"left out: {shown} (no part of a checkpoint; --include keeps them)", err=True)


def _target_bytes(target: Path, found: Inspection) -> int:
    """Return the size on disk of what the delta describes of a target."""
    if not target.is_dir():
        return target.stat().st_size
    paths = [file.path for file in found.weight_files] + [file.path for file in found.side_files]
    return sum((target / path).stat().st_size for path in paths)


def _describe(output: Path, file_bytes: int, target_bytes: int, found: Inspection) -> str:
    share = file_bytes / target_bytes
    lines = [
        f"{printable(str(output))}: {size(file_bytes)},"
        f" {percent(share)} of the target's {size(target_bytes)}"
    ]
    unused = f", {count(found.n_unused, 'tensor')} of the base not used" if found.n_unused else ""
    if found.states["unchanged"] == len(found.tensors):
        return "\n".join([*lines, f"no tensor changed{unused}"])
    lines.append(changed_text(found) + unused)
    if found.nnz:
        lines.append(
            f"{found.payload_bytes_per_change:.2f} bytes per changed value,"
            f" {found.file_bytes_per_change:.2f} with the rest of the file"
        )
    return "\n".join(lines)
