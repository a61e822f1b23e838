"""A model of a pipeline of diffusers is trained, and exported against the pipeline's folder."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import sparsedelta
from sift_train import SIFT, FitConfig, export_delta, fit

pytest.importorskip("diffusers")
from live import pipelines
from live.live_helpers import same

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit:UserWarning"),
]


def trained(unet: Any, **options: Any) -> SIFT:
    """Train a UNet for two steps."""
    torch.manual_seed(0)
    sift = SIFT(unet, 0.05, **options)
    optimizer = torch.optim.AdamW(sift.parameters_in_optimizer(), lr=1e-3)
    for _ in range(2):
        output = unet(
            torch.randn(1, 4, 8, 8, dtype=unet.dtype),
            torch.tensor([3]),
            torch.randn(1, 4, 32, dtype=unet.dtype),
        )
        output.sample.float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return sift


def changed_files(delta: Any) -> set[str]:
    return {row.file for row in delta.tensors if not row.is_copied}


def test_a_unet_against_its_pipeline(tmp_path: Path) -> None:
    base = pipelines.saved(pipelines.KINDS["sd"](), tmp_path / "base")
    unet = pipelines.loaded(base).unet
    sift = trained(unet)
    for name, folder in (("own", base / "unet"), ("whole", base)):
        export_delta(unet, tmp_path / f"{name}.sd", sift=sift, base=folder)
    sizes = [(tmp_path / f"{name}.sd").stat().st_size for name in ("own", "whole")]
    weights = base / "unet/diffusion_pytorch_model.safetensors"
    assert sizes[1] < 1.2 * sizes[0] < weights.stat().st_size / 10
    with sparsedelta.load(tmp_path / "whole.sd") as delta:
        assert changed_files(delta) == {"unet/diffusion_pytorch_model.safetensors"}
        assert not [file.path for file in delta.target.side_files if file.stored is not None]
        live = pipelines.loaded(base)
        delta.apply_(live, verify="full")
        assert same(live.unet.state_dict(), unet.state_dict())
        delta.revert_(live.unet)
    sparsedelta.apply(base, tmp_path / "whole.sd", tmp_path / "out")
    assert same(pipelines.loaded(tmp_path / "out").unet.state_dict(), unet.state_dict())


def test_the_kept_target_has_no_links(tmp_path: Path) -> None:
    base = pipelines.saved(pipelines.KINDS["sd"](), tmp_path / "base")
    unet = pipelines.loaded(base).unet
    kept = tmp_path / "kept"
    export_delta(unet, tmp_path / "d.sd", sift=trained(unet), base=base, save_target=kept)
    shutil.rmtree(base / "vae")
    assert not [path for path in kept.rglob("*") if path.is_symlink()]
    assert same(pipelines.loaded(kept).unet.state_dict(), unet.state_dict())


def test_one_of_several_text_encoders(tmp_path: Path) -> None:
    """Both have the same class, names and shapes; their values tell which one is trained."""
    base = pipelines.saved(pipelines.KINDS["sd3"](), tmp_path / "base")
    model = pipelines.loaded(base).text_encoder_2
    sift = SIFT(model, 0.05)
    optimizer = torch.optim.AdamW(sift.parameters_in_optimizer(), lr=1e-3)
    model(torch.tensor([[0, 5, 1]])).text_embeds.square().mean().backward()
    optimizer.step()
    export_delta(model, tmp_path / "d.sd", sift=sift, base=base)
    with sparsedelta.load(tmp_path / "d.sd") as delta:
        assert changed_files(delta) == {"text_encoder_2/model.safetensors"}
    with sift.reverted():
        shutil.rmtree(base / "text_encoder")
        shutil.copytree(base / "text_encoder_2", base / "text_encoder")
    with pytest.raises(ValueError, match="several models of the class CLIPTextModelWithProjection"):
        export_delta(model, tmp_path / "e.sd", sift=sift, base=base)
    export_delta(model, tmp_path / "e.sd", sift=sift, base=base / "text_encoder")


def test_the_fp16_variant(tmp_path: Path) -> None:
    """The trained files are those of the model's dtype; the others stay as they are."""
    pipeline = pipelines.KINDS["sd"]()
    pipelines.saved(pipeline, tmp_path / "base")
    base = pipelines.saved(pipeline.to(torch.float16), tmp_path / "base", variant="fp16")
    unet = pipelines.loaded(base, variant="fp16", torch_dtype=torch.float16).unet
    export_delta(unet, tmp_path / "d.sd", sift=trained(unet), base=base)
    with sparsedelta.load(tmp_path / "d.sd") as delta:
        assert changed_files(delta) == {"unet/diffusion_pytorch_model.fp16.safetensors"}
        live = pipelines.loaded(base, variant="fp16", torch_dtype=torch.float16)
        delta.apply_(live)
    assert same(live.unet.state_dict(), unet.state_dict())


def test_sharded_weights(tmp_path: Path) -> None:
    pipeline = pipelines.KINDS["sd"]()
    base = pipelines.saved(pipeline, tmp_path / "base", max_shard_size="2MB")
    assert len(list((base / "unet").glob("*.safetensors"))) > 1
    unet = pipelines.loaded(base).unet
    export_delta(unet, tmp_path / "d.sd", sift=trained(unet), base=base)
    sparsedelta.apply(base, tmp_path / "d.sd", tmp_path / "out")
    assert same(pipelines.loaded(tmp_path / "out").unet.state_dict(), unet.state_dict())


def test_fit(tmp_path: Path) -> None:
    base = pipelines.saved(pipelines.KINDS["sd"](), tmp_path / "base")
    unet = pipelines.loaded(base).unet
    torch.manual_seed(0)
    data = [torch.randn(2, 4, 8, 8) for _ in range(3)]

    def loss(model: Any, batch: torch.Tensor) -> torch.Tensor:
        text = torch.zeros(len(batch), 4, 32)
        found: torch.Tensor = model(batch, torch.tensor([3]), text).sample.square().mean()
        return found

    config = FitConfig(sparse_rate=0.01, sparse_module="all-linear", lr=1e-3)
    result = fit(unet, data, loss=loss, base=base, output=tmp_path / "d.sd", config=config)
    assert result.nnz
    with sparsedelta.load(tmp_path / "d.sd") as delta:
        assert changed_files(delta) == {"unet/diffusion_pytorch_model.safetensors"}


def test_without_a_base(tmp_path: Path) -> None:
    """The base is the model with its first weights, although the configuration of diffusers cannot be set."""
    unet = pipelines.KINDS["sd"]().unet
    assert export_delta(unet, tmp_path / "d.sd", sift=trained(unet))


def test_a_wrong_base(tmp_path: Path) -> None:
    base = pipelines.saved(pipelines.KINDS["flux"](), tmp_path / "base")
    unet = pipelines.KINDS["sd"]().unet
    sift = trained(unet)
    with pytest.raises(ValueError, match=r"has no UNet2DConditionModel, only .*transformer"):
        export_delta(unet, tmp_path / "d.sd", sift=sift, base=base)
    other = pipelines.saved(pipelines.KINDS["sd"](), tmp_path / "other")
    torch.nn.init.ones_(unet.conv_in.weight)
    with pytest.raises(ValueError, match="differs from the model before training"):
        export_delta(unet, tmp_path / "d.sd", sift=sift, base=other)
