"""What is published is compared with what the latest version holds: files, names, dtypes and step."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from channel.parties import MemoryStore
from channel.weights import State, is_at, save, weights
from safetensors.torch import save_file

import sparsedelta
from sparsedelta.channel.channel import Channel
from sparsedelta.channel.latest import Latest, read_latest
from sparsedelta.channel.publisher import publish_checkpoint
from sparsedelta.errors import BadVersion, BaseMismatch
from sparsedelta.stores.stream import Stream


class CountingStream(Stream):
    """Counts the bytes that are read."""

    n_read = 0

    def read(self, offset: int, n_bytes: int) -> bytes:
        found = super().read(offset, n_bytes)
        CountingStream.n_read += len(found)
        return found


class CountingStore(MemoryStore):
    def open(self, name: str) -> Stream | None:
        found = self.objects.get(name)
        return None if found is None else CountingStream(BytesIO(found))


def state(dtype: torch.dtype = torch.float32, prefix: str = "", n: int = 8) -> State:
    return {f"{prefix}layer.{i}.w": torch.full((64, 64), i + 0.3, dtype=dtype) for i in range(n)}


def publish(channel: Channel, model: State, tmp_path: Path, way: str) -> None:
    """Publish a model from memory, or as a file."""
    if way == "memory":
        with sparsedelta.Publisher(channel, model) as publisher:
            publisher.publish().result()
        return
    save_file(model, tmp_path / "published.safetensors")
    publish_checkpoint(channel, tmp_path / "published.safetensors")


def test_no_weights_are_read() -> None:
    store = CountingStore()
    channel = sparsedelta.Channel(store)
    model = {f"{i}": torch.randn(128, 128) for i in range(4)}
    with sparsedelta.Publisher(channel, model) as publisher:
        publisher.publish().result()
    CountingStream.n_read = 0
    head = channel.head()
    found = read_latest(channel, head)
    assert found
    assert (found.version, found.target.is_folder) == (1, False)
    assert found.dtypes == dict.fromkeys(model, "F32")
    assert head
    assert head.anchor
    assert 0 < CountingStream.n_read < head.anchor.n_bytes / 50


def test_what_cannot_be_read_is_not_compared() -> None:
    """The next version goes on: a follower reads what is damaged, and says so."""
    store = MemoryStore()
    channel = sparsedelta.Channel(store)
    assert read_latest(channel, channel.head()) is None
    publish(channel, state(), Path(), "memory")
    (name,) = store.list("anchors/")
    for content in (b"", b"x" * len(store.objects[name])):
        store.objects[name] = content
        assert read_latest(channel, channel.head()) is None
    del store.objects[name]
    assert read_latest(channel, channel.head()) is None
    publish(channel, state(torch.bfloat16), Path(), "memory")


@pytest.fixture
def both(tmp_path: Path) -> dict[str, Path]:
    """Return a checkpoint by kind."""
    folder = save(tmp_path / "2", 2)
    shutil.copy(folder / "model.safetensors", tmp_path / "2.safetensors")
    return {"folder": folder, "file": tmp_path / "2.safetensors"}


@pytest.mark.parametrize(
    ("kind", "other", "says"),
    [
        ("file", "folder", "are single files, and '{}' is a folder; give its weight file, or"),
        ("folder", "file", "are folders, and '{}' is one file; give the folder of the checkpoint"),
    ],
)
def test_the_other_kind_is_refused(
    kind: str, other: str, says: str, both: dict[str, Path], tmp_path: Path
) -> None:
    first = save(tmp_path / "1", 1)
    channel = sparsedelta.Channel(tmp_path / "channel")
    publish_checkpoint(channel, first if kind == "folder" else first / "model.safetensors")
    for base in (None, first):
        with pytest.raises(ValueError, match="new channel") as caught:
            publish_checkpoint(channel, both[other], base=base)
        assert says.format(both[other]) in str(caught.value)
    folder = both["folder"] if kind == "file" else None
    with pytest.raises(
        ValueError, match=r"what this publisher adds is .*\(folder=\), or use a new"
    ):
        sparsedelta.Publisher(channel, weights(2), folder=folder)
    assert len(channel.log()) == 1
    assert publish_checkpoint(channel, both[kind])


@pytest.fixture
def foreign(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Return a function that publishes as a program does that does not look at the kind."""

    def publish(*words: Any, **options: Any) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(Latest, "check_kind", lambda *_, **__: None)
            assert publish_checkpoint(*words, **options)

    return publish


@pytest.mark.parametrize("kind", ["file", "folder"])
@pytest.mark.parametrize("by_delta", [False, True])
def test_a_follower_refuses_the_other_kind(
    kind: str, foreign: Callable[..., Any], both: dict[str, Path], tmp_path: Path, *, by_delta: bool
) -> None:
    channel = sparsedelta.Channel(tmp_path / "channel")
    first = save(tmp_path / "1", 1)
    first = first if kind == "folder" else first / "model.safetensors"
    publish_checkpoint(channel, first)
    follower = sparsedelta.Follower(channel, tmp_path / "out")
    follower.sync()
    other = both["file" if kind == "folder" else "folder"]
    foreign(channel, other, base=first if by_delta else None)
    for overwrite in (False, True):
        again = sparsedelta.Follower(channel, tmp_path / "out", overwrite=overwrite)
        for one in (follower, again):
            with pytest.raises(
                BadVersion, match=r"version 2 is .* nothing was changed; .* new place"
            ):
                one.sync()
            assert is_at(tmp_path / "out", 1)
            assert (tmp_path / "out").is_dir() == (kind == "folder")
    third = save(tmp_path / "3", 3)
    foreign(channel, third if kind == "folder" else third / "model.safetensors")
    assert follower.sync().version == 3
    assert is_at(tmp_path / "out", 3)


