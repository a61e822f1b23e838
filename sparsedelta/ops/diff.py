"""``diff``: compare two checkpoints and return the delta between them."""

from __future__ import annotations

import logging
import os
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from shlex import quote
from typing import Any, TypeGuard

from blake3 import blake3

from sparsedelta._typing import JSON, AnyPath, Executor, Model
from sparsedelta.codecs.values import VALUE_ENCODINGS
from sparsedelta.codecs.zstd import Level
from sparsedelta.errors import CheckpointError, Corrupt
from sparsedelta.files.checkpoint import Checkpoint, FileTensors, WeightFile
from sparsedelta.files.globs import covering
from sparsedelta.files.side_files import digest_file
from sparsedelta.files.unread import UNREAD_WEIGHT_SUFFIXES
from sparsedelta.format.delta import Delta
from sparsedelta.format.paths import check_paths
from sparsedelta.format.records import DIGEST_BYTES, Base, Row, SideFile, Stored, Target
from sparsedelta.format.records import WeightFile as DeltaWeightFile
from sparsedelta.format.safetensors_header import render_header
from sparsedelta.format.spool import SpoolPayload, new_payload
from sparsedelta.format.strict_json import compact_json, parse_json
from sparsedelta.ops.base_check import check_has_weights, open_side
from sparsedelta.ops.counterparts import counterparts
from sparsedelta.progress import Progress
from sparsedelta.tensors.compare import Comparison
from sparsedelta.tensors.compare_tasks import Coder, ComparisonTasks
from sparsedelta.tensors.parallel import Pace
from sparsedelta.tensors.small_pairs import Pair, PairComparison, run_pairs
from sparsedelta.tensors.tasks import Files, check_executor

_log = logging.getLogger(__name__)
_LEVELS = {level.value: level for level in Level}
CARRY_LIMIT_BYTES = 64 << 20


def diff(
    base: AnyPath | Model,
    target: AnyPath | Model,
    *,
    base_id: str | None = None,
    values: str = "ulp",
    level: str = "default",
    standalone: bool = False,
    exclude: Sequence[str] = (),
    include: Sequence[str] = (),
    strict: bool = True,
    info: Mapping[str, JSON] | None = None,
    progress: Progress | None = None,
    spool_dir: str | None = None,
    executor: Executor | None = None,
) -> Delta:
    """Return the delta from ``base`` to ``target``, from which ``apply`` rebuilds every byte of the target.

    A model in memory is treated as the file that saving it would write. If the base is a folder and the
    target is a model, the target is that folder with the model's tensors in place of its own. The model
    must not change during the call.

    Args:
        base: a safetensors file; a folder of safetensors files (sharded or not) and other files; a checkpoint
            folder of ``torch.distributed``; or a
            model in memory: a ``torch.nn.Module`` or a state dict, on any device; or, if no such path exists, a
            repository on the Hub: ``org/model``, ``org/model@revision`` or ``hf://org/model@revision``.
        target: the same; or a pipeline of diffusers in memory, if the base is the folder of a pipeline.
        base_id: where the base can be found, such as ``org/model@<commit>``; recorded as a hint. None: the
            repository and its commit if the base is one.
        values: ``"ulp"`` (differences in units in the last place: small) or ``"target"`` (new bits).
        level: ``"fast"``, ``"default"`` or ``"max"``: how much time is spent to make the delta smaller.
        standalone: code all changes so that they can be decoded without the base. ``stack`` and
            ``invert`` then need no base either. Otherwise, if it saves a tenth, changes are coded
            with the base's exponents, except at level ``"fast"``. It does after small training steps.
        exclude: globs of files to leave out of both sides; a glob without "/" matches the last component.
        include: globs of files to keep although they are usually not part of a checkpoint: ``.git``,
            ``.env``, caches, editor files, the state of training and its ``checkpoint-*`` folders
            (``sparsedelta.files.junk``). The files left out are logged.
        strict: if the base is a folder and the target is a model, the model must have all tensors of the
            folder. If false, tensors that the model lacks are taken from the folder.
        info: free JSON to record, such as training settings.
        progress: receives the number of bytes read.
        spool_dir: folder for the temporary file that holds the coded changes if they do not fit in memory;
            None for the system's temporary folder.
        executor: compares on its workers instead of threads of this process: an executor of
            ``concurrent.futures`` or anything with its ``submit``. The delta has the same bytes. The workers must see
            base and target by the same paths; models in memory are refused.

    Raises:
        CheckpointError: base or target cannot be read, or the target has a file that no delta can
            carry; the message names it.
        StructureMismatch: it is not known how a model in memory is saved, or the model has other
            tensors than the folder that is the base.
        RemoteError: a repository is not available, or holds no weights.
        ValueError: an argument is wrong.
    """
    with ExitStack() as context:
        base, repository = _side(base, context)
        target, _ = _side(target, context)
        folder = base if _is_path(base) and Path(base).is_dir() else None
        old = context.enter_context(
            open_side(base, exclude=exclude, include=include, whole=False)
            if _is_path(base)
            else _model_side(base)
        )
        new = context.enter_context(
            open_side(target, exclude=exclude, include=include)
            if _is_path(target)
            else _model_side(target, folder, exclude=exclude, include=include, strict=strict)
        )
        return between(
            old,
            new,
            base_id=base_id or repository,
            values=values,
            level=level,
            standalone=standalone,
            info=info,
            progress=progress,
            spool_dir=spool_dir,
            executor=executor,
        )


