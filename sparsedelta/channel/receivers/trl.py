"""A weight transfer of TRL that publishes to a channel (``WeightTransferProtocol`` of TRL's ``AsyncGRPOTrainer``)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from sparsedelta._typing import AnyPath, Model
from sparsedelta.channel.entry import Entry
from sparsedelta.channel.publisher import Publisher
from sparsedelta.channel.versions import Versions
from sparsedelta.errors import StructureMismatch
from sparsedelta.live.bits import integer_view

if TYPE_CHECKING:
    import torch


class ChannelTransfer:
    """Publishes a version each time that TRL sends weights; pass it as ``AsyncGRPOTrainer(weight_transfer=…)``.

    Not safe for use from several threads.
    """

    def __init__(
        self,
        channel: Versions | AnyPath,
        *,
        model: Model | None = None,
        notify: Callable[[Entry], object] | None = None,
        pause: Callable[[], object] | None = None,
        resume: Callable[[], object] | None = None,
        anchor_ratio: float | None = 1.0,
        anchor_every: int | None = None,
        anchor_base: AnyPath | None = None,
        anchor_base_id: str | None = None,
    ) -> None:
        """Store the arguments; nothing is read yet.

        Args:
            channel: the channel to add versions to.
            model: the model that TRL trains, if this process holds all of it and it has no adapters. Versions then
                have the names of its checkpoint. None: versions hold the tensors that TRL sends, under the names
                of the module; this takes one more copy of the weights in host memory.
            notify: called with the entry of each version when it is durable, such as to let engines load it. The
                trainer waits for it. None: the version is stored in the background.
            pause: called by TRL before weights are sent, such as to pause an engine.
            resume: called by TRL afterwards.
            anchor_ratio: see ``Publisher``.
            anchor_every: the same.
            anchor_base: the same.
            anchor_base_id: the same.
        """
        self._channel = channel
        self._model = model
        self._sent: dict[str, torch.Tensor] = {}
        self._notify, self._pause, self._resume = notify, pause, resume
        self._anchors: Any = {
            "anchor_ratio": anchor_ratio,
            "anchor_every": anchor_every,
            "anchor_base": anchor_base,
            "anchor_base_id": anchor_base_id,
        }
        self._publisher: Publisher | None = None
        self._n_sent = 0

    def init_weight_transfer(self) -> None:
        """Do nothing: the publisher starts when the first weights are sent."""

    def pause(self) -> None:
        """Call ``pause``, if it was given."""
        if self._pause:
            self._pause()

    def send_weights(self, iterator: Iterator[tuple[str, torch.Tensor]]) -> None:
        """Publish the weights as a version.

        The step of the version is the number of the call, from 0.

        Args:
            iterator: pairs of name and tensor; all of them are taken, because other ranks take part.

        Raises:
            StructureMismatch: other tensors are sent than the first time.
            HeadMoved, OSError, RemoteError: see ``Publisher.publish``.
        """
        self._take(iterator)
        if self._publisher is None:
            model = self._sent if self._model is None else self._model
            self._publisher = Publisher(self._channel, model, **self._anchors)
        publication = self._publisher.publish(self._n_sent)
        self._n_sent += 1
        if self._notify:
            self._notify(publication.result())

    def resume(self) -> None:
        """Call ``resume``, if it was given."""
        if self._resume:
            self._resume()

    def destroy(self) -> None:
        """Wait until the last version is durable, and release the copies.

        Raises:
            HeadMoved, OSError, RemoteError: the last version has failed.
        """
        publisher, self._publisher = self._publisher, None
        if publisher:
            publisher.close()
        self._sent = {}

    def _take(self, iterator: Iterator[tuple[str, torch.Tensor]]) -> None:
        names = set()
        for name, tensor in iterator:
            if self._model is not None:
                continue
            names.add(name)
            if self._publisher is None:
                bits = integer_view(tensor).to("cpu", copy=True).contiguous()
                self._sent[name] = bits.view(tensor.dtype)
            else:
                integer_view(self._kept(name, tensor)).copy_(integer_view(tensor))
        missing = self._sent.keys() - names
        if missing:
            raise StructureMismatch(
                f"tensor {min(missing)!r} was sent before and is not sent now; make a new transfer",
                tensor=min(missing),
            )

    def _kept(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        kept = self._sent.get(name)
        if kept is None or kept.shape != tensor.shape or kept.dtype != tensor.dtype:
            raise StructureMismatch(
                f"tensor {name!r} is sent as {tensor.dtype} {list(tensor.shape)}, and was not sent like this"
                " before; make a new transfer",
                tensor=name,
            )
        return kept
