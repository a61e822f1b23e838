"""A training publishes to a channel; a killed run that resumes continues it."""

from __future__ import annotations

import shutil
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_trainer import Rows, arguments, load
from torch import Tensor
from train_helpers import bert_batches, make_bert, make_inputs, make_net, same_bits, square_loss
from transformers import Trainer

import sparsedelta
from sift_train import FitConfig, PublishCallback, fit
from sift_train.publishing import Publishing
from sparsedelta.channel.sources import CapturedModel
from sparsedelta.errors import BadVersion

LAYERS = ["query", "value", "intermediate"]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_bert(tmp_path / "base", torch.float32)


def settings(folder: Path, **more: Any) -> FitConfig:
    return FitConfig(sparse_module=LAYERS, lr=1e-2, max_steps=6, publish=folder / "channel", **more)


def followed(channel: Path) -> Any:
    """Return the weights of the head, as a follower that joins gets them."""
    out = channel.with_name("followed")
    sparsedelta.Follower(sparsedelta.Channel(channel), out).sync()
    return load_file(out if out.is_file() else out / "model.safetensors")


def are_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(same_bits(one[n], other[n]) for n in one)


def steps(channel: Path) -> list[int | None]:
    return [entry.step for entry in reversed(sparsedelta.Channel(channel).log())]


def test_fit_publishes_some_steps_and_the_last(base: Path, tmp_path: Path) -> None:
    config = settings(tmp_path, publish_every=4)
    (base / "pytorch_model.bin").write_bytes(b"the base's weights in another format")
    fit(
        base, bert_batches(3), output=tmp_path / "d.sd", config=config,
        save_target=tmp_path / "trained",
    )  # fmt: skip
    assert steps(tmp_path / "channel") == [4, 6]
    trained = load_file(tmp_path / "trained" / "model.safetensors")
    assert are_same(followed(tmp_path / "channel"), trained)
    # Versions are folders that an engine can load.
    config_path = tmp_path / "followed" / "config.json"
    assert config_path.read_bytes() == (base / "config.json").read_bytes()
    assert not config_path.with_name("pytorch_model.bin").exists()
    with sparsedelta.load(tmp_path / "d.sd") as delta:
        assert "publish" not in str(delta.info)


def test_the_weights_of_the_best_evaluation_are_published_last(base: Path, tmp_path: Path) -> None:
    scores = iter([2.0, 3.0, 1.0])
    result = fit(
        base, bert_batches(3), output=tmp_path / "d.sd", config=settings(tmp_path, eval_every=2, patience=9),
        save_target=tmp_path / "trained", evaluate=lambda model: next(scores),
    )  # fmt: skip
    assert result.kept_step == 4
    assert steps(tmp_path / "channel") == [1, 2, 3, 4, 5, 6, 4]
    trained = load_file(tmp_path / "trained" / "model.safetensors")
    assert are_same(followed(tmp_path / "channel"), trained)


class Killed(Exception):
    pass


@pytest.mark.parametrize("at", [4, 5])
def test_a_resumed_run_continues_the_channel(base: Path, tmp_path: Path, at: int) -> None:
    """After step 4 the checkpoint is the head; after step 5 it is one version older."""

    def die(report: Any) -> None:
        if report.step == at + 1:
            raise Killed

    given: dict[str, Any] = {
        "output": tmp_path / "d.sd", "run_dir": tmp_path / "run",
        "config": settings(tmp_path, save_every=2), "save_target": tmp_path / "trained",
    }  # fmt: skip
    with pytest.raises(Killed):
        fit(base, bert_batches(3), on_step=die, **given)
    before = len(steps(tmp_path / "channel"))
    assert before == at
    fit(base, bert_batches(3), resume=True, **given)
    entries = sparsedelta.Channel(tmp_path / "channel").log()[::-1]
    assert [entry.step for entry in entries[before:]] == [5, 6]
    assert (entries[before].anchor is not None) == (at == 5)
    trained = load_file(tmp_path / "trained" / "model.safetensors")
    assert are_same(followed(tmp_path / "channel"), trained)


