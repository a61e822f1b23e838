"""Small weights that change from step to step, as state dicts and as checkpoints."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

State = dict[str, torch.Tensor]


def weights(step: int) -> State:
    """Return the weights after a step; each step changes a few elements of both tensors."""
    found = {
        "a": torch.arange(2048).reshape(64, 32).to(torch.bfloat16),
        "b": torch.arange(512).to(torch.float32),
    }
    for number in range(1, step + 1):
        advance(found, number)
    return found


def advance(state: State, step: int) -> None:
    """Change weights in place as one step does."""
    state["a"].view(-1)[step * 7 % 2048 :: 97] += step
    state["b"][step % 512] = -step


def save(folder: Path, step: int, *, same_config: bool = False) -> Path:
    """Write the weights after a step as a checkpoint folder, with a configuration that names the step or none."""
    folder.mkdir(exist_ok=True)
    save_file(weights(step), folder / "model.safetensors")
    (folder / "config.json").write_text("{}" if same_config else f'{{"step":{step}}}')
    return folder


def is_at(held: State | Path, step: int) -> bool:
    """Return whether a state dict or a checkpoint holds exactly the weights after a step."""
    if isinstance(held, Path):
        held = load_file(held / "model.safetensors" if held.is_dir() else held)
    wanted = weights(step)
    return held.keys() == wanted.keys() and all(
        torch.equal(held[name].view(torch.uint8), wanted[name].view(torch.uint8)) for name in wanted
    )
