"""The folder that slime and miles let SGLang pull: written from a channel, applied by other code than this package's."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
import zstandard
from channel.weights import is_at, save

import sparsedelta
from sparsedelta.channel.follower import Follower
from sparsedelta.channel.objects import fetch
from sparsedelta.channel.publisher import publish_checkpoint
from sparsedelta.channel.receivers import pulled
from sparsedelta.channel.receivers.pulled import PulledFolder
from sparsedelta.errors import Behind, StructureMismatch

# A file ``local_checkpoint.py`` of slime's patch for SGLang (docker/patch/latest/sglang-pull_weights.patch).
REAL = os.environ.get("SPARSEDELTA_TEST_LOCAL_CHECKPOINT")


def tensors(path: Path) -> dict[str, tuple[int, int]]:
    """Return where the data of each tensor begins and ends in a safetensors file."""
    raw = path.read_bytes()
    start = 8 + struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8:start])
    header.pop("__metadata__", None)
    places = {name: one["data_offsets"] for name, one in header.items()}
    return {name: (start + begin, start + end) for name, (begin, end) in places.items()}


def pull(local: str, base: str, source: str, version: int) -> None:
    """Bring a checkpoint of one file to a version, as slime's page for `/pull_weights` describes it."""
    held, root = Path(local), Path(source)
    marker = held / ".weight_sync" / "version"
    marker.parent.mkdir(parents=True, exist_ok=True)
    applied = int(marker.read_text()) if marker.exists() else -1
    index = "model.safetensors.index.json"

    def metadata(number: int) -> dict[str, str]:
        place = root / f"weight_v{number:06d}"
        assert place.is_dir()
        found = json.loads((place / index).read_text()) if (place / index).exists() else {}
        return dict(found.get("metadata", {}))

    first = version
    while first > max(applied, 0) and "delta_encoding" in metadata(first):
        first -= 1
    if first > applied:
        full = root / f"weight_v{first:06d}" if first else Path(base)
        for path in full.iterdir():
            shutil.copy2(path, held / path.name)
        marker.write_text(str(first))
    for number in range(max(first, applied) + 1, version + 1):
        told = metadata(number)
        assert int(told["base_version"]) == number - 1
        assert told["compression_format"] == "zstd"
        apply_file(held / "model.safetensors", root / f"weight_v{number:06d}", told)
        marker.write_text(str(number))


def apply_file(held: Path, version: Path, told: dict[str, str]) -> None:
    data = np.frombuffer(held.read_bytes(), np.uint8).copy()
    for path in version.glob("*.safetensors"):
        raw = path.read_bytes()
        sums = json.loads(raw[8 : 8 + struct.unpack("<Q", raw[:8])[0]])["__metadata__"]
        for name, (begin, end) in tensors(path).items():
            first, last = tensors(held)[name]
            change = zstandard.ZstdDecompressor().decompress(raw[begin:end])
            if told["delta_encoding"] == "xor":
                data[first:last] ^= np.frombuffer(change, np.uint8)
            else:
                n = int.from_bytes(change[:4], "little")
                where = np.frombuffer(change[4 : 4 + 4 * n], "<u4")
                data[first + where] = np.frombuffer(change[4 + 4 * n :], np.uint8)
            assert told["checksum_format"] == "xxh3-128"
            assert sums[name] == xxhash.xxh3_128(data[first:last].tobytes()).hexdigest()
    held.write_bytes(data.tobytes())


@pytest.fixture(params=["as described", "real"])
def puller(request: pytest.FixtureRequest) -> Any:
    """Return the function that an engine pulls with: that of slime's patch if it is here, or our own reading of it."""
    if request.param == "as described":
        return pull
    if REAL is None:
        pytest.skip("set SPARSEDELTA_TEST_LOCAL_CHECKPOINT to slime's local_checkpoint.py")
    spec = importlib.util.spec_from_file_location("local_checkpoint", REAL)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.pull


class Published:
    """A channel whose version v is the checkpoint after step v."""

    def __init__(self, root: Path, *, anchor_every: int | None = None) -> None:
        self.root, self.version, self.anchor_every = root, 0, anchor_every
        self.channel = sparsedelta.Channel(root / "channel")

    def publish(self) -> None:
        self.version += 1
        before = self.root / f"step{self.version - 1}"
        publish_checkpoint(
            self.channel,
            save(self.root / f"step{self.version}", self.version, same_config=True),
            base=before if before.exists() else None,
            anchor_every=self.anchor_every,
            anchor_ratio=None,
        )


