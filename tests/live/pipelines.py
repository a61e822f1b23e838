"""Helpers: pipelines of diffusers at toy size, with the parts of Stable Diffusion 1, XL, 3 and of Flux."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
)

_ABSENT = ("tokenizer", "tokenizer_2", "tokenizer_3", "feature_extractor", "safety_checker")


def _clip(cls: Any = CLIPTextModel, *, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = CLIPTextConfig(
        hidden_size=32,
        intermediate_size=37,
        num_attention_heads=4,
        num_hidden_layers=2,
        vocab_size=100,
        bos_token_id=0,
        eos_token_id=1,
        projection_dim=32,
    )
    return cls(config).eval()


def _t5() -> Any:
    torch.manual_seed(2)
    return T5EncoderModel(
        T5Config(vocab_size=100, d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4)
    )


def _unet(**more: Any) -> Any:
    torch.manual_seed(3)
    return diffusers.UNet2DConditionModel(
        block_out_channels=(32, 64),
        layers_per_block=1,
        sample_size=8,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        **{"cross_attention_dim": 32, **more},
    )


def _vae(n_channels: int = 4) -> Any:
    torch.manual_seed(4)
    return diffusers.AutoencoderKL(
        block_out_channels=(32, 64),
        latent_channels=n_channels,
        norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )


def _stable_diffusion() -> Any:
    return diffusers.StableDiffusionPipeline(
        unet=_unet(),
        vae=_vae(),
        text_encoder=_clip(),
        scheduler=diffusers.DDIMScheduler(clip_sample=False, steps_offset=1),
        tokenizer=None,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _stable_diffusion_xl() -> Any:
    unet = _unet(
        cross_attention_dim=64,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=80,
        use_linear_projection=True,
    )
    return diffusers.StableDiffusionXLPipeline(
        unet=unet,
        vae=_vae(),
        text_encoder=_clip(),
        text_encoder_2=_clip(CLIPTextModelWithProjection, seed=1),
        scheduler=diffusers.DDIMScheduler(clip_sample=False, steps_offset=1),
        tokenizer=None,
        tokenizer_2=None,
    )


def _stable_diffusion_3() -> Any:
    torch.manual_seed(3)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=64,
        out_channels=4,
    )
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer,
        vae=_vae(),
        text_encoder=_clip(CLIPTextModelWithProjection),
        text_encoder_2=_clip(CLIPTextModelWithProjection, seed=1),
        text_encoder_3=_t5(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        tokenizer=None,
        tokenizer_2=None,
        tokenizer_3=None,
    )


def _flux() -> Any:
    torch.manual_seed(3)
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=[4, 4, 8],
    )
    return diffusers.FluxPipeline(
        transformer=transformer,
        vae=_vae(1),
        text_encoder=_clip(),
        text_encoder_2=_t5(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        tokenizer=None,
        tokenizer_2=None,
    )


KINDS: dict[str, Callable[[], Any]] = {
    "sd": _stable_diffusion,
    "sdxl": _stable_diffusion_xl,
    "sd3": _stable_diffusion_3,
    "flux": _flux,
}


def parts_of(pipeline: Any) -> dict[str, torch.nn.Module]:
    """Return the models of a pipeline by name."""
    return {n: m for n, m in pipeline.components.items() if isinstance(m, torch.nn.Module)}


def state(pipeline: Any) -> dict[str, torch.Tensor]:
    """Return copies of all tensors of a pipeline, by the part's name and the tensor's."""
    return {
        f"{part}/{name}": tensor.detach().clone()
        for part, module in parts_of(pipeline).items()
        for name, tensor in module.state_dict().items()
    }


def saved(pipeline: Any, folder: Path, **options: Any) -> Path:
    """Save a pipeline; return the folder."""
    pipeline.save_pretrained(folder, **options)
    return folder


def absent(folder: Path) -> dict[str, None]:
    """Return the options with which diffusers loads a pipeline that has no tokenizers."""
    known = json.loads((folder / "model_index.json").read_text())
    return dict.fromkeys(name for name in _ABSENT if name in known)


def loaded(folder: Path, **options: Any) -> Any:
    """Load a pipeline from a folder."""
    pipeline: Any = diffusers.DiffusionPipeline
    return pipeline.from_pretrained(folder, **absent(folder), **options)
