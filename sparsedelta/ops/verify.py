"""``verify``: check a whole delta, and optionally its base and its target. Nothing is written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from shlex import quote

import numpy as np

from sparsedelta._typing import JSON, AnyPath, Executor
from sparsedelta.errors import AlreadyApplied, TargetMismatch
from sparsedelta.files import junk
from sparsedelta.files.checkpoint import Checkpoint, Tensor
from sparsedelta.files.globs import covering
from sparsedelta.files.layout import target_layout
from sparsedelta.files.side_files import carried_content, check_base_files, digest_file
from sparsedelta.format.columns import columns_of, starts
from sparsedelta.format.delta import AnyDelta, Delta, opened_all
from sparsedelta.format.records import BaseTensor, Row, SideFile
from sparsedelta.ops.base_check import explained, find_base, is_base, open_base
from sparsedelta.ops.lookup import Lookup
from sparsedelta.ops.rebuilding import rebuild_on, rebuild_tensors
from sparsedelta.progress import Progress
from sparsedelta.tensors.changes import decode_row
from sparsedelta.tensors.compare import digest_tensor
from sparsedelta.tensors.parallel import Pace, run_all
from sparsedelta.tensors.rebuild_tasks import decode_tasks
from sparsedelta.tensors.small import Group, SmallRows, groups, handled, rows_outside
from sparsedelta.tensors.tasks import Files, check_executor, digest_tasks, no_result, run_tasks


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """The checks that ``verify`` made; all of them succeeded.

    Attributes:
        n_tensors: number of tensors of the target.
        n_changed: number of tensors that the delta changes or adds.
        nnz: number of touched elements.
        payload_bytes: number of coded bytes checked.
        base_checked: whether a base was given and checked. It is the delta's base, and the delta rebuilds
            the target from it.
        target_checked: whether a target was given and checked. All its files equal those of the
            delta's target.
        n_from_base: number of tensors of the target that are rebuilt from tensors of the base.
        converted: for a delta that was converted from another form, the name of the form and what its digests
            prove (``sparsedelta.ConvertReport.verified``); None for others.
    """

    n_tensors: int
    n_changed: int
    nnz: int
    payload_bytes: int
    base_checked: bool
    target_checked: bool
    n_from_base: int
    converted: Mapping[str, JSON] | None = None


def verify(
    delta: AnyDelta,
    *,
    base: AnyPath | None = None,
    target: AnyPath | None = None,
    exclude: Sequence[str] = (),
    progress: Progress | None = None,
    executor: Executor | None = None,
) -> VerifyReport:
    """Check a delta and return a report; a failed check raises an error.

    All streams of the delta are checked, and decoded if that does not need the base. With a base, all
    digests of the base are compared, and the target is rebuilt in memory and checked. With a target, all
    its files are compared.

    Args:
        delta: an ``.sd`` file, a loaded delta, or a file or folder of another form that ``convert`` reads.
        base: the checkpoint that should be the delta's base; needed for other forms.
        target: the checkpoint that should be the delta's target.
        exclude: globs of files to leave out of both, as for ``diff``.
        progress: receives the number of bytes read.
        executor: checks on its workers instead of threads of this process: an executor of
            ``concurrent.futures`` or anything with its ``submit``. The workers must see base and target by the same
            paths.

    Raises:
        FormatError: the delta cannot be read, or is inconsistent.
        MismatchError: ``base`` or ``target`` is not the delta's.
        CheckpointError: ``base`` or ``target`` cannot be read as a checkpoint.
    """
    check_executor(executor)
    with opened_all([delta], base, exclude=exclude) as (given,):
        check_delta(given, progress, executor)
        if base is not None:
            with (
                open_base(base, given, exclude=exclude) as checkpoint,
                _not_the_target(base),
                explained(given, checkpoint),
            ):
                found = find_base(given, checkpoint)
                check_base_files(given, checkpoint, exclude)
                if executor is None:
                    rebuild_tensors(
                        found, given, [], check="full", progress=progress, every_base=True
                    )
                else:
                    rebuild_on(
                        executor,
                        checkpoint,
                        found,
                        given,
                        [],
                        check="full",
                        progress=progress,
                        every_base=True,
                    )
        if target is not None:
            with (
                open_base(target, given, exclude=exclude) as checkpoint,
                _not_the_base(given, checkpoint),
            ):
                _check_target(given, checkpoint, exclude, progress, executor)
        return VerifyReport(
            n_tensors=len(given.tensors),
            n_changed=given.n_changed,
            nnz=given.nnz,
            payload_bytes=given.coded_bytes,
            base_checked=base is not None,
            target_checked=target is not None,
            n_from_base=_n_from_base(given),
            converted=converted_from(given),
        )


@contextmanager
def _not_the_target(base: AnyPath) -> Iterator[None]:
    """Return a context that says how the target is checked, if it was given as the base."""
    try:
        yield
    except AlreadyApplied as error:
        raise AlreadyApplied(
            f"'{base}' already is this delta's target, not its base; check it as the target (target=, --target)",
            tensor=error.tensor,
        ) from error


@contextmanager
def _not_the_base(delta: Delta, target: Checkpoint) -> Iterator[None]:
    """Return a context that says how the base is checked, if it was given as the target."""
    try:
        yield
    except TargetMismatch as error:
        if not is_base(delta, target):
            raise
        raise TargetMismatch(
            f"'{target.path}' has the tensors of this delta's base, not of its target; did you mean to check it as the"
            " base (base=, --base)?",
            tensor=error.tensor,
        ) from error


def _n_from_base(delta: Delta) -> int:
    columns = columns_of(delta.tensors)
    if columns:
        return int((columns.base_file >= 0).sum())
    return sum(1 for row in delta.tensors if row.base)


def converted_from(delta: Delta) -> Mapping[str, JSON] | None:
    """Return what a delta records about its conversion from another form; None if it was not converted."""
    found = delta.info.get("converted")
    return found if isinstance(found, dict) else None


def check_delta(delta: Delta, progress: Progress | None, executor: Executor | None = None) -> None:
    """Decode everything in a delta that needs no base, and check it against the manifest.

    Raises:
        FormatError: the delta is damaged or inconsistent.
    """
    delta.check_output()
    for side_file in delta.target.side_files:
        if side_file.stored:
            carried_content(delta, side_file, side_file.stored)
    target_layout(delta)
    pace = Pace(progress)
    if executor is not None:
        run_tasks(
            executor,
            decode_tasks(delta.tensors, delta.payload),
            no_result,
            pace=pace,
            label="decoding",
            n_bytes=delta.coded_bytes,
        )
        return
    work = _Decoding(delta, pace)
    run_all(work.run, work.items, cost=work.cost, pace=pace, label="decoding")


class _Decoding:
    """The decoding of all chunks. An item is the number of a row, or a group of rows.

    Attributes:
        items: all of them.
    """

    def __init__(self, delta: Delta, pace: Pace) -> None:
        self._delta = delta
        self._pace = pace
        self._small: SmallRows | None = None
        small: list[Group] = []
        columns = columns_of(delta.tensors)
        if columns:
            self._ends = columns.chunks.offset[columns.first_chunk]
            self._small = SmallRows(columns, delta.payload)
            small = groups(columns, handled(columns), None)
        else:
            self._ends = starts(np.array([row.coded_bytes for row in delta.tensors], np.int64))
        self.items: list[int | Group] = [*small, *rows_outside(small, len(delta.tensors))]

    def cost(self, item: int | Group) -> int:
        """Return the number of coded bytes of a row or a group."""
        start, end = (item, item + 1) if isinstance(item, int) else item
        return int(self._ends[end] - self._ends[start])

    def run(self, item: int | Group) -> None:
        """Decode a row, or a group of rows."""
        if isinstance(item, int):
            decode_row(self._delta.tensors[item], self._delta.payload, self._pace)
        elif self._small:
            _, left = self._small.run(item)
            for number in left:
                decode_row(self._delta.tensors[number], self._delta.payload, self._pace)
            self._pace.advance(self.cost(item) - sum(map(self.cost, left)))


def _check_target(
    delta: Delta,
    target: Checkpoint,
    exclude: Sequence[str],
    progress: Progress | None,
    executor: Executor | None,
) -> None:
    """Compare every file of a checkpoint with the delta's target, but for those left out; a single file may have any name."""
    if target.is_folder != delta.target.is_folder:
        kinds = {True: "a folder", False: "a file"}
        raise TargetMismatch(
            f"'{target.path}' is {kinds[target.is_folder]}, but the delta's target is"
            f" {kinds[delta.target.is_folder]}; give that"
        )
    if target.is_folder:
        side_files = [
            file for file in delta.target.side_files if not junk.matches(file.path, exclude)
        ]
        _check_file_names(delta, target, side_files)
        for file in side_files:
            if digest_file(target.side_files[file.path]) != (file.n_bytes, file.digest):
                raise TargetMismatch(
                    f"file '{target.side_files[file.path]}' differs from that of the delta's target"
                )
    layout = target_layout(delta)
    found_files = {file.path: file for file in target.weight_files}
    for expected in layout:
        found = found_files[expected.path] if target.is_folder else target.weight_files[0]
        if found.raw_header != expected.header:
            raise TargetMismatch(
                f"the header of '{target.path / found.path if target.is_folder else target.path}'"
                " differs from that of the delta's target"
            )
    _check_target_tensors(delta, target, progress, executor)


