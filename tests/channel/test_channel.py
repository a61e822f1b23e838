"""Publisher and follower with real weights: models in memory and checkpoints on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from channel.parties import MemoryStore
from channel.weights import advance, is_at, save, weights

import sparsedelta
from sparsedelta.channel.layout import object_name
from sparsedelta.channel.leases import take_lease
from sparsedelta.channel.publisher import publish_checkpoint
from sparsedelta.errors import BadVersion, BaseMismatch, Behind, HeadMoved, Uncertain
from sparsedelta.live import chain
from sparsedelta.live import held as held_tensors
from sparsedelta.live.rwlock import SharedLock
from sparsedelta.stores.folder import FolderStore


class FailingStore(MemoryStore):
    """Fails at calls that a test names: ``fails(call, name)`` gives "before", "after" or None."""

    def __init__(self, objects: dict[str, bytes] | None = None) -> None:
        super().__init__(objects)
        self.fails: Any = lambda call, name: None

    def create(self, name: str, content: Any) -> bool:
        when = self.fails("create", name)
        if when == "before":
            raise OSError("the store failed")
        found = super().create(name, content)
        if when == "after":
            raise OSError("the answer was lost")
        return found

    def write(self, name: str, content: Any) -> None:
        if self.fails("write", name) == "before":
            raise OSError("the store failed")
        super().write(name, content)


def channel_on(store: MemoryStore) -> sparsedelta.Channel:
    channel = sparsedelta.Channel(store)
    channel.pause = lambda seconds: None
    return channel


def published(n: int, **options: Any) -> tuple[sparsedelta.Channel, FailingStore]:
    """Return a channel with n versions: version v holds the weights after step v."""
    store = FailingStore()
    channel = channel_on(store)
    state = weights(1)
    publisher = sparsedelta.Publisher(channel, state, **options)
    for step in range(1, n + 1):
        if step > 1:
            advance(state, step)
        publisher.publish(step).result()
    return channel, store


def test_a_model_follows_each_version() -> None:
    channel, state = channel_on(MemoryStore()), weights(1)
    publisher = sparsedelta.Publisher(channel, state)
    held = weights(0)
    follower = sparsedelta.Follower(channel, held)
    with pytest.raises(Behind, match="no version"):
        follower.sync()
    assert follower.version is None
    for step in range(1, 5):
        if step > 1:
            advance(state, step)
        entry = publisher.publish(step, {"loss": 1.5}).result()
        report = follower.sync()
        assert (report.version, report.step) == (entry.version, step) == (step, step)
        assert report.anchor == (step == 1)
        assert is_at(held, step)
        with follower.reading() as version:
            assert version == step
    again = follower.sync()
    assert (again.n_versions, again.n_bytes) == (0, 0)
    assert [entry.version for entry in channel.log(limit=3)] == [4, 3, 2]
    assert channel.log()[0].info == {"loss": 1.5}


def test_a_module_follows_by_stacked_deltas() -> None:
    torch.manual_seed(0)
    model, other = torch.nn.Linear(16, 8), torch.nn.Linear(16, 8)
    other.load_state_dict(model.state_dict())
    channel = channel_on(MemoryStore())
    publisher = sparsedelta.Publisher(channel, model, anchor_ratio=None)
    publisher.publish().result()
    follower = sparsedelta.Follower(channel, other)
    assert follower.sync().n_versions == 0  # it holds version 1 already
    for _ in range(3):
        with torch.no_grad():
            model.weight[0, :3] += 1
        publisher.publish().result()
    report = follower.sync()
    assert (report.before, report.version, report.n_versions, report.anchor) == (1, 4, 3, False)
    assert torch.equal(other.weight, model.weight)


def test_a_folder_is_followed_and_its_files_too(tmp_path: Path) -> None:
    channel = sparsedelta.Channel(tmp_path / "channel")
    old = save(tmp_path / "one", 1)
    publish_checkpoint(channel, old, step=1)
    out = tmp_path / "out"
    assert sparsedelta.Follower(channel, out).sync().anchor
    assert is_at(out, 1)
    publish_checkpoint(channel, save(tmp_path / "two", 2), base=old, step=2)
    follower = sparsedelta.Follower(channel, out)  # as a new process: it finds out what is there
    report = follower.sync()
    assert (report.before, report.version, report.anchor) == (1, 2, False)
    assert is_at(out, 2)
    assert (out / "config.json").read_text() == '{"step":2}'
    assert follower.sync(1).version == 1  # back
    assert is_at(out, 1)


def test_a_folder_of_somebody_else_is_not_replaced(tmp_path: Path) -> None:
    channel = channel_on(MemoryStore())
    publish_checkpoint(channel, save(tmp_path / "one", 1))
    out = save(tmp_path / "out", 9)
    with pytest.raises(FileExistsError):
        sparsedelta.Follower(channel, out).sync()
    assert is_at(out, 9)
    sparsedelta.Follower(channel, out, overwrite=True).sync()
    assert is_at(out, 1)


def test_a_base_that_is_not_the_head_is_refused(tmp_path: Path) -> None:
    channel = sparsedelta.Channel(tmp_path / "channel")
    one, two = save(tmp_path / "one", 1), save(tmp_path / "two", 2)
    publish_checkpoint(channel, one)
    assert publish_checkpoint(channel, one) is None
    with pytest.raises(BaseMismatch, match="is not the latest version"):
        publish_checkpoint(channel, save(tmp_path / "three", 3), base=two)
    assert len(channel.log()) == 1


def test_a_restart_at_the_head_goes_on_with_deltas() -> None:
    channel, _ = published(2, anchor_ratio=None)
    state = weights(2)
    publisher = sparsedelta.Publisher(channel, state, anchor_ratio=None)
    assert publisher.is_at_head
    advance(state, 3)
    entry = publisher.publish(3).result()
    assert entry.anchor is None
    assert entry.run != channel.entry(2).run


def test_a_restart_elsewhere_begins_with_an_anchor_and_followers_move_over() -> None:
    channel, _ = published(2)
    held = weights(0)
    follower = sparsedelta.Follower(channel, held)
    follower.sync()
    publisher = sparsedelta.Publisher(channel, weights(7))
    assert not publisher.is_at_head
    entry = publisher.publish(7).result()
    assert entry.anchor
    assert entry.delta is None
    assert follower.sync().version == 3
    assert is_at(held, 7)


@pytest.mark.parametrize("name", ["deltas/", "versions/"])
def test_a_version_that_failed_is_published_by_the_next_call(name: str) -> None:
    channel, store = published(1)
    state = weights(1)
    publisher = sparsedelta.Publisher(channel, state)
    advance(state, 2)
    store.fails = lambda call, found: "before" if found.startswith(name) else None
    with pytest.raises(OSError, match="failed"):
        publisher.publish(2).result()
    head = channel.head()
    assert head
    assert head.version == 1  # nothing of the version can be seen
    store.fails = lambda call, found: None
    assert publisher.publish(2).result().version == 2
    held = weights(0)
    sparsedelta.Follower(channel, held).sync()
    assert is_at(held, 2)


def test_a_lost_answer_publishes_once() -> None:
    channel, store = published(1)
    state = weights(1)
    publisher = sparsedelta.Publisher(channel, state)
    advance(state, 2)
    store.fails = lambda call, name: "after" if name.startswith("versions/") else None
    assert publisher.publish(2).result().version == 2
    assert [entry.step for entry in channel.log()] == [2, 1]


def test_of_two_publishers_one_stops() -> None:
    channel, _ = published(1)
    one, other = weights(1), weights(1)
    first, second = sparsedelta.Publisher(channel, one), sparsedelta.Publisher(channel, other)
    advance(one, 2)
    advance(other, 3)
    first.publish(2).result()
    with pytest.raises(HeadMoved, match="version 2"):
        second.publish(3).result()
    assert len(channel.log()) == 2


def test_anchors_come_by_age_and_by_weight() -> None:
    by_age, _ = published(7, anchor_ratio=None, anchor_every=3)
    assert [e.version for e in by_age.log() if e.anchor] == [7, 4, 1]
    by_weight, _ = published(12, anchor_ratio=0.5)
    entries = by_weight.log()[::-1]
    anchors = [entry.version for entry in entries if entry.anchor]
    assert len(anchors) > 1
    weight = sum(e.delta.n_bytes for e in entries[1 : anchors[1]] if e.delta)
    first = entries[0].anchor
    assert first
    assert weight > first.n_bytes / 2 >= weight - (entries[anchors[1] - 1].delta or first).n_bytes
    with pytest.raises(ValueError, match="anchor_every"):
        published(1, anchor_every=0)


def test_anchors_on_a_checkpoint_that_followers_have(tmp_path: Path) -> None:
    base = save(tmp_path / "base", 0)
    channel, _ = published(3, anchor_base=base / "model.safetensors", anchor_base_id="org/base")
    held = weights(0)  # the base itself
    assert sparsedelta.Follower(channel, held).sync().version == 3
    assert is_at(held, 3)
    other = weights(5)
    with pytest.raises(Behind, match="org/base"):
        sparsedelta.Follower(channel, other).sync()
    assert is_at(other, 5)
    sparsedelta.Follower(channel, other, base=base / "model.safetensors").sync()
    assert is_at(other, 3)


def test_a_pruned_way_without_the_base_of_the_anchor(tmp_path: Path) -> None:
    base = save(tmp_path / "base", 0) / "model.safetensors"
    channel, _ = published(3, anchor_base=base, anchor_every=1)
    held = weights(1)
    channel.prune(keep=1)
    with pytest.raises(Behind, match=r"has an anchor on .*, which is not here; give it"):
        sparsedelta.Follower(channel, held).sync()
    sparsedelta.Follower(channel, held, base=base).sync()
    assert is_at(held, 3)


def damage(store: MemoryStore, name: str) -> None:
    raw = store.objects[name]
    store.objects[name] = raw[:-1] + bytes([raw[-1] ^ 1])


def test_a_damaged_delta_is_a_bad_version_and_changes_nothing() -> None:
    channel, store = published(2)
    held = weights(1)
    follower = sparsedelta.Follower(channel, held)
    follower.sync(1)
    entry = channel.entry(2)
    assert entry.delta
    damage(store, object_name("deltas", 2, entry.delta))
    with pytest.raises(BadVersion, match="damaged"):
        follower.sync()
    assert is_at(held, 1)
    assert follower.version == 1


def test_an_anchor_leads_round_a_damaged_delta() -> None:
    channel, store = published(2, anchor_ratio=None)
    held = weights(1)
    follower = sparsedelta.Follower(channel, held)
    follower.sync(1)
    entry = channel.entry(2)
    assert entry.delta
    damage(store, object_name("deltas", 2, entry.delta))
    state = weights(2)
    publisher = sparsedelta.Publisher(channel, state, anchor_every=1)
    advance(state, 3)
    publisher.publish(3).result()
    assert follower.sync().anchor
    assert is_at(held, 3)


def test_a_damaged_entry_is_a_bad_version() -> None:
    channel, store = published(3)
    raw = store.objects["versions/0000000002.json"]
    store.objects["versions/0000000002.json"] = raw.replace(b'"step":2', b'"step":3')
    held = weights(1)
    with pytest.raises(BadVersion, match="another entry"):
        sparsedelta.Follower(channel, held).sync()
    assert is_at(held, 1)


def test_a_model_that_somebody_changed_is_uncertain_and_is_rebuilt() -> None:
    channel, _ = published(3, anchor_ratio=None)
    held = weights(2)
    follower = sparsedelta.Follower(channel, held)
    follower.sync(2)
    entry = channel.entry(3)
    assert entry.delta
    held["a"] += 1
    with pytest.raises(Uncertain, match="sync again"):
        follower.sync()
    assert follower.version is None
    report = follower.sync()
    assert report.anchor
    assert is_at(held, 3)


def at_read_back(monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> None:
    """Let something happen after the values were written and before they are read back."""
    check = chain.find_unwritten

    def acted(patches: Any) -> Any:
        act()
        return check(patches)

    monkeypatch.setattr("sparsedelta.channel.model_replica.find_unwritten", acted)


def test_readers_use_the_new_version_while_it_is_read_back(monkeypatch: pytest.MonkeyPatch) -> None:
    channel, _ = published(2, anchor_ratio=None)
    held = weights(1)
    follower = sparsedelta.Follower(channel, held)
    follower.sync(1)
    seen = []

    def read() -> None:
        with follower.reading() as version:
            seen.append((version, is_at(held, 2)))

    at_read_back(monkeypatch, read)
    follower.sync()
    assert seen == [(2, True)]


def test_a_model_that_does_not_hold_what_was_written_is_no_version(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    channel, _ = published(2, anchor_ratio=None)
    held = weights(1)
    follower = sparsedelta.Follower(channel, held)
    follower.sync(1)
    at_read_back(monkeypatch, lambda: held["b"].view(torch.uint8).fill_(7))
    with pytest.raises(Uncertain, match=r"'b'.*memory is faulty"):
        follower.sync()
    assert follower.version is None
    with follower.reading() as version:
        assert version is None
    monkeypatch.undo()
    assert follower.sync().anchor
    assert is_at(held, 2)
    assert follower.version == 2


def test_a_model_that_was_written_in_part_is_no_version_for_any_reader(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    channel, _ = published(2, anchor_ratio=None)
    held = weights(1)
    follower = sparsedelta.Follower(channel, held)
    follower.sync(1)
    broken: list[bool] = []
    seen: list[int | None] = []
    write, leave = held_tensors.scatter, SharedLock._leave

    def scatter(*args: Any) -> None:
        if broken:
            raise RuntimeError("the device is gone")
        write(*args)
        broken.append(True)

    def left(lock: SharedLock, me: object) -> None:
        if broken:
            seen.append(follower.version)  # what the next reader is given
        leave(lock, me)

    with monkeypatch.context() as faulty:
        faulty.setattr("sparsedelta.live.patch.scatter", scatter)
        faulty.setattr(SharedLock, "_leave", left)
        with pytest.raises(Uncertain, match="restore"):
            follower.sync()
    assert {*seen} == {None}
    assert not is_at(held, 1)
    assert follower.sync().version == 2
    assert is_at(held, 2)


def test_a_version_that_is_not_there_is_behind() -> None:
    channel, _ = published(2, anchor_every=1)
    follower = sparsedelta.Follower(channel, weights(0))
    with pytest.raises(Behind, match="version 3 is not published"):
        follower.sync(3)
    for version in ("a", 0, 1.5):
        with pytest.raises(ValueError, match=f"version is {version!r}, expected an integer from 1"):
            follower.sync(version)  # type: ignore[arg-type]
    channel.prune(keep=1)
    with pytest.raises(Behind, match="pruned"):
        follower.sync(1)
    assert repr(follower) == "<Follower at no known version>"
    assert follower.sync().version == 2
    assert repr(follower) == "<Follower at version 2>"


def test_pruning_leaves_what_the_last_versions_need() -> None:
    channel, store = published(7, anchor_ratio=None, anchor_every=3)  # segments at 1, 4 and 7
    store.write("deltas/0000000005-0123456789abcdef.sd", b"left by a crash")
    for keep in (0, 1.5):
        with pytest.raises(ValueError, match=f"keep is {keep}, expected an integer from 1 to"):
            channel.prune(keep=keep)  # type: ignore[arg-type]
    report = channel.prune(keep=2)
    assert (report.first, report.n_closed, report.leased) == (4, 1, None)
    held = weights(0)
    follower = sparsedelta.Follower(channel, held)
    for version in (4, 5, 6, 7):
        follower.sync(version)
        assert is_at(held, version)
    assert not [name for name in store.list("") if "/0000000003-" in name]
    assert "deltas/0000000005-0123456789abcdef.sd" not in store.objects
    assert len(channel.log()) == 7  # entries stay
    assert channel.prune(keep=2).n_deleted == 0


def test_a_lease_keeps_a_segment_until_it_ends() -> None:
    channel, _ = published(4, anchor_every=1)
    now = channel.now
    channel._clock = lambda: now
    until = take_lease(channel, 2, "somebody")
    assert until
    report = channel.prune(keep=1)
    assert (report.first, report.leased) == (2, 2)
    channel._clock = lambda: until + 61
    assert channel.prune(keep=1).first == 4
    assert take_lease(channel, 2, "late") is None


def test_a_lease_of_more_than_an_hour_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    for seconds, first in ((3600, 2), (3600 * 24, 4)):
        channel, _ = published(4, anchor_every=1)
        monkeypatch.setattr("sparsedelta.channel.leases.LEASE_SECONDS", seconds)
        assert take_lease(channel, 2, "somebody")
        assert channel.prune(keep=1).first == first


def test_a_path_in_place_of_a_channel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[str] = []
    monkeypatch.setattr(FolderStore, "close", lambda self: closed.append(self.name))
    state = {"a": torch.zeros(9)}
    with sparsedelta.Publisher(tmp_path / "channel", state) as publisher:
        publisher.publish(1).result()
        assert not closed
    with sparsedelta.Follower(f"{tmp_path}/channel", tmp_path / "out") as follower:
        assert follower.sync().version == 1
    assert len(closed) == 2
    with pytest.raises(sparsedelta.SparseDeltaError):
        sparsedelta.Publisher(tmp_path / "channel", {"a": torch.zeros(9, device="meta")})
    assert len(closed) == 3


@pytest.mark.parametrize("wrong", [None, 3, {}, torch.nn.Linear(1, 1)])
def test_anything_else_is_a_type_error(tmp_path: Path, wrong: Any) -> None:
    expected = "expected a Channel, or the path or URL of one"
    with pytest.raises(TypeError, match=expected):
        sparsedelta.Publisher(wrong, {"a": torch.zeros(9)})
    with pytest.raises(TypeError, match=expected):
        sparsedelta.Follower(wrong, tmp_path / "out")


@pytest.mark.parametrize("step", [2.0, 2.5, "2", -1, True, 1 << 63])
def test_a_step_that_no_entry_can_hold_is_refused_before_anything_is_written(step: Any) -> None:
    channel, store = published(1)
    state = weights(1)
    publisher = sparsedelta.Publisher(channel, state)
    before = dict(store.objects)
    advance(state, 2)
    with pytest.raises(ValueError, match="step is"):
        publisher.publish(step)
    assert store.objects == before
    publisher.publish(2).result()
    held = weights(0)
    assert sparsedelta.Follower(channel, held).sync().version == 2
    assert is_at(held, 2)


def test_a_step_may_be_an_integer_of_another_library() -> None:
    channel, _ = published(1)
    publisher = sparsedelta.Publisher(channel, weights(1))
    assert publisher.publish(torch.tensor(7)).result().step == 7  # type: ignore[arg-type]


def test_an_entry_that_nobody_could_read_is_not_created() -> None:
    channel, store = published(1)
    publisher = sparsedelta.Publisher(channel, weights(1))
    before = set(store.list("versions/"))
    publisher._run.id = 5  # type: ignore[assignment]
    with pytest.raises(ValueError, match="was not published"):
        publisher.publish(2).result()
    assert set(store.list("versions/")) == before


def test_what_is_no_channel_is_refused_at_once() -> None:
    store = MemoryStore({"config.json": b"{}"})
    channel = channel_on(store)
    with pytest.raises(FileExistsError, match="not a channel"):
        sparsedelta.Publisher(channel, weights(1))
    with pytest.raises(FileExistsError, match="not a channel"):
        sparsedelta.Follower(channel, weights(1)).sync()


def test_a_publisher_of_a_path_is_refused_with_the_command(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="sparsedelta publish"):
        sparsedelta.Publisher(tmp_path / "c", tmp_path)  # type: ignore[arg-type]


def test_info_that_json_lacks_is_refused_with_what_it_may_be() -> None:
    publisher = sparsedelta.Publisher(channel_on(MemoryStore()), weights(1))
    with pytest.raises(ValueError, match=r"float\(x\)"):
        publisher.publish(1, {"loss": torch.tensor(1.5)})  # type: ignore[dict-item]