def test_overwrite_replaces_a_version_of_another_channel(
    both: dict[str, Path], tmp_path: Path
) -> None:
    publish_checkpoint(sparsedelta.Channel(tmp_path / "a"), save(tmp_path / "1", 1))
    publish_checkpoint(sparsedelta.Channel(tmp_path / "b"), both["file"])
    sparsedelta.Follower(tmp_path / "a", tmp_path / "out").sync()
    with pytest.raises(BadVersion, match="is a folder"):
        sparsedelta.Follower(tmp_path / "b", tmp_path / "out").sync()
    sparsedelta.Follower(tmp_path / "b", tmp_path / "out", overwrite=True).sync()
    assert (tmp_path / "out").is_file()


@pytest.mark.parametrize("way", ["memory", "disk"])
@pytest.mark.parametrize(
    ("before", "after", "says"),
    [
        (
            state(),
            state(torch.bfloat16),
            "8 of 8 tensors have another dtype than in version 1 of the channel (BF16 instead of F32), so the version"
            " is stored nearly whole; convert the model to F32, or use a new channel for BF16",
        ),
        (
            state(),
            state() | state(torch.float16, n=1),
            "1 of 8 tensors have another dtype than in version 1 of the channel (F16 instead of F32), so these are"
            " stored whole",
        ),
        (
            state(),
            state(prefix="module."),
            "8 of 8 tensors are not in version 1 of the channel by name: their names begin with 'module.'; save what is"
            " published without its wrapper",
        ),
        (
            state(prefix="_orig_mod."),
            state(),
            "by name: there the names begin with '_orig_mod.'; that version should have been saved without its wrapper",
        ),
        (
            state(),
            {"z": torch.zeros(3), "y": torch.ones(4)},
            "2 of 2 tensors are not in version 1 of the channel by name, such as 'y'; publish another model in",
        ),
        (state(), state(n=15), ""),  # 7 of 15 are new
        (state(), {name: tensor + 1 for name, tensor in state().items()}, ""),
        (state(), state(), ""),
    ],
)
def test_another_model_is_reported(
    way: str, before: State, after: State, says: str, tmp_path: Path, caplog: Any
) -> None:
    channel = sparsedelta.Channel(MemoryStore())
    publish(channel, before, tmp_path, way)
    assert not caplog.messages
    publish(channel, after, tmp_path, way)
    assert len(caplog.messages) == bool(says)
    assert says in "".join(caplog.messages)


def test_an_earlier_step_is_reported(caplog: Any) -> None:
    model = state()
    with sparsedelta.Publisher(sparsedelta.Channel(MemoryStore()), model) as publisher:
        for step in (None, 5, 5, 6, None, 2):
            publisher.publish(step).result()
        assert not caplog.messages  # the version before the last has no step
        publisher.publish(1).result()
    assert [*caplog.messages] == [
        "version 7 has step 1 and the version before it has step 2; this is right if the training was resumed from an"
        " earlier checkpoint, otherwise check the step that is given"
    ]


def test_a_repeated_publish_adds_nothing(tmp_path: Path) -> None:
    channel = sparsedelta.Channel(tmp_path / "channel")
    one, two, three = (save(tmp_path / str(step), step) for step in (1, 2, 3))
    publish_checkpoint(channel, one)
    call: dict[str, Any] = {"base": one, "step": 2, "info": {"loss": 0.5}}
    assert publish_checkpoint(channel, two, **call)
    for repeated in (call, {"base": one}, call | {"info": None}):
        assert publish_checkpoint(channel, two, **repeated) is None
    (tmp_path / "2" / "config.json").write_text("{}")  # this is not what was published
    for checkpoint in (three, two):
        with pytest.raises(
            BaseMismatch, match=r"is version 1 of .* latest version is 2 \(step 2\)"
        ):
            publish_checkpoint(channel, checkpoint, base=one)
    save(two, 2)
    for other in (call | {"step": 3}, call | {"info": {"loss": 0.4}}):
        with pytest.raises(BaseMismatch, match=r"leave out the base \(--base\)"):
            publish_checkpoint(channel, two, **other)
    with pytest.raises(BaseMismatch, match=r"3' is not the latest version of"):
        publish_checkpoint(channel, one, base=three)
    assert len(channel.log()) == 2
    other_files = save(tmp_path / "other", 2)
    (other_files / "config.json").write_text("{}")
    for step, added in ((None, True), (None, False), (3, True), (3, False)):
        assert bool(publish_checkpoint(channel, other_files, base=two, step=step)) == added
    assert len(channel.log()) == 4
    with pytest.raises(BaseMismatch, match=r"which has none yet; leave out the base"):
        publish_checkpoint(sparsedelta.Channel(tmp_path / "empty"), two, base=one)
