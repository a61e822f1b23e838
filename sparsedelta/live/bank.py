"""``DeltaBank``: several deltas of one base, for one model in memory. Deltas are decoded once and switched in place.

While no thread holds the lock for writing, the model is the base, or the target of the active delta. After a switch
that failed half-way, only ``restore`` is possible.
"""

from __future__ import annotations

import os
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace

from sparsedelta._typing import Model, ModelCheck, Names
from sparsedelta.errors import ConflictError
from sparsedelta.format.delta import Delta, load
from sparsedelta.format.digests import base_tensors
from sparsedelta.format.records import TensorKey, TensorSpec
from sparsedelta.live.held import Held
from sparsedelta.live.inplace import prepare
from sparsedelta.live.patch import Patch, Plan, Writer
from sparsedelta.live.ranks import check_same_call, group_of
from sparsedelta.live.rwlock import SharedLock


@dataclass(slots=True)
class _Resident:
    """One delta of the bank. If ``patches`` is None, it is decoded again when it is activated.

    Attributes:
        source: where the delta is.
        base: the tensors that it was made from.
        patches: the decoded delta, or None.
        n_bytes: memory of the decoded delta; on ranks that divide the model, the largest one, the same on all.
    """

    source: str | os.PathLike[str] | Delta
    base: Mapping[TensorKey, TensorSpec]
    patches: list[Patch] | None = None
    n_bytes: int = 0


