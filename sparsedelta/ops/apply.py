"""``apply``: rebuild the target from a base and a delta, byte for byte.

The base is only read. The output is written under a temporary name. It gets its own name when every
check has passed and all data is on disk.
"""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import get_args

from sparsedelta._typing import AnyPath, Executor
from sparsedelta.errors import BaseMismatch
from sparsedelta.files.checkpoint import Checkpoint
from sparsedelta.files.layout import FileLayout, target_layout
from sparsedelta.files.side_files import check_presence, is_short, without, write_side_file
from sparsedelta.files.unread import is_distributed
from sparsedelta.format.container import is_delta_file
from sparsedelta.format.delta import AnyDelta, Delta, opened_all
from sparsedelta.format.records import BaseTensor, SideFile
from sparsedelta.fs import (
    check_absent,
    check_checkpoint_folder,
    check_no_folder,
    check_no_slash,
    check_room,
    overlap,
    staged_output,
    synced,
    write_all,
)
from sparsedelta.ops.base_check import explained, find_base, open_base
from sparsedelta.ops.clones import read_from, same_files
from sparsedelta.ops.lookup import Lookup, base_conflict
from sparsedelta.ops.rebuilding import Output, rebuild_on, rebuild_tensors
from sparsedelta.progress import Progress
from sparsedelta.system import CREATE, allow_open_files, clone, reserve
from sparsedelta.tensors.parallel import Pace, run_all
from sparsedelta.tensors.rebuild import Check
from sparsedelta.tensors.tasks import check_executor


def apply(
    base: AnyPath,
    delta: AnyDelta | Sequence[AnyDelta],
    out: AnyPath,
    *,
    verify: Check = "full",
    overwrite: bool = False,
    exclude: Sequence[str] = (),
    any_size: bool = False,
    durable: bool = True,
    progress: Progress | None = None,
    executor: Executor | None = None,
) -> None:
    """Rebuild the target from ``base`` and ``delta``, and write it to ``out``.

    Args:
        base: a safetensors file; a folder of safetensors files (sharded or not) and other files; or a checkpoint
            folder of ``torch.distributed``, of which all digests are compared, in this process.
        delta: an ``.sd`` file, a loaded delta, or a file or folder of another form that ``convert`` reads;
            or a sequence of them, each made from the target of the one before it.
        out: path of the output file or folder.
        verify: ``"full"`` compares the digests of all tensors of base and target. ``"touched"``
            compares only the digests of touched values, where the delta has them. ``"none"`` compares
            neither. Structure, delta and side files are always checked.
        overwrite: replace an existing ``out``.
        exclude: globs of files of ``base`` to leave out, as for ``diff``; the target lacks them, too.
        any_size: accept an output of any size; see ``load``.
        durable: sync the output to disk before it gets its name. Without this a crash of the system or a power failure soon
            after can leave an output that is incomplete or empty; a killed process cannot. The workers of an
            executor, and outputs of ``torch.distributed``, are always synced.
        progress: receives the number of bytes written.
        executor: rebuilds on its workers instead of threads of this process: an executor of
            ``concurrent.futures`` or anything with its ``submit``. The workers must see the base and the folder of
            ``out`` by the same paths.

    Raises:
        FormatError: a delta cannot be read, or is inconsistent.
        MismatchError: ``base`` is not the base of the delta; the message says which tensor differs,
            or that ``base`` already is the target.
        CheckpointError: ``base`` cannot be read as a checkpoint.
        FileExistsError: ``out`` exists and ``overwrite`` is false, or ``out`` is a folder of other
            files.
        IsADirectoryError: ``out`` is a folder, but the target is one file.
        NotADirectoryError: ``out`` is a file, but the target is a folder.
        OSError: a file cannot be read or written, or the disk is full.
        ValueError: an argument is wrong.
    """
    if verify not in get_args(Check):
        raise ValueError(f"verify is {verify!r}, expected one of {', '.join(get_args(Check))}")
    check_executor(executor)
    if executor is not None and is_distributed(base):
        raise ValueError(
            f"'{base}' is a checkpoint of torch.distributed, which is rebuilt in this process; leave out executor="
        )
    given = _as_sequence(delta)
    check_apart([base, *(one for one in given if not isinstance(one, Delta))], out)
    check_order(base, out)
    check_absent(Path(out), overwrite=overwrite)
    with ExitStack() as stack:
        deltas = stack.enter_context(opened_all(given, base, exclude=exclude, any_size=any_size))
        check_chain(deltas)
        check_replaceable = (
            check_checkpoint_folder if deltas[-1].target.is_folder else check_no_folder
        )
        if not is_distributed(out):
            check_replaceable(Path(out))
        if not deltas[-1].target.is_folder:
            check_no_slash(out, "model.safetensors")
        staged = stack.enter_context(staged_output(out, overwrite=overwrite, durable=durable))
        if is_distributed(base):
            _write_distributed(base, deltas, staged, exclude)
            return
        source = Path(base)
        for number, one in enumerate(deltas, 1):
            is_last, left_out = number == len(deltas), exclude if number == 1 else ()
            result = staged if is_last else staged.with_name(f"step-{number}")
            with open_base(source, one, exclude=left_out) as checkpoint:
                write_target(
                    checkpoint,
                    one,
                    result,
                    check=verify,
                    exclude=exclude,
                    durable=durable and is_last,
                    progress=progress,
                    executor=executor,
                )
            if number > 1:
                _remove(source)
            source = result


