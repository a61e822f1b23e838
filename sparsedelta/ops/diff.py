"""``diff``: find what changed between two checkpoints, exactly, and describe the target completely."""

from __future__ import annotations

import logging
import os
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, TypeGuard

from blake3 import blake3

from sparsedelta._typing import JSON, AnyPath, Model
from sparsedelta.codecs.values import VALUE_ENCODINGS
from sparsedelta.codecs.zstd import Level
from sparsedelta.errors import CheckpointError, Corrupt
from sparsedelta.files.checkpoint import Checkpoint, Tensor, WeightFile
from sparsedelta.files.side_files import digest_file
from sparsedelta.format.delta import Delta
from sparsedelta.format.paths import WEIGHT_SUFFIX, check_paths
from sparsedelta.format.records import DIGEST_BYTES, Base, Row, SideFile, Stored, Target
from sparsedelta.format.records import WeightFile as DeltaWeightFile
from sparsedelta.format.safetensors_header import render_header
from sparsedelta.format.spool import SpoolPayload, new_payload
from sparsedelta.format.strict_json import compact_json, parse_json
from sparsedelta.ops.counterparts import counterparts
from sparsedelta.progress import Progress
from sparsedelta.tensors.compare import Comparison
from sparsedelta.tensors.parallel import Pace, run_all

_log = logging.getLogger(__name__)
_LEVELS = {level.value: level for level in Level}
CARRY_LIMIT_BYTES = 64 << 20

# Files that usually hold weights in a form this version does not read.
UNREAD_WEIGHT_SUFFIXES = (
    ".bin", ".ckpt", ".gguf", ".ggml", ".h5", ".mlmodel", ".msgpack", ".npy", ".npz", ".onnx",
    ".onnx_data", ".ot", ".pb", ".pickle", ".pkl", ".pt", ".pth", ".tflite",
)  # fmt: skip


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
) -> Delta:
    """Return the delta that makes ``target`` of ``base``, byte for byte.

    A model in memory counts as the file that it would be saved as; as a target whose base is a folder it counts
    as that folder, with the model's tensors in place of the folder's. It must not change meanwhile.

    Args:
        base: a safetensors file, a folder holding safetensors files (sharded or not) and others, or a model
            in memory: a ``torch.nn.Module`` or a state dict, on any device.
        target: the same.
        base_id: where the base may be found, such as ``org/model@<commit>``; recorded as a hint.
        values: ``"ulp"`` (differences in units of the last place: small) or ``"target"`` (new bits).
        level: ``"fast"``, ``"default"`` or ``"max"``: how much time a smaller delta may cost.
        standalone: code all changes so that they can be read without the base, as ``stack`` and
            ``invert`` like to. Otherwise the base's exponents help where they save a tenth, as they
            do after small steps. At level ``"fast"`` they never do.
        exclude: globs of files to leave out of both; without "/" they match a file's last component.
        include: globs of files to keep although they are usually no part of a checkpoint: ``.git``,
            ``.env``, caches, editor files, the state of training and its ``checkpoint-*`` folders
            (``sparsedelta.files.junk``). What was left out is logged.
        strict: a model as the target has all tensors of a folder that is the base; otherwise those that it
            lacks are the base's.
        info: free JSON to record, such as training settings.
        progress: told of the bytes read.
        spool_dir: where coded changes wait if they outgrow memory; None: the system's choice.

    Raises:
        CheckpointError: base or target cannot be read, or the target holds a file that cannot be
            carried; the message names it.
        StructureMismatch: how a model in memory is saved is not known, or it has other tensors than the
            folder that is the base.
        ValueError: an argument is wrong.
    """
    folder = base if _is_path(base) and Path(base).is_dir() else None
    with ExitStack() as context:
        old = context.enter_context(
            Checkpoint(base, exclude=exclude, include=include, whole=False)
            if _is_path(base)
            else _held(base)
        )
        new = context.enter_context(
            Checkpoint(target, exclude=exclude, include=include)
            if _is_path(target)
            else _held(target, folder, exclude=exclude, include=include, strict=strict)
        )
        return between(
            old,
            new,
            base_id=base_id,
            values=values,
            level=level,
            standalone=standalone,
            info=info,
            progress=progress,
            spool_dir=spool_dir,
        )


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
) -> Delta:
    """Return the delta between two open checkpoints; without a base it holds all of the target. See ``diff``."""
    checked_info = check_json(info or {}, "info")
    check_json({"base_id": base_id}, "base_id")
    with new_payload(spool_dir) as payload:
        comparison = comparisons(payload, values=values, level=level, standalone=standalone)
        for checkpoint in (base, target):
            if checkpoint:
                _check_has_weights(checkpoint)
        if target.left_out:
            _log.info("left out of '%s': %s", target.path, ", ".join(target.left_out))
        files = describe_files(target, partial(_digest_if_there, base), payload)
        rows = _compare_all(base, target, comparison, progress)
        n_left = n_unused(base, rows) if base else 0
        return Delta(Base(base_id, n_left), files, tuple(rows), checked_info, payload)


