"""Counts on CPU tensors the launches and the waits of the host that a GPU would have."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

WAITS = (
    "_local_scalar_dense", "nonzero", "bincount", "equal.default", "masked_select", "unique", "histc",
)  # fmt: skip
VIEWS = (
    "view", "reshape", "detach", "alias", "slice", "expand", "t.default", "transpose", "split",
    "unsqueeze", "squeeze", "select.int", "_unsafe_view", "as_strided", "permute", "unbind",
    "lift_fresh",
)  # fmt: skip


class Counted(TorchDispatchMode):
    """Counts operations inside its context.

    Attributes:
        launches: count by operation; operations that only create a view do not count.
        waits: count by operation. Copies to the host do not count, since a CPU has none.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.launches: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = str(func)
        if not any(f"aten.{view}" in name for view in VIEWS):
            self.launches[name] += 1
        by_mask = "index.Tensor" in name and any(
            isinstance(each, Tensor) and each.dtype.itemsize == 1 for each in args[1] or ()
        )
        if by_mask or any(wait in name for wait in WAITS):
            self.waits[name] += 1
        return func(*args, **(kwargs or {}))