def _write_distributed(
    base: AnyPath, deltas: Sequence[Delta], out: Path, exclude: Sequence[str]
) -> None:
    """Rebuild a checkpoint of torch.distributed."""
    # Imported only for such a checkpoint, because the room of other formats comes after this one.
    from sparsedelta.interop.opening import rebuild_regions

    with open_base(base, deltas[0], exclude=exclude) as checkpoint:
        rebuild_regions(checkpoint, deltas, out)


def check_chain(deltas: Sequence[Delta]) -> None:
    """Check that each delta was made from the target of the one before it, as far as digests are known.

    Raises:
        BaseMismatch: a delta was made from another target.
        ValueError: ``deltas`` is empty.
    """
    if not deltas:
        raise ValueError("no delta is given; give at least one")
    for number, (one, following) in enumerate(itertools.pairwise(deltas), 2):
        missing = first_gap(one, following)
        if missing is not None:
            raise BaseMismatch(
                f"tensor {missing.name!r}: delta {number} was not made from the target of the delta before"
                f" it; {_way_out(one, following)}",
                tensor=missing.name,
            )


def _way_out(one: Delta, following: Delta) -> str:
    """Return what to do with two deltas that are no chain, as a clause."""
    if one.target_fingerprint and one.target_fingerprint == following.target_fingerprint:
        return "both lead to the same target: give one of them"
    if first_gap(following, one) is not None and base_conflict(one, following) is None:
        return "both were made from the same base: combine them with stack or merge, and apply the result"
    return "give the deltas in the order in which they were made"


def first_gap(one: Delta, following: Delta) -> BaseTensor | None:
    """Return the first base tensor of ``following`` that the target of ``one`` lacks; None if it has all.

    A tensor counts as present if name, dtype and shape are right and its digest in the target of ``one``
    is right or not known.
    """
    lookup = target_lookup(one)
    for row in following.tensors:
        if row.base:
            found = lookup.find(row.base)
            if found is None or found.spec.digest not in (None, row.base.spec.digest):
                return row.base
    return None


def target_lookup(delta: Delta) -> Lookup[BaseTensor]:
    """Return a ``Lookup`` of the tensors of a delta's target."""
    tensors = [BaseTensor(row.file, row.name, row.target) for row in delta.tensors]
    return Lookup(tensors, lambda tensor: tensor.spec.digest)


def check_apart(inputs: Iterable[AnyPath], out: AnyPath) -> None:
    """Raise ValueError if ``out`` is, contains or lies in an input, or contains the current folder.

    ``overwrite`` does not permit it: no input is ever changed.
    """
    check_no_input(inputs, out)
    output = Path(os.path.realpath(out))
    if output == Path.cwd() or output in Path.cwd().parents:
        raise ValueError(
            f"output '{out}' is the current folder, or contains it; choose a new name in this folder"
        )


