"""Publishes the weights to a channel during a training, every so many steps and after the last one.

A run that resumes continues the channel if its weights are the channel's latest version. Otherwise its first version is a
full one, and followers switch to it. If the store fails, the training continues, and the next version has the changes.

With a SIFT, the trained components are compared with their published bits, and no copy of the model is kept.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

from torch import nn

from sift_train.sift import SIFT
from sparsedelta import Channel, Publisher, SparseDeltaError

logger = logging.getLogger(__name__)
_TRIES = 3


class Publishing:
    """Publishes a model to a channel. At the end of the context the last step is durable.

    Args:
        channel: the path of a folder, or the URL of a store.
        every: steps between two versions.
        folder: a checkpoint of the model, whose other files the versions have. None, a file, or a checkpoint with other tensors:
            versions are single files.
    """

    def __init__(
        self,
        channel: str | PathLike[str],
        every: int,
        folder: str | PathLike[str] | None = None,
    ) -> None:
        self._channel = Channel(channel)
        self._every = every
        self._folder = folder if folder is not None and Path(folder).is_dir() else None
        self._publisher: Publisher | None = None
        self._start: Callable[[], Publisher]
        self._step = 0
        self._published: int | None = None
        self._last: Any = None  # what ``Publisher.publish`` has returned last

    def __enter__(self) -> Publishing:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        try:
            if kind is None:
                self.finish()
            elif self._publisher:
                self._wait(self._publisher)
        finally:
            self._channel.close()

    def start(self, model: nn.Module, step: int, sift: SIFT | None = None) -> None:
        """Compare the model with the channel's latest version.

        Args:
            model: what is published.
            step: number of the steps that it was trained.
            sift: the SIFT that trains the model, its components being chosen. The components that it does not train
                must not change: after a re-selection the next version is a full one. None: any may change, and a copy of the model is kept.
        """
        self._start = partial(_publisher, self._channel, model, sift, self._folder)
        self._publisher = self._start()
        self._step = step
        self._published = step if self._publisher.is_at_head else None

    def after(self, step: int) -> None:
        """Publish the model after a step, if it is due.

        Raises:
            HeadMoved: another publisher has added a version.
        """
        self._step = step
        if step % self._every == 0:
            _tried(self._publish)

    def finish(self) -> None:
        """Publish the last step, if it is not published, and wait until it is durable.

        Raises:
            OSError, RemoteError: the store has failed several times.
        """
        if self._publisher:
            _tried(self._finish)
            self._publisher.close()

    @staticmethod
    def _wait(publisher: Publisher) -> None:
        """Wait for the version that is on its way, after the training has failed."""
        try:
            publisher.close()
        except (OSError, SparseDeltaError) as error:
            logger.warning("the last version was not published: %s", error)

    def _publish(self) -> None:
        if self._publisher:
            self._published = None
            try:
                self._last = self._publisher.publish(self._step)
            except SparseDeltaError as error:
                if error.code != "base_mismatch":
                    raise
                self._restart(error)
            self._published = self._step

    def _restart(self, error: SparseDeltaError) -> None:
        """Publish in full: something else than the training has changed the model."""
        logger.warning("the next version is a full one: %s", error)
        self._publisher = self._start()
        self._last = self._publisher.publish(self._step)

    def _finish(self) -> None:
        if self._published != self._step:
            self._publish()
        if self._last:
            self._published = None  # unless it is durable
            try:
                self._last.result()
            except SparseDeltaError as error:
                if error.code != "base_mismatch":
                    raise
                self._restart(error)
                self._last.result()
            self._published = self._step


def _publisher(
    channel: Channel, model: nn.Module, sift: SIFT | None, folder: str | PathLike[str] | None
) -> Publisher:
    """Return a publisher; that of a SIFT compares the components that are trained now."""
    trained = None
    if sift is not None:
        trained = {
            name: None if part.trains_all else part.flat_index
            for name, part in sift.sparse_mapping.items()
        }
    if folder is not None:
        try:
            return Publisher(channel, model, folder=folder, trained=trained)
        except SparseDeltaError as error:
            if error.code != "structure_mismatch":  # such as a new head
                raise
            logger.info("versions are single files: %s", error)
    return Publisher(channel, model, trained=trained)


def _tried(work: Callable[[], None]) -> None:
    """Do work again if the store fails; an error may be of the version before."""
    for number in range(1, _TRIES + 1):
        try:
            work()
            return
        except (OSError, SparseDeltaError) as error:
            is_failure = isinstance(error, OSError) or error.code == "remote"
            if not is_failure or number == _TRIES:
                raise
            logger.warning("publish failed and is tried again: %s", error)
