"""Receivers for engines: versions reach a model of another layout whole, once, and verified."""

from __future__ import annotations

import importlib
import math
import sys
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from channel.engines import N_RANKS, FusedModel, advance, checkpoint, save
from channel.parties import MemoryStore
from safetensors.torch import save_file

import sparsedelta
from sparsedelta.channel.layout import object_name
from sparsedelta.channel.receivers import sglang
from sparsedelta.channel.receivers import vllm as vllm_receiver
from sparsedelta.channel.receivers.mirror import Changed, Mirror
from sparsedelta.errors import BadVersion, Behind, StructureMismatch, Uncertain
from sparsedelta.live.readback import find_unloaded


class Trainer:
    """Publishes weights: version v holds the weights after step v."""

    def __init__(self, store: Any) -> None:
        self.channel = sparsedelta.Channel(store)
        self.state = checkpoint(1)
        self.publisher = sparsedelta.Publisher(self.channel, self.state, anchor_ratio=None)
        self.step = 1
        self.publisher.publish(1).result()

    def publish(self, n: int = 1) -> None:
        for _ in range(n):
            self.step += 1
            advance(self.state, self.step)
            self.publisher.publish(self.step).result()


class Engine:
    """A mirror and the model that it feeds; fails when a test says so."""

    def __init__(self, channel: sparsedelta.Channel, folder: Path) -> None:
        self.model = FusedModel()
        self.mirror = Mirror(channel, folder)
        self.calls: list[str] = []
        self.fails: set[str] = set()

    def whole(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._load("whole", [*tensors.items()])

    def changed(self, changed: Sequence[Changed]) -> None:
        for one in changed:
            assert torch.equal(one.tensor.view(-1)[one.index.long()], one.values)
        self._load("changed", [(one.name, one.tensor) for one in changed])

    def _load(self, call: str, weights: list[tuple[str, torch.Tensor]]) -> None:
        self.calls.append(call)
        if call in self.fails:
            self.model.load_weights(weights[:1])
            raise RuntimeError("out of memory")
        self.model.load_weights(weights)

    def deliver(self, version: int | None = None) -> Any:
        return self.mirror.deliver(version, whole=self.whole, changed=self.changed)


@pytest.fixture
def trainer() -> Trainer:
    return Trainer(MemoryStore())


@pytest.fixture
def engine(trainer: Trainer, tmp_path: Path) -> Engine:
    return Engine(trainer.channel, save(tmp_path / "base", 1))


def test_all_tensors_first_then_the_changed(trainer: Trainer, engine: Engine) -> None:
    report = engine.deliver()
    assert (report.version, report.n_versions) == (1, 0)  # the checkpoint is version 1
    trainer.publish(3)
    engine.deliver(2)
    assert engine.model.is_at(2)
    assert engine.deliver().n_versions == 2
    assert engine.model.is_at(4)
    assert engine.calls == ["whole", "changed", "changed"]
    assert engine.model.loaded[-1] == {"q.weight", "k.weight", "v.weight", "norm"}


def test_a_version_is_loaded_once(trainer: Trainer, engine: Engine) -> None:
    trainer.publish()
    for _ in range(3):
        assert engine.deliver(2).version == 2
    assert engine.calls == ["whole"]
    assert engine.mirror.version == 2


def test_an_older_version_is_loaded_whole(trainer: Trainer, engine: Engine) -> None:
    trainer.publish(2)
    engine.deliver()
    engine.deliver(2)
    assert engine.model.is_at(2)
    assert engine.calls == ["whole", "whole"]


def test_changed_elements_that_fail_are_followed_by_all_tensors(
    trainer: Trainer, engine: Engine
) -> None:
    engine.deliver()
    trainer.publish()
    engine.fails = {"changed"}
    assert engine.deliver().version == 2
    assert engine.model.is_at(2)
    assert engine.calls == ["whole", "changed", "whole"]


def test_an_engine_that_fails_is_uncertain_until_all_is_loaded(
    trainer: Trainer, engine: Engine
) -> None:
    engine.deliver()
    trainer.publish()
    engine.fails = {"changed", "whole"}
    with pytest.raises(Uncertain, match=r"failed to load version 2.*out of memory"):
        engine.deliver()
    assert engine.mirror.version is None
    trainer.publish()
    engine.fails = {"changed"}
    engine.deliver()
    assert engine.model.is_at(3)
    assert engine.calls[-1] == "whole"
    assert engine.calls.count("changed") == 1


def test_an_interrupted_loader_leaves_the_engine_uncertain(
    trainer: Trainer, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.deliver()
    trainer.publish()
    with monkeypatch.context() as patched:
        patched.setattr(engine, "_load", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            engine.deliver()
    assert engine.mirror.version is None
    engine.deliver()
    assert engine.calls == ["whole", "whole"]
    assert engine.model.is_at(2)


def test_behind_and_bad_versions_change_nothing(tmp_path: Path) -> None:
    store = MemoryStore()
    trainer = Trainer(store)
    engine = Engine(trainer.channel, save(tmp_path / "base", 1))
    engine.deliver()
    with pytest.raises(Behind, match="version 2 is not published"):
        engine.deliver(2)
    trainer.publish()
    entry = trainer.channel.entry(2)
    assert entry.delta
    name = object_name("deltas", 2, entry.delta)
    good = store.objects[name]
    store.objects[name] = good[:-1] + bytes([good[-1] ^ 1])
    with pytest.raises(BadVersion, match="damaged"):
        engine.deliver(2)
    assert (engine.mirror.version, engine.calls) == (1, ["whole"])
    assert engine.model.is_at(1)
    store.objects[name] = good
    engine.deliver(2)
    assert engine.model.is_at(2)


def test_a_checkpoint_of_another_model_is_refused(trainer: Trainer, tmp_path: Path) -> None:
    folder = save(tmp_path / "other", 1)
    state = {**checkpoint(1), "norm": torch.zeros(31, dtype=torch.bfloat16)}
    save_file(state, folder / "model.safetensors")
    engine = Engine(trainer.channel, folder)
    with pytest.raises(StructureMismatch, match="norm"):
        engine.deliver()
    assert engine.calls == []
    save_file({"q.weight": state["q.weight"]}, folder / "second.safetensors")
    with pytest.raises(StructureMismatch, match=r"'q.weight' is in 'model.*' and in 'second"):
        Mirror(trainer.channel, folder)


# vLLM


@dataclass
class Patch:
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    values: torch.Tensor
    indices: torch.Tensor


class StubFactory:
    """Stands in for ``WeightTransferEngineFactory``."""

    def __init__(self) -> None:
        self.engines: dict[str, tuple[str, str]] = {}

    def register_engine(self, name: str, module: str, class_name: str) -> None:
        if name in self.engines:
            raise ValueError(f"Weight transfer engine '{name}' is already registered.")
        self.engines[name] = module, class_name

    def create_engine(self, config: Any, vllm_config: Any, device: Any, model: Any) -> Any:
        module, class_name = self.engines[config.backend]
        return getattr(importlib.import_module(module), class_name)(
            config, vllm_config, device, model
        )


def stub_patches(
    model: FusedModel, patches: Sequence[Patch], *, validate_unique_indices: bool = True
) -> None:
    """Stand in for ``load_checkpoint_weight_patches``: NaN means unchanged."""
    original = torch.Tensor.copy_

    def copy(to: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        return torch.where(torch.isnan(source), to, source, out=to)

    for patch in patches:
        flat = torch.full((math.prod(patch.shape),), float("nan"), dtype=patch.dtype)
        flat[patch.indices.long()] = patch.values
        torch.Tensor.copy_ = copy  # type: ignore[method-assign, assignment]
        try:
            model.load_weights([(patch.name, flat.view(patch.shape))])
        finally:
            torch.Tensor.copy_ = original  # type: ignore[method-assign]


@pytest.fixture(params=["stub", "real"])
def factory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return vLLM's factory of engines: its own if vLLM can be imported, and a stub with the signatures of 0.33.0."""
    if request.param == "real":
        pytest.importorskip("vllm.distributed.weight_transfer.factory")
        real = importlib.import_module("vllm.distributed.weight_transfer.factory")
        monkeypatch.setattr(
            real.WeightTransferEngineFactory,
            "_registry",
            dict(real.WeightTransferEngineFactory._registry),
        )
        return real.WeightTransferEngineFactory
    stub = StubFactory()
    parts: dict[str, dict[str, Any]] = {
        "distributed.weight_transfer.factory": {"WeightTransferEngineFactory": stub},
        "model_executor.model_loader.reload": {
            "record_metadata_for_reloading": lambda model: None,
            "initialize_layerwise_reload": lambda model: None,
            "finalize_layerwise_reload": lambda model, config: None,
        },
        "model_executor.model_loader.checkpoint_weight_patch": {
            "CheckpointWeightPatch": Patch,
            "load_checkpoint_weight_patches": stub_patches,
        },
    }
    for path, members in parts.items():
        names = ["vllm"]
        for part in path.split("."):
            names.append(f"{names[-1]}.{part}")
        for name in names:
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        sys.modules[names[-1]].__dict__.update(members)
    return stub


class Worker:
    """What a worker of vLLM does with a weight transfer engine (``v1/worker/gpu_worker.py``)."""

    def __init__(self, factory: Any, rank: int, folder: Path) -> None:
        reload = importlib.import_module("vllm.model_executor.model_loader.reload")
        with torch.device("cpu"):
            self.model = FusedModel(rank)
        reload.record_metadata_for_reloading(self.model)
        config = SimpleNamespace(backend=vllm_receiver.BACKEND)
        model_config = SimpleNamespace(model=str(folder), dtype=torch.bfloat16)
        vllm_config = SimpleNamespace(model_config=model_config, parallel_config=None)
        self.engine = factory.create_engine(config, vllm_config, torch.device("cpu"), self.model)

    def init(self, info: dict[str, Any]) -> None:
        self.engine.init_transfer_engine(self.engine.parse_init_info(info))

    def update(self, info: dict[str, Any]) -> None:
        try:
            self.engine.start_weight_update()
            self.engine.update_weights(info)
        except BaseException:
            self.engine.reset_weight_update_target()
            raise
        self.engine.finish_weight_update()
        self.engine.reset_weight_update_target()


@pytest.fixture
def workers(factory: Any, tmp_path: Path) -> list[Worker]:
    folder = save(tmp_path / "base", 1)
    vllm_receiver.register()
    vllm_receiver.register()  # each process loads plugins, some twice
    return [Worker(factory, rank, folder) for rank in range(N_RANKS)]


def test_vllm_workers_follow(workers: list[Worker], tmp_path: Path) -> None:
    trainer = Trainer(tmp_path / "channel")
    for worker in workers:
        worker.init({"channel": str(tmp_path / "channel")})
    for version in (1, 2, 4, 4, 3):
        trainer.publish(max(0, version - trainer.step))
        for worker in workers:
            worker.update({"version": version})
            assert worker.engine.version == version
            assert worker.model.is_at(version), version
    for worker in workers:
        n_loads = len(worker.model.loaded)
        worker.update({"version": 3})
        assert len(worker.model.loaded) == n_loads
        worker.engine.shutdown()
        assert worker.engine.version is None


def test_vllm_gets_changes_that_patches_cannot_hold(workers: list[Worker], tmp_path: Path) -> None:
    """A NaN, which means "unchanged" in a patch, arrives."""
    trainer = Trainer(tmp_path / "channel")
    worker = workers[0]
    worker.init({"channel": str(tmp_path / "channel")})
    worker.update({"version": 1})
    trainer.state["norm"][3] = float("nan")
    trainer.publisher.publish(2).result()
    worker.update({"version": 2})
    norm = worker.model.get_parameter("rest.norm")
    assert norm[3].isnan() and norm.isnan().sum() == 1  # noqa: PT018


def test_vllm_gets_only_what_has_changed(workers: list[Worker], tmp_path: Path) -> None:
    trainer = Trainer(tmp_path / "channel")
    worker = workers[1]
    worker.init({"channel": str(tmp_path / "channel")})
    worker.update({"version": 1})
    with torch.no_grad():  # to see which elements are written
        worker.model.get_parameter("rest.norm").fill_(7)
    trainer.publish()
    worker.update({"version": 2})
    norm = worker.model.get_parameter("rest.norm")
    touched = norm != norm.new_tensor(7)
    assert 0 < touched.sum() <= 3
    assert torch.equal(norm[touched], checkpoint(2)["norm"][touched])


def spoil(model: FusedModel, part: str) -> None:
    """Let the loader of a part of the model write wrong values, as a faulty memory or kernel would."""
    param: Any = model.get_parameter("rest.norm") if part == "norm" else model.qkv.weight
    real = getattr(param, "weight_loader", lambda param, loaded: param.data.copy_(loaded))

    def faulty(param: Any, loaded: torch.Tensor, *place: str) -> None:
        before = param.detach().clone()
        real(param, loaded, *place)
        wrong = (param.view(torch.int16) != before.view(torch.int16)).nonzero()
        if len(wrong) and (not place or place[0] == part):
            param.data[tuple(wrong[0])] += 1

    param.__dict__["weight_loader"] = faulty


@pytest.mark.parametrize("part", ["norm", "v"])
def test_vllm_reads_back(
    workers: list[Worker], tmp_path: Path, caplog: pytest.LogCaptureFixture, part: str
) -> None:
    """Values that do not arrive are noticed, and all tensors are loaded."""
    trainer = Trainer(tmp_path / "channel")
    worker = workers[1]
    worker.init({"channel": str(tmp_path / "channel")})
    worker.update({"version": 1})
    trainer.publish(2)
    spoil(worker.model, part)
    worker.update({"version": 2})
    name = "norm" if part == "norm" else "v.weight"
    assert f"it holds other values of tensor '{name}' than it has loaded" in caplog.text
    assert worker.model.loaded[-1] == set(checkpoint(1))


def test_vllm_errors(workers: list[Worker], tmp_path: Path) -> None:
    worker = workers[0]
    with pytest.raises(RuntimeError, match="not initialized"):
        worker.update({"version": 1})
    with pytest.raises(ValueError, match="invalid init_info"):
        worker.init({"url": "x"})
    with pytest.raises(ValueError, match="invalid update_info"):
        worker.update({})
    worker.engine.model_config.model = "org/model"
    with pytest.raises(ValueError, match="'org/model' is not a folder"):
        worker.init({"channel": "x"})
    worker.init({"channel": str(tmp_path / "none"), "checkpoint": str(tmp_path / "base")})
    with pytest.raises(Behind, match="no version"):
        worker.update({"version": 1})
    assert worker.model.loaded == []


def test_a_vllm_without_engines_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its plugins must not raise, for that would end it."""
    monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))
    monkeypatch.setitem(sys.modules, "vllm.distributed", None)
    vllm_receiver.register()


def test_vllm_finds_the_plugin() -> None:
    text = (Path(sparsedelta.__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    points = tomllib.loads(text)["project"]["entry-points"]["vllm.general_plugins"]
    module, _, function = points["sparsedelta"].partition(":")
    assert getattr(importlib.import_module(module), function) is vllm_receiver.register


# SGLang


@pytest.fixture(params=["stub", "real"])
def update(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return how a worker of SGLang hands tensors to a custom loader: its own code, or the same three lines."""
    if request.param == "stub":

        def stub(model: FusedModel, named_tensors: Any) -> None:
            module, _, name = sglang.LOADER.rpartition(".")
            getattr(importlib.import_module(module), name)(model, named_tensors)

        return stub
    name = "sglang.srt.model_executor.model_runner_components.weight_updater"
    pytest.importorskip("sglang")
    importlib.import_module("transformers.tokenization_utils_base")  # else SGLang imports a circle
    real = importlib.import_module(name)
    # What a server publishes when it starts.
    monkeypatch.setattr(real, "get_model", lambda: SimpleNamespace(weight_cache_mode="off"))
    monkeypatch.setattr(real, "get_parallel", lambda: SimpleNamespace(tp_rank=0))

    def updated(model: FusedModel, named_tensors: Any) -> None:
        updater = object.__new__(real.WeightUpdater)
        members = {
            "get_model": lambda: model,
            "custom_weight_loaders": [sglang.LOADER],
            "device": "cpu",
        }
        for key, value in members.items():
            object.__setattr__(updater, key, value)
        done, message = updater.update_weights_from_tensor(named_tensors, load_format=sglang.LOADER)
        assert done, message

    return updated


@pytest.mark.parametrize("whole", [False, True])
def test_sglang_workers_follow(update: Any, tmp_path: Path, *, whole: bool) -> None:
    channel, folder = str(tmp_path / "channel"), save(tmp_path / "base", 1)
    trainer = Trainer(channel)
    models = [FusedModel(rank) for rank in range(N_RANKS)]
    for version in (1, 2, 4, 4, 3):
        trainer.publish(max(0, version - trainer.step))
        name, value = sglang.request(channel, version, checkpoint=folder, whole=whole)
        for model in models:
            update(model, [(name, torch.tensor(value))])
            assert model.is_at(version), version
    for model in models:
        # Changed tensors are loaded, and then compared by the same loader.
        sizes = [5, 5, 5, 5] if whole else [5, 4, 4, 4, 4, 5]
        assert [len(loaded) for loaded in model.loaded] == sizes


def test_sglang_requests_are_checked(tmp_path: Path) -> None:
    channel, folder = str(tmp_path / "channel"), save(tmp_path / "base", 1)
    Trainer(channel)
    with pytest.raises(Behind, match="no version 2"):
        sglang.request(channel, 2, checkpoint=folder)
    model = FusedModel()
    for wrong in ([], [("w", torch.zeros(3))], [("{}", torch.tensor(1))]):
        with pytest.raises(ValueError, match="request"):
            sglang.load(model, wrong)
    assert model.loaded == []


@pytest.mark.parametrize("part", ["norm", "v"])
def test_sglang_reads_back(
    update: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, part: str
) -> None:
    channel, folder = str(tmp_path / "channel"), save(tmp_path / "base", 1)
    trainer, model = Trainer(channel), FusedModel(1)
    trainer.publish(2)
    for version in (1, 2, 3):
        if version == 2:
            spoil(model, part)
        name, value = sglang.request(channel, version, checkpoint=folder)
        update(model, [(name, torch.tensor(value))])
    name = "norm" if part == "norm" else "v.weight"
    assert f"it holds other values of tensor '{name}' than it has loaded" in caplog.text


def test_reading_back_writes_nothing() -> None:
    model = FusedModel()
    model.load_weights(checkpoint(1).items())
    found = find_unloaded(model, model.load_weights, checkpoint(1).items(), nan=False)
    assert found is None
    assert find_unloaded(model, model.load_weights, checkpoint(2).items(), nan=False) == "q.weight"
    assert model.is_at(1)
    model.get_parameter("rest.scale").data[2] = -0.0
    last = [("scale", torch.arange(4.0).index_fill(0, torch.tensor(2), 0.0))]
    assert find_unloaded(model, model.load_weights, last, nan=False) == "scale"  # bits, not values


def test_a_loader_that_cannot_be_read_back(caplog: pytest.LogCaptureFixture) -> None:
    model = FusedModel()

    def load(weights: Any) -> None:
        for _, tensor in weights:
            model.get_parameter("rest.scale").data.index_copy_(0, torch.arange(4), tensor)

    assert find_unloaded(model, load, [("scale", torch.ones(4))], nan=False) is None
    assert "cannot be read back" in caplog.text
    assert "index_copy_" in caplog.text
    assert not model.get_parameter("rest.scale").any()
