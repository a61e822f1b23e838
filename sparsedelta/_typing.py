"""Type aliases that several packages share."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

if TYPE_CHECKING:
    import torch

JSON: TypeAlias = bool | int | float | str | list["JSON"] | dict[str, "JSON"] | None
AnyPath: TypeAlias = str | os.PathLike[str]

Model: TypeAlias = "torch.nn.Module | Mapping[str, torch.Tensor]"  # in memory
# Maps tensor names of a delta to names in a model. Keys are a name, or a pair of file and name.
Names: TypeAlias = Mapping[Any, str | None] | Callable[[str], str | None] | None
ModelCheck: TypeAlias = Literal["touched", "full", "none"]  # what is checked before a model changes
TorchDType: TypeAlias = "torch.dtype | str"