def check_no_input(inputs: Iterable[AnyPath], out: AnyPath) -> None:
    """Raise ValueError if ``out`` is, contains or lies in an input."""
    output = Path(os.path.realpath(out))
    for path in inputs:
        source = Path(os.path.realpath(path))
        if output == source:
            raise ValueError(
                f"output '{out}' is also an input, and inputs are not changed; choose another output"
            )
        if overlap(output, source):
            raise ValueError(
                f"output '{out}' and input '{path}': one contains the other, and inputs are not changed;"
                " choose another output"
            )


def check_order(base: AnyPath, out: AnyPath) -> None:
    """Raise ValueError if the base or the output is a delta.

    A rebuilt model must not replace a delta, also not with ``overwrite``. Most likely an argument is missing, or they are
    in another order.
    """
    for path, place in ((base, "base"), (out, "output")):
        if is_delta_file(path):
            raise ValueError(
                f"'{path}' is a delta, but it is given as the {place}; the order is base, delta, output"
            )


def write_target(
    base: Checkpoint,
    delta: Delta,
    out: Path,
    *,
    check: Check,
    exclude: Sequence[str],
    progress: Progress | None,
    durable: bool = True,
    executor: Executor | None = None,
) -> None:
    """Write the target to a new file or folder ``out`` and, if ``durable``, sync its files; see ``apply``."""
    delta.check_output()
    files = target_layout(delta)
    n_bytes = sum(file.n_bytes for file in files)
    check_room(out, n_bytes + sum(file.n_bytes for file in delta.target.side_files))
    with explained(delta, base), ExitStack() as stack:
        found = find_base(delta, base)
        side_files = without(delta, exclude)
        check_presence(delta, base, side_files)
        if delta.target.is_folder:
            _make_folders(delta, out)
        _write_side_files(base, delta, out, side_files, durable=durable)
        allow_open_files(len(files))
        paths = [out / file.path if delta.target.is_folder else out for file in files]
        sources = same_files(found, delta, files) if executor is None else [None] * len(files)
        outputs, clones = [], []
        for path, file, source in zip(paths, files, sources, strict=True):
            fd, is_clone = stack.enter_context(_new_file(path, file, source))
            outputs.append(fd)
            clones.append(fd if is_clone else None)
        if durable:
            stack.enter_context(synced(outputs))
        if executor is not None:
            named = [(path, file.offsets) for path, file in zip(paths, files, strict=True)]
            rebuild_on(executor, base, found, delta, named, check=check, progress=progress)
            return
        places = [
            Output(fd if clone is None else -1, file.offsets)
            for fd, clone, file in zip(outputs, clones, files, strict=True)
        ]
        checked = read_from(found, delta, files, clones)
        rebuild_tensors(checked, delta, places, check=check, progress=progress)


def _write_side_files(
    base: Checkpoint, delta: Delta, out: Path, side_files: Sequence[SideFile], *, durable: bool
) -> None:
    """Write side files; the short ones at the same time, because each sync waits for the disk."""

    def write(file: SideFile) -> None:
        write_side_file(delta, base, file, out / file.path, durable=durable)

    for file in side_files:
        if not is_short(file):
            write(file)
    short = [file for file in side_files if is_short(file)]
    run_all(write, short, cost=lambda file: file.n_bytes, pace=Pace(), waits=True)


def _as_sequence(delta: AnyDelta | Sequence[AnyDelta]) -> Sequence[AnyDelta]:
    return [delta] if isinstance(delta, str | os.PathLike | Delta) else delta


def _make_folders(delta: Delta, out: Path) -> None:
    out.mkdir()
    paths = [file.path for file in delta.target.weight_files]
    paths += [file.path for file in delta.target.side_files]
    for folder in {*delta.target.empty_folders, *(os.path.dirname(path) for path in paths)}:
        (out / folder).mkdir(parents=True, exist_ok=True)


@contextmanager
def _new_file(path: Path, layout: FileLayout, source: int | None) -> Iterator[tuple[int, bool]]:
    """Yield the descriptor of a new weight file, and whether it is a clone of ``source``, which has all of its bytes.

    Otherwise its size is set and its header is written.
    """
    fd = os.open(path, CREATE, 0o666)
    try:
        is_clone = source is not None and clone(source, fd)
        if not is_clone:
            reserve(fd, layout.n_bytes)
            head = len(layout.header).to_bytes(8, "little") + layout.header
            write_all(fd, memoryview(head), 0)
        yield fd, is_clone
    finally:
        os.close(fd)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
