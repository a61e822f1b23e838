"""Checks that the packages of an example are installed, before the example imports them."""

from __future__ import annotations

import sys
from importlib.util import find_spec

TRAINING = ("torch", "transformers", "accelerate", "safetensors")
TRAIN = "'.[train]'"  # what pip installs from a clone


def need(install: str, *packages: str) -> None:
    """End the program with one sentence if a package is missing.

    Args:
        install: what pip installs, as words of the command line.
        packages: names of modules.
    """
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        names = ", ".join(missing)
        sys.exit(
            f"error: this example needs {names}; run, in the folder of the clone: pip install {install}"
        )
