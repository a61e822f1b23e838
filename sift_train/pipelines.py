"""Finds the folder of a pipeline that a model belongs to, and makes the pipeline's folder with the trained model in it.

A pipeline of diffusers is a folder with ``model_index.json`` and one subfolder for each of its models.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from torch import nn

INDEX = "model_index.json"
_CONFIG = "config.json"


def is_pipeline(base: Path) -> bool:
    """Return whether a path is the folder of a pipeline."""
    return (base / INDEX).is_file()


def part_of(model: nn.Module, base: Path, n_equal: Callable[[Path], int]) -> str:
    """Return the subfolder of a pipeline that holds a model.

    Args:
        model: the model.
        base: the pipeline's folder.
        n_equal: returns how many of the model's parameters a subfolder holds with the same values. It is
            needed if the pipeline has several models of this class.

    Raises:
        ValueError: the pipeline has no model of this class, or it is not clear which one it is.
    """
    kind = type(model).__name__
    index = json.loads((base / INDEX).read_text("utf-8")).items()
    classes = {str(n): v[1] for n, v in index if isinstance(v, list) and len(v) == 2}
    found = [name for name, cls in classes.items() if cls == kind and (base / name).is_dir()]
    if not found:
        names = ", ".join(f"{name} ({cls})" for name, cls in classes.items() if cls)
        raise ValueError(f"the pipeline '{base}' has no {kind}, only {names}; give its base")
    if len(found) > 1:
        counts = {name: n_equal(base / name) for name in found}
        most = max(counts.values())
        best = [name for name, n in counts.items() if n == most]
        if len(best) > 1:
            raise ValueError(
                f"the pipeline '{base}' has several models of the class {kind}, {' and '.join(best)}, and it is"
                f" not clear which one is trained; give its own folder as the base, such as '{base / best[0]}'"
            )
        return best[0]
    return found[0]


def copy_rest(base: Path, target: Path, *, left_out: Collection[Path], links: bool) -> None:
    """Fill a pipeline's folder with the files of its base.

    Args:
        base: the pipeline's folder.
        target: the new folder; files that it has already are kept.
        left_out: files of the base that are not copied.
        links: make symbolic links instead of copies.
    """
    for source in sorted(base.rglob("*")):
        place = target / source.relative_to(base)
        if not source.is_file() or source in left_out or place.exists():
            continue
        place.parent.mkdir(parents=True, exist_ok=True)
        if links:
            place.symlink_to(os.path.abspath(source))
        else:
            shutil.copyfile(source, place)


def keep_config(folder: Path, base: Path) -> None:
    """Replace the configuration of a saved model of diffusers by that of its base, if they say the same.

    diffusers writes the path that the model was loaded from into the configuration.
    """
    own, known = folder / _CONFIG, base / _CONFIG
    if own.is_file() and known.is_file():
        now, before = (_settings(path) for path in (own, known))
        if "_diffusers_version" in now and _public(now) == _public(before):
            shutil.copyfile(known, own)


def _settings(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return found


def _public(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if not name.startswith("_")}