def test_a_store_that_fails_does_not_end_the_training(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = {2}
    publish = sparsedelta.Publisher.publish

    def fails(publisher: Any, step: int) -> Any:
        if step in failing:
            failing.clear()
            raise OSError("the store failed")
        return publish(publisher, step)

    monkeypatch.setattr(sparsedelta.Publisher, "publish", fails)
    fit(base, bert_batches(3), output=tmp_path / "d.sd", config=settings(tmp_path))
    assert steps(tmp_path / "channel") == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("at", "is_lost", "kind", "words"),
    [
        (3, False, OSError, "failed at step 3: the store is down; the delta is 'd.sd': apply it"),
        (4, True, BadVersion, "failed at step 4: version 3 of channel .* the channel was deleted"),
    ],
)
def test_a_training_whose_channel_is_lost_keeps_its_delta(
    at: int, is_lost: bool, kind: type[Exception], words: str,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    publish = sparsedelta.Publisher.publish

    def lose(publisher: Any, step: int) -> Any:
        if step >= at and not is_lost:
            raise ConnectionResetError("the store is down")
        if step == at:
            shutil.rmtree("channel", ignore_errors=True)
        publication = publish(publisher, step)
        publication.result()
        return publication

    monkeypatch.setattr(sparsedelta.Publisher, "publish", lose)
    with pytest.raises(kind, match=words) as failed:
        fit(
            make_net(), make_inputs(6), output="d.sd", loss=square_loss,
            config=FitConfig(sparse_rate=0.2, max_steps=6, publish="channel"),
        )  # fmt: skip
    assert is_lost or type(failed.value) is ConnectionResetError
    with sparsedelta.load("d.sd") as delta:
        assert delta.info["steps"] == 6
    assert sum("the training continues" in record.message for record in caplog.records) == 1
    assert not (tmp_path / "channel" / "versions" / "0000000004.json").exists()


def test_the_trainer_of_transformers_publishes(base: Path, tmp_path: Path) -> None:
    model = load(base)
    callback = PublishCallback(tmp_path / "channel", every=2)
    with pytest.raises(ValueError, match="every is 0"):
        PublishCallback(tmp_path / "channel", every=0)
    args = arguments(tmp_path / "out", max_steps=3)
    Trainer(model, args, train_dataset=Rows(3), callbacks=[callback]).train()
    assert steps(tmp_path / "channel") == [2, 3]
    found = followed(tmp_path / "channel")
    assert all(torch.equal(found[n], t) for n, t in model.state_dict().items() if n in found)


def tree(channel: Path) -> dict[str, bytes]:
    """Return the deltas and anchors of a channel; their names differ by random parts."""
    found = sorted(path for path in channel.rglob("*.sd"))
    return {f"{path.parent.name}/{n}": path.read_bytes() for n, path in enumerate(found)}


def test_the_versions_have_the_bytes_that_a_copy_of_the_model_gives(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[int] = []
    start = Publishing.start

    def begin(publishing: Any, model: Any, step: int, sift: Any, *, with_sift: bool) -> None:
        start(publishing, model, step, sift if with_sift else None)
        kept.append(publishing._publisher._run._source._snapshot.n_bytes)

    for name in ("copy", "elements"):
        monkeypatch.setattr(Publishing, "start", partialmethod(begin, with_sift=name == "elements"))
        (tmp_path / name).mkdir()
        fit(base, bert_batches(3), output=tmp_path / f"{name}.sd", config=settings(tmp_path / name))
    one, other = (tree(tmp_path / name / "channel") for name in ("copy", "elements"))
    assert len(one) == 6
    assert one == other
    assert kept[1] < kept[0] / 10


@pytest.mark.parametrize("way", ["in place", "assigned", "replaced"])
def test_a_change_that_is_not_of_the_training_is_published_in_full(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, way: str
) -> None:
    """Nothing is published that followers could not rebuild, and the training continues."""

    def meddle(report: Any) -> None:
        if report.step in (2, 4):
            model = report_model[0]
            table = model.get_input_embeddings()
            with torch.no_grad():
                if report.step == 2:
                    next(p for n, p in model.named_parameters() if n.endswith("query.weight")).add_(
                        1
                    )
                elif way == "in place":
                    table.weight.add_(1)
                elif way == "assigned":
                    table.weight.data = table.weight.data + 1
                else:
                    table.weight = torch.nn.Parameter(table.weight + 1)

    report_model = [load(base)]
    fit(
        report_model[0], bert_batches(3), output=tmp_path / "d.sd", config=settings(tmp_path),
        on_step=meddle,
    )  # fmt: skip
    channel = tmp_path / "channel"
    # A version on its way may be the one that notices, also the first one.
    assert sum("not trained" in record.message for record in caplog.records) == 2
    assert len([e for e in sparsedelta.Channel(channel).log() if e.anchor]) >= 2
    found = followed(channel)
    state = report_model[0].state_dict()
    assert all(same_bits(found[n], t) for n, t in state.items() if n in found)


def test_a_change_between_the_fingerprint_and_the_anchor_is_published_in_full(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = load(base)
    anchor = CapturedModel.anchor
    meddled: list[int] = []

    def meddles(captured: CapturedModel) -> Any:
        if not meddled:
            meddled.append(1)
            with torch.no_grad():
                model.get_input_embeddings().weight.add_(1)
        return anchor(captured)

    monkeypatch.setattr(CapturedModel, "anchor", meddles)
    fit(model, bert_batches(3), output=tmp_path / "d.sd", config=settings(tmp_path))
    assert sum("not trained" in record.message for record in caplog.records) == 1
    found = followed(tmp_path / "channel")
    state = model.state_dict()
    assert all(same_bits(found[n], t) for n, t in state.items() if n in found)
