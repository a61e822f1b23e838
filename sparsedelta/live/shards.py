"""A model that is divided among the ranks of ``torch.distributed`` (FSDP2, tensor parallelism), as whole tensors in host memory.

Each tensor has a home, a rank that holds it whole. Elements that have changed go there, one tensor at a time; in the first
call these are all. Nothing is gathered on a device.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt

from sparsedelta.codecs.context import Bits
from sparsedelta.errors import StructureMismatch
from sparsedelta.live.bits import flat_bits, integer_view, on_host
from sparsedelta.live.divided import dtensor, placed
from sparsedelta.live.ranks import Ranks
from sparsedelta.live.wire import Wire

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist

Name = TypeVar("Name", bound=Hashable)
Ordered = TypeVar("Ordered", str, int)


@dataclass(frozen=True, slots=True)
class HeldPart:
    """What a rank holds of a tensor.

    Attributes:
        shape: of the whole tensor.
        local: shape of the part.
        offset: where the part begins in each direction.
        is_sent: whether this rank sends it; other ranks may hold it too.
    """

    shape: tuple[int, ...]
    local: tuple[int, ...]
    offset: tuple[int, ...]
    is_sent: bool = True

    @property
    def n_sent(self) -> int:
        """How many elements this rank sends."""
        return math.prod(self.local) if self.is_sent else 0

    def in_whole(self, at: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the flat indices in the whole tensor, ``(n,)``, of flat indices in the part; the order is the same."""
        if not len(at) or not self.shape:
            return at
        places = np.unravel_index(at, self.local)
        whole = [place + start for place, start in zip(places, self.offset, strict=True)]
        return np.ravel_multi_index(whole, self.shape).astype(np.int64)

    def n_before(self, end: int) -> int:
        """Return how many elements of the part have a flat index below ``end`` in the whole tensor."""
        n_inner, n_held = math.prod(self.shape), math.prod(self.local)
        found = 0
        if end >= n_inner:
            return n_held
        for size, own, offset in zip(self.shape, self.local, self.offset, strict=True):
            n_inner, n_held = n_inner // size, n_held // own if own else 0
            place, end = divmod(end, n_inner)
            place -= offset
            if not 0 <= place < own:
                return found + (n_held * own if place >= own else 0)
            found += place * n_held
        return found

    @property
    def slices(self) -> tuple[slice, ...]:
        """The part in the whole tensor."""
        return tuple(slice(o, o + n) for o, n in zip(self.offset, self.local, strict=True))


