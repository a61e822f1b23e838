"""Open a delta of any form with its base, as this project's own ``Delta``."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from shlex import quote

from sparsedelta._typing import JSON, AnyPath
from sparsedelta.errors import BadMagic, BaseNeeded, FormatError, UnsupportedFeature
from sparsedelta.files.checkpoint import Checkpoint
from sparsedelta.files.unread import OLD_PICKLE, stand_in
from sparsedelta.format.delta import AnyDelta, Delta, load
from sparsedelta.format.paths import WEIGHT_SUFFIX
from sparsedelta.fs import temporary_folder
from sparsedelta.interop.form import Form, Reading
from sparsedelta.interop.rebuilt import RebuiltCheckpoint
from sparsedelta.interop.regions import RegionFiles, has_regions, write_regions
from sparsedelta.interop.registry import DELTA, is_delta, recognised
from sparsedelta.interop.source import Source
from sparsedelta.ops.diff import between

_log = logging.getLogger(__name__)
CONVERTED = "converted"  # the member of ``info`` that says where a converted delta comes from


def form_of(path: AnyPath) -> Form | None:
    """Return the form of another project that a file or folder has; None if it has none."""
    source = Source(path)
    return None if is_delta(source) else recognised(source)


def open_checkpoint(path: AnyPath, *, exclude: Sequence[str] = ()) -> Checkpoint:
    """Return a checkpoint, opened as ``diff`` opens a base; or files of other formats as checkpoints."""
    if has_regions(Source(path)):
        return RegionFiles(path, exclude=exclude)
    return Checkpoint(path, exclude=exclude, include=(), whole=False)


def record(form: Form, reading: Reading, *, proof: str | None = None) -> dict[str, JSON]:
    """Return what ``info`` says about a converted delta."""
    return {
        CONVERTED: {
            "form": form.name,
            "verified": proof or reading.proof,
            "says": dict(reading.says),
        }
    }


def converted(
    base: Checkpoint, form: Form, source: Source, *, spool_dir: str | None = None
) -> Delta:
    """Return a foreign delta as a delta that needs no base to be decoded.

    Raises:
        FormatError: the file is damaged, does not fit the base, or fails a digest.
        StructureMismatch: the base lacks a tensor that it changes.
    """
    reading = form.read(source, base)
    with reading.target as target:
        reading.check()
        info = record(form, reading)
        return between(base, target, info=info, level="fast", standalone=True, spool_dir=spool_dir)


@contextmanager
def opened_chain(
    deltas: Sequence[AnyDelta],
    base: AnyPath | None,
    *,
    exclude: Sequence[str] = (),
    any_size: bool = False,
) -> Iterator[list[Delta]]:
    """Yield deltas of any form, in order. A foreign one is read with the target of the one before it as base.

    Raises:
        BaseNeeded: one has a foreign form, and ``base`` is None.
        BadMagic: one has no known form.
    """
    with ExitStack() as stack:
        result: list[Delta] = []
        view: Checkpoint | None = None
        for number, one in enumerate(deltas):
            form = None if isinstance(one, Delta) else form_of(one)
            if isinstance(one, Delta) or form is None:
                delta = one if isinstance(one, Delta) else stack.enter_context(_load(one, any_size))
            else:
                if form.not_read:
                    raise UnsupportedFeature(
                        f"'{one}': {form.title} cannot be read: {form.not_read}"
                    )
                if base is None:
                    raise BaseNeeded(
                        f"'{one}' is a delta of the form {form.name} ({form.title}), which can be read only with"
                        " its base; give the base (base=, --base)"
                    )
                if view is None:
                    view = stack.enter_context(open_checkpoint(base, exclude=exclude))
                    for earlier in result:
                        view = target_of(earlier, view, stack)
                delta = stack.enter_context(converted(view, form, Source(one)))
            result.append(delta)
            if view is not None and number + 1 < len(deltas):
                view = target_of(delta, view, stack)
        yield result


def _load(path: AnyPath, any_size: bool) -> Delta:
    source = Source(path)
    try:
        return load(path, any_size=any_size)
    except FormatError as error:
        is_unknown = isinstance(error, BadMagic) or error.code == "limit_exceeded"
        if is_unknown and not is_delta(source) and other_than_delta(path) is None:
            raise BadMagic(
                f"{error}; it has none of the other forms that `sparsedelta convert` reads either"
            ) from error
        raise


def other_than_delta(path: AnyPath) -> BadMagic | None:
    """Return the error that says what is at ``path``; None if that may be a damaged delta of this project."""
    source = Source(path)
    if is_delta(source):
        return None
    other = stand_in(source.start)
    if other:
        return BadMagic(f"'{path}' {other}")
    form = recognised(source)
    if form is not None and not form.not_read:
        return BadMagic(
            f"'{path}' is a delta of the form {form.name} ({form.title}); convert it to an .sd file first, with"
            f" `sparsedelta convert {quote(str(path))} delta.sd --base BASE`"
        )
    inside = sorted(name for name in source.names if name.endswith(f".{DELTA}"))
    if inside:
        return BadMagic(
            f"'{path}' is a folder; give the delta in it, such as '{source.path / inside[0]}'"
        )
    if has_regions(source):
        made = f"convert {quote(str(path))} delta.sd --base BASE"
    elif (
        any(name.endswith(WEIGHT_SUFFIX) for name in source.names)
        or source.tensors
        or source.start.startswith(OLD_PICKLE)
    ):
        made = f"diff BASE {quote(str(path))} -o delta.sd"
    elif source.is_folder:
        return BadMagic(
            f"'{path}' is a folder, not a delta; give an .sd file, or convert another form of delta with"
            " `sparsedelta convert`"
        )
    else:
        return None
    what = "a folder with a model" if source.is_folder else "a model"
    return BadMagic(
        f"'{path}' is {what}, not a delta; make its delta with `sparsedelta {made}`, or, if this is the base, give"
        " it before the delta or as the base (--base, base=)"
    )


def target_of(delta: Delta, base: Checkpoint, stack: ExitStack) -> Checkpoint:
    """Return the target of a delta as a checkpoint, which is closed with the stack."""
    folder = stack.enter_context(temporary_folder("target"))
    return stack.enter_context(RebuiltCheckpoint(base, delta, folder))


def rebuild_regions(base: Checkpoint, deltas: Sequence[Delta], out: Path) -> None:
    """Write the target of a chain of deltas between files of other formats; its files are synced.

    Raises:
        MismatchError: ``base`` is not the base of the first delta.
        FormatError: a delta is damaged.
    """
    with ExitStack() as stack:
        view = base
        for delta in deltas:
            view = target_of(delta, view, stack)
        write_regions(view, out)
