"""Early stopping: when a run has no better evaluation, and the weights of its best one, kept on the CPU."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from sift_train.config import Evaluation, FitConfig
from sift_train.saved import MASTER
from sift_train.sift import SIFT

logger = logging.getLogger(__name__)

_LOSS = re.compile("loss|error|perplexity|ppl", re.IGNORECASE)


class Patience:
    """Keeps what ``SIFT.state_dict`` returns after the best evaluation so far. Without ``patience`` it does nothing.

    Args:
        sift: the SIFT of the run. The shards of a sharded model are not kept.
        config: ``patience`` and ``higher_is_better``.
    """

    def __init__(self, sift: SIFT, config: FitConfig) -> None:
        self._sift = sift
        self._limit = config.patience
        self._sign = 1.0 if config.higher_is_better else -1.0
        self._is_sharded = any(part.shard is not None for part in sift.sparse_mapping.values())
        self._step: int | None = None
        self._state: Mapping[str, Tensor] = {}

    def note(self, evaluations: Sequence[Evaluation]) -> None:
        """Copy the weights if the last evaluation is the best one."""
        if len(evaluations) == 1:
            self._warn_of_losses(evaluations[0])
        is_kept = self._limit is not None and not self._is_sharded
        if is_kept and self._best(evaluations) is evaluations[-1]:
            self._step, self._state = evaluations[-1].step, self._sift.state_dict()

    def is_lost(self, evaluations: Sequence[Evaluation]) -> bool:
        """Return whether none of the last ``patience`` evaluations is better than all before them."""
        if self._limit is None or len(evaluations) <= self._limit:
            return False
        return evaluations.index(self._best(evaluations)) < len(evaluations) - self._limit

    def restore_best(self, evaluations: Sequence[Evaluation], n_done: int) -> int:
        """Give the model the weights of the best evaluation; return the step of the weights that it has then.

        Args:
            evaluations: all of the run.
            n_done: the step of the weights that the model has.
        """
        if self._limit is None or not evaluations:
            return n_done
        best = self._best(evaluations)
        if best.step == n_done:
            return n_done
        if self._step != best.step:
            why = "are not in the checkpoint from which the run resumed"
            logger.warning(
                "the weights after the last step, %d, are kept: those of the best evaluation, after step %d, %s",
                n_done,
                best.step,
                "are divided among ranks" if self._is_sharded else why,
            )
            return n_done
        self._restore()
        logger.info("the weights after step %d are kept, whose evaluation was the best", best.step)
        return best.step

    def for_checkpoint(self) -> dict[str, Any] | None:
        """Return what ``load`` takes; None if no weights are kept."""
        return None if self._step is None else {"step": self._step, "state": dict(self._state)}

    def load(
        self, saved: Mapping[str, Any] | None, evaluations: Sequence[Evaluation], n_done: int
    ) -> None:
        """Continue from what a checkpoint holds.

        Args:
            saved: what ``for_checkpoint`` returned; None also if the run had no patience then.
            evaluations: all before the checkpoint.
            n_done: the step of the weights that the model has now.
        """
        if saved is not None and self._limit is not None:
            self._step, self._state = saved["step"], saved["state"]
        elif evaluations and evaluations[-1].step == n_done:
            self.note(evaluations)

    def _best(self, evaluations: Sequence[Evaluation]) -> Evaluation:
        """Return the first of the best evaluations; NaN is the worst value."""
        return max(evaluations, key=lambda e: (not math.isnan(e.first), self._sign * e.first))

    def _warn_of_losses(self, evaluation: Evaluation) -> None:
        name = next(iter(evaluation.values))
        if self._limit is not None and self._sign > 0 and _LOSS.search(name):
            logger.warning(
                "patience waits for a higher %r, because higher_is_better is True; for a loss, set it to False",
                name,
            )

    def _restore(self) -> None:
        """Restore the state. Components that were chosen later get their original values."""
        late = [
            name
            for name, part in self._sift.sparse_mapping.items()
            if part.is_selected and MASTER + name not in self._state
        ]
        for name in late:
            self._sift.sparse_mapping[name].revert()
        now = self._sift.state_dict() if late else {}
        reverted = {key: held for key, held in now.items() if key.partition(":")[2] in late}
        self._sift.load_state_dict({**reverted, **self._state})