def _check_file_names(delta: Delta, target: Checkpoint, side_files: Sequence[SideFile]) -> None:
    described = delta.target
    expected = {file.path for file in described.weight_files}
    expected |= {file.path for file in side_files}
    expected |= {f"{folder}/" for folder in described.empty_folders}
    found = {file.path for file in target.weight_files} | target.side_files.keys()
    found |= {f"{folder}/" for folder in target.empty_folders}
    missing, surplus = sorted(expected - found), sorted(found - expected)
    if missing:
        raise TargetMismatch(f"'{target.path}' lacks {_named(missing)}part of the delta's target")
    if surplus:
        globs = covering((path.rstrip("/") for path in surplus), expected)
        options = " ".join(f"--exclude {quote(glob)}" for glob in globs)
        raise TargetMismatch(
            f"'{target.path}' has {_named(surplus, 'not ')}part of the delta's target; to leave"
            f" {'it' if len(surplus) == 1 else 'them'} out of the check: {options} (exclude=)"
        )


def _named(paths: Sequence[str], negation: str = "") -> str:
    """Return the first path and the number of others, and the beginning of a clause about them."""
    if len(paths) == 1:
        return f"{paths[0]!r}, which is {negation}"
    return f"{paths[0]!r} and {len(paths) - 1} more, which are {negation}"