def _is_path(side: AnyPath | Model) -> TypeGuard[AnyPath]:
    return isinstance(side, str | os.PathLike)


def _held(side: Any, folder: AnyPath | None = None, **options: Any) -> Checkpoint:
    # Not imported before a model is there: the command line has none.
    from sparsedelta.live.sides import held_checkpoint

    return held_checkpoint(side, folder, **options)


def comparisons(
    payload: SpoolPayload, *, values: str, level: str, standalone: bool
) -> Callable[..., Comparison]:
    """Return what makes a ``Comparison`` of two tensors; see ``diff`` for the arguments."""
    if values not in VALUE_ENCODINGS:
        raise ValueError(f"values is {values!r}, expected one of {', '.join(VALUE_ENCODINGS)}")
    if level not in _LEVELS:
        raise ValueError(f"level is {level!r}, expected one of {', '.join(_LEVELS)}")
    return partial(
        Comparison, values=values, payload=payload, level=_LEVELS[level], standalone=standalone
    )


def describe_files(
    new: Checkpoint,
    in_base: Callable[[str], tuple[int, bytes] | None],
    payload: SpoolPayload,
) -> Target:
    """Return a target's files, having put those that the base lacks into the payload.

    Args:
        new: the target.
        in_base: returns size and digest of the base's side file of a path, None if there is none.
        payload: receives headers and side files.

    Raises:
        CheckpointError: a file cannot be carried; the message names it.
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


def _check_has_weights(checkpoint: Checkpoint) -> None:
    if not checkpoint.weight_files:
        raise CheckpointError(
            f"'{checkpoint.path}' holds no {WEIGHT_SUFFIX} file; convert its weights to"
            " safetensors first"
        )


def _compare_all(
    old: Checkpoint | None,
    new: Checkpoint,
    comparison: Callable[..., Comparison],
    progress: Progress | None,
) -> list[Row]:
    pace = Pace(progress)
    matched = counterparts(old, new, pace.unreported()) if old else {}

    def compare(tensor: Tensor) -> Row:
        return comparison(matched.get(tensor.key), tensor, pace=pace).run()

    def cost(tensor: Tensor) -> int:
        base = matched.get(tensor.key)
        return tensor.spec.n_bytes + (base.spec.n_bytes if base else 0)

    return run_all(compare, [*new.tensors.values()], cost=cost, pace=pace, label="comparing")


def n_unused(base: Checkpoint, rows: Sequence[Row]) -> int:
    """Return how many tensors of the base no row is made from."""
    return len(base.tensors.keys() - {row.base.key for row in rows if row.base})


def _weight_file(file: WeightFile, payload: SpoolPayload) -> DeltaWeightFile:
    digest = blake3(file.raw_header).digest()[:DIGEST_BYTES]
    if render_header(file.header.metadata, file.header.entries) == file.raw_header:
        return DeltaWeightFile(file.path, digest, file.header.metadata, None)
    if not file.header.only_known_members:
        raise CheckpointError(
            f"the header of {file.path!r} has null metadata, or says more of a tensor than dtype, shape"
            " and data_offsets; write the file anew with the safetensors library"
        )
    return DeltaWeightFile(file.path, digest, None, payload.add_text(file.raw_header))


def _side_files(
    new: Checkpoint,
    in_base: Callable[[str], tuple[int, bytes] | None],
    payload: SpoolPayload,
) -> tuple[SideFile, ...]:
    """Return the target's side files, having put those the base lacks into the payload."""
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
        hint = " ".join(f"--exclude '{path}'" for path in paths[:5])
        raise CheckpointError(
            f"'{new.path}' holds {listed}, {reason}; convert or leave out (exclude=): {hint}"
        )
    return tuple(result)


def _why_not_carried(path: str, location: Path, n_bytes: int, root: Path) -> str | None:
    """Return why a delta cannot carry a side file, None if it can."""
    if path.lower().endswith(UNREAD_WEIGHT_SUFFIXES):
        return "in a weight format that is not read, only safetensors is"
    if n_bytes > CARRY_LIMIT_BYTES:
        return f"larger than the {CARRY_LIMIT_BYTES >> 20} MiB a delta carries"
    if _leads_out(location, root):
        return "a link to a file elsewhere, which may not be meant to be shared"
    return None


def _leads_out(location: Path, root: Path) -> bool:
    """Return whether a file is elsewhere than in the folder, or its repository in the Hub's cache."""
    if not location.is_symlink():
        return False
    real, home = Path(os.path.realpath(location)), Path(os.path.realpath(root))
    blobs = home.parent.parent / "blobs"  # beside snapshots/<commit>/, which holds the links
    return not (real.is_relative_to(home) or real.is_relative_to(blobs))


def check_json(members: Mapping[str, JSON], what: str) -> Mapping[str, JSON]:
    """Return members as they are read again from a delta; raises ValueError if they cannot be recorded."""
    try:
        checked: dict[str, JSON] = parse_json(compact_json({what: dict(members)}), what)[what]
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{what} cannot be recorded as JSON: {error}") from error
    return checked
