"""Files in a checkpoint's folder that are not part of it: secrets, caches, editor files, training state."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase

# Globs for one component of a path. If one matches a folder, everything in the folder is left out.
NOT_PART = (
    # may hold secrets or run commands
    ".git", ".hg", ".svn", ".env", ".env.*", ".netrc", ".ssh", ".aws", ".huggingface",
    # caches; `hf download --local-dir` creates .cache
    ".cache", "__pycache__", ".ipynb_checkpoints", ".pytest_cache", ".mypy_cache", ".ruff_cache",
    # created by editors and operating systems
    ".DS_Store", "._*", "Thumbs.db", "desktop.ini", ".idea", ".vscode", "*.swp", "*~",
    # created by transformers' Trainer and accelerate
    "checkpoint-[0-9]*", "runs", "wandb", "optimizer.pt", "optimizer.bin", "scheduler.pt",
    "scheduler.bin", "scaler.pt", "rng_state*.pth", "random_states_*.pkl", "training_args.bin",
    # written by sift_train beside its delta
    "sift.safetensors",
)  # fmt: skip


def matches(path: str, globs: Iterable[str]) -> bool:
    """Return whether a glob matches a relative path; a glob without "/" matches its last component."""
    name = path.rsplit("/", 1)[-1]
    return any(fnmatchcase(path if "/" in glob else name, glob.rstrip("/")) for glob in globs)


def is_weights(path: str, suffixes: str | tuple[str, ...]) -> bool:
    """Return whether a relative path has a suffix of weights, and is not the state of a training."""
    return path.endswith(suffixes) and not matches(path, NOT_PART)


def is_part(include: Sequence[str]) -> Callable[[str], bool]:
    """Return a function that says whether a relative path is part of the checkpoint.

    The function must be called only for paths whose parent folders are part of the checkpoint.

    Args:
        include: globs of files and folders that are part of the checkpoint although ``NOT_PART``
            matches them; see ``matches``. The parent folders of a glob with "/" are part of it, too.
    """
    parents = {
        glob.rsplit("/", depth)[0] for glob in include for depth in range(1, 1 + glob.count("/"))
    }

    def included(path: str) -> bool:
        if not matches(path, NOT_PART):
            return True
        return matches(path, include) or any(fnmatchcase(path, parent) for parent in parents)

    return included