def _side(side: AnyPath | Model, context: ExitStack) -> tuple[AnyPath | Model, str | None]:
    """Return a side of ``diff``; a repository as the folder of its files, with its name."""
    if not isinstance(side, str):
        return side, None
    # Imported only for text, because the room of the Hub comes after this one.
    from sparsedelta.hub.sources import opened_side

    name, path = context.enter_context(opened_side(side))
    return (path if name else side), name


def between(
    base: Checkpoint | None,
    target: Checkpoint,
    *,
    base_id: str | None = None,
    values: str = "ulp",
    level: str = "default",
    standalone: bool = False,
    info: Mapping[str, JSON] | None = None,
    progress: Progress | None = None,
    spool_dir: str | None = None,
    executor: Executor | None = None,
    held: Mapping[str, tuple[int, bytes]] | None = None,
) -> Delta:
    """Return the delta between two open checkpoints; without a base it holds all of the target. See ``diff``.

    ``held`` has size and digest of the side files of what the delta will be applied to, by path; None: those of ``base``.
    """
    checked_info = check_json(info or {}, "info")
    check_json({"base_id": base_id}, "base_id")
    with new_payload(spool_dir) as payload:
        coder = coder_of(values=values, level=level, standalone=standalone)
        check_executor(executor)
        for checkpoint in (base, target):
            if checkpoint:
                check_has_weights(checkpoint)
        if target.left_out:
            _log.info("left out of '%s': %s", target.path, ", ".join(target.left_out))
        in_base = partial(_digest_if_there, base) if held is None else held.get
        files = describe_files(target, in_base, payload)
        rows = _compare_all(base, target, coder, payload, progress, executor)
        n_left = n_unused(base, rows) if base else 0
        return Delta(Base(base_id, n_left), files, tuple(rows), checked_info, payload)


def _is_path(side: AnyPath | Model) -> TypeGuard[AnyPath]:
    return isinstance(side, str | os.PathLike)


def _model_side(side: Any, folder: AnyPath | None = None, **options: Any) -> Checkpoint:
    # Imported only if there is a model, because the command line must start without torch.
    from sparsedelta.live.sides import held_checkpoint

    return held_checkpoint(side, folder, **options)


def coder_of(*, values: str, level: str, standalone: bool) -> Coder:
    """Return how changes are coded; for the options see ``diff``.

    Raises:
        ValueError: an option is wrong.
    """
    if values not in VALUE_ENCODINGS:
        raise ValueError(f"values is {values!r}, expected one of {', '.join(VALUE_ENCODINGS)}")
    if level not in _LEVELS:
        raise ValueError(f"level is {level!r}, expected one of {', '.join(_LEVELS)}")
    return Coder(values, _LEVELS[level], standalone)


def comparisons(
    payload: SpoolPayload, *, values: str, level: str, standalone: bool
) -> Callable[..., Comparison]:
    """Return a function that creates a ``Comparison`` of two tensors; for the options see ``diff``."""
    coder = coder_of(values=values, level=level, standalone=standalone)
    return partial(Comparison, payload=payload, **asdict(coder))


def describe_files(
    new: Checkpoint,
    in_base: Callable[[str], tuple[int, bytes] | None],
    payload: SpoolPayload,
) -> Target:
    """Return the description of a target's files; files that the base lacks are added to the payload.

    Args:
        new: the target.
        in_base: returns the size and digest of the base's side file at a path, None if there is none.
        payload: receives headers and side files.

    Raises:
        CheckpointError: the target has a file that no delta can carry; the message names it.
    """
    weight_paths = [file.path for file in new.weight_files]
    try:
        check_paths([*weight_paths, *new.side_files, *new.empty_folders])
    except Corrupt as error:
        raise CheckpointError(
            f"'{new.path}': {error}; rename it or leave it out (exclude=, --exclude)"
        ) from error
    side_files = _side_files(new, in_base, payload)
    weight_files = tuple(_weight_file(file, payload) for file in new.weight_files)
    return Target(new.is_folder, weight_files, side_files, new.empty_folders)


def _digest_if_there(checkpoint: Checkpoint | None, path: str) -> tuple[int, bytes] | None:
    location = checkpoint.side_files.get(path) if checkpoint else None
    return None if location is None else digest_file(location)


