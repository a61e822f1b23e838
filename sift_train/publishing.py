"""Publishes the weights to a channel during a training, every so many steps and after the last one.

A run that resumes continues the channel if its weights are the channel's latest version. Otherwise its first version is a
full one, and followers switch to it. If the store fails, the training continues, and the next version has the changes. If
the last step cannot be published, an error is raised after the training.

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
_FAILURES = (OSError, SparseDeltaError)


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
        self._failed_at: int | None = None  # first step that could not be published since a success
        self._ended_by: Exception | None = None  # a failure that no further call can mend

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
        """Publish the model after a step, if it is due. A failure is logged, and the training continues."""
        self._step = step
        if step % self._every or self._ended_by:
            return
        try:
            _tried(self._publish, _TRIES if self._failed_at is None else 1)
            self._failed_at = None
        except _FAILURES as error:
            if self._failed_at is None:
                self._failed_at = step
                logger.warning(
                    "publishing to '%s' failed at step %d, and the training continues: %s",
                    self._channel.store.name, step, error,
                )  # fmt: skip
            if not _is_of_store(error):
                self._ended_by = error

    def went_back(self, step: int) -> None:
        """Note that the model has the weights of an earlier step again, which ``finish`` publishes."""
        self._step, self._published = step, None

    def finish(self, remedy: str = "the model in memory has the trained weights: save it") -> None:
        """Publish the last step, if it is not published, and wait until it is durable.

        Args:
            remedy: where the trained weights are and how to publish them, a clause of the error.

        Raises:
            OSError, SparseDeltaError: the last step could not be published: the store has failed several times, another
                publisher has added a version (HeadMoved), or the channel was deleted (BadVersion).
        """
        if self._publisher is None:
            return
        try:
            if self._ended_by:
                raise self._ended_by
            _tried(self._finish, _TRIES)
            self._publisher.close()
        except _FAILURES as error:
            step = self._step if self._failed_at is None else self._failed_at
            raise _same_kind(
                error,
                f"the training is complete, but publishing to '{self._channel.store.name}' failed at step {step}:"
                f" {error}; {remedy}",
            ) from error

    @staticmethod
    def _wait(publisher: Publisher) -> None:
        """Wait for the version that is on its way, after the training has failed."""
        try:
            publisher.close()
        except _FAILURES as error:
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


def _tried(work: Callable[[], None], n_tries: int) -> None:
    """Do work again if the store fails; an error may be of the version before."""
    for number in range(1, n_tries + 1):
        try:
            work()
            return
        except _FAILURES as error:
            if not _is_of_store(error) or number == n_tries:
                raise
            logger.warning("publish failed and is tried again: %s", error)


def _is_of_store(error: OSError | SparseDeltaError) -> bool:
    """Return whether a later call may succeed: of the errors of sparsedelta only those of stores are no ValueError."""
    return isinstance(error, OSError) or not isinstance(error, ValueError)


def _same_kind(error: OSError | SparseDeltaError, message: str) -> OSError | SparseDeltaError:
    """Return an error of the same class with another message; of a store's own OSError, an OSError."""
    kind = type(error)
    if isinstance(error, OSError) and kind.__module__ != "builtins":
        return OSError(message)
    return kind(message)
