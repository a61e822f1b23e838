"""Deltas in bytes and in open files: same result as by path, read on demand, and the file stays open."""

from __future__ import annotations

import io
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from helpers import assert_same_files, noise, write_file

import sparsedelta
from sparsedelta import Delta
from sparsedelta.errors import BadMagic, Corrupt, Truncated
from sparsedelta.stores.stream import Stream


@pytest.fixture
def data(tmp_path: Path) -> bytes:
    """Return the bytes of a delta from a base to a target, both in ``tmp_path``."""
    tensors = {name: noise("BF16", 40, 40, seed=name) for name in "abc"}
    changed = {n: t.changed(*range(0, 3200, 9)) for n, t in tensors.items()}
    write_file(tmp_path / "base", tensors)
    write_file(tmp_path / "target", changed)
    with sparsedelta.diff(tmp_path / "base", tmp_path / "target", info={"step": 1}) as delta:
        delta.save(tmp_path / "d.sd")
        assert delta.to_bytes() == (tmp_path / "d.sd").read_bytes()
        return delta.to_bytes()


def test_bytes_come_back_and_apply(data: bytes, tmp_path: Path) -> None:
    with Delta.from_bytes(data) as delta:
        assert delta.to_bytes() == data
        assert delta.info == {"step": 1}
        sparsedelta.apply(tmp_path / "base", delta, tmp_path / "out")
    assert_same_files(tmp_path / "target", tmp_path / "out")


def test_a_delta_by_path_gives_its_file(data: bytes, tmp_path: Path) -> None:
    with sparsedelta.load(tmp_path / "d.sd") as delta:
        assert delta.to_bytes() == data


@pytest.mark.parametrize("kind", ["file", "unbuffered", "bytes", "spooled"])
def test_open_files(kind: str, data: bytes, tmp_path: Path) -> None:
    if kind == "bytes":
        file: object = io.BytesIO(data)
    elif kind == "spooled":
        file = tempfile.SpooledTemporaryFile(max_size=10)  # noqa: SIM115
        file.write(data)
    else:
        file = open(tmp_path / "d.sd", "rb", buffering=0 if kind == "unbuffered" else -1)  # noqa: SIM115
    with sparsedelta.load(file) as delta:  # type: ignore[arg-type]
        sparsedelta.apply(tmp_path / "base", delta, tmp_path / "out")
        assert delta.to_bytes() == data
    assert not file.closed  # type: ignore[attr-defined]
    file.close()  # type: ignore[attr-defined]
    assert_same_files(tmp_path / "target", tmp_path / "out")


class Stuttering(io.BytesIO):
    """A file that returns a few bytes at a time, as a file on a network may."""

    def read(self, size: int | None = -1, /) -> bytes:
        return super().read(min(size or 0, 7))


def test_short_reads(data: bytes) -> None:
    with sparsedelta.load(Stuttering(data)) as delta:
        assert delta.to_bytes() == data


def test_threads_share_one_file() -> None:
    content = bytes(range(256)) * 64
    stream = Stream(io.BytesIO(content))
    assert stream.n_bytes == len(content)
    with ThreadPoolExecutor(8) as pool:
        parts = [*pool.map(lambda at: stream.read(at, 13), range(0, len(content), 13))]
    assert b"".join(parts) == content
    assert stream.read(len(content), 1) == b""


def test_messages_name_the_file(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "short.sd").write_bytes(data[:-1])
    with open(tmp_path / "short.sd", "rb") as file, pytest.raises(Truncated, match=r"short\.sd"):
        sparsedelta.load(file)
    with pytest.raises(Truncated, match="<BytesIO>"):
        Delta.from_bytes(data[:-1])


def test_wrong_bytes(data: bytes) -> None:
    with pytest.raises(Corrupt):
        Delta.from_bytes(data + b"\0")
    with pytest.raises(BadMagic):
        Delta.from_bytes(bytes(300))
    for wrong in (data, bytearray(data), memoryview(data)):
        with pytest.raises(TypeError, match=r"use Delta\.from_bytes"):
            sparsedelta.load(wrong)  # type: ignore[arg-type]
