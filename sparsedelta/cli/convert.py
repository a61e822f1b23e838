"""``sparsedelta convert``: read a delta in the form of another project, or write one."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.shell_completion import CompletionItem

import sparsedelta
from sparsedelta.cli._common import (
    PATH_OR_REPOSITORY,
    Settings,
    examples,
    exclude_option,
    json_option,
    print_json,
)
from sparsedelta.cli._help import Command
from sparsedelta.cli._progress import progress_bar
from sparsedelta.cli._sources import Sources
from sparsedelta.cli._written import show_warnings
from sparsedelta.report.text import count, printable, size

if TYPE_CHECKING:
    from sparsedelta import ConvertReport


def _forms(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem | str]:
    """Return the names of forms that begin as given."""
    from sparsedelta.interop.registry import NAMES, WRITTEN

    names = WRITTEN if param.name == "write_as" else NAMES
    return [name for name in names if name.startswith(incomplete)]


@click.command(
    "convert",
    cls=Command,
    epilog=examples(
        "sparsedelta convert delta.sd v1/ --base base/ --to slime --lossy",
        "sparsedelta convert v1/ back.sd --base base/",
    ),
)
@click.argument("source", type=PATH_OR_REPOSITORY, metavar="IN")
@click.argument("out", type=PATH_OR_REPOSITORY)
@click.option(
    "--base",
    type=PATH_OR_REPOSITORY,
    metavar="BASE",
    required=True,
    help="The checkpoint that IN starts from.",
)
@click.option(
    "--target",
    type=PATH_OR_REPOSITORY,
    metavar="TARGET",
    help="Also check that IN rebuilds this checkpoint.",
)
@click.option(
    "--from",
    "read_as",
    metavar="FORM",
    shell_complete=_forms,
    help="The form of IN. [default: recognised]",
)
@click.option(
    "--to",
    "write_as",
    metavar="FORM",
    shell_complete=_forms,
    help="The form of OUT. [default: sd, for *.sd]",
)
@click.option(
    "--set", "chosen", metavar="KEY=VALUE", multiple=True, help="A setting of the written form."
)
@click.option("--lossy", is_flag=True, help="Write OUT although it cannot hold everything.")
@exclude_option("files of base and target")
@click.option("--overwrite", is_flag=True, help="Replace OUT if it exists.")
@json_option
@click.pass_obj
def command(
    settings: Settings,
    *,
    source: str,
    out: str,
    base: str,
    target: str | None,
    read_as: str | None,
    write_as: str | None,
    chosen: tuple[str, ...],
    lossy: bool,
    exclude: tuple[str, ...],
    overwrite: bool,
    as_json: bool,
) -> None:
    """Convert a delta from the form of one project to another's.

    IN and OUT are deltas, or whole checkpoints. The form of IN is recognised from its content.
    Forms: sd, checkpoint, and those that docs/interop.md lists. IN, the base and the target may be
    repositories on the Hub (org/name@revision).
    """
    with Sources(settings) as sources, progress_bar(settings) as progress:
        path = sources.delta(source)
        base_path = sources.base_with_weights(base, path)
        report = sparsedelta.convert(
            path,
            out,
            base=base_path,
            target=None if target is None else sources.checkpoint(target)[0],
            read_as=read_as,
            write_as=write_as,
            settings=dict(_pair(text) for text in chosen),
            lossy=lossy,
            exclude=exclude,
            overwrite=overwrite,
            progress=progress,
        )
    if as_json:
        print_json({"out": out, **dataclasses.asdict(report)})
    else:
        click.echo(_described(out, report))
        if (report.read_as, report.written_as) == ("checkpoint", "sd") and _has_files(path):
            back = shlex.join(["sparsedelta", "convert", out, "OUT", "--base", base])
            click.echo(
                "apply writes the tensors as .safetensors files and the rest as .skeleton files; to rebuild"
                f" the original files: {printable(back)} --to original"
            )
    if report.written_as == "sd":
        found = sparsedelta.inspect(out)
        show_warnings(found, found.target_bytes, lambda: _dtypes(base_path, exclude))


def _has_files(path: Path) -> bool:
    """Return whether a checkpoint consists of files of GGUF, ONNX or torch.save."""
    from sparsedelta.interop.regions import has_regions
    from sparsedelta.interop.source import Source

    return has_regions(Source(path))


def _dtypes(base: Path | str, exclude: tuple[str, ...]) -> dict[str, str]:
    from sparsedelta.interop.opening import open_checkpoint

    with open_checkpoint(base, exclude=exclude) as opened:
        return {tensor.name: tensor.spec.dtype.name for tensor in opened.tensors.values()}


def _pair(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals:
        raise click.UsageError(f"--set {text} has no '='; give KEY=VALUE")
    return key, value


def _described(out: str, report: ConvertReport) -> str:
    verified = {
        "none": "the input has no digests: not verified; --target checks it against a checkpoint",
        "changed tensors": "verified by the digests of the changed tensors in the input",
        "all tensors": "verified by digests of all tensors",
        "target": "verified: all tensors are those of the given target; other files are not compared",
    }[report.verified]
    lines = [
        f"{printable(out)}: {size(report.n_bytes)}, {report.read_as} to {report.written_as},"
        f" {count(report.nnz)} changed in {count(report.n_changed, 'tensor')}",
        verified,
    ]
    return "\n".join([*lines, *(f"lost: {printable(loss)}" for loss in report.losses)])
