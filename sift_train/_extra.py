"""Checks on import that the packages of the extra ``train`` are installed."""

from __future__ import annotations

from importlib.util import find_spec

_missing = [
    package
    for package in ("torch", "transformers", "accelerate", "safetensors")
    if find_spec(package) is None
]
if _missing:
    _are, _them = ("is", "it") if len(_missing) == 1 else ("are", "them")
    raise ModuleNotFoundError(
        f"sift_train needs {', '.join(_missing)}, which {_are} not installed; install {_them} with:"
        " pip install 'sparsedelta[train]'",
        name=_missing[0],
    )
