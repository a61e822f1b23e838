"""Where transformers does not load what it saves, the export says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from live.model_helpers import make, saved
from safetensors.torch import load_file, save_file

from sift_train import SIFT, FitConfig, export_delta, fit


def forget(model: Any) -> None:
    """Let a model save its norms under names that it does not load, as a faulty conversion does."""
    own = model.save_pretrained

    def save(folder: Path, **options: Any) -> None:
        own(folder, **options)
        path = Path(folder) / "model.safetensors"
        state = {name.replace("norm", "nrm"): tensor for name, tensor in load_file(path).items()}
        save_file(state, path, metadata={"format": "pt"})

    model.save_pretrained = save


@pytest.mark.parametrize("with_base", [False, True])
def test_export_says_it(tmp_path: Path, with_base: bool) -> None:
    model = make("llama", dtype=torch.float32)
    base = saved(model, tmp_path / "base") if with_base else None
    sift = SIFT(model, 0.05)
    assert export_delta(model, tmp_path / "right.sd", sift=sift, base=base) == 0
    forget(model)
    with pytest.raises(
        ValueError, match=r"does not read back the LlamaForCausalLM .*norm.*at random"
    ):
        export_delta(model, tmp_path / "d.sd", sift=sift, base=base)
    assert not (tmp_path / "d.sd").exists()


def test_fit_says_it(tmp_path: Path) -> None:
    model = make("llama", dtype=torch.float32)
    base = saved(model, tmp_path / "base")
    forget(model)
    words = torch.arange(8).view(1, 8)
    data = [{"input_ids": words, "labels": words}] * 2
    with pytest.raises(ValueError, match="does not read back"):
        fit(model, data, base=base, output=tmp_path / "d.sd", config=FitConfig(max_steps=1))
    assert not (tmp_path / "d.sd").exists()
