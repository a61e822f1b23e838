"""The inner loops of the codecs, compiled where the package was built with a C compiler (``_native.c``).

Where ``native`` is None numpy does the same work: the same bytes, the same refusals, more slowly. Callers
hold both ways side by side, and numpy's is the reference. ``SPARSEDELTA_KERNELS=numpy`` in the environment
leaves the compiled ones out.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

_VERSION = 1  # of the functions: a module of another one was built from other source


def _load() -> ModuleType | None:
    try:
        module = import_module(f"{__name__}._native")
    except ImportError:
        return None
    return module if module.VERSION == _VERSION else None


native = _load()


def in_use() -> str:
    """Return what does the work: ``"compiled"`` or ``"numpy"``."""
    return "compiled" if native else "numpy"
