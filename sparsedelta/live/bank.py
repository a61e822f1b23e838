"""``DeltaBank``: several deltas of one base, for one model in memory. Deltas are decoded once and switched in place.

While no thread holds the lock for writing, the model is the base, or the target of the active delta. After a switch
that failed half-way, only ``restore`` is possible.
"""

from __future__ import annotations

import os
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace

from sparsedelta._typing import Model, ModelCheck, Names
from sparsedelta.errors import ConflictError
from sparsedelta.format.delta import Delta, load
from sparsedelta.format.digests import base_tensors
from sparsedelta.format.records import TensorKey, TensorSpec
from sparsedelta.live.held import Held
from sparsedelta.live.inplace import prepare
from sparsedelta.live.patch import Patch, Plan, Writer
from sparsedelta.live.ranks import check_undivided
from sparsedelta.live.rwlock import SharedLock


@dataclass(slots=True)
class _Resident:
    """One delta of the bank. If ``patches`` is None, it is decoded again when it is activated."""

    source: str | os.PathLike[str] | Delta
    base: Mapping[TensorKey, TensorSpec]
    patches: list[Patch] | None = None

    @property
    def n_bytes(self) -> int:
        return sum(patch.n_bytes for patch in self.patches or ())


class DeltaBank:
    """A model in memory, and deltas of its weights. At most one delta is active.

    A switch writes the touched elements of the old delta and of the new one. It reads no tensor. Threads that use
    the model while others switch must use it inside ``reading``.

    A switch that fails or is interrupted is undone. If undoing it fails too, for example after more interrupts, every
    method that uses the model raises ``HalfWritten``, a ``PartlyApplied``, until ``restore`` has succeeded.

    Args:
        model: a ``torch.nn.Module`` or a state dict that holds the base.
        budget_bytes: limit for the memory of decoded deltas. Each touched element takes 4 bytes and two
            values. The deltas that were not used for the longest time are freed; they are decoded again when
            they are activated. None: no limit.
        verify: how each delta is checked against the model when it is decoded; see
            ``Delta.apply_``.
        names: see ``Delta.apply_``.

    Raises:
        StructureMismatch: the model is divided among ranks.
    """

    def __init__(
        self,
        model: Model,
        *,
        budget_bytes: int | None = None,
        verify: ModelCheck = "touched",
        names: Names = None,
    ) -> None:
        check_undivided(model, "a bank", "use apply_, revert_ and applied on all ranks")
        self._model = model
        self._budget_bytes = budget_bytes
        self._verify: ModelCheck = verify
        self._names = names
        self._lock = SharedLock()
        self._deltas: OrderedDict[str, _Resident] = OrderedDict()  # the last used one is last
        self._writer = Writer()
        # By what the model holds before and after; without those of deltas that are freed or removed.
        self._plans: dict[tuple[str | None, str | None], Plan] = {}

    @property
    def active(self) -> str | None:
        """The name of the active delta; None if the model is the base."""
        return self._writer.holds

    @property
    def resident_bytes(self) -> int:
        """Memory that the decoded deltas take, in bytes."""
        return sum(resident.n_bytes for resident in self._deltas.values())

    def __contains__(self, name: object) -> bool:
        return name in self._deltas

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._deltas))

    def __len__(self) -> int:
        return len(self._deltas)

    def add(self, name: str, delta: str | os.PathLike[str] | Delta) -> None:
        """Decode a delta, check it against the model, and keep it under a name.

        Args:
            name: a name that the bank does not have yet.
            delta: an ``.sd`` file, which is opened again when the delta must be decoded again; or a loaded
                delta, which must stay open.

        Raises:
            ConflictError: the delta was made from another base than the deltas in the bank.
            ValueError: the name is taken, or the delta alone exceeds the budget.
            MismatchError, FormatError: see ``Delta.apply_``.
        """
        with self._lock.writing():
            if name in self._deltas:
                raise ValueError(f"the bank has a delta {name!r} already; remove it first")
            with _opened(delta) as opened:
                resident = _Resident(delta, base_tensors(opened.tensors))
                self._check_sibling(name, resident)
                active = self.active
                try:
                    self._switch(None)
                    self._decode(resident, opened, keep=active)
                    self._deltas[name] = resident
                finally:
                    self._switch(active)

    def remove(self, name: str) -> None:
        """Remove a delta from the bank.

        Raises:
            KeyError: the bank has no delta with this name.
            ValueError: the delta is active.
        """
        with self._lock.writing():
            if name == self.active:
                raise ValueError(f"delta {name!r} is active; activate another one or None first")
            del self._deltas[name]
            self._forget(name)

    def activate(self, name: str | None) -> None:
        """Change the model to the target of a delta; with None, to the base.

        Raises:
            KeyError: the bank has no delta with this name.
            StructureMismatch: tensors of the model were replaced after the deltas were decoded.
        """
        with self._lock.writing():
            self._switch(name)

    def restore(self) -> None:
        """Undo a switch that was interrupted. Then the model is again what ``active`` states."""
        with self._lock.writing():
            self._writer.restore()

    def reading(self) -> AbstractContextManager[str | None]:
        """Return a context in which no other thread switches the model. ``with`` returns the name of the active delta.

        Several threads may be in such a context at once. A thread must not switch the model in it.
        """
        return self._lock.reading(lambda: self.active)

    def using(self, name: str | None) -> AbstractContextManager[None]:
        """Return a context that activates a delta. No other thread can enter ``reading`` or ``using`` meanwhile.

        Entering it raises:
            KeyError: the bank has no delta with this name.
        """
        return self._lock.writing(lambda: self._switch(name))

    def _switch(self, name: str | None) -> None:
        if name == self.active:
            return
        if name is not None and name not in self._deltas:
            raise KeyError(f"the bank has no delta {name!r}, only {', '.join(self) or 'none'}")
        if name is not None:
            self._make_resident(name)
        pair = self.active, name
        plan = self._plans.get(pair)
        if plan is None or not plan.is_current():
            found: dict[str, Held] = {}
            steps = _steps(self._patches(self.active, found), self._patches(name, found))
            plan = self._plans[pair] = Plan(steps, found)
        self._writer.write(plan, becomes=name)

    def _patches(self, name: str | None, found: dict[str, Held]) -> list[Patch]:
        """Return the patches of a resident delta, each on the device of its tensor; see ``current_tensor``."""
        if name is None:
            return []
        resident = self._deltas[name]
        resident.patches = [patch.in_step(found) for patch in resident.patches or ()]
        return resident.patches

    def _make_resident(self, name: str) -> None:
        self._deltas.move_to_end(name)
        resident = self._deltas[name]
        if resident.patches is None:
            active = self.active
            try:
                self._switch(None)
                with _opened(resident.source) as opened:
                    self._decode(resident, opened, keep=None)
            except BaseException:
                self._switch(active)
                raise

    def _decode(self, resident: _Resident, delta: Delta, *, keep: str | None) -> None:
        """Decode a delta while the model is the base. Free other deltas if the budget requires it.

        The delta named ``keep`` is not freed. If both together exceed the budget, the new one stays undecoded.
        """
        patches = prepare(delta, self._model, verify=self._verify, names=self._names, undo=False)
        n_bytes = sum(patch.n_bytes for patch in patches)
        if self._budget_bytes is not None:
            if n_bytes > self._budget_bytes:
                raise ValueError(
                    f"the delta takes {n_bytes} bytes decoded, the budget is {self._budget_bytes};"
                    " raise it (budget_bytes)"
                )
            if n_bytes + (self._deltas[keep].n_bytes if keep else 0) > self._budget_bytes:
                return
            self._make_room(self._budget_bytes - n_bytes, keep)
        resident.patches = patches

    def _make_room(self, n_left: int, keep: str | None) -> None:
        for name, other in self._deltas.items():
            if self.resident_bytes <= n_left:
                return
            if name != keep:
                other.patches = None
                self._forget(name)

    def _forget(self, name: str) -> None:
        self._plans = {pair: plan for pair, plan in self._plans.items() if name not in pair}

    def _check_sibling(self, name: str, resident: _Resident) -> None:
        for other_name, other in self._deltas.items():
            problem = _other_base(resident.base, other.base)
            if problem:
                raise ConflictError(
                    f"deltas {name!r} and {other_name!r} were made from different bases: {problem};"
                    " a bank holds deltas of one base"
                )


