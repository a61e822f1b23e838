"""The inner loops of the codecs in C (``_native.c``), where the package was built with a C compiler.

``native`` is the compiled module, or None. Each function that has a compiled loop also has the numpy code
beside it. The numpy code is the reference, and runs where ``native`` is None: it writes the same bytes and
refuses the same streams, but takes longer.

The environment variable ``SPARSEDELTA_KERNELS`` overrides the choice: ``numpy`` does not load the compiled
module, ``compiled`` fails if it cannot be loaded.
"""

from __future__ import annotations

import os
from importlib import import_module
from types import ModuleType

_VARIABLE = "SPARSEDELTA_KERNELS"
_VERSION = 5  # version of the functions' arguments; it must equal that of the compiled module


def _load() -> ModuleType | None:
    wanted = os.environ.get(_VARIABLE, "")
    if wanted not in ("", "compiled", "numpy"):
        raise ValueError(f"{_VARIABLE} is {wanted!r}; set it to compiled or numpy, or unset it")
    if wanted == "numpy":
        return None
    try:
        module = import_module(f"{__name__}._native")
        if module.VERSION != _VERSION:
            raise ImportError(f"{module.__file__} was built from other source; build it again")
    except ImportError as error:
        if wanted:
            raise ValueError(
                f"{_VARIABLE} is {wanted!r}, but the compiled kernels cannot be loaded: {error}"
            ) from error
        return None
    return module


native = _load()


def in_use() -> str:
    """Return ``"compiled"`` or ``"numpy"``: which code runs the inner loops."""
    return "compiled" if native else "numpy"
