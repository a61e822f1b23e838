"""Checks on import that the packages of the extra ``train`` are installed."""

from __future__ import annotations

from importlib.util import find_spec

for _package in ("torch", "transformers", "accelerate", "safetensors"):
    if find_spec(_package) is None:
        raise ModuleNotFoundError(
            f"sift_train needs {_package}, which is not installed; install it with:"
            " pip install 'sparsedelta[train]'",
            name=_package,
        )
