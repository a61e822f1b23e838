"""A weight transfer engine of vLLM that follows a channel. vLLM finds it by the plugin entry point of this package.

It has the methods of vLLM's ``WeightTransferEngine`` without deriving from it, so that this module imports no vLLM.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from sparsedelta.channel.channel import Channel
from sparsedelta.channel.receivers.mirror import Changed, Mirror, find_wrong

if TYPE_CHECKING:
    import torch

_log = logging.getLogger(__name__)

BACKEND = "sparsedelta"
_Info = TypeVar("_Info")


@dataclass
class InitInfo:
    """What ``/init_weight_transfer_engine`` is given.

    Attributes:
        channel: path or URL of the channel.
        checkpoint: folder of a checkpoint with the model's tensors, on the engine's machine; None: the one that
            vLLM has loaded.
        base: the checkpoint that the anchors are deltas on, if the publisher uses one.
    """

    channel: str
    checkpoint: str | None = None
    base: str | None = None


@dataclass
class UpdateInfo:
    """What ``/update_weights`` is given.

    Attributes:
        version: number of the version. It is required, so that all workers load the same one.
    """

    version: int


def register() -> None:
    """Register the engine with vLLM. vLLM calls this in each of its processes; an error here would end it."""
    try:
        from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
    except ImportError as error:
        _log.warning("this vLLM has no weight transfer engines that can be registered: %s", error)
        return
    try:
        WeightTransferEngineFactory.register_engine(BACKEND, __name__, "ChannelEngine")
    except ValueError:
        _log.debug("vLLM has loaded this plugin already")


class ChannelEngine:
    """Loads versions of a channel into a worker of vLLM (``vllm.distributed.weight_transfer.base``).

    Each worker holds a copy of the checkpoint in host memory. vLLM's loaders place the tensors, so fused and sharded
    parameters need no map. Pause vLLM during an update: see docs/engines.md.
    """

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo
    supports_draft_weight_update = False
    defers_processing = False

    def __init__(
        self, config: Any, vllm_config: Any, device: torch.device, model: torch.nn.Module
    ) -> None:
        """Store the arguments, which are those of vLLM; nothing is read yet."""
        self.config = config
        self.vllm_config = vllm_config
        self.model_config = vllm_config.model_config
        self.device = device
        self.model = model
        self._channel: Channel | None = None
        self._mirror: Mirror | None = None

    @property
    def version(self) -> int | None:
        """The version that the worker has; None if it is not known."""
        return self._mirror.version if self._mirror else None

    def parse_init_info(self, init_dict: dict[str, Any]) -> InitInfo:
        """Return the typed form of ``init_info``. Raises ValueError if a member is wrong or missing."""
        return _parsed(InitInfo, "init_info", init_dict)

    def parse_update_info(self, update_dict: dict[str, Any]) -> UpdateInfo:
        """Return the typed form of ``update_info``. Raises ValueError if a member is wrong or missing."""
        return _parsed(UpdateInfo, "update_info", update_dict)

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        """Open the channel and read the checkpoint into host memory.

        Raises:
            CheckpointError: the checkpoint cannot be read.
            ValueError: vLLM has loaded a repository and no folder, and no checkpoint is given.
        """
        place = init_info.checkpoint or self.model_config.model
        if not Path(place).is_dir():
            raise ValueError(
                f"'{place}' is not a folder; give the folder of the checkpoint that vLLM has loaded"
                ' (init_info: {"checkpoint": …})'
            )
        self.shutdown()
        self._channel = Channel(init_info.channel)
        self._mirror = Mirror(self._channel, place, base=init_info.base)

    def start_weight_update(self) -> None:
        """Do nothing: a version is loaded as a whole in ``receive_weights``."""

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Load the version that ``update_info`` names; see ``receive_weights``."""
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: UpdateInfo) -> None:
        """Load a version into the model; see ``Mirror.deliver`` for the errors.

        Raises:
            RuntimeError: ``init_transfer_engine`` was not called.
        """
        if self._mirror is None:
            raise RuntimeError("the weight transfer is not initialized; call init_transfer_engine")
        self._mirror.deliver(
            update_info.version,
            whole=self._load_whole,
            changed=self._load,
            check=lambda changed: find_wrong(self.model, changed, self.device),
        )

    def finish_weight_update(self) -> None:
        """Do nothing; see ``start_weight_update``."""

    def drain_pending(self) -> None:
        """Do nothing: updates are not deferred."""

    def reset_weight_update_target(self) -> None:
        """Do nothing: the target is always the worker's model."""

    def shutdown(self) -> None:
        """Close the channel and release the copy in host memory."""
        channel, self._channel, self._mirror = self._channel, None, None
        if channel:
            channel.close()

    def _load_whole(self, tensors: Mapping[str, torch.Tensor]) -> None:
        from vllm.model_executor.model_loader.reload import (
            finalize_layerwise_reload,
            initialize_layerwise_reload,
        )

        initialize_layerwise_reload(self.model)
        load: Any = self.model.load_weights
        load((name, tensor.to(self.device)) for name, tensor in tensors.items())
        finalize_layerwise_reload(self.model, self.model_config)

    def _load(self, changed: Sequence[Changed]) -> None:
        from vllm.model_executor.model_loader.checkpoint_weight_patch import (
            CheckpointWeightPatch,
            load_checkpoint_weight_patches,
        )

        for one in changed:  # vLLM checks this too, but only on the device
            if one.has_nan or not one.tensor.dtype.is_floating_point:
                raise ValueError(f"vLLM's patches cannot hold the change of tensor {one.name!r}")
        load_checkpoint_weight_patches(
            self.model,
            [
                CheckpointWeightPatch(
                    one.name,
                    tuple(one.tensor.shape),
                    one.tensor.dtype,
                    one.values.to(self.device),
                    one.index.to(self.device),
                )
                for one in changed
            ],
            validate_unique_indices=False,
        )


def _parsed(cls: type[_Info], what: str, members: dict[str, Any]) -> _Info:
    try:
        return cls(**members)
    except TypeError as error:
        raise ValueError(f"invalid {what} for the backend {BACKEND}: {error}") from error
