"""Decoding and rebuilding a delta's tensors as tasks for an executor; a task carries the chunks that it needs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from sparsedelta.files.checkpoint import Tensor
from sparsedelta.format.records import Payload, Row
from sparsedelta.fs import write_all
from sparsedelta.system import EDIT
from sparsedelta.tensors import tasks
from sparsedelta.tensors.changes import Segment, decode_row, segments
from sparsedelta.tensors.parallel import Pace
from sparsedelta.tensors.rebuild import Check, check_written, rebuild, rebuild_part
from sparsedelta.tensors.tasks import BytesPayload, Files, Picked, Task, batches, cut_out


@dataclass(frozen=True, slots=True)
class DecodeTask:
    """Decodes the chunks of rows as far as that needs no base."""

    rows: tuple[Row, ...]
    payload: BytesPayload
    n_bytes: int

    def run(self) -> None:
        """Check the chunks."""
        for row in self.rows:
            decode_row(row, self.payload, Pace())


def decode_tasks(rows: Sequence[Row], payload: Payload) -> Iterator[DecodeTask]:
    """Yield tasks that decode all rows."""
    for batch in batches(rows, lambda row: row.coded_bytes):
        own, part = cut_out(batch, payload)
        yield DecodeTask(own, part, len(part.data))


class Placed(NamedTuple):
    """A row to rebuild.

    Attributes:
        row: the row.
        base: its base tensor; None if it has none.
        file: the output file; None if the tensor is only checked.
        at: where the tensor begins in that file.
    """

    row: Row
    base: Tensor | None
    file: str | None
    at: int


@dataclass(frozen=True, slots=True)
class RebuildTask:
    """Rebuilds tensors, or one part of one tensor, and writes them to existing files.

    Attributes:
        picked: the base tensor of each row.
        rows: the rows.
        payload: holds their chunks.
        outputs: file and position of each tensor; without a file it is only checked.
        check: see ``rebuild``.
        every_base: see ``rebuild``.
        n_bytes: size of what is rebuilt.
        part: the segments to rebuild of the only row, each with the number of its chunk or -1; None for all.
    """

    picked: Picked
    rows: tuple[Row, ...]
    payload: BytesPayload
    outputs: tuple[tuple[str | None, int], ...]
    check: Check
    every_base: bool
    n_bytes: int
    part: tuple[tuple[int, int, int], ...] | None = None

    def run(self) -> None:
        """Rebuild, check and write."""
        with self.picked.opened() as bases, _Writers() as writers:
            for row, base, (file, at) in zip(self.rows, bases, self.outputs, strict=True):
                write = writers.to(file, at)
                if self.part is None:
                    check = partial(rebuild, every_base=self.every_base)
                    check(row, base, self.payload, write, check=self.check, pace=Pace())
                else:
                    chunks = row.chunks
                    part = [(a, b, chunks[n] if n >= 0 else None) for a, b, n in self.part]
                    rebuild_part(
                        row, base, self.payload, write, part, check=self.check, pace=Pace()
                    )


@dataclass(frozen=True, slots=True)
class CheckTask:
    """Compares the digests of a tensor that was rebuilt in parts; ``picked`` are the tensors of base and output."""

    picked: Picked
    row: Row
    check: Check
    every_base: bool
    n_bytes: int = 0

    def run(self) -> None:
        """Read the tensor."""
        with self.picked.opened() as (base, written):
            if written:
                check_written(self.row, base, written, check=self.check, every_base=self.every_base)


class RebuildTasks:
    """Makes the tasks that rebuild rows.

    Args:
        placed: the rows; called twice.
        payload: holds their chunks.
        files: knows the places of the base's files.
        check: see ``rebuild``.
        every_base: see ``rebuild``.
    """

    def __init__(
        self,
        placed: Callable[[], Iterable[Placed]],
        payload: Payload,
        files: Files,
        *,
        check: Check,
        every_base: bool,
    ) -> None:
        self._placed = placed
        self._payload = payload
        self._files = files
        self._check = check
        self._every_base = every_base

    def rebuilding(self) -> Iterator[Task[None]]:
        """Yield tasks that write and check all rows, except for the digests of large tensors."""
        for one in self._placed():
            if _is_divided(one):
                yield from self._parts(one)
        whole = (one for one in self._placed() if not _is_divided(one))
        for batch in batches(whole, lambda one: one.row.target.n_bytes):
            yield self._task(batch, sum(one.row.target.n_bytes for one in batch))

    def checking(self) -> Iterator[Task[None]]:
        """Yield tasks that compare the digests of large tensors, once all parts are written."""
        for one in self._placed():
            if _is_divided(one) and one.file:
                output = Tensor(one.file, one.row.name, one.row.target, -1, one.at)
                picked = self._files.picked([one.base]).beside(one.file, output)
                yield CheckTask(picked, one.row, self._check, self._every_base)

    def _task(
        self,
        batch: Sequence[Placed],
        n_bytes: int,
        part: tuple[tuple[int, int, int], ...] | None = None,
    ) -> RebuildTask:
        rows, payload = cut_out([one.row for one in batch], self._payload)
        return RebuildTask(
            self._files.picked([one.base for one in batch]),
            rows,
            payload,
            tuple((one.file, one.at) for one in batch),
            self._check,
            self._every_base,
            n_bytes,
            part,
        )

    def _parts(self, one: Placed) -> Iterator[RebuildTask]:
        row, width = one.row, one.row.target.dtype.width
        for part in batches(_short_segments(row), lambda part: (part[1] - part[0]) * width):
            chunks = tuple(chunk for _, _, chunk in part if chunk)
            numbers = iter(range(len(chunks)))
            numbered = tuple((a, b, next(numbers) if chunk else -1) for a, b, chunk in part)
            own = one._replace(row=row.with_chunks(chunks))
            yield self._task([own], (part[-1][1] - part[0][0]) * width, numbered)


def _is_divided(one: Placed) -> bool:
    return one.file is not None and one.row.target.n_bytes > tasks.SPLIT_BYTES


def _short_segments(row: Row) -> Iterator[Segment]:
    """Yield the segments of a row; those without changes in pieces of ``TASK_BYTES``."""
    step = max(1, tasks.TASK_BYTES // row.target.dtype.width)
    for start, end, chunk in segments(row):
        if chunk:
            yield start, end, chunk
        else:
            yield from ((at, min(end, at + step), None) for at in range(start, end, step))


class _Writers:
    """Opens existing files for writing; at the end they are synced, so that other hosts see the data, and closed."""

    def __init__(self) -> None:
        self._fds: dict[str, int] = {}

    def __enter__(self) -> _Writers:
        return self

    def __exit__(self, *exc: object) -> None:
        try:
            if exc[0] is None:
                for fd in self._fds.values():
                    os.fsync(fd)
        finally:
            while self._fds:
                os.close(self._fds.popitem()[1])

    def to(self, file: str | None, at: int) -> Callable[[memoryview, int], None]:
        """Return a function that writes a tensor that begins at ``at``; without a file it does nothing."""
        if file is None:
            return lambda data, offset: None
        if file not in self._fds:
            self._fds[file] = os.open(Path(file), EDIT)
        fd = self._fds[file]
        return lambda data, offset: write_all(fd, data, at + offset)
