"""Masks in files of torch.save: views, parameters and devices; other content is refused, and nothing is executed."""

from __future__ import annotations

import pickle
import random
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import sparsedelta
from sparsedelta.errors import CheckpointError, LimitExceeded, SparseDeltaError


def flags(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.3


def masks() -> dict[str, torch.Tensor]:
    """Return masks that lie in storages in many ways."""
    whole = flags(7, 9)
    return {
        "plain": flags(5, 6, seed=1), "cube": flags(2, 3, 4, seed=2), "scalar": torch.tensor(True),
        "empty": flags(0, 4), "transposed": whole.T, "part": whole[2:5, 1:7:2], "same": whole,
        "parameter": torch.nn.Parameter(flags(4, seed=3), requires_grad=False),
    }  # fmt: skip


@pytest.mark.parametrize("kind", [dict, OrderedDict])
def test_every_view_is_read(kind: type[dict[str, torch.Tensor]], tmp_path: Path) -> None:
    expected = masks()
    torch.save(kind(expected), tmp_path / "m.pt")
    found = sparsedelta.read_mask(tmp_path / "m.pt")
    assert list(found) == list(expected)
    for name, mask in found.items():
        assert mask.dtype == np.bool_
        assert mask.shape == tuple(expected[name].shape)
        assert np.array_equal(mask, expected[name].detach().numpy()), name


class Run:
    """A pickle of this creates a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[Path]]:
        return Path.touch, (self.path,)


def test_other_content_is_refused_and_not_executed(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    for value in (
        {"w": flags(3), "x": Run(tmp_path / "ran")}, Run(tmp_path / "ran"), flags(3), [flags(3)], {"w": 3},
        {3: flags(3)}, {"w": torch.ones(3)}, {"w": {"x": flags(3)}}, {"w": flags(3).to_sparse()},
        {"w": flags(1).expand(50)},
    ):  # fmt: skip
        torch.save(value, path)
        with pytest.raises(CheckpointError):
            sparsedelta.read_mask(path)
    assert not (tmp_path / "ran").exists()
    torch.save({"w": flags(3)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match="saved again"):
        sparsedelta.read_mask(path)
    path.write_bytes(pickle.dumps({"w": np.ones(3, bool)}))
    with pytest.raises(CheckpointError, match="not a zip archive"):
        sparsedelta.read_mask(path)


def test_compressed_members_are_refused(tmp_path: Path) -> None:
    """A gigabyte of zeros takes a megabyte in such a member, and torch never writes one."""
    torch.save({"w": torch.zeros(1 << 20, dtype=torch.bool)}, tmp_path / "m.pt")
    with (
        zipfile.ZipFile(tmp_path / "m.pt") as old,
        zipfile.ZipFile(tmp_path / "packed.pt", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with pytest.raises(CheckpointError, match="no stored member"):
        sparsedelta.read_mask(tmp_path / "packed.pt")


def test_masks_that_share_data_take_no_more_memory(tmp_path: Path) -> None:
    mask = flags(1 << 16)
    torch.save({str(n): mask for n in range(8)}, tmp_path / "m.pt")
    found = sparsedelta.read_mask(tmp_path / "m.pt")
    assert all(np.shares_memory(found["0"], other) for other in found.values())
    torch.save({str(n): mask for n in range(3000)}, tmp_path / "m.pt")
    with pytest.raises(LimitExceeded, match="without sharing"):
        sparsedelta.read_mask(tmp_path / "m.pt")


def test_damaged_files(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    torch.save(masks(), path)
    content = path.read_bytes()
    draw = random.Random(0)
    n_refused = 0
    for _ in range(300):
        data = bytearray(content)
        for _ in range(draw.randrange(1, 4)):
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        if draw.random() < 0.2:
            del data[draw.randrange(len(data)) :]
        path.write_bytes(data)
        try:
            sparsedelta.read_mask(path)
        except SparseDeltaError:
            n_refused += 1
    assert n_refused > 100
