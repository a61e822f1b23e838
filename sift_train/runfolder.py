"""Writes and reads the checkpoints of a run, one folder per step. Only the newest is kept.

A checkpoint is written completely or not at all. It holds the state of the training, not the base.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sift_train.saved import STATE_NAME, read_state, refuse_other_settings, write_state

_STEP = re.compile(r"step-(\d{8})")
_PARTIAL = ".checkpoint."  # prefix of unfinished checkpoints, which a killed run leaves
TENSORS, PROGRESS, SETTINGS = STATE_NAME, "progress.pt", "settings.json"
SHARDS = "shards"  # instead of the tensors, if the model is sharded


def newest(folder: Path) -> Path | None:
    """Return the newest checkpoint in a run's folder, None if there is none."""
    if not folder.is_dir():
        return None
    return max((path for path in folder.iterdir() if _STEP.fullmatch(path.name)), default=None)


def step_of(checkpoint: Path) -> int:
    """Return the number of steps that a checkpoint has behind it."""
    return int(checkpoint.name.removeprefix("step-"))


def write(
    folder: Path,
    step: int,
    *,
    tensors: Mapping[str, Tensor],
    progress: Mapping[str, Any],
    settings: Mapping[str, Any],
    shards: Path | None = None,
) -> Path:
    """Write a checkpoint, remove all others and unfinished ones, and return its folder.

    ``shards``, a folder on the same file system, is moved into the checkpoint.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step-{step:08d}"
    work = folder / f"{_PARTIAL}{secrets.token_hex(8)}"  # mkdtemp would let only its owner read it
    work.mkdir()
    try:
        write_state(tensors, work / TENSORS)
        torch.save(dict(progress), work / PROGRESS)
        (work / SETTINGS).write_text(json.dumps(settings, indent=1), "utf-8")
        if shards is not None:
            shards.rename(work / SHARDS)
        for path in (path for path in work.rglob("*") if path.is_file()):
            with open(path, "r+b") as file:  # Windows syncs only what is open for writing
                os.fsync(file.fileno())
            # As the umask says; safetensors lets only the owner read.
            path.chmod(work.stat().st_mode & 0o666)
        if final.exists():
            shutil.rmtree(final)
        work.rename(final)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    for path in folder.iterdir():
        if (_STEP.fullmatch(path.name) and path != final) or path.name.startswith(_PARTIAL):
            shutil.rmtree(path)
    return final


def read(checkpoint: Path, settings: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return a checkpoint's tensors and progress.

    Raises:
        ValueError: the checkpoint was written by a run with other settings.
    """
    saved = json.loads((checkpoint / SETTINGS).read_text("utf-8"))
    refuse_other_settings(saved, settings, checkpoint)
    progress: dict[str, Any] = torch.load(checkpoint / PROGRESS, weights_only=True)
    return read_state(checkpoint / TENSORS), progress