def _other_base(
    one: Mapping[TensorKey, TensorSpec], other: Mapping[TensorKey, TensorSpec]
) -> str | None:
    """Return how the bases of two deltas differ; None if no difference is known.

    Tensors are matched by file and name. If the other base has no such tensor, they are matched by name only,
    because the same weights may be divided among files in several ways.
    """
    digests: dict[str, set[bytes | None]] = defaultdict(set)
    for (_, name), spec in other.items():
        digests[name].add(spec.digest)
    shared = False
    for key, spec in one.items():
        theirs = {other[key].digest} if key in other else digests.get(key[1])
        if theirs and spec.digest not in theirs:
            return f"tensor {key[1]!r} differs"
        shared = shared or bool(theirs)
    return None if shared or not one or not other else "they have no tensor in common"


@contextmanager
def _opened(source: str | os.PathLike[str] | Delta) -> Iterator[Delta]:
    if isinstance(source, Delta):
        yield source
    else:
        with load(source) as delta:
            yield delta


def _steps(outgoing: Sequence[Patch], incoming: Sequence[Patch]) -> list[Patch]:
    """Return the patches that undo ``outgoing`` and apply ``incoming``.

    If both touch the same positions of a tensor, one patch does both.
    """
    coming = {patch.place.slot.name: patch for patch in incoming}
    going = []
    for patch in outgoing:
        other = coming.get(patch.place.slot.name)
        if other is None or patch.index_digest != other.index_digest:
            going.append(patch.reversed())
        else:
            coming[patch.place.slot.name] = replace(other, before=patch.after)
    return [*going, *coming.values()]
