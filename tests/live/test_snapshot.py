"""``Snapshot``: its deltas equal those of ``diff`` on saved models, and it changes only by ``advance``."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import assert_same_files, write
from live.live_helpers import Net, copied, same, tuned
from live.model_helpers import KINDS, change, make, saved
from safetensors.torch import save_file

import sparsedelta
from sparsedelta import Delta, Snapshot
from sparsedelta.errors import BaseMismatch, Corrupt, PartlyApplied, StructureMismatch
from sparsedelta.live import snapshot as snapshot_module
from sparsedelta.ops.diff import between

FILE = "model.safetensors"


def delta_bytes(base: Any, target: Any, **options: Any) -> bytes:
    with sparsedelta.diff(base, target, **options) as delta:
        return delta.to_bytes()


def taken(snapshot: Snapshot, **options: Any) -> bytes:
    with snapshot.diff(**options) as delta:
        return delta.to_bytes()


def advance(snapshot: Snapshot, data: bytes) -> None:
    with Delta.from_bytes(data) as delta:
        snapshot.advance(delta)


@pytest.mark.parametrize("keep_on", ["cpu", "model", "both"])
@pytest.mark.parametrize("kind", KINDS)
def test_versions_of_a_model(kind: str, keep_on: Any, tmp_path: Path) -> None:
    model = make(kind)
    snapshot = Snapshot(model, keep_on=keep_on)
    paths = [saved(model, tmp_path / "0") / FILE]
    for version in (1, 2, 3):
        change(model, every=version + 2, skip="embed" if version == 2 else "norm")
        paths.append(saved(model, tmp_path / str(version)) / FILE)
        data = taken(snapshot)
        assert data == delta_bytes(*paths[-2:])
        advance(snapshot, data)
    with snapshot.diff() as delta:
        assert delta.nnz == 0


@pytest.mark.parametrize("kind", ["tied llama", "mixtral"])
def test_deltas_between_folders(kind: str, tmp_path: Path) -> None:
    model = make(kind)
    first = saved(model, tmp_path / "0", max_shard_size="6KB")
    write(first / "tokenizer.json", "{}")
    snapshot = Snapshot(model, folder=first)
    held = first
    for version in (1, 2):
        change(model, every=version + 2)
        target = saved(model, tmp_path / f"target-{version}", max_shard_size="6KB")
        write(target / "tokenizer.json", "{}")
        data = taken(snapshot)
        assert data == delta_bytes(held, target)
        out = tmp_path / str(version)
        with Delta.from_bytes(data) as delta:
            sparsedelta.apply(held, delta, out)
            snapshot.advance(delta)
        assert_same_files(target, out)
        held = out


def test_repr() -> None:
    snapshot = Snapshot(torch.nn.Linear(2, 3))
    assert repr(snapshot) == "<Snapshot of Linear: 2 tensors>"


def test_another_copy_of_the_model_applies_the_deltas(tmp_path: Path) -> None:
    model = make("tied llama")
    follower, snapshot = copy.deepcopy(model), Snapshot(model)
    for every in (3, 4):
        change(model, every=every)
        with Delta.from_bytes(taken(snapshot)) as delta:
            delta.apply_(follower, verify="full")
            snapshot.advance(delta)
        assert same(follower.state_dict(), model.state_dict())


def test_a_side_file_that_changes_is_carried_once(tmp_path: Path) -> None:
    model = make("llama")
    folder = saved(model, tmp_path / "0")
    write(folder / "tokenizer.json", "{}")
    snapshot = Snapshot(model, folder=folder)
    write(folder / "tokenizer.json", '{"new": 1}')
    with snapshot.diff() as delta:
        carried = [file.path for file in delta.target.side_files if file.stored]
        assert carried == ["tokenizer.json"]
        snapshot.advance(delta)
    with snapshot.diff() as delta:
        assert not any(file.stored for file in delta.target.side_files)


def test_options_are_those_of_diff(tmp_path: Path) -> None:
    model = Net()
    old = copied(model.state_dict())
    snapshot = Snapshot(model)
    change(model, every=2)
    options: dict[str, Any] = {"values": "target", "level": "fast", "standalone": True}
    options |= {"base_id": "org/base@1", "info": {"step": 3}}
    assert taken(snapshot, **options) == delta_bytes(old, model, **options)
    for wrong in ({"values": "new"}, {"level": "best"}, {"info": {"step": object()}}):
        with pytest.raises(ValueError, match=r"values|level|info"):
            snapshot.diff(**wrong)
    with pytest.raises(ValueError, match="keep_on is 'gpu'"):
        Snapshot(model, keep_on="gpu")  # type: ignore[arg-type]


def test_advance_moves_to_the_delta_not_to_the_model(tmp_path: Path) -> None:
    model = make("mixtral")
    snapshot = Snapshot(model)
    change(model, every=3)
    second, data = copy.deepcopy(model), taken(snapshot)
    change(model, every=5)  # training continues while the version is stored
    advance(snapshot, data)
    assert taken(snapshot) == delta_bytes(second, model)


@pytest.mark.parametrize("every", [1, 7])
def test_a_capture_does_not_change_with_the_model(every: int) -> None:
    model = make("mixtral")
    first, snapshot = copy.deepcopy(model), Snapshot(model)
    change(model, every=every)
    second = copy.deepcopy(model)
    capture = snapshot.capture()
    assert 0 < capture.n_bytes <= snapshot.n_bytes
    change(model, every=3)
    with capture.diff() as delta:
        data = delta.to_bytes()
    assert data == delta_bytes(first, second)
    with between(None, capture) as anchor, sparsedelta.diff({}, second) as expected:
        assert anchor.target_fingerprint == expected.target_fingerprint
    advance(snapshot, data)
    with pytest.raises(BaseMismatch, match="has moved"):
        capture.diff()
    with snapshot.capture() as later, later.diff() as delta:
        assert delta.to_bytes() == delta_bytes(second, model)


def test_without_advance_all_deltas_have_the_same_base() -> None:
    model = make("llama")
    first, snapshot = copy.deepcopy(model), Snapshot(model)
    change(model, every=3)
    taken(snapshot)
    change(model, every=5)
    assert taken(snapshot) == delta_bytes(first, model)


def test_the_model_is_not_the_snapshot() -> None:
    model = Net()
    snapshot = Snapshot(model)
    old = copied(model.state_dict())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert taken(snapshot) == delta_bytes(old, model)


def test_state_dicts_and_all_their_views(tmp_path: Path) -> None:
    whole = torch.arange(60, dtype=torch.float32).view(6, 10)
    state = {"t": whole.t(), "s": whole[:, ::2], "b": whole > 30, "e": whole[:0]}
    old = copied(state)
    snapshot = Snapshot(state)
    with snapshot.diff() as delta:
        assert delta.nnz == 0
    state["b"] = whole > 20  # the same mapping with another tensor
    whole += 0.5
    assert taken(snapshot) == delta_bytes(old, state)


def test_unchanged_tensors_are_not_hashed_or_coded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = make("mixtral")
    snapshot = Snapshot(model)
    with torch.no_grad():
        model.model.norm.weight.view(torch.int16)[3] ^= 1
    read: set[str] = set()
    original = snapshot_module._Kept.read_into

    def read_into(kept: Any, buffer: memoryview, offset: int) -> None:
        read.add(kept.name)
        original(kept, buffer, offset)

    monkeypatch.setattr(snapshot_module._Kept, "read_into", read_into)
    with snapshot.diff() as delta:
        assert delta.nnz == 1
    assert read == {"model.norm.weight"}


def test_n_bytes() -> None:
    net = Net()
    assert Snapshot(net).n_bytes == sum(t.nbytes for t in net.state_dict().values())


class TestRefused:
    def test_another_structure(self) -> None:
        model = Net()
        snapshot = Snapshot(model)
        model.register_buffer("more", torch.ones(2))
        with pytest.raises(
            StructureMismatch, match=r"'more' was added.*make a new Snapshot or Publisher"
        ):
            snapshot.diff()
        del model._buffers["more"]
        model.float()
        with pytest.raises(StructureMismatch, match="has another dtype"):
            snapshot.diff()

    def test_a_delta_from_something_else(self) -> None:
        model = make("llama")
        snapshot = Snapshot(model)
        change(model, every=3)
        first = taken(snapshot)
        change(model, every=5)
        second = taken(snapshot)
        advance(snapshot, first)
        before = taken(snapshot)
        with pytest.raises(BaseMismatch, match="was not made from the last published state"):
            advance(snapshot, second)
        assert taken(snapshot) == before

    def test_a_delta_of_another_model(self) -> None:
        snapshot, other = Snapshot(make("llama")), Snapshot(Net())
        with pytest.raises(BaseMismatch):
            advance(snapshot, taken(other))
        state = {"a": torch.ones(3), "b": torch.ones(3)}
        part = {"a": state["a"]}
        with pytest.raises(BaseMismatch, match="lacks tensors"):
            advance(Snapshot(state), delta_bytes(part, {"a": torch.zeros(3)}))

    def test_a_delta_that_changes_the_layout(self) -> None:
        state = {"a": torch.ones(3)}
        with pytest.raises(BaseMismatch):
            advance(Snapshot(state), delta_bytes(state, {"a": torch.ones(4)}))

    def test_a_delta_without_digests_of_its_target(self) -> None:
        old, new = {"a": torch.zeros(8)}, {"a": torch.ones(8)}
        with sparsedelta.diff(old, new) as delta:
            row = replace(delta.tensors[0], target=delta.tensors[0].target.with_digest(None))
            with pytest.raises(BaseMismatch):
                Snapshot(old).advance(replace(delta, tensors=(row,)))


class TestBrokenOff:
    def test_a_repeated_advance_changes_nothing(self) -> None:
        model = make("mixtral")
        snapshot = Snapshot(model)
        change(model)
        data = taken(snapshot)
        advance(snapshot, data)
        advance(snapshot, data)
        with snapshot.diff() as delta:
            assert delta.nnz == 0

    @pytest.mark.parametrize("at", [0, 1, 5])
    @pytest.mark.parametrize("written", [False, True])
    def test_an_interrupted_advance_is_completed(
        self, at: int, written: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = make("mixtral")
        snapshot = Snapshot(model)
        change(model)
        data = taken(snapshot)
        scatter = snapshot_module.scatter  # type: ignore[attr-defined]
        n_calls = 0

        def failing(*arguments: Any) -> None:
            nonlocal n_calls
            n_calls += 1
            if n_calls == at + 1:
                if written:
                    scatter(*arguments)
                raise KeyboardInterrupt
            scatter(*arguments)

        with monkeypatch.context() as patched:
            patched.setattr(snapshot_module, "scatter", failing)
            with pytest.raises(KeyboardInterrupt):
                advance(snapshot, data)
        with pytest.raises(PartlyApplied, match="call advance again"):
            snapshot.diff()
        advance(snapshot, data)
        with snapshot.diff() as delta:
            assert delta.nnz == 0

    def test_a_damaged_delta_changes_no_tensor_partly(self, tmp_path: Path) -> None:
        state = {"a": torch.zeros(4000), "b": torch.zeros(4000)}
        snapshot = Snapshot(state)
        state |= tuned(state)
        data = bytearray(taken(snapshot))
        whole = bytes(data)
        data[-1] ^= 1  # of the last chunk
        with pytest.raises(Corrupt):
            advance(snapshot, bytes(data))
        advance(snapshot, whole)
        assert taken(snapshot) == delta_bytes(copied(state), state)


@pytest.mark.parametrize("block", [64, 67])
def test_changes_on_device(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    """The comparison for tensors on a GPU, run on the CPU, with several blocks of which some have changed."""
    monkeypatch.setattr(snapshot_module, "_BLOCK_ELEMENTS", block)
    monkeypatch.setattr(snapshot_module, "HOST", frozenset())
    model = make("mixtral")
    old, snapshot = copy.deepcopy(model), Snapshot(model)
    change(model, every=50)
    assert taken(snapshot) == delta_bytes(old, model)
    noise = np.random.default_rng(0).integers(0, 2**16, 700, np.uint16)
    state = {"nan": torch.from_numpy(noise.copy()).view(torch.bfloat16)}
    before, other = copied(state), Snapshot(state)
    state["nan"].view(torch.int16)[::99] ^= 7
    assert taken(other) == delta_bytes(before, state)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("keep_on", ["cpu", "model", "both"])
@pytest.mark.parametrize("kind", ["tied llama", "mixtral"])
def test_on_a_gpu(kind: str, keep_on: Any, tmp_path: Path) -> None:
    model = make(kind).cuda()
    snapshot = Snapshot(model, keep_on=keep_on)
    paths = [saved(model, tmp_path / "0") / FILE]
    for version in (1, 2):
        change(model, every=version + 2)
        paths.append(saved(model, tmp_path / str(version)) / FILE)
        data = taken(snapshot)
        assert data == delta_bytes(*paths[-2:]) == delta_bytes(paths[-2], model)
        advance(snapshot, data)


def test_tensors_as_large_as_several_chunks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from sparsedelta.tensors import compare

    monkeypatch.setattr(compare, "MAX_SPAN", 1 << 10)
    state = {"w": torch.randn(5000).bfloat16()}
    old = copied(state)
    snapshot = Snapshot(state)
    state |= tuned(state)
    save_file(old, tmp_path / "old.safetensors")
    save_file(state, tmp_path / "new.safetensors")
    data = taken(snapshot)
    with Delta.from_bytes(data) as delta:
        assert len(delta.tensors[0].chunks) > 1
    advance(snapshot, data)
    with snapshot.diff() as delta:
        assert delta.nnz == 0
