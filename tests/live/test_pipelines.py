"""Deltas of pipelines of diffusers, on the pipeline and on its models."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from live.live_helpers import copied, same, tuned
from torch import nn

import sparsedelta
from sparsedelta import Delta, DeltaBank, Snapshot, load_model
from sparsedelta.errors import AlreadyApplied, BaseMismatch, StructureMismatch

pytest.importorskip("diffusers")
from live import pipelines

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit:UserWarning"),
]
KINDS = sorted(pipelines.KINDS)


def tune(pipeline: Any, *parts: str) -> None:
    """Change parameters of some parts of a pipeline; of all parts, if none is named."""
    found = pipelines.parts_of(pipeline)
    for part in parts or found:
        names = [name for name, _ in found[part].named_parameters()]
        found[part].load_state_dict(tuned(found[part].state_dict(), *names))


class Case:
    """A pipeline, its state before and after a change of some parts, and the delta."""

    def __init__(self, kind: str, path: Path, *changed: str, **options: Any) -> None:
        pipeline = pipelines.KINDS[kind]()
        if options.get("variant"):
            pipeline.to(torch.float16)
        self.path = path
        self.folder = pipelines.saved(pipeline, path / "base", **options)
        self.base = pipelines.state(pipeline)
        tune(pipeline, *changed)
        self.target_folder = pipelines.saved(pipeline, path / "target", **options)
        self.target = pipelines.state(pipeline)
        with sparsedelta.diff(self.folder, self.target_folder) as delta:
            delta.save(path / "d.sd")
        self.delta: Delta = sparsedelta.load(path / "d.sd")

    def load(self, **options: Any) -> Any:
        return pipelines.loaded(self.folder, **options)

    def load_target(self, **options: Any) -> Any:
        absent = pipelines.absent(self.folder)
        return load_model(self.path / "d.sd", base=self.folder, options=absent | options)


@pytest.fixture(scope="module", params=KINDS)
def case(request: pytest.FixtureRequest, tmp_path_factory: Any) -> Iterator[Case]:
    made = Case(request.param, tmp_path_factory.mktemp(request.param))
    yield made
    made.delta.close()


def test_a_pipeline(case: Case) -> None:
    pipeline = case.load()
    case.delta.apply_(pipeline, verify="full")
    assert same(pipelines.state(pipeline), case.target)
    with pytest.raises(AlreadyApplied):
        case.delta.apply_(pipeline)
    case.delta.revert_(pipeline, verify="full")
    assert same(pipelines.state(pipeline), case.base)
    with case.delta.applied(pipeline):
        assert same(pipelines.state(pipeline), case.target)
    assert same(pipelines.state(pipeline), case.base)


def test_each_of_its_models(case: Case) -> None:
    """Two text encoders may have the same names and shapes; the digests tell one from the other."""
    pipeline = case.load()
    for part in pipelines.parts_of(pipeline).values():
        case.delta.apply_(part, verify="full")
    assert same(pipelines.state(pipeline), case.target)
    for part in pipelines.parts_of(pipeline).values():
        case.delta.revert_(part)
    assert same(pipelines.state(pipeline), case.base)


def test_load_model(case: Case) -> None:
    pipeline = case.load_target()
    assert type(pipeline) is type(case.load())
    assert same(pipelines.state(pipeline), case.target)


def data_of(delta: Delta, path: Path) -> bytes:
    """Return the bytes of a delta's file."""
    with delta:
        delta.save(path, overwrite=True)
    return path.read_bytes()


def test_the_target_of_diff(case: Case, tmp_path: Path) -> None:
    """The delta has the bytes of that between the saved folders."""
    delta = sparsedelta.diff(case.folder, case.load_target())
    assert data_of(delta, tmp_path / "d.sd") == (case.path / "d.sd").read_bytes()


def test_a_snapshot(case: Case, tmp_path: Path) -> None:
    """Two deltas in a row have the bytes of those between the saved folders."""
    pipeline = case.load()
    snapshot = Snapshot(pipeline, folder=case.folder)
    case.delta.apply_(pipeline)
    assert data_of(snapshot.diff(), tmp_path / "1.sd") == (case.path / "d.sd").read_bytes()
    snapshot.advance(tmp_path / "1.sd")
    tune(pipeline, "vae")
    third = shutil.copytree(case.target_folder, tmp_path / "third")
    pipeline.vae.save_pretrained(tmp_path / "vae")
    weights = "vae/diffusion_pytorch_model.safetensors"
    shutil.copy(tmp_path / weights, third / weights)
    expected = data_of(sparsedelta.diff(case.target_folder, third), tmp_path / "expected.sd")
    assert data_of(snapshot.diff(), tmp_path / "2.sd") == expected


