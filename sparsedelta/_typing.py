"""Type aliases and protocols that several packages share."""

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


class Future(Protocol):
    """The result of a submitted call, once it is there."""

    def result(self) -> Any:
        """Wait for the call; return its result or raise its error."""


class Executor(Protocol):
    """Runs calls elsewhere: an executor of ``concurrent.futures``, or anything with this method.

    Functions, arguments and results are pickled, unless the executor runs threads. The workers must see the same
    files by the same absolute paths. ``cancel`` of a future is used if it exists.
    """

    def submit(self, fn: Callable[..., Any], /, *args: Any) -> Future:
        """Start ``fn(*args)`` and return its future."""


Model: TypeAlias = "torch.nn.Module | Mapping[str, torch.Tensor] | Pipeline"  # in memory
# Maps tensor names of a delta to names in a model. Keys are a name, or a pair of file and name.
Names: TypeAlias = Mapping[Any, str | None] | Callable[[str], str | None] | None
ModelCheck: TypeAlias = Literal["touched", "full", "none"]  # what is checked before a model changes
TorchDType: TypeAlias = "torch.dtype | str"
