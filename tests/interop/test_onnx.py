"""Deltas between ONNX models: the exact files come back, with weights in the file and beside it."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import onnx
import pytest
from helpers import assert_same_files
from onnx import TensorProto, helper, numpy_helper

import sparsedelta
from sparsedelta.errors import CheckpointError, SparseDeltaError
from sparsedelta.interop.regions import RegionFiles


def model(seed: int) -> onnx.ModelProto:
    """Return a model of weights in several dtypes; another seed changes a few values."""
    draw = np.random.default_rng(0)
    first = draw.normal(size=(40, 30)).astype(np.float32)
    first[seed, :3] += 1
    weights = [
        numpy_helper.from_array(first, "first.weight"),
        numpy_helper.from_array(draw.normal(size=(30, 20)).astype(np.float16), "second.weight"),
        numpy_helper.from_array(draw.integers(-9, 9, (100,)), "table"),
        numpy_helper.from_array(np.zeros(3, np.float32), "small"),
        helper.make_tensor("numbers", TensorProto.FLOAT, [50], draw.normal(size=50)),  # not raw
        helper.make_tensor("half", TensorProto.INT4, [200], bytes(100), raw=True),
    ]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [40, 30]) for n in ("x", "y")]
    node = helper.make_node("Add", ["x", "first.weight"], ["y"])
    graph = helper.make_graph([node], "graph", ends[:1], ends[1:], weights)
    return helper.make_model(graph, producer_name=f"seed {seed}")


def test_one_file_comes_back(tmp_path: Path) -> None:
    base, target, out = (tmp_path / f"{name}.onnx" for name in ("base", "target", "out"))
    onnx.save(model(0), base)
    onnx.save(model(1), target)
    report = sparsedelta.convert(target, tmp_path / "x.sd", base=base)
    assert (report.n_changed, report.nnz) == (1, 6)
    sparsedelta.convert(tmp_path / "x.sd", out, base=base)
    assert out.read_bytes() == target.read_bytes()
    with RegionFiles(target) as opened:
        assert {t.name: (t.spec.dtype.name, t.spec.shape) for t in opened.tensors.values()} == {
            "first.weight": ("F32", (40, 30)),
            "second.weight": ("F16", (30, 20)),
            "table": ("I64", (100,)),
            "half": ("U8", (100,)),
        }


def test_weights_beside_the_model_come_back(tmp_path: Path) -> None:
    for seed, name in enumerate(("base", "target")):
        (tmp_path / name / "onnx").mkdir(parents=True)
        (tmp_path / name / "config.json").write_text("{}")
        onnx.save(
            model(seed), tmp_path / name / "onnx" / "model.onnx",
            save_as_external_data=True, location="model.onnx_data", size_threshold=0,
        )  # fmt: skip
    base, target, out = (tmp_path / name / "onnx" for name in ("base", "target", "out"))
    report = sparsedelta.convert(target, tmp_path / "x.sd", base=base)
    assert report.nnz == 6
    out.parent.mkdir()
    sparsedelta.convert(tmp_path / "x.sd", out, base=base, write_as="original")
    assert_same_files(target, out)
    with pytest.raises(CheckpointError, match="give the folder of both"):
        RegionFiles(base / "model.onnx")


def test_damaged_files_are_refused_or_copied_exactly(tmp_path: Path) -> None:
    base, damaged, out = (tmp_path / f"{name}.onnx" for name in ("base", "damaged", "out"))
    onnx.save(model(0), base)
    content = base.read_bytes()
    draw = random.Random(0)
    n_copied = 0
    for number in range(60):
        data = bytearray(content)
        if number % 3:
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
            data[draw.randrange(60)] ^= 1 << draw.randrange(8)
        else:
            del data[draw.randrange(len(data)) :]
        damaged.write_bytes(data)
        try:
            sparsedelta.convert(damaged, tmp_path / "x.sd", base=base, overwrite=True)
        except SparseDeltaError:
            continue
        sparsedelta.convert(tmp_path / "x.sd", out, base=base, overwrite=True)
        assert out.read_bytes() == bytes(data)
        n_copied += 1
    assert 5 <= n_copied < 60


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\x7f",
        b"\x3b",
        b"\x80" * 20,
        b"\x3a\x03\x2a\x05\x00",
    ],
)
def test_other_bytes_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.onnx"
    path.write_bytes(content)
    with pytest.raises(CheckpointError):
        RegionFiles(path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
        (b"\xef\xbb\xbf<!doctype html>\n<html>", "a web page"),
    ],
)
def test_what_stands_in_place_of_a_model_is_named(
    tmp_path: Path, content: bytes, said: str
) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=said):
        sparsedelta.convert(path, tmp_path / "d.sd", base=path)
