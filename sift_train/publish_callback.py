"""``PublishCallback``: publishes the model of a ``transformers.Trainer`` to a channel."""

from __future__ import annotations

from os import PathLike
from typing import Any

from transformers import TrainerCallback

from sift_train.publishing import Publishing
from sift_train.sift import SIFT
from sift_train.trainer_groups import check_open


class PublishCallback(TrainerCallback):
    """Publishes the model of a Trainer to a channel, every so many steps and after the last one.

    It works with any Trainer, and with ``SiftCallback`` and ``SiftTrainerMixin``. A resumed run continues the channel if its
    weights are the channel's latest version; otherwise its first version is a full one.

    Example:
        >>> Trainer(model, args, train_dataset=data, callbacks=[PublishCallback("channel/", every=10)])

    Args:
        channel: the path of a folder, or the URL of a store.
        every: optimizer steps between two versions.
        sift: the SIFT that trains the Trainer's model, if one does. Then no copy of the model is kept: only the trained
            components are compared and published. They must be chosen when the training begins. After a re-selection the
            next version is a full one.
    """

    def __init__(
        self, channel: str | PathLike[str], *, every: int = 1, sift: SIFT | None = None
    ) -> None:
        if every < 1:
            raise ValueError(f"every is {every}, expected at least 1")
        if sift is not None:
            check_open(sift)
        self._publishing = Publishing(channel, every)
        self._sift = sift

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Compare the model with the channel's latest version."""
        if state.is_world_process_zero:
            self._publishing.start(given["model"], state.global_step, self._sift)

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Publish the model, if this step is due."""
        if state.is_world_process_zero:
            self._publishing.after(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Publish the last step, and wait until it is durable."""
        self._publishing.finish()
