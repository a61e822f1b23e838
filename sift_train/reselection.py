"""``Reselection``: when a training moves its choice of components, and by which rules; presets by name."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer

from sift_train.known import check_integer, settings_checked
from sift_train.rules import Rule, Selection, find_rule

if TYPE_CHECKING:
    from sift_train.sift import SIFT

logger = logging.getLogger(__name__)

DROPS = ("change", "moment", "random", "score")
DROPPED = ("revert", "keep")
DECREASES = ("linear", "constant")


def check_move(*, share: Any, drop: str, grow: Selection, dropped: str) -> Rule:
    """Return the rule of ``grow``, after a check of the settings of one re-selection.

    Raises:
        ValueError: a setting is out of range.
    """
    check_share("share", share)
    if drop not in DROPS:
        raise ValueError(f"drop is {drop!r}; choose one of {', '.join(DROPS)}")
    if dropped not in DROPPED:
        raise ValueError(f"dropped is {dropped!r}; choose one of {', '.join(DROPPED)}")
    rule = find_rule(grow)
    if rule is None:
        raise ValueError("grow is a mask or a delta; give a rule, which can rank all components")
    return rule


def needs_gradients(grow: Selection) -> bool:
    """Return whether a rule ranks by gradients."""
    rule = find_rule(grow)
    return rule is not None and rule.from_gradient is not None


def check_share(name: str, value: Any) -> None:
    """Check a setting from 0 to 1.

    Raises:
        ValueError: it is no such number.
    """
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} is {value!r}; it must be a number from 0 to 1")


@settings_checked
@dataclass(frozen=True, kw_only=True)
class Reselection:
    """Settings of the re-selections of a training.

    At each one, some trained components are dropped, and as many others are grown, which means that they are trained
    from then on. Optimizer states stay with the components that stay, and are zero for grown ones, of which torch's Adam and
    AdamW count the steps from then on.

    Attributes:
        every: optimizer steps between two re-selections.
        share: share of the trained components that the first one may replace, 0 to 1; at least one if it is above 0.
        decrease: the share decreases to zero at ``until`` (``"linear"``), or stays ``"constant"``.
        until: share of all steps after which the choice stays, 0 to 1.
        drop: which components are dropped: those with the smallest ``"change"``, |trained - original|; those
            with the smallest first ``"moment"`` of the optimizer; ``"random"`` ones; or those with the smallest
            ``"score"`` by the rule of ``grow``, which are trained on if no other component has a larger score.
        grow: the rule that ranks the components that are not trained: a rule's name, a ``Rule``, or a function of weight
            and gradient.
        dropped: ``"revert"``: dropped components get their original value back; ``"keep"``: they keep the trained one, which
            the delta holds.

    Raises:
        ValueError: a setting is out of range.
    """

    every: int
    share: float = 0.2
    decrease: str = "linear"
    until: float = 0.75
    drop: str = "change"
    grow: Selection = "random"
    dropped: str = "revert"

    def __post_init__(self) -> None:
        check_integer("every", self.every, least=1)
        check_share("until", self.until)
        if self.decrease not in DECREASES:
            raise ValueError(f"decrease is {self.decrease!r}; choose one of {', '.join(DECREASES)}")
        check_move(share=self.share, drop=self.drop, grow=self.grow, dropped=self.dropped)

    def share_after(self, step: int, n_steps: int) -> float:
        """Return the share to replace after a number of steps; 0 if no re-selection is due."""
        end = self.until * n_steps
        if step == 0 or step % self.every or step >= n_steps or step > end:
            return 0.0
        return self.share * (1 - step / end if self.decrease == "linear" else 1)

    def warn_if_never(self, n_steps: int) -> None:
        """Log a warning if a run of this many steps has no re-selection."""
        if self.share and not self.share_after(self.every, n_steps):
            until = (
                ""
                if self.until == 1
                else f", and until {self.until:g} ends them at step {self.until * n_steps:g}"
            )
            logger.warning(
                "the choice will never move: reselection has every %d, and the run has %d steps%s; lower every",
                self.every,
                n_steps,
                until,
            )

    def applied(
        self, sift: SIFT, optimizer: Optimizer, share: float
    ) -> AbstractContextManager[None]:
        """Return ``sift.reselecting`` with these rules and a share that ``share_after`` has returned."""
        return sift.reselecting(
            optimizer, share=share, drop=self.drop, grow=self.grow, dropped=self.dropped
        )


PRESETS: Mapping[str, Reselection] = MappingProxyType(
    {
        # LIFT (arXiv 2506.00772): the mask is made anew; what was trained stays in the model.
        "lift": Reselection(
            every=200,
            share=1.0,
            decrease="constant",
            until=1.0,
            drop="score",
            grow="principal",
            dropped="keep",
        ),
        # SpIEL (arXiv 2401.16405), with accumulated gradients.
        "spiel": Reselection(every=20, share=0.2, until=1.0, grow="accumulated"),
    }
)


def find_reselection(given: Any) -> Reselection | None:
    """Return the settings of a preset's name or a mapping; ``None`` and a ``Reselection`` are returned as they are.

    Raises:
        ValueError: it is none of these, no preset has the name, or a setting is unknown or out of range.
    """
    if given is None or isinstance(given, Reselection):
        return given
    if isinstance(given, Mapping):
        try:
            return Reselection(**given)
        except (TypeError, ValueError) as error:
            raise ValueError(f"reselection: {error}") from error
    if isinstance(given, str) and given in PRESETS:
        return PRESETS[given]
    raise ValueError(
        f"reselection is {given!r}; give a Reselection, its settings, or one of {', '.join(PRESETS)}"
    )
