"""Side files of the target: carried in the delta or taken from the base, and always checked (FORMAT §3.1)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from shlex import quote

from blake3 import blake3

from sparsedelta.errors import BaseMismatch, Corrupt
from sparsedelta.files import junk
from sparsedelta.files.checkpoint import Checkpoint
from sparsedelta.files.globs import covering
from sparsedelta.files.unread import SKELETON_SUFFIX
from sparsedelta.format.delta import Delta
from sparsedelta.format.manifest import read_text
from sparsedelta.format.paths import DELTA_SUFFIX, WEIGHT_SUFFIX
from sparsedelta.format.records import SideFile, Stored

_BLOCK_BYTES = 1 << 20
_MOST_NAMED = 5


def digest_file(location: Path, copy: Callable[[bytes], object] | None = None) -> tuple[int, bytes]:
    """Return the size and BLAKE3 digest of a file; ``copy``, if given, receives its content in blocks."""
    hasher = blake3()
    n_bytes = 0
    with open(location, "rb") as file:
        while block := file.read(_BLOCK_BYTES):
            hasher.update(block)
            n_bytes += len(block)
            if copy:
                copy(block)
    return n_bytes, hasher.digest()


def carried_content(delta: Delta, file: SideFile, stored: Stored) -> bytes:
    """Return the content of a file that the delta carries.

    Raises:
        Corrupt: the content does not have the size or digest in the manifest.
    """
    raw = read_text(delta.payload.read(stored.offset, stored.stored_bytes), stored.n_bytes)
    if blake3(raw).digest() != file.digest:
        raise Corrupt(f"carried file {file.path!r} does not match its digest; the delta is damaged")
    return raw


def write_side_file(
    delta: Delta, base: Checkpoint, file: SideFile, path: Path, *, durable: bool = True
) -> None:
    """Write a side file of the target to ``path`` and, if ``durable``, sync it.

    Raises:
        BaseMismatch: the file comes from the base, but is missing there or differs.
        Corrupt: the file is carried in the delta and is damaged.
    """
    with open(path, "xb") as output:
        if file.stored:
            output.write(carried_content(delta, file, file.stored))
        else:
            check_base_file(delta, base, file, output.write)
        if durable:
            output.flush()
            os.fsync(output.fileno())


def is_of_other_files(delta: Delta) -> bool:
    """Return whether ``convert`` made a delta between files that are not safetensors."""
    target = delta.target
    others = {file.path for file in target.side_files}
    weights = [file.path.removesuffix(WEIGHT_SUFFIX) for file in target.weight_files]
    return bool(weights) and all(path + SKELETON_SUFFIX in others for path in weights)


def is_short(file: SideFile) -> bool:
    """Return whether a side file is so short that several may be in memory at the same time."""
    return file.n_bytes <= _BLOCK_BYTES


def without(delta: Delta, exclude: Sequence[str]) -> list[SideFile]:
    """Return the side files of the target, but for those from the base that match one of the globs."""
    return [
        file
        for file in delta.target.side_files
        if file.stored or not junk.matches(file.path, exclude)
    ]


def check_base_files(delta: Delta, base: Checkpoint, exclude: Sequence[str] = ()) -> None:
    """Check the side files that the target takes from the base, but for those that match one of the globs.

    Raises:
        BaseMismatch: a file is missing from the base or differs.
    """
    side_files = without(delta, exclude)
    check_presence(delta, base, side_files)
    for file in side_files:
        if not file.stored:
            check_base_file(delta, base, file)


def check_presence(delta: Delta, base: Checkpoint, side_files: Iterable[SideFile]) -> None:
    """Raise BaseMismatch if the base lacks one of these side files that the target takes from it."""
    if any(not file.stored and file.path not in base.side_files for file in side_files):
        raise _missing(delta, base)


def check_base_file(
    delta: Delta, base: Checkpoint, file: SideFile, copy: Callable[[bytes], object] | None = None
) -> None:
    """Check one side file that the target takes from the base; for ``copy`` see ``digest_file``.

    Raises:
        BaseMismatch: the file is missing from the base or differs.
    """
    location = base.side_files.get(file.path)
    if location is None:
        raise _missing(delta, base)
    if digest_file(location, copy) != (file.n_bytes, file.digest):
        raise BaseMismatch(f"file '{location}' differs from that of {_source(delta).rstrip(',')}")


def _source(delta: Delta) -> str:
    return "the base that the delta was made from" + (f", {delta.base.id}," * bool(delta.base.id))


def _folder_with(paths: Sequence[str], base: Checkpoint) -> str | None:
    """Return the folder in the base, relative to it, that has all of these files; None if there is none or there are several."""
    suffix = f"/{paths[0]}"
    folders = [path.removesuffix(suffix) for path in base.side_files if path.endswith(suffix)]
    found = [one for one in folders if all(f"{one}/{path}" in base.side_files for path in paths)]
    return found[0] if len(found) == 1 else None


def _missing(delta: Delta, base: Checkpoint) -> BaseMismatch:
    """Return the error that names all files that the target takes from the base and that it lacks."""
    files = delta.target.side_files
    missing = [f.path for f in files if not f.stored and f.path not in base.side_files]
    if not base.is_folder:
        return BaseMismatch(
            f"'{base.path}' is one file, but the target also needs other files of its base, such as {missing[0]!r};"
            f" give the folder of the base, such as '{base.path.parent}'"
        )
    inside = _folder_with(missing, base)
    if inside:
        return BaseMismatch(
            f"'{base.path}' is not the folder of the base: the files that the target takes from it, such as {missing[0]!r}, are in"
            f" '{base.path / inside}'; give that folder"
        )
    others = {f.path for f in files} | {f.path for f in delta.target.weight_files}
    options = " ".join(
        f"--exclude {quote(glob)}" for glob in covering(missing, others - {*missing})
    )
    shown = ", ".join(repr(path) for path in missing[:_MOST_NAMED])
    if len(missing) > _MOST_NAMED:
        shown += f" and {len(missing) - _MOST_NAMED} more"
    what, them = ("file", "it") if len(missing) == 1 else ("files", "them")
    where = ""
    if delta.base.id:
        a_delta = f"{DELTA_SUFFIX}@" in f"{delta.base.id}@"
        where = f" from {'the target of ' * a_delta}{delta.base.id}"
    return BaseMismatch(
        f"'{base.path}' has no {what} {shown}, which {_source(delta)} has; get {them}{where}, or rebuild the target"
        f" without {them} (exclude=, `sparsedelta apply {options}`)"
    )
