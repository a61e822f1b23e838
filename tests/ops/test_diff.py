"""``diff``: the delta's description of base and target, and its arguments."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3
from helpers import UNKNOWN_BITS, Raw, noise, roundtrip, write, write_file, write_sharded

import sparsedelta
from sparsedelta.dtypes import DTYPES
from sparsedelta.format.digests import fingerprint
from sparsedelta.format.records import TensorSpec
from sparsedelta.progress import Silent

W, V, U = noise("BF16", 4, 3), noise("F32", 5), noise("I64", 2)
V2, U2 = noise("F32", 5, seed=2), noise("I64", 2, seed=2)


def digest(tensors: dict[str, Raw]) -> bytes:
    """Return the fingerprint of tensors."""
    return fingerprint(
        (n, TensorSpec(DTYPES[t.dtype], t.shape, blake3(t.data).digest()[:16]))
        for n, t in tensors.items()
    )


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    base = write_file(tmp_path / "base.safetensors", {"w": W, "gone": V, "also": U})
    target = write_sharded(tmp_path / "target", [{"v": V2}, {"u": U2, "w": W.changed(0, 3)}])
    return base, target


def test_description(pair: tuple[Path, Path]) -> None:
    with sparsedelta.diff(*pair, base_id="org/model@4f1e", info={"lr": 0.1}) as delta:
        assert delta.base.id == "org/model@4f1e"
        assert delta.base.n_unused == 2
        assert delta.base_fingerprint == digest({"w": W})  # of the others nothing is used
        assert delta.target_fingerprint == digest({"v": V2, "u": U2, "w": W.changed(0, 3)})
        assert delta.target.is_folder
        assert [f.path for f in delta.target.weight_files] == [
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
        ]
        assert [f.path for f in delta.target.side_files] == ["model.safetensors.index.json"]
        assert delta.info == {"lr": 0.1}
        assert [row.name for row in delta.tensors] == ["v", "u", "w"]
        assert [row.nnz for row in delta.tensors] == [5, 2, 2]
        assert [row.base and row.base.key for row in delta.tensors] == [
            None, None, ("base.safetensors", "w"),
        ]  # fmt: skip
        assert (delta.nnz, delta.numel) == (9, 19)


def test_fingerprint_is_independent_of_sharding(tmp_path: Path) -> None:
    tensors = {"w": W, "v": V}
    one = write_file(tmp_path / "one", tensors, {"format": "pt"})
    other = write_sharded(tmp_path / "other", [{"v": V}, {"w": W}])
    with sparsedelta.diff(one, other) as delta:
        assert delta.base_fingerprint == delta.target_fingerprint == digest(tensors)
        assert delta.nnz == 0
        assert all(row.is_copied for row in delta.tensors)


def test_unknown_dtypes_pass_through(tmp_path: Path) -> None:
    """A dtype that no release knows is compared by bytes and comes out as it was."""
    before = {name: noise(name, 8, 3) for name in UNKNOWN_BITS}
    after = {name: tensor.changed(0, 7) for name, tensor in before.items()}
    grown = Raw("X24", (9, 3), after["X24"].data + b"123456789")
    target = {**after, "X24": grown, "new": noise("X8_NEW", 5), "empty": noise("X24", 0)}
    (tmp_path / "scratch").mkdir()
    for values in ("ulp", "target"):
        delta = roundtrip(
            write_file(tmp_path / "base", before),
            write_file(tmp_path / "target", target),
            tmp_path / "scratch",
            values=values,
        )
        rows = {row.name: row for row in delta.tensors}
        assert {name: row.nnz for name, row in rows.items()} == {
            "X24": 2 + 9, "X4": 2, "X8_NEW": 2, "new": 5, "empty": 0,
        }  # fmt: skip
        assert rows["X24"].keep == 72
        sparsedelta.verify(delta, base=tmp_path / "base", target=tmp_path / "target")
        shutil.rmtree(tmp_path / "scratch")
        (tmp_path / "scratch").mkdir()


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


def test_info_must_be_a_dict(pair: tuple[Path, Path]) -> None:
    text: Any = "loss"
    with pytest.raises(ValueError, match="info is 'loss', expected a dict"):
        sparsedelta.diff(*pair, info=text)


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
    n_bytes = sum(len(t.data) for t in (W, W, V2, U2))  # "gone" and "also" are not read
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