def _compare_all(
    old: Checkpoint | None,
    new: Checkpoint,
    coder: Coder,
    payload: SpoolPayload,
    progress: Progress | None,
    executor: Executor | None,
) -> list[Row]:
    pace = Pace(progress)
    matched = counterparts(old, new, pace.unreported()) if old else {}
    pairs: list[Pair] = [(matched.get(tensor.key), tensor) for tensor in new.tensors.values()]
    if executor is not None:
        work = ComparisonTasks(executor, pairs, Files(old, new), coder, payload)
        return work.run(pace, label="comparing")
    small = PairComparison(coder.values, payload, coder.level)

    def single(number: int) -> Row:
        return coder.comparison(pairs[number], payload, pace=pace).run()

    def group(start: int, end: int) -> list[Row | None]:
        return small.run(pairs[start:end])

    return run_pairs(pairs, group, single, pace, label="comparing")


def n_unused(base: Checkpoint, rows: Sequence[Row]) -> int:
    """Return the number of base tensors that no row refers to."""
    return len(base.tensors.keys() - {row.base.key for row in rows if row.base})


def _weight_file(file: WeightFile, payload: SpoolPayload) -> DeltaWeightFile:
    digest = blake3(file.raw_header).digest()[:DIGEST_BYTES]
    is_canonical = isinstance(
        file.tensors, FileTensors
    )  # only canonical headers are read as columns
    if is_canonical or render_header(file.header.metadata, file.header.entries) == file.raw_header:
        return DeltaWeightFile(file.path, digest, file.header.metadata, None)
    if not file.header.only_known_members:
        raise CheckpointError(
            f"the header of {file.path!r} has null metadata, or members other than dtype, shape and"
            " data_offsets, which no delta can carry; save the file again with the safetensors library"
        )
    return DeltaWeightFile(file.path, digest, None, payload.add_text(file.raw_header))


def _side_files(
    new: Checkpoint,
    in_base: Callable[[str], tuple[int, bytes] | None],
    payload: SpoolPayload,
) -> tuple[SideFile, ...]:
    """Return the target's side files; files that the base lacks are added to the payload."""
    result, refused = [], defaultdict(list)
    for path, location in new.side_files.items():
        n_bytes, digest = digest_file(location)
        stored: Stored | None = None
        if in_base(path) != (n_bytes, digest):
            reason = _why_not_carried(path, location, n_bytes, new.path)
            if reason:
                refused[reason].append(path)
            else:
                content = location.read_bytes()
                if blake3(content).digest() != digest:
                    raise CheckpointError(f"'{location}' changed while it was read; try again")
                stored = payload.add_text(content)
        result.append(SideFile(path, n_bytes, digest, stored))
    for reason, paths in refused.items():
        listed = ", ".join(repr(path) for path in paths[:5]) + (", …" if len(paths) > 5 else "")
        others = [*(file.path for file in new.weight_files), *new.side_files.keys() - {*paths}]
        hint = " ".join(f"--exclude {quote(glob)}" for glob in covering(paths, others))
        raise CheckpointError(
            f"'{new.path}' holds {listed}, {reason}; convert it or leave it out (exclude=): {hint}"
        )
    return tuple(result)


def _why_not_carried(path: str, location: Path, n_bytes: int, root: Path) -> str | None:
    """Return why a delta cannot carry a side file; None if it can."""
    if path.lower().endswith(UNREAD_WEIGHT_SUFFIXES):
        return "in a weight format other than safetensors, which is not supported"
    if n_bytes > CARRY_LIMIT_BYTES:
        return f"larger than the {CARRY_LIMIT_BYTES >> 20} MiB that a delta can carry"
    if _leads_out(location, root):
        return "a link to a file outside of the folder, which may not be meant to be shared"
    return None


def _leads_out(location: Path, root: Path) -> bool:
    """Return whether a file is a link that leads out of the folder.

    A link of the Hub's cache, which leads to a blob of the same repository, does not.
    """
    if not location.is_symlink():
        return False
    real, home = Path(os.path.realpath(location)), Path(os.path.realpath(root))
    blobs = home.parent.parent / "blobs"  # beside snapshots/<commit>/, which holds the links
    return not (real.is_relative_to(home) or real.is_relative_to(blobs))


def check_json(members: Mapping[str, JSON], what: str) -> Mapping[str, JSON]:
    """Return members as they are after writing them as JSON and reading them again.

    Raises:
        ValueError: they cannot be recorded as JSON.
    """
    if not isinstance(members, Mapping):
        raise ValueError(f"{what} is {members!r}, expected a dict")
    try:
        checked: dict[str, JSON] = parse_json(compact_json({what: dict(members)}), what)[what]
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{what} cannot be recorded as JSON: {error}; give a dict of strings, finite numbers (float(x), int(x)),"
            " lists and dicts"
        ) from error
    return checked
