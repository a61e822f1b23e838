"""``Maker``: checkpoints and their deltas, for the tests of ``stack``."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from helpers import Raw, assert_same_files, write, write_file

import sparsedelta
from sparsedelta import Delta

Files = dict[str, str]


class Maker:
    """Writes checkpoints and makes deltas of them, closed at the end."""

    def __init__(self, path: Path, context: ExitStack) -> None:
        self.path = path
        self.context = context
        self.n_made = 0

    def checkpoint(self, tensors: dict[str, Raw], files: Files | None = None) -> Path:
        self.n_made += 1
        folder = self.path / f"checkpoint-{self.n_made}"
        write_file(folder / "model.safetensors", tensors, {"format": "pt"})
        for name, text in (files or {}).items():
            write(folder / name, text)
        return folder

    def diff(self, base: Path, target: Path, **options: Any) -> Delta:
        return self.context.enter_context(sparsedelta.diff(base, target, **options))

    def stack(self, *deltas: Delta | Path, **options: Any) -> Delta:
        return self.context.enter_context(sparsedelta.stack(*deltas, **options))

    def check(self, delta: Delta, base: Path, target: Path) -> None:
        path, out = self.path / "made.sd", self.path / "out"
        delta.save(path, overwrite=True)
        sparsedelta.apply(base, path, out, overwrite=True)
        assert_same_files(target, out)


def unknown_target(delta: Delta) -> Delta:
    """Return a delta that does not know the digests of what it changes."""
    rows = (
        row if row.is_copied else replace(row, target=row.target.with_digest(None))
        for row in delta.tensors
    )
    return replace(delta, tensors=tuple(rows))
