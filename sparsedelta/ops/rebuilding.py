"""Rebuild all tensors of a delta's target: small ones in groups, the others one by one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from sparsedelta.files.checkpoint import Tensor
from sparsedelta.format.columns import Column, columns_of, starts
from sparsedelta.format.delta import Delta
from sparsedelta.format.records import TensorKey
from sparsedelta.ops.base_check import PlacedTensors
from sparsedelta.progress import Progress
from sparsedelta.system import copy_range, write_at
from sparsedelta.tensors.parallel import Pace, run_all
from sparsedelta.tensors.rebuild import Check, Write, rebuild
from sparsedelta.tensors.small import (
    Group,
    SmallRows,
    checks_of,
    groups,
    handled,
    rows_outside,
)


class Output(NamedTuple):
    """A weight file of the target.

    Attributes:
        fd: descriptor for writing; -1 if the file has all of its bytes, which are then only checked.
        offsets: where each of its tensors begins in it, (n,).
    """

    fd: int
    offsets: Column


def rebuild_tensors(
    base: Mapping[TensorKey, Tensor],
    delta: Delta,
    outputs: Sequence[Output],
    *,
    check: Check,
    progress: Progress | None,
    every_base: bool = False,
) -> None:
    """Rebuild and check all tensors of the target; the base tensors are checked, too.

    Args:
        base: the base tensor of each row that has one (``find_base``).
        delta: the delta.
        outputs: the file for each weight file of the target. If there are none, the tensors are only checked.
        check: see ``rebuild``.
        progress: receives the number of bytes of the target.
        every_base: see ``rebuild``.

    Raises:
        BaseDiffers: a base tensor has another digest than the delta expects.
        Corrupt: the delta is damaged, or the right base gives a wrong target.
    """
    pace = Pace(progress)
    work = _Rebuilding(base, delta, outputs, check, pace, every_base=every_base)
    run_all(work.run, work.items, cost=work.cost, pace=pace, label="applying")


class _Rebuilding:
    """The work of ``rebuild_tensors``. An item is the number of a row, or a group of rows.

    Attributes:
        items: all of them.
    """

    def __init__(
        self,
        base: Mapping[TensorKey, Tensor],
        delta: Delta,
        outputs: Sequence[Output],
        check: Check,
        pace: Pace,
        *,
        every_base: bool,
    ) -> None:
        self._base = base
        self._delta = delta
        self._check = check
        self._pace = pace
        self._every_base = every_base
        self._fds = np.repeat([one.fd for one in outputs], [len(one.offsets) for one in outputs])
        self._at = np.concatenate([np.empty(0, np.int64), *(one.offsets for one in outputs)])
        self._placed = base if isinstance(base, PlacedTensors) else None
        self._small: SmallRows | None = None
        small: list[Group] = []
        columns = columns_of(delta.tensors)
        if columns:
            self._ends = starts(columns.n_bytes)
        else:
            self._ends = starts(np.array([row.target.n_bytes for row in delta.tensors], np.int64))
        if columns and self._placed:
            places, checks = self._placed.places, checks_of(columns, check, every_base=every_base)
            self._small = SmallRows(columns, delta.payload, places, checks)
            small = groups(columns, handled(columns), places)
        self.items: list[int | Group] = [*small, *rows_outside(small, len(delta.tensors))]

    def cost(self, item: int | Group) -> int:
        """Return the number of bytes of a row or a group."""
        start, end = (item, item + 1) if isinstance(item, int) else item
        return int(self._ends[end] - self._ends[start])

    def run(self, item: int | Group) -> None:
        """Rebuild a row, or a group of rows."""
        if isinstance(item, int):
            self._rebuild(item, partial(self._write, item))
        elif self._small:
            start = item[0]
            data, left = self._small.run(item)
            for number in left:
                first = int(self._ends[number] - self._ends[start])
                self._rebuild(number, partial(_copy, data, first))
            self._write(start, data.data, 0)
            self._pace.advance(len(data) - sum(self.cost(number) for number in left))

    def _rebuild(self, number: int, write: Write) -> None:
        row = self._delta.tensors[number]
        base = self._placed.of_row(number) if self._placed else self._base.get(row.key)
        if self._check != "full" and base and row.is_copied and self._copy(number, base):
            self._pace.advance(row.target.n_bytes)
            return
        rebuild(
            row,
            base,
            self._delta.payload,
            write,
            check=self._check,
            pace=self._pace,
            every_base=self._every_base,
        )

    def _copy(self, number: int, base: Tensor) -> bool:
        """Copy a tensor that is not read for a digest; return whether that is done."""
        if not len(self._at) or self._fds[number] < 0:
            return True
        fd, at = int(self._fds[number]), int(self._at[number])
        return base.fd >= 0 and copy_range(base.fd, base.offset, fd, at, base.spec.n_bytes)

    def _write(self, number: int, data: memoryview, offset: int) -> None:
        """Write bytes of the target from byte ``offset`` of a row on."""
        if len(self._at) and self._fds[number] >= 0:
            write_all(int(self._fds[number]), data, int(self._at[number]) + offset)


def write_all(fd: int, data: memoryview, offset: int) -> None:
    """Write all bytes to a file at ``offset``."""
    while data:
        n_written = write_at(fd, data, offset)
        data = data[n_written:]
        offset += n_written


def _copy(data: npt.NDArray[np.uint8], first: int, block: memoryview, offset: int) -> None:
    data[first + offset : first + offset + len(block)] = np.frombuffer(block, np.uint8)
