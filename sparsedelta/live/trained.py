"""``KeptElements``: the published bits of the elements that a training changes; the rest is read from the model.

The other elements of the tensor must not change. The base digest of every delta is computed from the model and
compared, so a change that something else makes is an error and is never published.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from sparsedelta._typing import Model
from sparsedelta.codecs.context import Bits
from sparsedelta.format.records import TensorSpec
from sparsedelta.live.bits import Overlay, TensorBytes, gather, on_host
from sparsedelta.live.capture import Changes, changed_elsewhere
from sparsedelta.live.held import whole_digest

if TYPE_CHECKING:
    import torch

Trained = Mapping[str, "torch.Tensor | None"]


@dataclass(slots=True)
class Pending:
    """Changes to be written to a kept tensor: pairs of flat indices and bits, and the spec of the result."""

    spec: TensorSpec
    changes: list[tuple[npt.NDArray[np.int64], Bits]]


@dataclass(slots=True)
class KeptElements:
    """What was published of a tensor in a model; implements ``tensors.compare.Source``.

    Attributes:
        tensor: the tensor in the model's memory, contiguous.
        parameter: the parameter that it is, or is a part of.
        version: torch's count of the writes to the parameter, if none of its elements is trained.
        index: flat indices of the trained elements in the tensor, increasing, (k,).
        bits: their published bits, (k,).
    """

    file: str
    name: str
    spec: TensorSpec  # with its digest
    tensor: torch.Tensor
    parameter: torch.Tensor
    version: int | None
    index: torch.Tensor
    bits: Bits
    pending: Pending | None = None  # changes that are not completely written
    _on_host: npt.NDArray[Any] = field(init=False)  # the index

    def __post_init__(self) -> None:
        self._on_host = self.index.cpu().numpy()

    @property
    def n_bytes(self) -> int:
        """Memory of the bits that are kept, in bytes; the index is that of the training."""
        return self.bits.nbytes

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer`` with the published bytes from ``offset``; both are whole elements."""
        Overlay(TensorBytes(self.tensor), self._on_host, self.bits).read_into(buffer, offset)

    def at(self, positions: npt.NDArray[np.int64]) -> Bits:
        """Return the published bits of trained elements."""
        return self.bits[self._places(positions)]

    def write_pending(self) -> None:
        """Write the pending changes. It is safe to call this again after an interrupted call."""
        if self.pending is not None:
            for positions, bits in self.pending.changes:
                self.bits[self._places(positions)] = bits
            self.spec, self.pending = self.pending.spec, None

    def changes(self, now: torch.Tensor) -> Changes | None:
        """Return the trained elements that have changed since they were published; None if none has.

        Args:
            now: the tensor in the model, which may have moved to another device.

        Raises:
            BaseMismatch: something has written to a parameter that is not trained.
        """
        if self.version is not None and self.parameter._version != self.version:
            raise changed_elsewhere(self.name)
        if self.version is not None and now.data_ptr() != self.tensor.data_ptr():
            if whole_digest(now) != self.spec.digest:
                raise changed_elsewhere(self.name)
            self.parameter, self.version = now, now._version  # moved to another device, or replaced
        self.tensor, self.index = now, self.index.to(now.device)
        bits = on_host(gather(now, self.index)).view(self.bits.dtype)
        changed = bits != self.bits
        if not changed.any():
            return None
        return Changes(self._on_host[changed], bits[changed])

    def _places(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.intp]:
        index = self._on_host
        places = np.searchsorted(index, positions.astype(index.dtype, copy=False))
        if not np.array_equal(index[np.minimum(places, len(index) - 1)], positions):
            raise changed_elsewhere(self.name)
        return places


class TrainedElements:
    """Finds which elements of a checkpoint's tensors are trained, from those of the module's parameters.

    Args:
        model: a module.
        trained: flat indices by the names of its parameters; see ``Snapshot``.

    Raises:
        ValueError: ``model`` has no such parameter, or is no module.
    """

    def __init__(self, model: Model, trained: Trained) -> None:
        named = getattr(model, "named_parameters", None)
        if named is None:
            raise ValueError("trained names parameters of a module, and the model is a state dict")
        parameters: dict[str, torch.Tensor] = dict(named())
        unknown = trained.keys() - parameters.keys()
        if unknown:
            raise ValueError(f"trained names {min(unknown)!r}, which is no parameter of the model")
        self._starts = {
            parameter.data_ptr(): (parameter, name in trained, trained.get(name))
            for name, parameter in parameters.items()
            if parameter.is_contiguous() and not parameter.is_inference() and parameter.numel()
        }
        self._sorted = np.array(sorted(self._starts), np.uint64)

    def kept(
        self, file: str, name: str, spec: TensorSpec, held: torch.Tensor
    ) -> KeptElements | None:
        """Return what is kept of a tensor; None if a copy of all of it is needed.

        A copy is needed if all its elements are trained, if it is no parameter, and if it is converted from
        parameters instead of being a part of one's memory.
        """
        import torch

        at = held.data_ptr()
        place = int(np.searchsorted(self._sorted, np.uint64(at), side="right")) - 1
        if place < 0:
            return None
        start = int(self._sorted[place])
        parameter, is_trained, index = self._starts[start]
        width = parameter.element_size()
        first, end = (at - start) // width, (at - start) // width + held.numel()
        if (
            (is_trained and index is None)
            or held.dtype != parameter.dtype
            or held.device != parameter.device
            or end > parameter.numel()
        ):
            return None
        if index is None:
            index = torch.empty(0, dtype=torch.int32, device=held.device)
        elif held.numel() < parameter.numel():
            low, high = torch.searchsorted(
                index, torch.tensor([first, end], device=index.device).to(index.dtype)
            )
            index = index[int(low) : int(high)] - first
        bits = on_host(gather(held, index)).view(spec.dtype.view).copy()
        version = None if is_trained else parameter._version
        return KeptElements(file, name, spec, held, parameter, version, index, bits)
