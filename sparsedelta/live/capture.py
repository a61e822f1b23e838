"""``Capture``: what a model has become since its snapshot, without a reference to the model's memory.

It holds the changed elements only: of a tensor at most as many bytes as the tensor has. So a delta and an anchor can be
made of it while the model is trained.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from sparsedelta._typing import JSON
from sparsedelta.codecs.context import Bits
from sparsedelta.codecs.values import differences
from sparsedelta.errors import BaseMismatch
from sparsedelta.files.checkpoint import Checkpoint, Tensor
from sparsedelta.format.delta import Delta
from sparsedelta.format.records import Base, Row, TensorSpec
from sparsedelta.format.spool import new_payload
from sparsedelta.live.bits import Overlay
from sparsedelta.ops.diff import check_json, comparisons, describe_files
from sparsedelta.progress import Progress
from sparsedelta.tensors.compare import Comparison, Source, base_tensor
from sparsedelta.tensors.parallel import Pace, run_all

_BLOCK_ELEMENTS = 1 << 20
_Index = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Changes:
    """The changed elements of a tensor, or of a part of it.

    Attributes:
        index: their flat indices, increasing, ``(nnz,)`` int64 or uint32; None: ``bits`` has all elements.
        bits: their bits, ``(nnz,)`` or ``(numel,)``.
    """

    index: npt.NDArray[Any] | None
    bits: Bits

    @property
    def n_bytes(self) -> int:
        """Memory in bytes."""
        return self.bits.nbytes + (0 if self.index is None else self.index.nbytes)


@dataclass(frozen=True, slots=True)
class CapturedTensor(Tensor):
    """A tensor of the model as it was; implements ``tensors.compare.Source``.

    Attributes:
        published: the snapshot's copy.
        base: dtype, shape and digest of the copy at the time of the capture.
        changes: the elements in which the tensor differs from the copy; None: in none.
        is_live: whether the copy has the trained elements only, and the others are read from the model.
    """

    published: Source
    base: TensorSpec
    changes: Changes | None
    is_live: bool = False

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer`` with the tensor's bytes from ``offset``; both are whole elements."""
        changes = self.changes
        if changes is None:
            self.published.read_into(buffer, offset)
        elif changes.index is None:
            data = changes.bits.view(np.uint8)
            np.frombuffer(buffer, np.uint8)[:] = data[offset : offset + len(buffer)]
        else:
            Overlay(self.published, changes.index, changes.bits).read_into(buffer, offset)

    def row(self, comparison: Callable[..., Comparison], pace: Pace) -> Row:
        """Return the row of the delta from the copy to this tensor."""
        if self.published.spec is not self.base:
            raise BaseMismatch(
                f"tensor {self.name!r}: the snapshot has moved since the capture; capture the model again",
                tensor=self.name,
            )
        changes, spec = self.changes, self.base
        if changes is None:
            pace.advance(2 * spec.n_bytes)
            kept = base_tensor(self.published, spec.digest or b"")
            return Row(self.file, self.name, spec, kept, spec.n_elements, ())
        # A copy has the digest; elements that are read from the model may have been changed meanwhile.
        compare = comparison(
            self.published, self, pace=pace, base_digest=None if self.is_live else spec.digest
        )
        if changes.index is None:
            row = compare.run()
        else:
            row = compare.run_on_changes(changes.index.astype(np.int64, copy=False), changes.bits)
        if row.base is None or row.base.spec.digest != spec.digest:
            raise changed_elsewhere(self.name)
        return row


def changed_elsewhere(name: str) -> BaseMismatch:
    """Return the error for a tensor with changed elements that are not trained."""
    return BaseMismatch(
        f"tensor {name!r} has changed in elements that are not trained; make a new publisher,"
        " which publishes the model in full",
        tensor=name,
    )


