"""The models that a pipeline consists of, and the folders of a checkpoint that their tensors are in.

Each model of a pipeline is saved in a folder of its own. So a tensor's folder says which model it belongs to.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sparsedelta._typing import Model
from sparsedelta.format.delta import Delta

if TYPE_CHECKING:
    import torch

_PIPELINE_INDEX = "model_index.json"  # names the models of a pipeline
# A module of sentence-transformers, such as `2_Dense`; and one of a Router, such as `query_0_Dense`.
_NUMBERED = re.compile(r"(?:.*/)?(?:(?P<route>[^/]+)_)?(?P<number>\d+)_[^/_]+$")


@dataclass(frozen=True, slots=True)
class Part:
    """A model in another one.

    Attributes:
        path: its name in the other one; empty if it is the model itself.
        module: a module or a state dict.
    """

    path: str
    module: Model


class _Components:
    """The models of a pipeline as the children of a module. They are looked up at each use, since they may be replaced."""

    def __init__(self, pipeline: Any) -> None:
        self._pipeline = pipeline

    @property
    def _modules(self) -> _Components:
        return self

    def get(self, name: str) -> torch.nn.Module | None:
        """Return a model by its name."""
        found: torch.nn.Module | None = getattr(self._pipeline, name, None)
        return found


def components_of(model: object) -> dict[str, torch.nn.Module] | None:
    """Return the models of a pipeline of diffusers by name; None for any other object."""
    import torch

    if isinstance(model, torch.nn.Module | Mapping):
        return None
    components = getattr(model, "components", None)
    if not isinstance(components, Mapping):
        return None
    return {n: part for n, part in components.items() if isinstance(part, torch.nn.Module)}


def is_of_pipeline(delta: Delta) -> bool:
    """Return whether the target of a delta is a pipeline of diffusers."""
    return any(file.path == _PIPELINE_INDEX for file in delta.target.side_files)


def holder_of(model: Any) -> Any:
    """Return the object in which tensors are looked up by their full names."""
    return model if components_of(model) is None else _Components(model)


def folder_of(file: str) -> str:
    """Return the folder of a file in a checkpoint; empty for a file at the top."""
    return file.rpartition("/")[0]


def parts_by_folder(model: Any, folders: Collection[str]) -> dict[str, Part] | None:
    """Return the parts of a model by the folder in which each is saved; None if the model is saved as one.

    Args:
        model: a pipeline of diffusers, a model of sentence-transformers, or any other model.
        folders: all folders of the checkpoint that hold tensors.
    """
    components = components_of(model)
    if components is not None:
        return {name: Part(name, part) for name, part in components.items()}
    if not any(
        base.__module__.startswith("sentence_transformers.") for base in type(model).__mro__
    ):
        return None
    paths = {folder: _path_in(model, folder) for folder in folders}
    if not any(paths[folder] for folder in folders if folder):
        return None
    return {folder: Part(path, model.get_submodule(path)) for folder, path in paths.items() if path}


def _path_in(model: torch.nn.Module, folder: str) -> str | None:
    """Return the name of the module of a SentenceTransformer that is saved in a folder; None if there is none."""
    names = [name for name, _ in model.named_children()]
    if not folder:
        return names[0]
    found = _NUMBERED.match(folder)
    if found is None:
        return None
    number = int(found["number"])
    if found["route"] is None:
        return names[number] if number < len(names) else None
    inside = f"sub_modules.{found['route']}.{number}"
    modules = dict(model.named_modules())
    return next((path for name in names if (path := f"{name}.{inside}") in modules), None)


def choose_folder(
    folders: Collection[str], n_fitting: Callable[[str], int], holds: Callable[[str], bool]
) -> list[str]:
    """Return the folders of a pipeline's checkpoint that a model may have been loaded from.

    Args:
        folders: the folders that hold tensors.
        n_fitting: returns how many tensors of a folder are in the model with their dtype and shape; 0 if the
            model cannot be that of the folder.
        holds: returns whether the model has the contents of a folder's tensors.
    """
    counts = {folder: n_fitting(folder) for folder in folders}
    most = max(counts.values(), default=0)
    best = sorted(folder for folder, n in counts.items() if n == most and n)
    held = [folder for folder in best if holds(folder)] if len(best) > 1 else best
    return held or best
