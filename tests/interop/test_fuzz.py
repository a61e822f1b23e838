"""Damaged files of every form: each gives an error of this package, or a result; nothing else."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import pytest
from interop.interop_helpers import ADDITIVE, EXACT, plain_pair

import sparsedelta
from sparsedelta.errors import SparseDeltaError

N_DAMAGED = int(os.environ.get("SPARSEDELTA_MUTANTS", 60))
INTERESTING = (0, 1, 0x20, 0x22, 0x2C, 0x30, 0x39, 0x5B, 0x7B, 0x7D, 0x7F, 0x80, 0xFF)


def damaged(content: bytes, draw: random.Random) -> bytes:
    """Return a content with one part changed, removed, repeated or cut off."""
    data = bytearray(content)
    at = draw.randrange(len(data))
    match draw.randrange(5):
        case 0:
            data[at] = draw.choice(INTERESTING)
        case 1:
            data[at] ^= 1 << draw.randrange(8)
        case 2:
            del data[at : at + draw.randrange(1, 9)]
        case 3:
            data[at:at] = data[at : at + draw.randrange(1, 9)]
        case _:
            del data[at:]
    return bytes(data)


@pytest.mark.parametrize("case", [*EXACT, *ADDITIVE], ids=str)
def test_damaged_files(case: tuple[str, dict[str, str]], tmp_path: Path) -> None:
    given = plain_pair(tmp_path)
    whole = tmp_path / "whole"
    sparsedelta.convert(given.delta, whole, base=given.base, write_as=case[0], settings=case[1])
    draw = random.Random(str(case))
    n_refused = 0
    for number in range(N_DAMAGED):
        copy = tmp_path / f"copy-{number}"
        (shutil.copytree if whole.is_dir() else shutil.copy)(whole, copy)
        file = draw.choice(sorted(copy.rglob("*"))) if copy.is_dir() else copy
        file.write_bytes(damaged(file.read_bytes(), draw))
        try:
            sparsedelta.apply(given.base, copy, tmp_path / f"out-{number}")
        except (SparseDeltaError, OSError):
            n_refused += 1
            assert not (tmp_path / f"out-{number}").exists()
    assert n_refused >= N_DAMAGED // 4