class Capture(Checkpoint):
    """What a model has become since its snapshot. It refers to the snapshot, and not to the model.

    It is of use until the snapshot advances. Files beside the weights are read when the delta is made.
    """

    def __init__(
        self,
        now: Checkpoint,
        tensors: Sequence[CapturedTensor],
        side_files: Mapping[str, tuple[int, bytes]],
    ) -> None:
        """Store the arguments.

        Args:
            now: the model as a checkpoint, which may be closed afterwards.
            tensors: its tensors, in its order.
            side_files: size and digest of each side file that was published, by path.
        """
        self.path, self.is_folder = now.path, now.is_folder
        self._fds = []
        self.tensors = {tensor.key: tensor for tensor in tensors}
        self._captured = tensors
        self.weight_files = tuple(
            replace(file, tensors=tuple(self.tensors[tensor.key] for tensor in file.tensors))
            for file in now.weight_files
        )
        self.roles, self.side_files = now.roles, now.side_files
        self.empty_folders, self.left_out = now.empty_folders, now.left_out
        self._published = side_files

    def __enter__(self) -> Capture:
        return self

    @property
    def n_bytes(self) -> int:
        """Memory of the changed elements in bytes."""
        return sum(tensor.changes.n_bytes for tensor in self._captured if tensor.changes)

    def diff(
        self,
        *,
        base_id: str | None = None,
        values: str = "ulp",
        level: str = "default",
        standalone: bool = False,
        info: Mapping[str, JSON] | None = None,
        progress: Progress | None = None,
        spool_dir: str | None = None,
    ) -> Delta:
        """Return the delta from the snapshot to the captured state; see ``Snapshot.diff``.

        Raises:
            BaseMismatch: the snapshot has advanced since the capture.
            ValueError: an argument is wrong.
        """
        checked_info = check_json(info or {}, "info")
        check_json({"base_id": base_id}, "base_id")
        pace = Pace(progress)
        with new_payload(spool_dir) as payload:
            comparison = comparisons(payload, values=values, level=level, standalone=standalone)
            files = describe_files(self, self._published.get, payload)
            rows = run_all(
                partial(CapturedTensor.row, comparison=comparison, pace=pace),
                self._captured,
                cost=lambda tensor: 2 * tensor.spec.n_bytes,
                pace=pace,
                label="comparing",
            )
            return Delta(Base(base_id), files, tuple(rows), checked_info, payload)


def changes_in(before: Bits, now: Bits, start: int, *, wide: bool) -> Changes | None:
    """Return the elements in which two arrays differ; None if there are none.

    Args:
        before: bits of a part of a tensor, in host memory.
        now: the same part, changed.
        start: flat index of its first element.
        wide: whether indices are int64; else they are uint32.
    """
    places = np.empty(min(_BLOCK_ELEMENTS, len(now)), np.uint32)
    index, bits = [], []
    for first in range(0, len(now), _BLOCK_ELEMENTS):
        part = slice(first, first + _BLOCK_ELEMENTS)
        _, after = differences(before[part], now[part], 0, places)
        if len(after):
            found = places[: len(after)]
            at = start + first
            index.append(found.astype(np.int64) + at if wide else found + np.uint32(at))
            bits.append(after.copy())  # of memory of the whole block
    return Changes(np.concatenate(index), np.concatenate(bits)) if index else None


def joined(
    parts: Sequence[Changes | None], n_bytes: int, now: Callable[[], Bits]
) -> Changes | None:
    """Return the changes of a tensor's parts as one; None if there are none.

    Args:
        parts: in order.
        n_bytes: size of the tensor.
        now: returns a copy of all elements. They are kept if they take less memory than the changed ones.
    """
    found = [part for part in parts if part]
    if sum(part.n_bytes for part in found) > n_bytes:
        return Changes(None, now())
    if len(found) < 2:
        return found[0] if found else None
    indices = [part.index for part in found if part.index is not None]
    return Changes(np.concatenate(indices), np.concatenate([part.bits for part in found]))