def test_a_pipeline_without_its_folder(tmp_path: Path) -> None:
    case = Case("sd", tmp_path, "unet")
    pipeline = case.load()
    for call in (
        lambda: sparsedelta.diff(pipeline, case.folder),
        lambda: sparsedelta.diff(pipeline, pipeline),
        lambda: Snapshot(pipeline),
    ):
        with pytest.raises(StructureMismatch, match=r"several models.* give a folder of this"):
            call()


def test_diff_of_a_pipeline_that_lacks_a_part(tmp_path: Path) -> None:
    case = Case("sd", tmp_path, "unet")
    pipeline = case.load(vae=None)
    case.delta.apply_(pipeline)
    with pytest.raises(StructureMismatch, match=r"folder 'vae'.* no such part; .*strict=False"):
        sparsedelta.diff(case.folder, pipeline)
    delta = sparsedelta.diff(case.folder, pipeline, strict=False)
    assert data_of(delta, tmp_path / "other.sd") == (tmp_path / "d.sd").read_bytes()
    with pytest.raises(StructureMismatch, match="no such part"):
        sparsedelta.diff(case.folder / "vae", pipeline, strict=False)


def test_diff_with_two_variants(tmp_path: Path) -> None:
    """It is not clear which variant the pipeline replaces, until one of them is left out."""
    half = pipelines.KINDS["sd"]().to(torch.float16)
    folder = pipelines.saved(half, tmp_path / "base", variant="fp16")
    pipeline = pipelines.KINDS["sd"]()
    pipelines.saved(pipeline, folder)
    one = shutil.copytree(folder, tmp_path / "one", ignore=shutil.ignore_patterns("*.fp16.*"))
    tune(pipeline, "unet")
    plain = data_of(sparsedelta.diff(one, pipeline), tmp_path / "d.sd")
    with pytest.raises(StructureMismatch, match=r"fp16.*exclude"):
        sparsedelta.diff(folder, pipeline)
    delta = sparsedelta.diff(folder, pipeline, exclude=["*.fp16.safetensors"])
    assert data_of(delta, tmp_path / "d.sd") == plain


def test_a_bank_on_a_pipeline_and_on_a_model_of_it(tmp_path: Path) -> None:
    first, second = (Case("sd3", tmp_path / name, name) for name in ("text_encoder", "transformer"))
    pipeline = first.load()
    bank = DeltaBank(pipeline)
    bank.add("text", tmp_path / "text_encoder/d.sd")
    bank.add("image", tmp_path / "transformer/d.sd")
    for name, expected in (("text", first.target), ("image", second.target), (None, first.base)):
        bank.activate(name)
        assert same(pipelines.state(pipeline), expected)
    bank = DeltaBank(pipeline.transformer)
    bank.add("image", tmp_path / "transformer/d.sd")
    bank.activate("image")
    assert same(pipelines.state(pipeline), second.target)


def test_a_model_that_was_replaced(tmp_path: Path) -> None:
    """The bank writes to the model that the pipeline has now."""
    case = Case("sd", tmp_path, "unet")
    pipeline = case.load()
    bank = DeltaBank(pipeline)
    bank.add("one", tmp_path / "d.sd")
    pipeline.unet = case.load().unet
    bank.activate("one")
    assert same(pipelines.state(pipeline), case.target)


def test_a_compiled_model(tmp_path: Path) -> None:
    case = Case("sd", tmp_path, "unet")
    pipeline = case.load()
    plain = pipeline.unet
    pipeline.unet = torch.compile(plain)
    case.delta.apply_(pipeline)
    assert same({f"unet/{n}": t for n, t in plain.state_dict().items()}, unet_of(case.target))
    case.delta.revert_(pipeline.unet)
    assert same({f"unet/{n}": t for n, t in plain.state_dict().items()}, unet_of(case.base))


def unet_of(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in state.items() if name.startswith("unet/")}


def test_a_part_that_was_not_loaded(tmp_path: Path) -> None:
    case = Case("sd", tmp_path)
    pipeline = case.load(vae=None)
    before = pipelines.state(pipeline)
    with pytest.raises(StructureMismatch, match=r"of 'vae/.*has no part of this folder.*names="):
        case.delta.apply_(pipeline)
    assert same(pipelines.state(pipeline), before)
    names = {row.key: None for row in case.delta.tensors if row.file.startswith("vae/")}
    case.delta.apply_(pipeline, names=names)
    expected = {n: t for n, t in case.target.items() if not n.startswith("vae/")}
    assert same(pipelines.state(pipeline), expected)
    with pytest.warns(
        UserWarning, match="tensors that the returned pipeline does not hold.* of 'vae/"
    ):
        case.load_target(vae=None)


