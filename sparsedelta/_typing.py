"""Names of types that several rooms share."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

if TYPE_CHECKING:
    import torch

JSON: TypeAlias = bool | int | float | str | list["JSON"] | dict[str, "JSON"] | None
AnyPath: TypeAlias = str | os.PathLike[str]

# A model in memory, from a delta's names of tensors to the model's (keys: name, or file and name), and what
# is checked before it changes.
Model: TypeAlias = "torch.nn.Module | Mapping[str, torch.Tensor]"
Names: TypeAlias = Mapping[Any, str | None] | Callable[[str], str | None] | None
ModelCheck: TypeAlias = Literal["touched", "full", "none"]
TorchDType: TypeAlias = "torch.dtype | str"