class Shards:
    """The part of a model that this rank holds, and the whole tensors that it is the home of. All methods are called on all ranks.

    Attributes:
        held: the whole tensors, by name, in host memory.
    """

    def __init__(self, model: torch.nn.Module, *, whole: torch.nn.Module | None = None) -> None:
        """Send all elements to the homes of their tensors.

        Args:
            model: a module whose parameters may be DTensors. The names and parts must not change later.
            whole: on rank 0 a module in host memory with the same names, such as the model before it was divided. It
                receives all tensors. None: the tensors are divided among the ranks by their size.

        Raises:
            StructureMismatch: a tensor has another placement than shards and replicas, or ``whole`` has other tensors.
        """
        self._model = model
        self._wire = Wire()
        self._rank = self._wire.rank
        state = self._state()
        all_parts = self._all_parts(state)
        self._parts = all_parts[self._rank]
        sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in state.items()}
        has_whole = self._wire.from_first(whole is not None)
        self._homes = dict.fromkeys(sizes, 0) if has_whole else homes_of(sizes, len(all_parts))
        self._copies: dict[str, Bits] = {}
        self.held: dict[str, torch.Tensor] = {}
        tell(self._make_places(state, whole))
        for name, tensor in state.items():
            copy = self._copies[name] = _bits(local_of(tensor)).copy()
            for rank, bits in self._send(name, copy):
                part = all_parts[rank][name]
                place = _bits(self.held[name]).reshape(part.shape)
                place[part.slices] = bits.reshape(part.local)

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0."""
        return self._rank == 0

    def update(self) -> None:
        """Send the elements that have changed since the last call to the homes of their tensors, and write them there.

        Raises:
            StructureMismatch: a rank holds other elements than before.
        """
        state = self._state()
        group = Ranks()
        group.together(lambda: self._check(state))
        for name, tensor in state.items():
            copy, now = self._copies[name], _bits(local_of(tensor))
            at = np.flatnonzero(now != copy)
            copy[at] = now[at]
            for _, (index, bits) in self._send(name, (self._parts[name].in_whole(at), now[at])):
                _bits(self.held[name])[index] = bits
        group.together(lambda: None)  # all homes have written what they received

    def _state(self) -> Mapping[str, torch.Tensor]:
        return {name: tensor.detach() for name, tensor in self._model.state_dict().items()}

    def _check(self, state: Mapping[str, torch.Tensor]) -> None:
        for name, copy in self._copies.items():
            found = local_of(state[name]).numel() if name in state else 0
            if found != len(copy):
                raise StructureMismatch(
                    f"tensor {name!r} has {found} elements on this rank, expected {len(copy)}; make a new publisher",
                    tensor=name,
                )

    def _all_parts(self, state: Mapping[str, torch.Tensor]) -> list[dict[str, HeldPart]]:
        """Return the parts of all ranks."""
        Ranks().together(lambda: [_part(name, tensor) for name, tensor in state.items()])
        found = parts_of_ranks(state)
        for name, part in found[self._rank].items():
            if sum(one[name].n_sent for one in found) != math.prod(part.shape):
                raise StructureMismatch(
                    f"the ranks do not hold each element of tensor {name!r} once", tensor=name
                )
        return found

    def _send(self, name: str, value: Any) -> list[tuple[int, Any]]:
        """Send something of a tensor to its home; return there what each rank sends, with its number."""
        sent = value if self._parts[name].is_sent else None
        found = self._wire.gathered_on(self._homes[name], sent)
        return [(rank, one) for rank, one in enumerate(found) if one is not None]

    def _make_places(
        self, state: Mapping[str, torch.Tensor], whole: torch.nn.Module | None
    ) -> str | None:
        """Make the tensors that this rank is the home of; return what is wrong with ``whole``, if anything."""
        import torch

        given = None if whole is None else dict(whole.state_dict())
        for name, tensor in state.items():
            if self._homes[name] != self._rank:
                continue
            shape = tuple(tensor.shape)
            if given is None:
                self.held[name] = torch.empty(shape, dtype=tensor.dtype)
                continue
            place = given.get(name)
            if place is None or (tuple(place.shape), place.dtype) != (shape, tensor.dtype):
                return f"the whole model has no tensor {name!r} of {tensor.dtype} {list(shape)}"
            if place.device.type != "cpu" or not place.is_contiguous():
                return f"tensor {name!r} of the whole model is not contiguous in host memory"
            self.held[name] = place
        return None


def homes_of(sizes: Mapping[Ordered, int], n_ranks: int) -> dict[Ordered, int]:
    """Return the home of each tensor, such that the ranks hold about as many bytes; the largest tensors come first."""
    loads = [0] * n_ranks
    homes = {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        homes[name] = loads.index(min(loads))
        loads[homes[name]] += sizes[name]
    return homes


def tell(problem: str | None) -> None:
    """Raise an error on all ranks if rank 0 names a problem.

    Raises:
        StructureMismatch: it does.
    """
    told = Wire().from_first(problem)
    if told:
        raise StructureMismatch(told)


def parts_of_ranks(
    tensors: Mapping[Name, torch.Tensor], group: dist.ProcessGroup | None = None
) -> list[dict[Name, HeldPart]]:
    """Return what each rank holds of each tensor. Of parts that several ranks hold, the first rank sends them.

    Args:
        tensors: plain tensors and DTensors.
        group: the ranks; None: all.

    Raises:
        StructureMismatch: a tensor has another placement than shards and replicas.
    """
    own = {name: _part(name, tensor) for name, tensor in tensors.items()}
    held = Wire(group).gathered(own)
    seen: set[tuple[Name, HeldPart]] = set()
    found = []
    for parts in held:
        found.append({n: replace(part, is_sent=(n, part) not in seen) for n, part in parts.items()})
        seen |= {*parts.items()}
    return found


def _part(name: object, tensor: torch.Tensor) -> HeldPart:
    """Return what this rank holds of a tensor."""
    shape = tuple(tensor.shape)
    if dtensor(tensor) is None:
        return HeldPart(shape, shape, (0,) * len(shape))
    return HeldPart(shape, *placed(str(name), tensor))


def local_of(tensor: Any) -> torch.Tensor:
    """Return the part of a tensor that this rank holds, in the same memory; a plain tensor itself."""
    to_local = getattr(tensor, "to_local", None)
    found: torch.Tensor = to_local() if to_local else tensor
    return found


def _bits(tensor: torch.Tensor) -> Bits:
    """Return the bits of a tensor, in row-major order, ``(numel,)``: its own memory if it is contiguous on the host."""
    width = tensor.element_size()
    found: Bits = on_host(flat_bits(integer_view(tensor).contiguous())).view(f"<u{width}")
    return found
