"""``convert``: read a delta of any form, and write it in any other, with a statement of what was lost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from sparsedelta._typing import JSON, AnyPath
from sparsedelta.errors import BadMagic, BaseNeeded, LossyConversion, TargetMismatch
from sparsedelta.files.checkpoint import Checkpoint
from sparsedelta.files.unread import CONVERTED_SUFFIXES, OLD_PICKLE, way_out
from sparsedelta.format.delta import load
from sparsedelta.format.paths import DELTA_SUFFIX, WEIGHT_SUFFIX
from sparsedelta.fs import check_absent, check_no_folder, check_no_slash, staged_output
from sparsedelta.interop.form import Form, Reading, Setting
from sparsedelta.interop.opening import open_checkpoint, record, target_of
from sparsedelta.interop.regions import has_regions, write_regions
from sparsedelta.interop.registry import (
    CHECKPOINT,
    DELTA,
    NAMES,
    ORIGINAL,
    WRITTEN,
    form_named,
    is_delta,
    recognised,
)
from sparsedelta.interop.source import Source
from sparsedelta.interop.transition import Transition, by_name
from sparsedelta.ops.apply import apply, check_apart
from sparsedelta.ops.diff import between
from sparsedelta.progress import Progress
from sparsedelta.tensors.compare import digest_tensor


@dataclass(frozen=True, slots=True)
class ConvertReport:
    """What ``convert`` did.

    Attributes:
        read_as, written_as: names of the forms.
        n_changed, nnz: changed tensors and elements that were written.
        n_bytes: size of the output.
        verified: what proves that the input rebuilds the target that its author had: "none", "changed tensors"
            or "all tensors" (digests in the input), or "target" (the target was given, and it is equal).
        losses: what the output does not hold, one sentence each; empty if it is exact.
    """

    read_as: str
    written_as: str
    n_changed: int
    nnz: int
    n_bytes: int
    verified: str
    losses: tuple[str, ...]


def convert(
    source: AnyPath,
    out: AnyPath,
    *,
    base: AnyPath | None = None,
    target: AnyPath | None = None,
    read_as: str | None = None,
    write_as: str | None = None,
    settings: Mapping[str, Setting] | None = None,
    lossy: bool = False,
    exclude: Sequence[str] = (),
    level: str = "default",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> ConvertReport:
    """Read a delta or checkpoint of any form, and write it in another form; return a report.

    Args:
        source: the file or folder to read.
        out: the file or folder to write.
        base: the checkpoint that the delta starts from. All conversions need it.
        target: the checkpoint that the delta should rebuild; it is compared tensor by tensor.
        read_as: the form of ``source``; None to recognise it from the content.
        write_as: the form of ``out``; None for a delta of this project, if ``out`` ends in ``.sd``, or
            for a file of another format, if it ends in ``.gguf``, ``.onnx``, ``.pt``, ``.pth``, ``.bin`` or
            ``.ckpt``.
        settings: choices of the written form, such as ``{"encoding": "overwrite"}``.
        lossy: write the output although it cannot hold everything; the report lists what it lacks.
        exclude: globs of files of base and target to leave out, as for ``diff``.
        level: as for ``diff``, for a delta of this project.
        overwrite: replace an existing ``out``.
        progress: receives the number of bytes read.

    Raises:
        BadMagic: the form of ``source`` is not known.
        BaseNeeded: ``base`` is not given.
        FormatError: ``source`` is damaged, or a digest in it is wrong.
        LossyConversion: the output cannot hold everything, and ``lossy`` is false.
        MismatchError: ``base`` is not the base of the delta, or ``target`` not its target.
        FileExistsError: ``out`` exists and ``overwrite`` is false.
        ValueError: an argument is wrong.
    """
    check_apart([one for one in (source, base, target) if one is not None], out)
    check_absent(Path(out), overwrite=overwrite)
    wanted = _wanted(out, write_as)
    if _is_one_file(wanted):
        check_no_slash(out)
    opened = Source(source)
    if base is None:
        raise BaseNeeded("a conversion needs the base of the delta; give it (base=, --base)")
    with ExitStack() as stack:
        old = stack.enter_context(open_checkpoint(base, exclude=exclude))
        name, reading, info = _read(opened, old, read_as, exclude, stack)
        reading.check()
        proof = reading.proof
        if target is not None:
            _compare(reading.target, target, exclude)
            proof = "target"
        if name not in (DELTA, CHECKPOINT):
            info = record(form_named(name), reading, proof=proof)
        if wanted in (DELTA, CHECKPOINT):
            if settings:
                raise ValueError(f"the form {wanted} has no settings, found {min(settings)!r}")
            delta = stack.enter_context(
                between(old, reading.target, info=info, level=level, progress=progress)
            )
            if wanted == DELTA:
                delta.save(out, overwrite=overwrite)
            else:
                apply(base, delta, out, overwrite=overwrite, exclude=exclude)
            return ConvertReport(name, wanted, delta.n_changed, delta.nnz, _size(out), proof, ())
        if wanted == ORIGINAL:
            with staged_output(out, overwrite=overwrite) as staged:
                write_regions(reading.target, staged)
                if staged.is_file():
                    check_no_slash(out, "model.bin")
            with between(old, reading.target, level="fast") as delta:
                return ConvertReport(
                    name, wanted, delta.n_changed, delta.nnz, _size(out), proof, ()
                )
        form = form_named(wanted)
        change = Transition(old, reading.target, form.abilities)
        _write(form, change, out, settings or {}, lossy=lossy, overwrite=overwrite)
        losses = tuple(change.losses)
        return ConvertReport(name, wanted, change.n_changed, change.nnz, _size(out), proof, losses)


def _wanted(out: AnyPath, write_as: str | None) -> str:
    """Return the name of the form to write."""
    if write_as is None and str(out).endswith(CONVERTED_SUFFIXES):
        return ORIGINAL
    if write_as is None:
        if not str(out).endswith(DELTA_SUFFIX):
            raise ValueError(
                f"the form of output '{out}' is not given, and its name does not end in {DELTA_SUFFIX}; give one of"
                f" {', '.join(WRITTEN)} (write_as=, --to)"
            )
        return DELTA
    if write_as not in (DELTA, CHECKPOINT, ORIGINAL):
        form_named(write_as)
    return write_as


def _is_one_file(wanted: str) -> bool:
    """Return whether a form is always written as one file."""
    return wanted == DELTA or (
        wanted not in (CHECKPOINT, ORIGINAL) and not form_named(wanted).is_folder
    )


def _read(
    source: Source, base: Checkpoint, read_as: str | None, exclude: Sequence[str], stack: ExitStack
) -> tuple[str, Reading, Mapping[str, JSON]]:
    """Return the name of the form of a source, the opened source, and what is recorded about its making."""
    if read_as == DELTA or (read_as is None and is_delta(source)):
        delta = stack.enter_context(load(source.path))
        return DELTA, Reading(target_of(delta, base, stack), "all tensors"), delta.info
    form = recognised(source) if read_as is None else None
    if read_as not in (None, CHECKPOINT):
        form = form_named(str(read_as))
        if not form.accepts(source):
            raise BadMagic(f"'{source.path}' does not have the form {form.name} ({form.title})")
    if form is not None:
        reading = form.read(source, base)
        stack.enter_context(reading.target)
        return form.name, reading, {}
    if read_as is None and not _is_checkpoint(source):
        if source.start.startswith(OLD_PICKLE):
            raise BadMagic(f"'{source.path}' cannot be read: {way_out(source.start, source.path)}")
        raise BadMagic(
            f"'{source.path}' has none of the known forms: {', '.join(NAMES)}; see docs/interop.md"
        )
    target = stack.enter_context(open_checkpoint(source.path, exclude=exclude))
    return CHECKPOINT, Reading(target, "all tensors"), {}


def _is_checkpoint(source: Source) -> bool:
    return (
        has_regions(source)
        or bool(source.tensors)
        or any(name.endswith(WEIGHT_SUFFIX) for name in source.names)
    )


def _compare(found: Checkpoint, target: AnyPath, exclude: Sequence[str]) -> None:
    """Check that two checkpoints have the same tensors.

    Raises:
        TargetMismatch: a tensor differs.
    """
    with open_checkpoint(target, exclude=exclude) as expected:
        one, other = by_name(found), by_name(expected)
        for name in sorted(one.keys() | other.keys()):
            left, right = one.get(name), other.get(name)
            if left is None or right is None or not left.spec.same_layout(right.spec):
                raise TargetMismatch(
                    f"tensor {name!r} is missing or has another dtype or shape in '{target}'; it is not the"
                    " target of this delta",
                    tensor=name,
                )
            if digest_tensor(left) != digest_tensor(right):
                raise TargetMismatch(
                    f"tensor {name!r} differs from that of '{target}'; it is not the target of this delta, or the"
                    " delta does not hold all of its changes",
                    tensor=name,
                )


def _write(
    form: Form,
    change: Transition,
    out: AnyPath,
    settings: Mapping[str, Setting],
    *,
    lossy: bool,
    overwrite: bool,
) -> None:
    """Write a foreign form. If nothing is lost, it is read again and compared before it gets its name."""
    chosen = form.chosen(settings)
    if not form.is_folder:
        check_no_folder(out)
    with staged_output(out, overwrite=overwrite) as staged:
        form.write(change, staged, chosen)
        if change.losses and not lossy:
            raise LossyConversion(
                f"the form {form.name} cannot hold {'; '.join(change.losses[:5])}"
                f"{'; …' if len(change.losses) > 5 else ''}; allow the loss (lossy=True, --lossy) or choose another"
                " form"
            )
        if form.not_read is None:
            _check_written(form, change, staged)


def _check_written(form: Form, change: Transition, path: Path) -> None:
    source = Source(path)
    if not form.recognise(source):
        raise RuntimeError(f"the written file is not recognised as {form.name}; please report this")
    reading = form.read(source, change.base)
    with reading.target as target:
        if not change.losses:
            reading.check()
            one, other = by_name(target), by_name(change.target)
            for name, tensor in one.items():
                if tensor is not other[name] and digest_tensor(tensor) != digest_tensor(
                    other[name]
                ):
                    raise RuntimeError(
                        f"tensor {name!r} is not the same after writing {form.name}; please report this"
                    )


def _size(out: AnyPath) -> int:
    path = Path(out)
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())
