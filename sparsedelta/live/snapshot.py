"""``Snapshot``: a copy of the last published state of a model, and the delta from it to the current state.

The snapshot changes only when ``advance`` is called. It then has the target of the given delta, not the
current state of the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from sparsedelta._typing import JSON, AnyPath, Model
from sparsedelta.codecs.chunk import touched_digest
from sparsedelta.codecs.context import Bits
from sparsedelta.codecs.values import VALUE_ENCODINGS
from sparsedelta.errors import BaseMismatch, Corrupt, PartlyApplied, StructureMismatch
from sparsedelta.files.checkpoint import Checkpoint, Tensor
from sparsedelta.files.side_files import digest_file
from sparsedelta.files.unread import UNREAD_WEIGHTS
from sparsedelta.format.delta import AnyDelta, Delta, opened
from sparsedelta.format.digests import fingerprint
from sparsedelta.format.records import Row, TensorKey, TensorSpec
from sparsedelta.live.bits import (
    TensorBytes,
    blocks_on_device,
    flat_bits,
    gather,
    integer_view,
    on_host,
    scatter,
)
from sparsedelta.live.capture import Capture, CapturedTensor, Changes, changes_in, joined
from sparsedelta.live.classes import HOST, device_lock
from sparsedelta.live.fused import changed
from sparsedelta.live.sides import HeldTensor, held_checkpoint
from sparsedelta.live.trained import KeptElements, Pending, Trained, TrainedElements
from sparsedelta.progress import Progress
from sparsedelta.tensors.changes import decode_row_chunk
from sparsedelta.tensors.compare import digest_tensor
from sparsedelta.tensors.parallel import Pace, run_all

if TYPE_CHECKING:
    import torch

_BLOCK_ELEMENTS = 1 << 24


@dataclass(slots=True)
class _Kept:
    """The copy of a published tensor; implements ``tensors.compare.Source``."""

    file: str
    name: str
    spec: TensorSpec  # with its digest
    tensor: torch.Tensor
    mirror: torch.Tensor | None = None  # a second copy, on the model's device
    pending: Pending | None = None  # changes that are not completely written
    _bytes: TensorBytes = field(init=False)

    def __post_init__(self) -> None:
        self._bytes = TensorBytes(self.tensor)

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer`` with the tensor's bytes from ``offset``."""
        self._bytes.read_into(buffer, offset)

    def write_pending(self) -> None:
        """Write the pending changes. It is safe to call this again after an interrupted call."""
        if self.pending is not None:
            import torch

            for positions, after in self.pending.changes:
                index = torch.from_numpy(positions)
                bits = torch.from_numpy(after.view(f"<i{after.itemsize}"))
                for copy in (self.tensor, self.mirror):
                    if copy is not None:
                        scatter(copy, index.to(copy.device), bits.to(copy.device))
            self.spec, self.pending = self.pending.spec, None

    @property
    def n_bytes(self) -> int:
        """Size of one copy in bytes."""
        return self.spec.n_bytes

    def at(self, positions: npt.NDArray[np.int64]) -> Bits:
        """Return the published bits of elements."""
        import torch

        index = torch.from_numpy(positions).to(self.tensor.device)
        return on_host(gather(self.tensor, index)).view(self.spec.dtype.view)


