"""``diff``: the delta's description of base and target, and its arguments."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3
from helpers import Raw, noise, write, write_file, write_sharded

import sparsedelta
from sparsedelta.format.digests import fingerprint
from sparsedelta.progress import Silent

W, V, U = noise("BF16", 4, 3), noise("F32", 5), noise("I64", 2)


def digest(tensors: dict[str, Raw]) -> bytes:
    return fingerprint((n, t.dtype, t.shape, blake3(t.data).digest()) for n, t in tensors.items())


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    base = write_file(tmp_path / "base.safetensors", {"w": W, "gone": V, "also": U})
    target = write_sharded(tmp_path / "target", [{"v": V}, {"u": U, "w": W.changed(0, 3)}])
    return base, target


def test_description(pair: tuple[Path, Path]) -> None:
    with sparsedelta.diff(*pair, base_id="org/model@4f1e", info={"lr": 0.1}) as delta:
        assert delta.base.id == "org/model@4f1e"
        assert delta.base.fingerprint == digest({"w": W, "gone": V, "also": U})
        assert delta.target.fingerprint == digest({"v": V, "u": U, "w": W.changed(0, 3)})
        assert delta.target.is_folder
        assert [(f.path, f.n_tensors) for f in delta.target.weight_files] == [
            ("model-00001-of-00002.safetensors", 1),
            ("model-00002-of-00002.safetensors", 2),
        ]
        assert [f.path for f in delta.target.side_files] == ["model.safetensors.index.json"]
        assert delta.info == {"lr": 0.1}
        assert [row.name for row in delta.tensors] == ["v", "u", "w", "also", "gone"]
        changes = {row.name: row.change.nnz for row in delta.tensors if row.change}
        assert changes == {"v": 5, "u": 2, "w": 2}
        assert (delta.nnz, delta.numel) == (9, 19)


def test_fingerprint_is_independent_of_sharding(tmp_path: Path) -> None:
    tensors = {"w": W, "v": V}
    one = write_file(tmp_path / "one", tensors, {"format": "pt"})
    other = write_sharded(tmp_path / "other", [{"v": V}, {"w": W}])
    with sparsedelta.diff(one, other) as delta:
        assert delta.base.fingerprint == delta.target.fingerprint == digest(tensors)
        assert delta.nnz == 0


@pytest.mark.parametrize("values", ["xor", "", None])
def test_unknown_value_encoding(values: Any, pair: tuple[Path, Path]) -> None:
    with pytest.raises(ValueError, match="expected one of ulp, target"):
        sparsedelta.diff(*pair, values=values)


@pytest.mark.parametrize(
    "info", [{"a": float("nan")}, {"a": 1 << 63}, {"a": {1, 2}}, {"a": "\ud800"}, {"a": b"x"}]
)
def test_info_must_be_json(info: Any, pair: tuple[Path, Path]) -> None:
    with pytest.raises(ValueError, match="info cannot be recorded"):
        sparsedelta.diff(*pair, info=info)


def test_deep_info_is_refused(pair: tuple[Path, Path]) -> None:
    deep: Any = 0
    for _ in range(70):
        deep = [deep]
    with pytest.raises(ValueError, match="nested"):
        sparsedelta.diff(*pair, info={"a": deep})


def test_missing_checkpoint(pair: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        sparsedelta.diff(pair[0], tmp_path / "none")
    with pytest.raises(FileNotFoundError):
        sparsedelta.diff(tmp_path / "none", pair[0])


def test_progress_adds_up(pair: tuple[Path, Path]) -> None:
    class Recorder(Silent):
        def __init__(self) -> None:
            self.stages: list[tuple[str, int]] = []
            self.total = 0
            self.finished = 0

        def start(self, label: str, n_bytes: int) -> None:
            self.stages.append((label, n_bytes))

        def advance(self, n_bytes: int) -> None:
            self.total += n_bytes

        def finish(self) -> None:
            self.finished += 1

    recorder = Recorder()
    sparsedelta.diff(*pair, progress=recorder).close()
    n_bytes = 2 * sum(len(t.data) for t in (W, V, U))
    assert recorder.stages == [("comparing", n_bytes)]
    assert (recorder.total, recorder.finished) == (n_bytes, 1)


def test_no_file_stays_open(pair: tuple[Path, Path], tmp_path: Path) -> None:
    n_open = len(os.listdir("/dev/fd"))
    with sparsedelta.diff(*pair):
        pass
    write(tmp_path / "target/weights.bin", "x")
    with pytest.raises(sparsedelta.SparseDeltaError):
        sparsedelta.diff(*pair)
    assert len(os.listdir("/dev/fd")) == n_open


def test_spool_folder_is_used_and_left_empty(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sparsedelta.format.spool._MEMORY_BYTES", 1)
    (tmp_path / "spool").mkdir()
    with sparsedelta.diff(*pair, spool_dir=str(tmp_path / "spool")) as delta:
        delta.save(tmp_path / "delta.sd")
    assert not list((tmp_path / "spool").iterdir())
    with pytest.raises(FileNotFoundError):
        sparsedelta.diff(*pair, spool_dir=str(tmp_path / "none"))
