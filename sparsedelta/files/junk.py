"""Files that lie in a checkpoint's folder and are no part of it: secrets, caches, litter, the state of training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase

# Globs for one component of a path. A folder that matches is left out with all that is in it.
NOT_PART = (
    # may hold secrets, or run commands
    ".git", ".hg", ".svn", ".env", ".env.*", ".netrc", ".ssh", ".aws", ".huggingface",
    # caches, among them what `hf download --local-dir` leaves
    ".cache", "__pycache__", ".ipynb_checkpoints", ".pytest_cache", ".mypy_cache", ".ruff_cache",
    # of editors and operating systems
    ".DS_Store", "._*", "Thumbs.db", "desktop.ini", ".idea", ".vscode", "*.swp", "*~",
    # of transformers' Trainer and accelerate
    "checkpoint-[0-9]*", "runs", "wandb", "optimizer.pt", "optimizer.bin", "scheduler.pt",
    "scheduler.bin", "scaler.pt", "rng_state*.pth", "random_states_*.pkl",
)  # fmt: skip


def matches(path: str, globs: Iterable[str]) -> bool:
    """Return whether a glob matches a relative path, or, for a glob without "/", its last component."""
    name = path.rsplit("/", 1)[-1]
    return any(fnmatchcase(path if "/" in glob else name, glob.rstrip("/")) for glob in globs)


def is_part(include: Sequence[str]) -> Callable[[str], bool]:
    """Return what tells whether a path, whose folders are part of the checkpoint, is part of it too.

    Args:
        include: globs of files and folders that are part of it all the same; see ``matches``. A folder
            on the way to what a glob with "/" names is part of it, too.
    """
    ways = {
        glob.rsplit("/", depth)[0] for glob in include for depth in range(1, 1 + glob.count("/"))
    }

    def included(path: str) -> bool:
        if not matches(path, NOT_PART):
            return True
        return matches(path, include) or any(fnmatchcase(path, way) for way in ways)

    return included
