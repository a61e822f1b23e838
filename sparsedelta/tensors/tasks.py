"""Runs independent tasks on an executor: each is pickled, opens what it needs by path, and returns its result.

At most ``MOST_WAITING`` tasks are submitted and not yet collected, so that their results do not fill the memory. A
task reads or writes about ``TASK_BYTES``. The first failure ends all; tasks that already run are waited for.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

from sparsedelta._typing import Executor, Future
from sparsedelta.errors import CheckpointError
from sparsedelta.files.checkpoint import Checkpoint, Tensor
from sparsedelta.format.records import Payload, Row
from sparsedelta.fs import open_regular
from sparsedelta.system import allow_open_files
from sparsedelta.tensors.compare import digest_tensor
from sparsedelta.tensors.parallel import Pace

TASK_BYTES = 1 << 26
# A larger tensor is divided into ranges; its digest is computed by a task of its own.
SPLIT_BYTES = 1 << 28
MOST_WAITING = 128

R_co = TypeVar("R_co", covariant=True)
R = TypeVar("R")
T = TypeVar("T")


class Task(Protocol[R_co]):
    """Work that can be pickled."""

    @property
    def n_bytes(self) -> int:
        """What the task adds to the progress."""

    def run(self) -> R_co:
        """Do the work, in a worker."""


def check_executor(executor: Executor | None) -> None:
    """Raise TypeError if ``executor`` has no method ``submit``."""
    if executor is not None and not callable(getattr(executor, "submit", None)):
        raise TypeError(
            f"executor is {executor!r}, expected None or an object with the method submit, such as a"
            " concurrent.futures.ProcessPoolExecutor"
        )


def run_tasks(
    executor: Executor,
    tasks: Iterable[Task[R]],
    take: Callable[[Task[R], R], None],
    *,
    pace: Pace,
    label: str,
    n_bytes: int,
) -> None:
    """Run all tasks and pass each result to ``take``, in the order of the tasks.

    Args:
        executor: runs them.
        tasks: made one at a time, when there is room for another.
        take: called in this thread.
        pace: receives the size of each task that is done.
        label: name of the stage for the progress.
        n_bytes: size of all tasks.
    """
    waiting: deque[tuple[Task[R], Future]] = deque()

    def collect() -> None:
        task, future = waiting[0]
        result, error = future.result()
        if error is not None:
            raise error
        waiting.popleft()
        take(task, result)
        pace.advance(task.n_bytes)

    pace.progress.start(label, n_bytes)
    try:
        for task in tasks:
            if len(waiting) >= MOST_WAITING:
                collect()
            waiting.append((task, executor.submit(outcome, task)))
        while waiting:
            collect()
    finally:
        _end(future for _, future in waiting)
        pace.progress.finish()


def _end(futures: Iterable[Future]) -> None:
    """Cancel the calls that have not started, and wait for the others: they still write to the output."""
    running = [future for future in futures if not getattr(future, "cancel", lambda: False)()]
    for future in running:
        with suppress(Exception):
            future.result()


def outcome(task: Task[R]) -> tuple[R | None, Exception | None]:
    """Return the result of a task, or its error: executors wrap errors that are raised, each in its own way."""
    try:
        return task.run(), None
    except Exception as error:
        return None, error


@dataclass(frozen=True, slots=True)
class FilePlace:
    """Where a file is, and what shows that it is still the same.

    Attributes:
        path: absolute path.
        n_bytes: its size; -1: it is not compared.
        changed_ns: time of the last change, in nanoseconds.
    """

    path: str
    n_bytes: int
    changed_ns: int


class Files:
    """The places of the files that tensors are read from.

    Args:
        checkpoints: the open checkpoints that the tensors are from.
    """

    def __init__(self, *checkpoints: Checkpoint | None) -> None:
        self._checkpoints = [one for one in checkpoints if one]
        self._places: dict[int, FilePlace] = {}

    def place(self, tensor: Tensor) -> FilePlace:
        """Return where a tensor's file is.

        Raises:
            ValueError: the tensor is in memory.
        """
        if tensor.fd not in self._places:
            self._places[tensor.fd] = self._find(tensor)
        return self._places[tensor.fd]

    def _find(self, tensor: Tensor) -> FilePlace:
        if type(tensor) is not Tensor or tensor.fd < 0:
            raise ValueError(
                f"tensor {tensor.name!r} is in memory, but workers read files; save the model and give its path, or"
                " leave out executor="
            )
        found = os.fstat(tensor.fd)
        for checkpoint in self._checkpoints:
            path = os.path.abspath(checkpoint.location(tensor.file))
            with suppress(OSError):
                if os.path.samestat(os.stat(path), found):
                    return FilePlace(path, found.st_size, found.st_mtime_ns)
        raise CheckpointError(
            f"the file of tensor {tensor.name!r} was replaced meanwhile; try again"
        )

    def picked(self, tensors: Sequence[Tensor | None]) -> Picked:
        """Return tensors in a form that can be pickled."""
        places: dict[FilePlace, int] = {}
        numbered = [
            one and replace(one, fd=places.setdefault(self.place(one), len(places)))
            for one in tensors
        ]
        return Picked(tuple(places), tuple(numbered))


@dataclass(frozen=True, slots=True)
class Picked:
    """Tensors of files that are not open.

    Attributes:
        places: the files.
        tensors: the tensors; ``fd`` is the number of the file.
    """

    places: tuple[FilePlace, ...]
    tensors: tuple[Tensor | None, ...]

    def beside(self, path: str, tensor: Tensor) -> Picked:
        """Return the tensors and one more, of a file whose size and time are not compared."""
        place = FilePlace(path, -1, -1)
        more = replace(tensor, fd=len(self.places))
        return Picked((*self.places, place), (*self.tensors, more))

    @contextmanager
    def opened(self) -> Iterator[list[Tensor | None]]:
        """Yield the tensors of the opened files.

        Raises:
            CheckpointError: a file was replaced or has changed.
        """
        allow_open_files(len(self.places))
        with ExitStack() as stack:
            fds = []
            for place in self.places:
                fd = open_regular(place.path)
                stack.callback(os.close, fd)
                found = os.fstat(fd)
                if place.n_bytes >= 0 and (found.st_size, found.st_mtime_ns) != (
                    place.n_bytes,
                    place.changed_ns,
                ):
                    raise CheckpointError(f"'{place.path}' changed while it was read; try again")
                fds.append(fd)
            yield [one and replace(one, fd=fds[one.fd]) for one in self.tensors]


@dataclass(frozen=True, slots=True)
class DigestTask:
    """Returns the digests of some tensors.

    Attributes:
        picked: the tensors.
        n_bytes: their size, or 0 if it is reported by other tasks.
        number: of the pair, for the caller.
    """

    picked: Picked
    n_bytes: int
    number: int = -1

    def run(self) -> list[bytes]:
        """Read the tensors."""
        with self.picked.opened() as tensors:
            return [digest_tensor(one) for one in tensors if one]


def digest_tasks(tensors: Iterable[Tensor], files: Files) -> Iterator[DigestTask]:
    """Yield tasks that return the digests of all tensors, in order."""
    for batch in batches(tensors, lambda one: one.spec.n_bytes):
        yield DigestTask(files.picked(batch), sum(one.spec.n_bytes for one in batch))


class BytesPayload:
    """Coded bytes in memory (``sparsedelta.format.records.Payload``)."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def read(self, offset: int, n_bytes: int) -> bytes:
        """Return ``n_bytes`` bytes from ``offset``."""
        return self.data[offset : offset + n_bytes]

    def close(self) -> None:
        """Do nothing."""


def cut_out(rows: Sequence[Row], payload: Payload) -> tuple[tuple[Row, ...], BytesPayload]:
    """Return rows, and a payload that holds only their chunks."""
    parts: list[bytes] = []
    end = 0
    found = []
    for row in rows:
        chunks = []
        for chunk in row.chunks:
            parts.append(payload.read(chunk.offset, chunk.stored_bytes))
            chunks.append(chunk.at(end))
            end += chunk.stored_bytes
        found.append(row.with_chunks(tuple(chunks)))
    return tuple(found), BytesPayload(b"".join(parts))


def batches(items: Iterable[T], cost: Callable[[T], int]) -> Iterator[list[T]]:
    """Yield the items in lists that each cost about ``TASK_BYTES``."""
    batch: list[T] = []
    total = 0
    for item in items:
        own = cost(item)
        if batch and total + own > TASK_BYTES:
            yield batch
            batch, total = [], 0
        batch.append(item)
        total += own
    if batch:
        yield batch


def no_result(task: Any, result: Any) -> None:
    """Take the result of a task that has none."""