def test_two_models_with_the_same_weights(tmp_path: Path) -> None:
    """It is not clear which one a text encoder is; the pipeline says it."""
    pipeline = pipelines.KINDS["sd3"]()
    pipeline.text_encoder_2.load_state_dict(pipeline.text_encoder.state_dict())
    base = pipelines.saved(pipeline, tmp_path / "base")
    tune(pipeline, "text_encoder_2")
    target = pipelines.state(pipeline)
    with sparsedelta.diff(base, pipelines.saved(pipeline, tmp_path / "target")) as delta:
        live = pipelines.loaded(base)
        with pytest.raises(
            StructureMismatch, match=r"'text_encoder' or of 'text_encoder_2'.*pipeline"
        ):
            delta.apply_(live.text_encoder)
        delta.apply_(live)
        assert same(pipelines.state(live), target)


def test_a_model_of_another_pipeline(tmp_path: Path) -> None:
    case = Case("sd", tmp_path, "unet")
    other = nn.Linear(3, 4)
    with pytest.raises(StructureMismatch, match="is not in the model"):
        case.delta.apply_(other)
    changed = case.load()
    tune(changed, "vae", "unet")
    tune(changed, "unet")
    nn.init.zeros_(changed.unet.conv_in.weight)
    before = pipelines.state(changed)
    with pytest.raises(BaseMismatch):
        case.delta.apply_(changed)
    assert same(pipelines.state(changed), before)


def test_the_fp16_variant(tmp_path: Path) -> None:
    case = Case("sd", tmp_path, variant="fp16")
    pipeline = case.load(variant="fp16", torch_dtype=torch.float16)
    assert pipeline.unet.dtype == torch.float16
    with case.delta.applied(pipeline, verify="full"):
        assert same(pipelines.state(pipeline), case.target)
    assert same(pipelines.state(case.load_target()), case.target)


def test_a_folder_with_both_variants(tmp_path: Path) -> None:
    """The model's dtype tells which files it was loaded from."""
    halves: dict[str, Any] = {}
    wholes: dict[str, Any] = {}
    for name in ("base", "target"):
        for dtype, states, variant in (
            (torch.float16, halves, "fp16"),
            (torch.float32, wholes, None),
        ):
            pipeline = pipelines.KINDS["sd"]()
            if name == "target":
                nn.init.zeros_(pipeline.unet.conv_in.weight)
            pipeline.to(dtype)
            pipelines.saved(pipeline, tmp_path / name, variant=variant)
            states[name] = pipelines.state(pipeline)
    with sparsedelta.diff(tmp_path / "base", tmp_path / "target") as delta:
        delta.save(tmp_path / "d.sd")
        whole = pipelines.loaded(tmp_path / "base")
        half = pipelines.loaded(tmp_path / "base", variant="fp16", torch_dtype=torch.float16)
        for live, expected in ((whole, wholes["target"]), (half, halves["target"])):
            delta.apply_(live)
            assert same(pipelines.state(live), expected)
    absent = pipelines.absent(tmp_path / "base")
    for options, expected in ((absent, wholes), (absent | {"variant": "fp16"}, halves)):
        loaded = load_model(tmp_path / "d.sd", base=tmp_path / "base", options=options)
        assert same(pipelines.state(loaded), expected["target"])


def test_a_lora_fused_into_the_unet(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    pipeline = pipelines.KINDS["sd"]()
    base = pipelines.saved(pipeline, tmp_path / "base")
    pipeline.unet.add_adapter(
        peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    )
    pipeline.unet.fuse_lora()
    pipeline.unet.unload_lora()
    fused = pipelines.state(pipeline)
    target = pipelines.saved(pipeline, tmp_path / "target")
    with sparsedelta.diff(base, target) as delta:
        changed = [row for row in delta.tensors if not row.is_copied]
        assert {row.file for row in changed} == {"unet/diffusion_pytorch_model.safetensors"}
        assert all(".to_q." in row.name or ".to_v." in row.name for row in changed)
        live = pipelines.loaded(base)
        before = copied(live.unet.state_dict())
        delta.apply_(live.unet, verify="full")
        assert same(pipelines.state(live), fused)
        delta.revert_(live)
        assert same(live.unet.state_dict(), before)
