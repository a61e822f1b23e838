"""``RankPublisher``: adds versions of a model that is divided among ranks to a channel."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sparsedelta._typing import JSON, AnyPath
from sparsedelta.channel.channel import check_outside, open_channel
from sparsedelta.channel.entry import AnchorBase
from sparsedelta.channel.publication import Publication
from sparsedelta.channel.publisher import Background, Publisher, check_model
from sparsedelta.channel.publishing import AnchorRule, Change, Run
from sparsedelta.channel.sources import with_target
from sparsedelta.channel.versions import Versions
from sparsedelta.format.delta import Delta
from sparsedelta.live.homes import Homes
from sparsedelta.live.shards import Shards
from sparsedelta.live.wire import Wire

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class _RankSource:
    """The tensors of all ranks, and what was published of them (``channel.publishing.Source`` and ``Weights``)."""

    homes: Homes

    def is_at(self, target: bytes) -> bool:
        """Return whether what was published has this fingerprint; called before the first version."""
        return self.homes.fingerprint == target

    def capture(self) -> _RankSource:
        """Let all ranks copy what has changed; return this object."""
        self.homes.capture()
        return self

    def change(self) -> tuple[Delta, bytes]:
        """Return the delta to what was captured, and its fingerprint."""
        return with_target(self.homes.change())

    def anchor(self) -> tuple[Delta, bytes, AnchorBase | None]:
        """Return an anchor of what was captured, and its fingerprint."""
        return *with_target(self.homes.anchor()), None

    def advance(self, change: Change) -> None:
        """Move what was published to the target of a change."""
        if not isinstance(change, Delta):
            raise TypeError(f"change is of type {type(change).__name__}, expected a Delta")
        self.homes.advance(change)


class RankPublisher:
    """Adds versions of a model that FSDP2 or tensor parallelism divides among the ranks of ``torch.distributed``.

    Each tensor has a home, a rank that holds it whole in host memory, beside a copy of the last version; a rank is the
    home of its share of the model. Each rank compares what it holds with a copy and sends the changed elements to
    their homes, which encode them in the background. Rank 0 puts the coded bytes together and stores the versions.

    All ranks make one and call its methods at the same time. The model must not change while a method runs.
    """

    def __init__(
        self,
        channel: Versions | AnyPath,
        model: torch.nn.Module,
        *,
        whole: torch.nn.Module | None = None,
        folder: AnyPath | None = None,
        anchor_ratio: float | None = 1.0,
        anchor_every: int | None = None,
    ) -> None:
        """Send each tensor to its home, and compare the model with the head of the channel.

        Args:
            channel: the channel to add versions to; only rank 0 uses it.
            model: a module whose parameters may be DTensors.
            whole: on rank 0 a module in host memory with the same names, which is overwritten. Versions then have
                the names of its checkpoint, and rank 0 is the home of all tensors. None: versions have the names of
                the module's state dict.
            folder: see ``Publisher``; only rank 0 reads it. Without ``whole``, its tensors must have the names of the
                module's state dict.
            anchor_ratio: the same.
            anchor_every: the same.

        Raises:
            StructureMismatch: a tensor is placed otherwise than in shards and replicas, or ``whole`` has others.
            SparseDeltaError: rank 0 has failed; on rank 0 its own error.
        """
        self._wire = Wire()
        self._shards = Shards(model, whole=whole)
        self._publisher: Background | None = None
        self._homes: Homes | None = None
        is_whole = self._wire.from_first(whole is not None)
        if not is_whole:
            self._homes = Homes(self._shards.held, folder=folder)

        def create() -> None:
            if not self._shards.is_first:
                return
            if whole is not None:
                self._publisher = Publisher(
                    channel,
                    whole,
                    folder=folder,
                    anchor_ratio=anchor_ratio,
                    anchor_every=anchor_every,
                )
            elif self._homes and self._homes.layout:
                layout = self._homes.layout
                tensors = {tensor.name: tensor.spec for tensor in layout.tensors.values()}
                with ExitStack() as context:
                    opened = open_channel(channel, context)
                    if folder is not None:
                        check_outside(opened, folder, "folder")
                    rule = AnchorRule(anchor_ratio, anchor_every)
                    run = Run(opened, _RankSource(self._homes), rule, opened.head())
                    check_model(opened, run, tensors, is_folder=layout.is_folder)
                    self._publisher = Background(run, context.pop_all())

        try:
            self._wire.together(create)
        except BaseException:
            if self._homes:
                self._homes.close()
            raise

    def __enter__(self) -> RankPublisher:
        return self

    def __exit__(self, *exc: object) -> None:
        if exc[0] is None:
            self.close()
        elif self._publisher:  # other ranks may have ended
            self._publisher.close()

    def publish(
        self, step: int | None = None, info: Mapping[str, JSON] | None = None
    ) -> Publication | None:
        """Send what has changed to its homes, and begin to add it as a version; see ``Publisher.publish``.

        Returns:
            On rank 0 the publication; None on the others.

        Raises:
            StructureMismatch: the rank holds other elements than before.
            SparseDeltaError: rank 0 has failed; on rank 0 its own error. Call again on all ranks.
        """
        self._shards.update()
        publisher = self._publisher
        return self._wire.together(lambda: publisher.publish(step, info) if publisher else None)

    def close(self) -> None:
        """Wait until the last version is durable.

        Raises:
            SparseDeltaError: it has failed; on rank 0 its own error.
        """
        publisher = self._publisher
        try:
            self._wire.together(lambda: publisher.close() if publisher else None)
        finally:
            if self._homes:
                self._homes.close()
