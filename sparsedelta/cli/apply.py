"""``sparsedelta apply``: rebuild the target from a base and deltas."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

import sparsedelta
from sparsedelta.cli._common import (
    PATH_OR_REPOSITORY,
    Settings,
    durable_option,
    examples,
    exclude_option,
    verify_option,
)
from sparsedelta.cli._help import Command
from sparsedelta.cli._progress import progress_bar
from sparsedelta.cli._sources import Sources
from sparsedelta.fs import check_absent
from sparsedelta.report.text import printable

if TYPE_CHECKING:
    from sparsedelta.interop.form import Form
    from sparsedelta.tensors.rebuild import Check


@click.command("apply", cls=Command, epilog=examples("sparsedelta apply base/ delta.sd out/"))
@click.argument("base", type=PATH_OR_REPOSITORY)
@click.argument("deltas_and_out", type=PATH_OR_REPOSITORY, nargs=-1, metavar="DELTA... OUT")
@verify_option
@durable_option
@exclude_option("files of BASE")
@click.option(
    "--any-size",
    is_flag=True,
    help="Allow a target that is much larger than the base and the delta.",
)
@click.option("--overwrite", is_flag=True, help="Replace OUT and everything in it.")
@click.pass_obj
def command(
    settings: Settings,
    *,
    base: str,
    deltas_and_out: tuple[str, ...],
    verify: Check,
    durable: bool,
    exclude: tuple[str, ...],
    any_size: bool,
    overwrite: bool,
) -> None:
    """Rebuild the target from BASE and DELTA, byte for byte.

    Several deltas are applied in order; each must start from the target of the one before it.
    OUT appears only when it is complete and checked. BASE is not changed. BASE and DELTA may be
    repositories on the Hub (org/name@revision). DELTA may also be an adapter of PEFT (LoRA,
    SHiRA), which is merged into BASE, or a delta of another project (docs/interop.md).
    """
    if len(deltas_and_out) < 2:
        raise click.UsageError(
            "give BASE, at least one DELTA, and OUT, in this order. Example: sparsedelta apply base/ delta.sd out/"
        )
    from sparsedelta.ops.apply import check_apart, check_order  # with numpy

    *deltas, last = deltas_and_out
    out = Path(last)
    with Sources(settings) as sources, progress_bar(settings) as progress:
        check_apart(sources.paths(base, *deltas), out)
        check_order(base, out)
        check_absent(out, overwrite=overwrite)  # before a download
        paths = [sources.delta(delta) for delta in deltas]
        base_path, before = sources.base(base, paths[0])
        sparsedelta.apply(
            base_path,
            [*before, *paths],
            last,
            verify=verify,
            durable=durable,
            overwrite=overwrite,
            exclude=exclude,
            any_size=any_size,
            progress=progress,
        )
    settings.note(f"wrote {out}")
    for given, path in zip(deltas, paths, strict=True):
        if form := _without_digests(path):
            done = "merged into" if form.abilities.additive else "read with"
            settings.note(
                f"{printable(given)} ({form.title}) was {done} the base; it holds no digests of the target, so the"
                " result is not verified"
            )


def _without_digests(delta: Path) -> Form | None:
    """Return the form of another project that a delta has, if its files never have digests of the target."""
    from sparsedelta.interop.opening import form_of

    form = form_of(delta)
    return form if form is not None and form.abilities.proof == "none" else None
