"""A follower on the ranks of ``torch.distributed`` that divide a model. Rank 0 alone uses the channel.

Rank 0 does what a follower of one process does. What it reads of the model, and writes to it, it tells the other ranks, and
all do it together. So all follow one version, and agree on every error.
"""

from __future__ import annotations

import pickle
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import IO, Any, Literal, TypeAlias

from sparsedelta._typing import AnyPath, Model, Names
from sparsedelta.channel.entry import Entry
from sparsedelta.channel.following import Pursuit, SyncReport
from sparsedelta.channel.model_replica import ModelReplica, Source
from sparsedelta.channel.versions import Versions
from sparsedelta.format.delta import Delta, load
from sparsedelta.live.divided_state import divided_fingerprint, write_divided
from sparsedelta.live.ranks import Ranks, check_same_call, pickled
from sparsedelta.live.wire import RankLost

_MEMORY_BYTES = 32 << 20
Command: TypeAlias = Literal["fingerprint", "patch", "rewrite", "end"]
_NOTHING: tuple[Command, Any] = "end", None  # what rank 0 tells takes its place


@dataclass(frozen=True, slots=True)
class _Outcome:
    """How a call of ``sync`` ends on all ranks.

    Attributes:
        report: what it returns, unless it fails.
        error: what it raises, pickled; None: nothing.
        held: the version that is held from now on.
    """

    report: SyncReport | None
    error: bytes | None
    held: Entry | None


class RankReplica(ModelReplica):
    """A model that ranks divide. Rank 0 calls the methods of ``Replica``; the others are in ``serve`` meanwhile.

    Attributes:
        ranks: all ranks.
    """

    def __init__(
        self, model: Model, ranks: Ranks, *, base: AnyPath | None = None, names: Names = None
    ) -> None:
        super().__init__(model, base=base, names=names, group=ranks)
        self.ranks = ranks

    def tell(self, command: Command, value: Any = None) -> None:
        """Tell the other ranks what comes next."""
        self.ranks.together(lambda: self.ranks.shared((command, value)), interruptible=False)

    def fingerprint(self) -> bytes | None:
        """Return the fingerprint of the model; None if the way it is saved is unknown, or replicas differ."""
        with self.ranks.entered():
            self.tell("fingerprint")
            return super().fingerprint()

    def patch(
        self, deltas: Sequence[Delta], to: Entry, becomes: Callable[[Entry | None], None]
    ) -> None:
        """Change the model by one write of all changed elements; all ranks, or none."""
        with self.ranks.entered():
            self.tell("patch", to)
            self._exchanged(deltas, ExitStack())
            super().patch(deltas, to, becomes)

    def rewrite(
        self,
        source: Source | None,
        later: Sequence[Delta],
        to: Entry,
        becomes: Callable[[Entry | None], None],
    ) -> None:
        """Write all tensors, then the changed elements of later deltas."""
        with self.ranks.entered():
            self.tell("rewrite", to)
            self._exchanged(later, ExitStack())
            super().rewrite(source, later, to, becomes)

    def serve(self, becomes: Callable[[Entry | None], None]) -> _Outcome:
        """Do what rank 0 tells until its call of ``sync`` ends; return how. Called inside ``ranks.entered``.

        Raises:
            RankLost: the connection to a rank was lost.
        """
        while True:
            try:
                command, value = self.ranks.together(
                    lambda: self.ranks.shared(_NOTHING), interruptible=False
                )
                if command == "end":
                    outcome: _Outcome = value
                    return outcome
                self._do(command, value, becomes)
            except RankLost:
                raise
            except BaseException:  # rank 0 has the same error, and says at the end what it means
                continue

    def _do(self, command: Command, to: Any, becomes: Callable[[Entry | None], None]) -> None:
        if command == "fingerprint":
            super().fingerprint()
            return
        with ExitStack() as context:
            deltas = self._exchanged(None, context)
            if command == "patch":
                super().patch(deltas, to, becomes)
            else:
                super().rewrite(None, deltas, to, becomes)

    def _exchanged(self, deltas: Sequence[Delta] | None, context: ExitStack) -> Sequence[Delta]:
        """Send deltas from rank 0; return them on the other ranks, closed with the context."""
        shared = self.ranks.shared

        def send(given: Sequence[Delta]) -> Sequence[Delta]:
            shared(len(given))
            for delta in given:
                for block in delta.blocks():
                    shared(block)
                shared(None)
            return given

        def receive() -> Sequence[Delta]:
            found = list[Delta]()
            for _ in range(shared(0)):
                file = context.enter_context(_temporary_file())
                while (block := shared(b"")) is not None:
                    file.write(block)
                file.seek(0)
                found.append(context.enter_context(load(file)))
            return found

        return self.ranks.together(receive if deltas is None else lambda: send(deltas))

    def _read_fingerprint(self) -> bytes | None:
        return divided_fingerprint(self._model, self.ranks)

    def _write_all(self, source: Source | None) -> None:
        write_divided(source, self._model, self.ranks, names=self._names)


def _temporary_file() -> IO[bytes]:
    return tempfile.SpooledTemporaryFile(max_size=_MEMORY_BYTES)


class RankPursuit:
    """What a follower does on ranks; see ``Pursuit``.

    Args:
        opened: returns what is followed; only rank 0 calls it.
        replica: the model.
    """

    def __init__(self, opened: Callable[[], Versions], replica: RankReplica) -> None:
        self._replica = replica
        self._ranks = ranks = replica.ranks
        self._pursuit = ranks.together(
            lambda: Pursuit(opened(), replica) if ranks.is_first else None
        )
        self._held: Entry | None = None  # on ranks that have no channel

    @property
    def held(self) -> Entry | None:
        """The version that is held; None if it is unknown."""
        return self._pursuit.held if self._pursuit else self._held

    def sync(self, version: int | None) -> SyncReport:
        """Move to a version on all ranks, the latest that rank 0 finds if none is given; see ``Follower.sync``.

        Raises:
            ConflictError: the ranks give different versions.
            RankLost: the connection to a rank was lost.
        """
        with self._ranks.entered():
            check_same_call(self._ranks, "sync", version)
            return self._follow() if self._pursuit is None else self._lead(self._pursuit, version)

    def _lead(self, pursuit: Pursuit, version: int | None) -> SyncReport:
        report = failure = None
        try:
            try:
                # Reading may take long. An interrupt ends it, and is then told to the others.
                with self._ranks.left():
                    report = pursuit.sync(version)
            except RankLost:
                raise
            except BaseException as error:
                failure = error
            error_bytes = None if failure is None else pickled(failure)
            self._replica.tell("end", _Outcome(report, error_bytes, pursuit.held))
        except RankLost:
            pursuit.forget()
            raise
        if report is None:
            raise failure or AssertionError
        return report

    def _follow(self) -> SyncReport:
        try:
            outcome = self._replica.serve(self._becomes)
        except RankLost:
            self._held = None
            raise
        self._held = outcome.held
        if outcome.report is None:
            error: BaseException = pickle.loads(outcome.error or b"")
            raise error
        return outcome.report

    def _becomes(self, entry: Entry | None) -> None:
        self._held = entry
