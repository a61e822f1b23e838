"""Records in ``--run-dir`` the settings and outputs of a run, which ``--resume`` checks.

Without --overwrite, an output is replaced only if it is unchanged since the interrupted run wrote it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

INTERRUPTED, SETTINGS = "interrupted.json", "settings.json"
OF_A_RUN = (
    "template", "max_tokens", "packing", "rate", "targets", "dense", "selection", "lr",
    "weight_decay", "warmup", "schedule", "batch", "micro_batch", "epochs", "steps", "seed",
    "gradient_checkpointing",
)  # fmt: skip


def note_interrupted(options: argparse.Namespace) -> None:
    """Record the outputs of an interrupted run, for ``is_left_by_interrupted``."""
    note = _written(options)
    (options.run_dir / INTERRUPTED).write_text(json.dumps(note, indent=1), "utf-8")


def is_left_by_interrupted(options: argparse.Namespace) -> bool:
    """Return whether all existing outputs are unchanged since the run in ``--run-dir`` wrote them."""
    if options.run_dir is None:
        return False
    path = options.run_dir / INTERRUPTED
    left: dict[str, str] = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    written = _written(options)
    return bool(written) and all(left.get(place) == found for place, found in written.items())


def _written(options: argparse.Namespace) -> dict[str, str]:
    """Return the existing outputs, with data that identifies their content."""
    found = {}
    if options.output.is_file():
        with options.output.open("rb") as file:
            found[str(options.output.resolve())] = hashlib.file_digest(file, "sha256").hexdigest()
    target = getattr(options, "save_target", None)
    if target is not None and target.exists():
        files = sorted(target.iterdir()) if target.is_dir() else [target]
        times = {path.name: path.stat().st_mtime_ns for path in files}  # too large to read
        found[str(target.resolve())] = json.dumps(times)
    return found


def keep_settings(options: argparse.Namespace, n_rows: int) -> None:
    """Record the settings of a new run, or compare them with those of the resumed run.

    Raises:
        ValueError: the settings differ, or the folder has checkpoints and --resume is not set.
    """
    if options.run_dir is None:
        return
    path = options.run_dir / SETTINGS
    settings = {name: getattr(options, name) for name in OF_A_RUN} | {"rows": n_rows}
    if not any(options.run_dir.glob("checkpoint-*")):
        options.run_dir.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(settings, indent=1), "utf-8")
        return
    if not options.resume:
        raise ValueError(
            f"'{options.run_dir}' holds checkpoints of another run; --resume it, or name another --run-dir"
        )
    saved = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    _check_same(saved, settings, options.run_dir)


def _check_same(saved: Mapping[str, Any], settings: Mapping[str, Any], folder: Path) -> None:
    for name, value in settings.items():
        if saved.get(name) != value:
            raise ValueError(
                f"the run saved in '{folder}' has {name} {saved.get(name)!r}, this one {value!r}; resume "
                "with the same settings, or start a new run"
            )
