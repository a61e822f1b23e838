"""``RankPublisher``: adds versions of a model that is divided among ranks to a channel."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, TypeVar

from sparsedelta._typing import JSON, AnyPath
from sparsedelta.channel.publication import Publication
from sparsedelta.channel.publisher import Publisher
from sparsedelta.channel.versions import Versions
from sparsedelta.errors import SparseDeltaError
from sparsedelta.live.shards import Shards, shared

if TYPE_CHECKING:
    import torch

_Result = TypeVar("_Result")


class RankPublisher:
    """Adds versions of a model that FSDP2 or tensor parallelism divides among the ranks of ``torch.distributed``.

    Each rank compares what it holds with a copy in its host memory and sends the changed elements to rank 0. Rank 0
    holds the whole model in host memory, and its copy of the last version; it encodes and stores the versions.

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
        """Send the model to rank 0, one tensor at a time, and compare it there with the head of the channel.

        Args:
            channel: the channel to add versions to; only rank 0 uses it.
            model: a module whose parameters may be DTensors.
            whole: on rank 0 a module in host memory with the same names, which is overwritten. Versions then have
                the names of its checkpoint. None: they have the names of the module's state dict.
            folder: see ``Publisher``.
            anchor_ratio: the same.
            anchor_every: the same.

        Raises:
            StructureMismatch: a tensor is placed otherwise than in shards and replicas, or ``whole`` has others.
            SparseDeltaError: rank 0 has failed; on rank 0 its own error.
        """
        self._shards = Shards(model, whole=whole)
        self._publisher: Publisher | None = None

        def create() -> None:
            held = self._shards.whole
            if held is not None:
                self._publisher = Publisher(
                    channel,
                    held,
                    folder=folder,
                    anchor_ratio=anchor_ratio,
                    anchor_every=anchor_every,
                )

        _together(create)

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
        """Send what has changed to rank 0, and begin to add it as a version there; see ``Publisher.publish``.

        Returns:
            On rank 0 the publication; None on the others.

        Raises:
            StructureMismatch: the rank holds other elements than before.
            SparseDeltaError: rank 0 has failed; on rank 0 its own error. Call again on all ranks.
        """
        self._shards.update()
        publisher = self._publisher
        return _together(lambda: publisher.publish(step, info) if publisher else None)

    def close(self) -> None:
        """Wait until the last version is durable.

        Raises:
            SparseDeltaError: it has failed; on rank 0 its own error.
        """
        publisher = self._publisher
        _together(lambda: publisher.close() if publisher else None)


def _together(work: Callable[[], _Result]) -> _Result | None:
    """Do work that only rank 0 has, and return its result; if it fails there, raise on all ranks."""
    result: _Result | None = None
    failure: Exception | None = None
    try:
        result = work()
    except Exception as error:
        failure = error
    told = shared(None if failure is None else f"rank 0 has failed: {failure}")
    if failure is not None:
        raise failure
    if told:
        raise SparseDeltaError(told)
    return result
