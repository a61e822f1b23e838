"""The report on a delta that a command has written."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click

import sparsedelta
from sparsedelta.cli._common import print_json
from sparsedelta.report.text import count, percent, printable, size

if TYPE_CHECKING:
    from sparsedelta import Inspection
    from sparsedelta._typing import JSON

_SMALL_BYTES = 1 << 20  # for smaller targets, no warning that the delta is large
# Unrelated models of one shape: at least 99.8 % of the values differ, and the delta is 73 % (bf16) to 92 % (f16) of the
# target. Full fine-tuning in fp32 may change as many values, but to near ones: 30 % to 70 %.
_UNRELATED_DENSITY, _UNRELATED_SHARE = 0.99, 0.7
_SHARD = re.compile(r"(.*)-\d{5}-of-\d{5}\.safetensors")


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


def show_warnings(
    found: Inspection, target_bytes: int, dtypes_of_base: Callable[[], Mapping[str, str]]
) -> None:
    """Print warnings on stderr about a delta that is large, with the likely cause.

    Args:
        found: the delta.
        target_bytes: size of the target's files.
        dtypes_of_base: returns the dtype by name of the base's tensors.
    """
    for warning in _warnings(found, target_bytes, dtypes_of_base):
        click.echo(f"warning: {warning}", err=True)


def _warnings(
    found: Inspection, target_bytes: int, dtypes_of_base: Callable[[], Mapping[str, str]]
) -> Iterator[str]:
    n_tensors = count(len(found.tensors), "tensor")
    file_bytes = found.sizes.file_bytes or 0
    if file_bytes >= target_bytes:
        yield (
            f"the delta ({size(file_bytes)}) is not smaller than the target"
            f" ({size(target_bytes)}); storing the target itself takes less space"
        )
    elif 3 * file_bytes > target_bytes > _SMALL_BYTES and not _is_unrelated(found, target_bytes):
        yield (
            f"the delta is {percent(file_bytes / target_bytes)} of the target; deltas are small when few"
            " values change, as in sparse training or after a few steps"
        )
    if _is_unrelated(found, target_bytes):
        yield (
            f"{percent(found.density)} of the values differ, and the delta is {percent(file_bytes / target_bytes)} of"
            " the target: these look like two unrelated models; is this the right base?"
        )
    files = {t.file for t in found.tensors}
    doubled = sorted(f"{one[1]}.safetensors" for one in map(_SHARD.fullmatch, files) if one)
    both = next((file for file in doubled if file in files), None)
    if both:
        yield (
            f"the target holds '{printable(both)}' and shards of that name, so perhaps the model twice: remove the files of"
            " the older save"
        )
    renamed = [t for t in found.tensors if t.base_name not in (None, t.name)]
    if 2 * len(renamed) > len(found.tensors):
        yield (
            f"{count(len(renamed))} of {n_tensors} have another name than in the base, such as"
            f" {printable(renamed[0].name)} for {printable(renamed[0].base_name or '')}; to keep"
            " the base's names, save the model without its wrapper (torch.compile, DataParallel), or of the class that"
            " the base has; this costs almost no bytes"
        )
    below = {t.base_file.removesuffix(t.file) for t in found.tensors if t.base_file is not None}
    if len(below) == 1 and found.states["added"] < len(found.tensors):
        (folder,) = below
        if folder.endswith("/"):
            yield (
                f"all tensors of the base are in its folder '{printable(folder)}': give that folder as the base, or the delta"
                " carries every file that only this folder has"
            )
    added = {t.name: t.dtype for t in found.tensors if t.state == "added"}
    if found.n_unused and 2 * len(added) > len(found.tensors):
        reason = no_counterpart(added, dtypes_of_base())
        yield f"{count(len(added))} of {n_tensors} have no counterpart in the base; {reason}"


def _is_unrelated(found: Inspection, target_bytes: int) -> bool:
    """Return whether most tensors have a counterpart, but nearly all of their values are far from it."""
    file_bytes = found.sizes.file_bytes or 0
    return (
        target_bytes > _SMALL_BYTES
        and 2 * found.states["added"] < len(found.tensors)
        and found.density > _UNRELATED_DENSITY
        and file_bytes > _UNRELATED_SHARE * target_bytes
    )


def no_counterpart(added: Mapping[str, str], base: Mapping[str, str]) -> str:
    """Return why tensors of the target have no counterpart in the base, and what to do, as a clause.

    Args:
        added: dtype by name of these tensors; at least one.
        base: dtype by name of the base's tensors.
    """
    from sparsedelta.ops.counterparts import common_prefix  # with numpy

    if any(map(_is_adapter, added)):
        return (
            "the target is a PEFT adapter: merge it into the base and save that model, or make the delta of the merged model with"
            " `sparsedelta convert ADAPTER delta.sd --base BASE`"
        )
    if any(map(_is_adapter, base)):
        return "the base is a PEFT adapter: give the model that it was trained on"
    more, less = common_prefix(added, base) or ("", "")
    names = {name: less + name.removeprefix(more) for name in added if name.startswith(more)}
    pairs = {(base[own], added[name]) for name, own in names.items() if own in base}
    if pairs:
        before, after = min(pairs)
        renamed = (
            f" and with other names (prefix '{printable(more or less)}')" if more or less else ""
        )
        return (
            f"the base has them in another dtype or shape ({before} instead of {after}){renamed}: convert"
            " one of the checkpoints and run diff again for a small delta"
        )
    return "none of their names is in the base: is this the right base?"


def _is_adapter(name: str) -> bool:
    """Return whether PEFT gives such a name to a tensor of an adapter."""
    return name.startswith("base_model.model.") or "lora_" in name