class Snapshot:
    """A copy of the last published state of a model.

    It must not be used from several threads at once. The model must not change while a method runs.

    Attributes:
        is_folder: whether the deltas are between folders.
    """

    def __init__(
        self,
        model: Model,
        *,
        folder: AnyPath | None = None,
        keep_on: Literal["cpu", "model", "both"] = "cpu",
        trained: Trained | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Copy the tensors of a model and compute their digests.

        Args:
            model: a ``torch.nn.Module`` or a state dict, on any device; or, if a folder is given, a pipeline of
                diffusers. The snapshot keeps a reference to it. A state dict must be updated in place, because
                ``diff`` reads this object.
            folder: a checkpoint of this model. The deltas are then between folders with its files and layout, but
                without its weight files of other formats, such as ``.bin``, which do not hold the model's weights.
                None: they are between single files, as the model would be saved.
            keep_on: where the copy is, if the model is on a GPU. The GPU compares in each case.
                ``"cpu"``: in pinned host memory. To compare, the copy is sent to the GPU in blocks. Positions and
                values of changed elements are copied to the host.
                ``"model"``: on the GPU. Besides, the published bytes of changed tensors are copied to the host,
                where digests are computed.
                ``"both"``: one copy in each place. Only positions and values of changed elements cross the bus.
            trained: flat indices of the elements that a training changes, increasing, (k,), by the names of the
                module's parameters; None for a parameter in which all elements are trained. The other elements and
                parameters do not change while the snapshot is used. Then only the bits of these elements are kept and
                compared, and no copy of the model. Buffers, parameters in which all elements are trained and tensors
                that are converted from parameters to be saved are still copied.
                None: all elements may change.
            progress: receives the number of bytes read.

        Raises:
            StructureMismatch: the saved form of the model is not known, or it has other tensors than the folder.
            CheckpointError: the folder cannot be read as a checkpoint.
            ValueError: ``keep_on`` is another value, or ``trained`` names no parameter of the module.
        """
        if keep_on not in ("cpu", "model", "both"):
            raise ValueError(f"keep_on is {keep_on!r}, expected 'cpu', 'model' or 'both'")
        self._model = model
        self._folder = folder
        self._on_host = keep_on != "model"
        self._has_mirror = keep_on == "both"
        self._advancing = False
        pace = Pace(progress)
        elements = None if trained is None else TrainedElements(model, trained)

        def keep(tensor: Tensor) -> _Kept | KeptElements:
            held = _held(tensor)
            own = elements and elements.kept(tensor.file, tensor.name, tensor.spec, held)
            if own:
                own.spec = tensor.spec.with_digest(digest_tensor(own, pace))
                return own
            copy = _copied(held, "cpu" if self._on_host else held.device)
            mirror = _copied(held, held.device) if self._has_mirror and held.is_cuda else None
            kept = _Kept(tensor.file, tensor.name, tensor.spec, copy, mirror)
            kept.spec = tensor.spec.with_digest(digest_tensor(kept, pace))
            return kept

        with self._checkpoint() as now:
            self.is_folder = now.is_folder
            self._layout = _layout(now)
            self._side_files = {path: digest_file(at) for path, at in now.side_files.items()}
            kept = run_all(
                keep,
                [*now.tensors.values()],
                cost=lambda tensor: tensor.spec.n_bytes,
                pace=pace,
                label="copying",
            )
        self._kept: Mapping[TensorKey, _Kept | KeptElements] = {
            (one.file, one.name): one for one in kept
        }

    def __repr__(self) -> str:
        return f"<Snapshot of {type(self._model).__name__}: {len(self._kept)} tensors>"

    @property
    def n_bytes(self) -> int:
        """Size of the copy in bytes."""
        return sum(kept.n_bytes for kept in self._kept.values())

    @property
    def specs(self) -> dict[str, TensorSpec]:
        """Dtype, shape and digest of what was published last, by name."""
        return {kept.name: kept.spec for kept in self._kept.values()}

    @property
    def fingerprint(self) -> bytes:
        """Fingerprint of what was published last."""
        return fingerprint((kept.name, kept.spec) for kept in self._kept.values())

    def carry_side_files(self) -> None:
        """Let the next delta carry all side files, as if none had been published."""
        self._side_files = {}

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
        """Return the delta from the last published state to the current state of the model.

        It has the same bytes as the delta that ``sparsedelta.diff`` makes of the two saved states. The snapshot
        does not change; see ``advance``. The arguments are those of ``sparsedelta.diff``. Memory: that of ``capture``.

        Raises:
            StructureMismatch: the model has other tensors than the snapshot. Make a new snapshot.
            PartlyApplied: a call of ``advance`` was interrupted. Call it again.
            ValueError: an argument is wrong.
        """
        with self.capture() as capture:
            return capture.diff(
                base_id=base_id,
                values=values,
                level=level,
                standalone=standalone,
                info=info,
                progress=progress,
                spool_dir=spool_dir,
            )

    def capture(self) -> Capture:
        """Return what the model has become since the snapshot; the model may change afterwards.

        This takes about as long as copying the model, and much less than ``diff``, which is ``capture().diff()``. The
        capture holds the changed elements, in the memory of the host: at most as many bytes as the model.

        Raises:
            StructureMismatch: the model has other tensors than the snapshot. Make a new snapshot.
            PartlyApplied: a call of ``advance`` was interrupted. Call it again.
        """
        if self._advancing:
            raise PartlyApplied(
                "a call of advance was interrupted, so the snapshot is incomplete; call advance again with the"
                " same delta"
            )
        with self._checkpoint() as now:
            self._check_structure(now)
            tensors = [*now.tensors.values()]
            pieces = [
                (tensor, first)
                for tensor in tensors
                for first in range(0, tensor.spec.n_elements, _BLOCK_ELEMENTS)
            ]
            found: dict[TensorKey, list[Changes | None]] = {tensor.key: [] for tensor in tensors}
            changes = run_all(
                lambda piece: self._changes(*piece),
                pieces,
                cost=lambda piece: min(_BLOCK_ELEMENTS * 8, piece[0].spec.n_bytes),
                pace=Pace(),
            )
            for (tensor, _), one in zip(pieces, changes, strict=True):
                found[tensor.key].append(one)
            captured = [self._captured(tensor, found[tensor.key]) for tensor in tensors]
            return Capture(now, captured, dict(self._side_files))

    def advance(self, delta: AnyDelta) -> None:
        """Move the snapshot to the target of a delta. Call this when the delta is stored safely.

        The model is not read. If a call is interrupted, for example by Ctrl-C, call it again with the same delta. A
        second call with the same delta changes nothing.

        Args:
            delta: a delta that ``diff`` returned, or its file. Its base must be the current snapshot.

        Raises:
            BaseMismatch: the delta was not made from this snapshot.
            FormatError: the delta is damaged.
        """
        with opened(delta) as opened_delta:
            for row in opened_delta.tensors:
                self._check_base(opened_delta, row)
            if len(opened_delta.tensors) != len(self._kept):
                raise BaseMismatch(
                    f"{opened_delta!r} lacks tensors of the last published state; give a delta made by this snapshot"
                )
            self._advancing = True
            for row in opened_delta.tensors:
                self._advance(opened_delta, self._kept[row.key], row)
            self._side_files = {
                f.path: (f.n_bytes, f.digest) for f in opened_delta.target.side_files
            }
            self._advancing = False

    def _checkpoint(self) -> Checkpoint:
        return held_checkpoint(self._model, self._folder, exclude=UNREAD_WEIGHTS, include=())

    def _check_structure(self, now: Checkpoint) -> None:
        found = _layout(now)
        if found == self._layout:
            return
        changed = [
            key for key in self._layout.keys() | found if self._layout.get(key) != found.get(key)
        ]
        _, name = min(changed)
        raise StructureMismatch(
            f"tensor {name!r} was added, was removed, or has another dtype or shape since the snapshot was"
            " made; make a new Snapshot or Publisher, which begins with the whole model",
            tensor=name,
        )

    def _changes(self, tensor: Tensor, first: int) -> Changes | None:
        """Return what has changed in the block of a tensor that begins with an element; on a device, in all blocks."""
        kept, now = self._kept[tensor.key], _held(tensor)
        if isinstance(kept, KeptElements):
            return None if first else kept.changes(now)
        if now.device.type not in HOST:
            on_device = None if first else changes_on_device(kept, now)
            return on_device and Changes(*on_device)
        before, after = (
            on_host(flat_bits(one)[first : first + _BLOCK_ELEMENTS]).view(kept.spec.dtype.view)
            for one in (kept.tensor, now)
        )
        return changes_in(before, after, first, wide=tensor.spec.n_elements > 1 << 32)

    def _captured(self, tensor: Tensor, parts: Sequence[Changes | None]) -> CapturedTensor:
        kept = self._kept[tensor.key]

        def bits() -> Bits:
            return on_host(flat_bits(_held(tensor))).view(kept.spec.dtype.view).copy()

        changes = joined(parts, tensor.spec.n_bytes, bits)
        return CapturedTensor(
            tensor.file,
            tensor.name,
            tensor.spec,
            -1,
            0,
            kept,
            kept.spec,
            changes,
            isinstance(kept, KeptElements),
        )

    def _check_base(self, delta: Delta, row: Row) -> None:
        kept = self._kept.get(row.key)
        digests = {row.base.spec.digest if row.base else None, row.target.digest}
        if (
            kept is None
            or not row.keeps_all
            or not row.target.same_layout(kept.spec)
            or kept.spec.digest not in digests
            or None in digests
        ):
            raise BaseMismatch(
                f"tensor {row.name!r} of {delta!r} was not made from the last published state; give a delta"
                " made by this snapshot",
                tensor=row.name,
            )

    def _advance(self, delta: Delta, kept: _Kept | KeptElements, row: Row) -> None:
        kept.write_pending()
        if kept.spec.digest == row.target.digest:
            return
        dtype = row.target.dtype
        changes = []
        for chunk in row.chunks:
            positions, codes = decode_row_chunk(row, chunk, delta.payload, kept)
            index = positions.astype(np.int64) + chunk.start
            before = kept.at(index)
            after = VALUE_ENCODINGS[chunk.coding.values].decode(dtype, before, codes)
            if chunk.touched is None or touched_digest(after) != chunk.touched[1]:
                raise Corrupt(f"tensor {row.name!r}: the delta is inconsistent", tensor=row.name)
            changes.append((index, after))
        kept.pending = Pending(row.target, changes)
        kept.write_pending()


def changes_on_device(kept: _Kept, now: torch.Tensor) -> tuple[npt.NDArray[np.int64], Bits] | None:
    """Compare a tensor with its published copy on its device, in blocks.

    Args:
        kept: the published copy.
        now: the model's tensor, contiguous, on its device.

    Returns:
        Flat indices of the changed elements, increasing, and their bits now, both ``(nnz,)``, on the host; None
        if nothing has changed.
    """
    copy = kept.tensor if kept.mirror is None else kept.mirror
    positions, values = [], []
    with device_lock:
        blocks = flat_bits(now).split(_BLOCK_ELEMENTS)
        for number, (block, before) in enumerate(
            zip(blocks, blocks_on_device(flat_bits(copy), _BLOCK_ELEMENTS, now.device), strict=True)
        ):
            index, bits = changed(before, block)
            if len(index):
                positions.append(on_host(index).astype(np.int64) + number * _BLOCK_ELEMENTS)
                values.append(on_host(bits))
    if not positions:
        return None
    view = kept.spec.dtype.view
    return np.concatenate(positions), np.concatenate(values).view(view)


def _copied(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    import torch

    pinned = tensor.is_cuda and torch.device(device).type == "cpu"
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, device=device, pin_memory=pinned)
    # As integers, because a copy of floats may change NaN payloads.
    integer_view(copy).copy_(integer_view(tensor))
    return copy


def _held(tensor: Tensor) -> torch.Tensor:
    if not isinstance(tensor, HeldTensor):
        raise StructureMismatch(f"tensor {tensor.name!r} is not in the model", tensor=tensor.name)
    return tensor.held()


def _layout(now: Checkpoint) -> dict[TensorKey, TensorSpec]:
    return {key: tensor.spec for key, tensor in now.tensors.items()}
