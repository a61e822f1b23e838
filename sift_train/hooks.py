"""``BeforeUse``: the hook that a SIFT puts on its model, and that no copy of the model keeps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from sift_train.sift import SIFT


class BeforeUse:
    """Calls ``SIFT.before_use`` before a forward pass and before the state dict is taken.

    In a pickled model, such as ``torch.save`` writes, the hook has no effect, since no SIFT trains
    that model.
    """

    def __init__(self, sift: SIFT) -> None:
        # Not a decorator: it imports the compiler, which takes seconds and which only a training needs.
        self._before_use: Any = torch.compiler.disable(sift.before_use)

    def __call__(self, *_: Any) -> None:
        """Call ``SIFT.before_use``; torch gives arguments that are not needed."""
        self._before_use()

    def __reduce__(self) -> tuple[Any, ...]:
        return _no_hook, ()


def _do_nothing(*_: Any) -> None:
    pass


def _no_hook() -> Any:
    return _do_nothing