class DeltaBank:
    """A model in memory, and deltas of its weights. At most one delta is active.

    A switch writes the touched elements of the old delta and of the new one. It reads no tensor. Threads that use
    the model while others switch must use it inside ``reading``.

    A switch that fails or is interrupted is undone. If undoing it fails too, for example after more interrupts, every
    method that uses the model raises ``HalfWritten``, a ``PartlyApplied``, until ``restore`` has succeeded.

    If the model is divided among ranks (FSDP2, tensor parallelism), all ranks make a bank and call its methods in the same
    order, with the same arguments. Each writes what it holds; all switch, or none.

    Args:
        model: a ``torch.nn.Module`` or a state dict that holds the base.
        budget_bytes: limit for the memory of decoded deltas. Each touched element takes 4 bytes and two
            values. The deltas that were not used for the longest time are freed; they are decoded again when
            they are activated. None: no limit. Of a divided model: of the rank that needs the most.
        verify: how each delta is checked against the model when it is decoded; see
            ``Delta.apply_``.
        names: see ``Delta.apply_``.

    Raises:
        ConflictError: the ranks give different arguments.
    """

    def __init__(
        self,
        model: Model,
        *,
        budget_bytes: int | None = None,
        verify: ModelCheck = "touched",
        names: Names = None,
    ) -> None:
        self._group = group_of(model)
        with self._group.entered():
            check_same_call(self._group, "DeltaBank", budget_bytes, verify)
        self._model = model
        self._budget_bytes = budget_bytes
        self._verify: ModelCheck = verify
        self._names = names
        self._lock = SharedLock()
        self._deltas: OrderedDict[str, _Resident] = OrderedDict()  # the last used one is last
        self._writer = Writer(group=self._group)
        # By what the model holds before and after; without those of deltas that are freed or removed.
        self._plans: dict[tuple[str | None, str | None], Plan] = {}

    def __repr__(self) -> str:
        return f"<DeltaBank of {type(self._model).__name__}: {sorted(self._deltas)}, active: {self.active!r}>"

    @property
    def active(self) -> str | None:
        """The name of the active delta; None if the model is the base."""
        return self._writer.holds

    @property
    def resident_bytes(self) -> int:
        """Memory that the decoded deltas take, in bytes; of a divided model, on this rank."""
        patches = (patch for one in self._deltas.values() for patch in one.patches or ())
        return sum(patch.n_bytes for patch in patches)

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
            ConflictError: the delta was made from another base than the deltas in the bank; or the ranks do not make
                the same call, as for all methods.
            ValueError: the name is taken, or the delta alone exceeds the budget.
            MismatchError, FormatError: see ``Delta.apply_``.
        """
        with self._lock.writing(), self._group.entered():
            check_same_call(self._group, "add", name)
            if name in self._deltas:
                raise ValueError(f"the bank has a delta {name!r} already; remove it first")
            with ExitStack() as context:
                opened, resident = self._group.together(lambda: self._found(name, delta, context))
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
        with self._lock.writing(), self._group.entered():
            check_same_call(self._group, "remove", name)
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
            self._activate(name)

    def restore(self) -> None:
        """Undo a switch that was interrupted. Then the model is again what ``active`` states."""
        with self._lock.writing(), self._group.entered():
            check_same_call(self._group, "restore")
            self._writer.restore()

    def reading(self) -> AbstractContextManager[str | None]:
        """Return a context in which no other thread switches the model. ``with`` returns the name of the active delta.

        Several threads may be in such a context at once. A thread must not switch the model in it: it would wait for itself.
        """
        return self._lock.reading(lambda: self.active)

    def using(self, name: str | None) -> AbstractContextManager[None]:
        """Return a context that activates a delta, which stays active. Nothing can enter ``reading`` or ``using`` meanwhile: leave it first, also in the same thread.

        Entering it raises:
            KeyError: the bank has no delta with this name.
        """
        return self._lock.writing(lambda: self._activate(name))

    def _activate(self, name: str | None) -> None:
        with self._group.entered():
            check_same_call(self._group, "activate", name)
            self._switch(name)

    def _switch(self, name: str | None) -> None:
        if name == self.active:
            return
        if name is not None and name not in self._deltas:
            raise KeyError(f"the bank has no delta {name!r}, only {', '.join(self) or 'none'}")
        if name is not None:
            self._make_resident(name)
        pair = self.active, name
        plan = self._group.together(lambda: self._plan(*pair))
        self._writer.write(plan, becomes=name)

    def _plan(self, active: str | None, name: str | None) -> Plan:
        """Return how to switch from a resident delta to another one."""
        plan = self._plans.get((active, name))
        if plan is None or not plan.is_current():
            found: dict[str, Held] = {}
            steps = _steps(self._patches(active, found), self._patches(name, found))
            plan = self._plans[active, name] = Plan(steps, found)
        return plan

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
                with ExitStack() as context:
                    source = _opened(resident.source)
                    opened = self._group.together(lambda: context.enter_context(source))
                    self._decode(resident, opened, keep=None)
            except BaseException:
                self._switch(active)
                raise

    def _found(
        self, name: str, source: str | os.PathLike[str] | Delta, context: ExitStack
    ) -> tuple[Delta, _Resident]:
        """Return an opened delta, which is closed with the context, and its place in the bank."""
        opened = context.enter_context(_opened(source))
        resident = _Resident(source, base_tensors(opened.tensors))
        self._check_sibling(name, resident)
        return opened, resident

    def _decode(self, resident: _Resident, delta: Delta, *, keep: str | None) -> None:
        """Decode a delta while the model is the base. Free other deltas if the budget requires it.

        The delta named ``keep`` is not freed. If both together exceed the budget, the new one stays undecoded.
        """
        group = self._group
        patches = prepare(
            delta, self._model, verify=self._verify, names=self._names, undo=False, group=group
        )
        own = sum(patch.n_bytes for patch in patches)
        n_bytes = max(group.together(lambda: group.gathered(own)))
        if self._budget_bytes is not None:
            if n_bytes > self._budget_bytes:
                raise ValueError(
                    f"the delta takes {n_bytes} bytes decoded, the budget is {self._budget_bytes};"
                    " raise it (budget_bytes)"
                )
            if n_bytes + (self._deltas[keep].n_bytes if keep else 0) > self._budget_bytes:
                return
            self._make_room(self._budget_bytes - n_bytes, keep)
        resident.patches, resident.n_bytes = patches, n_bytes

    def _make_room(self, n_left: int, keep: str | None) -> None:
        for name, other in self._deltas.items():
            if sum(one.n_bytes for one in self._deltas.values()) <= n_left:
                return
            if name != keep:
                other.patches, other.n_bytes = None, 0
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
