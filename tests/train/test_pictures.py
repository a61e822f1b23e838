"""The pictures show the contents of the delta."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from train_helpers import bert_batches, make_bert, make_inputs, make_net, square_loss

import sparsedelta
from sift_train import FitConfig, fit
from sift_train.pictures import change_map, density_map, loss_curve


def size_of(png: Path) -> tuple[int, int]:
    raw = png.read_bytes()
    assert raw[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(raw[16:20], "big"), int.from_bytes(raw[20:24], "big")


def ink(png: Path) -> float:
    """Return the share of pixels that are not white."""
    from matplotlib.image import imread

    return float((imread(png)[..., :3].min(-1) < 0.98).mean())


def test_both_are_drawn_from_a_delta_alone(tmp_path: Path) -> None:
    base = make_bert(tmp_path / "base", torch.float32)
    config = FitConfig(sparse_module=["query", "dense.weight"], lr=1e-2)
    delta = fit(base, bert_batches(4), output=tmp_path / "d.sd", config=config).delta
    picture = density_map(delta, tmp_path / "map.png")
    assert ink(picture) > 0.2
    curve = loss_curve(delta, tmp_path / "curve.png")
    assert size_of(curve)[0] > size_of(curve)[1] > 200
    first = curve.read_bytes()
    assert loss_curve(delta, tmp_path / "curve.png").read_bytes() == first


def test_more_kinds_make_a_wider_map(tmp_path: Path) -> None:
    widths = []
    for name, fragments in (("a", ["query.weight"]), ("b", ["layer"])):
        base = make_bert(tmp_path / name, torch.float32)
        config = FitConfig(sparse_module=fragments, lr=1e-2)
        output = tmp_path / f"{name}.sd"
        delta = fit(base, bert_batches(1), output=output, config=config).delta
        widths.append(size_of(density_map(delta, tmp_path / f"{name}.png"))[0])
    assert widths[0] < widths[1]


def test_how_far_elements_moved_is_drawn_from_a_delta_alone(tmp_path: Path) -> None:
    base = make_bert(tmp_path / "base", torch.bfloat16)
    config = FitConfig(sparse_module=["query", "dense.weight"], exception="classifier", lr=1e-2)
    result = fit(
        base,
        bert_batches(4),
        output=tmp_path / "d.sd",
        config=config,
        save_target=tmp_path / "trained",
    )
    before = load_file(base / "model.safetensors")
    after = load_file(tmp_path / "trained" / "model.safetensors")
    moved = {}
    for name, weight in before.items():
        steps = (after[name].double() - weight.double()).abs()
        if bool(steps.any()):
            moved[name] = float(steps[steps > 0].mean())
    recorded = sparsedelta.inspect(result.delta).mean_changes
    assert set(recorded) == set(moved)
    assert recorded == pytest.approx(moved, rel=5e-3)
    picture = change_map(result.delta, tmp_path / "change.png")
    assert ink(picture) > 0.2
    density = density_map(result.delta, tmp_path / "map.png")
    assert picture.read_bytes() != density.read_bytes()


def test_missing_matplotlib_is_named_with_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'sparsedelta\[pictures\]'"):
        loss_curve([1.0], tmp_path / "curve.png")


def test_nothing_to_draw_is_said(tmp_path: Path) -> None:
    result = fit(make_net(), make_inputs(1), output=tmp_path / "d.sd", loss=square_loss)
    with pytest.raises(ValueError, match="nothing in numbered layers"):
        density_map(result.delta, tmp_path / "map.png")
    with pytest.raises(ValueError, match="does not record how far elements of numbered layers"):
        change_map(result.delta, tmp_path / "map.png")
    with pytest.raises(ValueError, match="no losses are recorded"):
        loss_curve([], tmp_path / "curve.png")
    assert size_of(loss_curve(result.losses, tmp_path / "curve.png"))[0] > 0