def _check_target_tensors(
    delta: Delta, target: Checkpoint, progress: Progress | None, executor: Executor | None
) -> None:
    pace = Pace(progress)
    lookup = Lookup(target.tensors.values(), lambda tensor: None)

    def found(row: Row) -> Tensor:
        tensor = lookup.find(BaseTensor(row.file, row.name, row.target))
        if tensor is None:
            raise TargetMismatch(
                f"tensor {row.name!r} of the delta's target is missing from '{target.path}'",
                tensor=row.name,
            )
        return tensor

    def check(row: Row, digest: bytes) -> None:
        expected = row.target.digest
        if expected is not None and digest != expected:
            raise TargetMismatch(
                f"tensor {row.name!r} has digest {digest.hex()[:12]}… in '{target.path}', expected"
                f" {expected.hex()[:12]}…; this is not the delta's target",
                tensor=row.name,
                expected=expected.hex(),
                found=digest.hex(),
            )

    label = "reading the target"
    if executor is None:
        run_all(
            lambda row: check(row, digest_tensor(found(row), pace)),
            delta.tensors,
            cost=lambda row: row.target.n_bytes,
            pace=pace,
            label=label,
        )
        return

    def take(task: object, digests: list[bytes]) -> None:
        for digest in digests:
            check(next(rows), digest)

    rows = iter(delta.tensors)
    made = digest_tasks(map(found, delta.tensors), Files(target))
    run_tasks(executor, made, take, pace=pace, label=label, n_bytes=delta.target_bytes)