@pytest.mark.parametrize("encoding", ["xor", "overwrite"])
def test_engines_pull_what_is_published(puller: Any, encoding: str, tmp_path: Path) -> None:
    published, source = Published(tmp_path), tmp_path / "source"
    folder = PulledFolder(published.channel, source, encoding=encoding, checksum="xxh3-128")
    early, late = str(tmp_path / "early"), str(tmp_path / "late")
    for n in (1, 1, 2):
        for _ in range(n):
            published.publish()
        assert folder.sync() == folder.version == published.version
        puller(early, str(tmp_path / "none"), str(source), published.version)
        assert is_at(Path(early), published.version)
    puller(late, str(tmp_path / "none"), str(source), 4)
    assert is_at(Path(late), 4)
    kinds = [(source / f"weight_v{n:06d}" / "config.json").exists() for n in (1, 2, 3, 4)]
    assert kinds == [True, False, False, False]
    assert folder.sync(2) == 4  # nothing to do


class Killed(BaseException):
    """Nothing of the process runs after it."""


def dying(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Let the steps of a folder's work fail, before or after what they do, when there were so many."""
    n_steps = 0

    def step() -> None:
        nonlocal n_steps
        n_steps += 1
        if n_steps > after:
            raise Killed

    def wrapped(real: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            step()
            found = real(*args, **options)
            if real is not fetch:  # nobody would close the file
                step()
            return found

        return call

    for owner, name in ((pulled, "fetch"), (pulled, "convert"), (Follower, "sync")):
        monkeypatch.setattr(owner, name, wrapped(getattr(owner, name)))


def test_a_killed_process_is_continued(tmp_path: Path) -> None:
    """Wherever it is broken off, the next one writes the versions that are missing, and all are right."""
    published, first = Published(tmp_path), tmp_path / "first"
    published.publish()
    PulledFolder(published.channel, first, checksum="xxh3-128").sync()
    for _ in range(2):
        published.publish()
    for after in range(100):
        source = tmp_path / f"source{after}"
        shutil.copytree(first, source)
        with pytest.MonkeyPatch.context() as patched:
            dying(patched, after)
            try:
                PulledFolder(published.channel, source, checksum="xxh3-128").sync()
                break
            except Killed:
                pass
        assert PulledFolder(published.channel, source, checksum="xxh3-128").sync() == 3
        out = tmp_path / f"out{after}"
        pull(str(out), "", str(source), 3)
        assert is_at(out, 3)
        assert not (source / "weight_v000003" / "config.json").exists()
    assert after == 10


def test_a_gap_is_bridged_by_a_full_version(puller: Any, tmp_path: Path) -> None:
    published, source = Published(tmp_path, anchor_every=3), tmp_path / "source"
    folder = PulledFolder(published.channel, source, checksum="xxh3-128")
    published.publish()
    folder.sync()
    for _ in range(6):
        published.publish()
    published.channel.prune(keep=1)
    assert folder.sync() == 7
    names = sorted(path.name for path in source.glob("weight_v*"))
    assert names[0] == "weight_v000001"
    assert names[-1] == "weight_v000007"
    puller(str(tmp_path / "out"), "", str(source), 7)
    assert is_at(tmp_path / "out", 7)


def test_a_changed_side_file_takes_a_full_version(puller: Any, tmp_path: Path) -> None:
    published, source = Published(tmp_path), tmp_path / "source"
    folder = PulledFolder(published.channel, source, checksum="xxh3-128")
    published.publish()
    folder.sync()
    save(tmp_path / "other", 2)
    publish_checkpoint(published.channel, tmp_path / "other", base=tmp_path / "step1")
    folder.sync()
    assert (source / "weight_v000002" / "config.json").read_text() == '{"step":2}'
    puller(str(tmp_path / "out"), "", str(source), 2)
    assert (tmp_path / "out" / "config.json").read_text() == '{"step":2}'


def test_errors(tmp_path: Path) -> None:
    channel = sparsedelta.Channel(tmp_path / "channel")
    folder = PulledFolder(channel, tmp_path / "source")
    assert folder.version is None
    with pytest.raises(Behind, match="no version 1"):
        folder.sync()
    publish_checkpoint(channel, save(tmp_path / "one", 1) / "model.safetensors")
    with pytest.raises(StructureMismatch, match="single file, and engines pull folders"):
        folder.sync()
    with pytest.raises(Behind, match="no version 2"):
        folder.sync(2)
    assert folder.version is None
