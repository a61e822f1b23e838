"""Type aliases that several packages share."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

if TYPE_CHECKING:
    import torch

JSON: TypeAlias = bool | int | float | str | list["JSON"] | dict[str, "JSON"] | None
AnyPath: TypeAlias = str | os.PathLike[str]


class Pipeline(Protocol):
    """Several models that are used together, such as a pipeline of diffusers."""

    @property
    def components(self) -> Mapping[str, Any]:
        """The models and other components by name."""


Model: TypeAlias = "torch.nn.Module | Mapping[str, torch.Tensor] | Pipeline"  # in memory
# Maps tensor names of a delta to names in a model. Keys are a name, or a pair of file and name.
Names: TypeAlias = Mapping[Any, str | None] | Callable[[str], str | None] | None
ModelCheck: TypeAlias = Literal["touched", "full", "none"]  # what is checked before a model changes
TorchDType: TypeAlias = "torch.dtype | str"
