"""The comparison of two checkpoints as tasks for an executor; the rows and streams are those of one process."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from sparsedelta._typing import Executor
from sparsedelta.codecs.chunk import MAX_SPAN, Chunk
from sparsedelta.codecs.zstd import Level
from sparsedelta.files.checkpoint import Tensor
from sparsedelta.format.columns import starts
from sparsedelta.format.records import Row
from sparsedelta.format.spool import SpoolPayload
from sparsedelta.tensors import tasks
from sparsedelta.tensors.compare import Comparison, base_tensor, kept
from sparsedelta.tensors.parallel import Pace
from sparsedelta.tensors.small import Group, rows_outside
from sparsedelta.tensors.small_pairs import Pair, PairComparison, pair_groups
from sparsedelta.tensors.tasks import DigestTask, Files, Picked, Task, batches, run_tasks


@dataclass(frozen=True, slots=True)
class Coder:
    """How changes are coded; see ``Comparison``."""

    values: str
    level: Level
    standalone: bool

    def comparison(
        self,
        pair: Pair,
        payload: SpoolPayload,
        *,
        pace: Pace | None = None,
        digests: bool = True,
    ) -> Comparison:
        """Return the comparison of a pair."""
        return Comparison(
            *pair,
            values=self.values,
            payload=payload,
            pace=pace or Pace(),
            level=self.level,
            standalone=self.standalone,
            digests=digests,
        )


class Compared(NamedTuple):
    """The result of a task: rows or chunks, and their streams."""

    rows: list[Row]
    chunks: list[Chunk]
    streams: bytes


@dataclass(frozen=True, slots=True)
class PairTask:
    """Compares pairs of tensors.

    Attributes:
        picked: the base and the target tensor of each pair.
        numbers: the number of each pair in the whole comparison.
        items: pairs and groups of pairs, counted from the first pair of the task.
        coder: codes the changes.
        n_bytes: size of all tensors.
    """

    picked: Picked
    numbers: tuple[int, ...]
    items: tuple[int | Group, ...]
    coder: Coder
    n_bytes: int

    def run(self) -> Compared:
        """Return the row of each pair."""
        payload = SpoolPayload()
        small = PairComparison(self.coder.values, payload, self.coder.level)
        rows: list[Row] = []
        with self.picked.opened() as tensors:
            pairs = _pairs(tensors)
            for item in self.items:
                start, end = (item, item + 1) if isinstance(item, int) else item
                own = pairs[start:end]
                found = [None] if isinstance(item, int) else small.run(own)
                rows += [
                    row or self.coder.comparison(pair, payload).run()
                    for pair, row in zip(own, found, strict=True)
                ]
        return Compared(rows, [], payload.taken())


@dataclass(frozen=True, slots=True)
class RangeTask:
    """Compares elements ``first`` to ``end`` of one pair."""

    picked: Picked
    number: int
    first: int
    end: int
    coder: Coder
    n_bytes: int

    def run(self) -> Compared:
        """Return the chunks."""
        payload = SpoolPayload()
        with self.picked.opened() as tensors:
            work = self.coder.comparison(_pairs(tensors)[0], payload, digests=False)
            return Compared([], work.chunks(self.first, self.end), payload.taken())


def _pairs(tensors: Sequence[Tensor | None]) -> list[Pair]:
    both = zip(tensors[::2], tensors[1::2], strict=True)
    return [(base, target) for base, target in both if target]


class ComparisonTasks:
    """Compares pairs on an executor.

    Args:
        executor: runs the tasks.
        pairs: all pairs, in order.
        files: knows the places of their files.
        coder: codes the changes.
        payload: receives the streams.
    """

    def __init__(
        self,
        executor: Executor,
        pairs: Sequence[Pair],
        files: Files,
        coder: Coder,
        payload: SpoolPayload,
    ) -> None:
        self._executor = executor
        self._pairs = pairs
        self._files = files
        self._coder = coder
        self._payload = payload
        self._costs = starts(
            np.array([t.spec.n_bytes + (b.spec.n_bytes if b else 0) for b, t in pairs], np.int64)
        )
        self._rows: dict[int, Row] = {}
        self._chunks: dict[int, list[Chunk]] = defaultdict(list)
        self._digests: dict[int, list[bytes]] = {}

    def run(self, pace: Pace, *, label: str) -> list[Row]:
        """Return the row of each pair."""
        whole, large = self._divided()
        made = self._tasks(whole, large)
        run_tasks(
            self._executor, made, self._take, pace=pace, label=label, n_bytes=int(self._costs[-1])
        )
        for number in large:
            self._rows[number] = self._joined(number)
        return [self._rows[number] for number in range(len(self._pairs))]

    def _divided(self) -> tuple[list[int | Group], list[int]]:
        """Return the pairs and groups to compare as a whole, in order, and the pairs to divide into ranges."""
        found = pair_groups(self._pairs)
        alone = list(rows_outside(found, len(self._pairs)))
        large = [n for n in alone if self._pairs[n][1].spec.n_bytes > tasks.SPLIT_BYTES]
        whole: list[int | Group] = [*found, *sorted({*alone} - {*large})]
        return sorted(whole, key=lambda item: item if isinstance(item, int) else item[0]), large

    def _cost(self, item: int | Group) -> int:
        start, end = (item, item + 1) if isinstance(item, int) else item
        return int(self._costs[end] - self._costs[start])

    def _tasks(
        self, whole: Sequence[int | Group], large: Sequence[int]
    ) -> Iterator[Task[Compared | list[bytes]]]:
        for number in large:  # first, because they take longest
            pair = self._pairs[number]
            yield DigestTask(self._files.picked([*_read(pair), pair[1]]), 0, number)
            yield from self._ranges(number)
        for batch in batches(whole, self._cost):
            numbers: list[int] = []
            items: list[int | Group] = []
            for item in batch:
                first = len(numbers)
                numbers += [item] if isinstance(item, int) else range(*item)
                items.append(first if isinstance(item, int) else (first, len(numbers)))
            picked = self._files.picked([one for n in numbers for one in self._pairs[n]])
            size = sum(map(self._cost, batch))
            yield PairTask(picked, tuple(numbers), tuple(items), self._coder, size)

    def _ranges(self, number: int) -> Iterator[RangeTask]:
        spec = self._pairs[number][1].spec
        step = max(1, tasks.TASK_BYTES // (MAX_SPAN * spec.dtype.width)) * MAX_SPAN
        left = self._cost(number)
        picked = self._files.picked(self._pairs[number])
        for first in range(0, spec.n_elements, step):
            end = min(spec.n_elements, first + step)
            own = left if end == spec.n_elements else self._cost(number) * step // spec.n_elements
            left -= own
            yield RangeTask(picked, number, first, end, self._coder, own)

    def _take(self, task: Task[object], result: Compared | list[bytes]) -> None:
        if isinstance(task, DigestTask) and isinstance(result, list):
            self._digests[task.number] = result
        elif isinstance(result, Compared):
            at = self._payload.add_streams(result.streams) if result.streams else 0
            if isinstance(task, RangeTask):
                self._chunks[task.number] += [_moved(chunk, at) for chunk in result.chunks]
            elif isinstance(task, PairTask):
                for number, row in zip(task.numbers, result.rows, strict=True):
                    chunks = tuple(_moved(chunk, at) for chunk in row.chunks)
                    self._rows[number] = row.with_chunks(chunks) if chunks else row

    def _joined(self, number: int) -> Row:
        """Return the row of a pair that was compared in ranges."""
        base, target = self._pairs[number]
        *of_base, digest = self._digests[number]
        found = base_tensor(base, of_base[0]) if base and of_base else None
        keep = kept(base, target)[1]
        spec = target.spec.with_digest(digest)
        return Row(target.file, target.name, spec, found, keep, tuple(self._chunks[number]))


def _read(pair: Pair) -> list[Tensor]:
    """Return the base tensor of a pair, if elements of it are used."""
    return [pair[0]] if pair[0] is not None and kept(*pair)[0] is not None else []


def _moved(chunk: Chunk, by: int) -> Chunk:
    return chunk.at(chunk.offset + by)
