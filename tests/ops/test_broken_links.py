"""Weight files that are links to files that do not exist, as in a cache from which something was deleted."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
from helpers import noise, write_sharded

import sparsedelta
from sparsedelta.errors import CheckpointError


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
def test_a_base_whose_weights_are_a_dangling_link_is_not_called_another_base(
    tmp_path: Path,
) -> None:
    weights = noise("F32", 9)
    for name, tensor in (("base", weights), ("target", weights.changed(3))):
        write_sharded(tmp_path / name, [{"v": weights}, {"w": tensor}])
    with sparsedelta.diff(tmp_path / "base", tmp_path / "target") as delta:
        for missing in ((2,), (1, 2)):
            for number in missing:
                shard = tmp_path / "base" / f"model-0000{number}-of-00002.safetensors"
                shard.unlink()
                shard.symlink_to("../blobs/gone")
            for work in (
                lambda: sparsedelta.apply(tmp_path / "base", delta, tmp_path / "out"),
                lambda: sparsedelta.verify(delta, base=tmp_path / "base"),
                lambda: sparsedelta.invert(delta, base=tmp_path / "base"),
            ):
                with pytest.raises(
                    CheckpointError, match=r"is a link to '../blobs/gone', which does not exist"
                ):
                    work()
            shutil.rmtree(tmp_path / "base")
            write_sharded(tmp_path / "base", [{"v": weights}, {"w": weights}])
    for path in (tmp_path / "base").glob("*.safetensors"):
        path.unlink()
        path.symlink_to("../blobs/gone")
    with pytest.raises(CheckpointError, match="which does not exist"):
        sparsedelta.diff(tmp_path / "base", tmp_path / "target")
