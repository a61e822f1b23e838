"""Small checkpoints and deltas for ``mutations.py``: between them, they use most of what a delta can hold.

- ``plain``: four tensors, integers among them, that only change;
- ``many``: 66 small tensors in two files, which are handled in groups;
- ``shapes``: tensors that are added, removed, renamed, resized and retyped, a dense change, a header with spaces,
  side files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save

import sparsedelta

FAMILIES = ("plain", "many", "shapes")
DELTAS = ("one", "set")  # those that are mutated, both from base to target
STEPS = ("base", "target", "final")
Tensors = dict[str, torch.Tensor]


def make_inputs(folder: Path) -> None:
    """Write three checkpoints for each family, and the deltas between them."""
    torch.manual_seed(0)
    for name, make in zip(FAMILIES, (plain, many, shapes), strict=True):
        for step, files in zip(STEPS, make(), strict=True):
            write(folder / name / step, files)
        for delta, old, new, values, level in (
            ("one", "base", "target", "ulp", "default"),
            ("set", "base", "target", "target", "fast"),
            ("both", "base", "final", "ulp", "default"),
            ("two", "target", "final", "ulp", "default"),
        ):
            pair = folder / name / old, folder / name / new
            with sparsedelta.diff(*pair, values=values, level=level, standalone=True) as made:
                made.save(folder / name / f"{delta}.sd")


def open_tensors(folder: Path) -> Tensors:
    """Return the tensors of all files in a folder."""
    found: Tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def write(folder: Path, files: Mapping[str, Tensors | bytes]) -> None:
    """Write a checkpoint. The header of a file whose name begins with "spaced" is not compact."""
    (folder / "empty").mkdir(parents=True)
    for name, content in files.items():
        raw = content if isinstance(content, bytes) else save(content)
        if name.startswith("spaced"):
            end = 8 + int.from_bytes(raw[:8], "little")
            header = json.dumps(json.loads(raw[8:end])).encode()
            header += b" " * (-len(header) % 8)
            raw = len(header).to_bytes(8, "little") + header + raw[end:]
        (folder / name).write_bytes(raw)


def changed(tensor: torch.Tensor, n: int) -> torch.Tensor:
    """Return a tensor with the bits of up to ``n`` elements changed by one."""
    result = tensor.clone()
    bits = result.view(-1).view(torch.uint8).view(tensor.numel(), -1)
    bits[torch.randint(tensor.numel(), (n,)), 0] ^= 1
    return result


def steps(base: Tensors, n: int) -> list[Tensors]:
    """Return a state and two more; integers change only in the first step, because ``merge`` wants equal integers."""
    target = {name: changed(one, n) for name, one in base.items()}
    final = {n_: changed(one, n) if one.is_floating_point() else one for n_, one in target.items()}
    return [base, target, final]


def plain() -> list[dict[str, Tensors | bytes]]:
    """Return the files of each step."""
    kinds = (torch.float32, torch.bfloat16, torch.uint8, torch.int64)
    base = {f"layers.{i}.w": (torch.randn(40, 30) * 9).to(kind) for i, kind in enumerate(kinds)}
    return [
        {"config.json": b'{"step": %d}' % number, "model.safetensors": one}
        for number, one in enumerate(steps(base, 40))
    ]


def many() -> list[dict[str, Tensors | bytes]]:
    """Return the files of each step."""
    base = {f"experts.{i:02}.w": torch.randn(3, 4).half() for i in range(66)}
    small = {"head": torch.randn(7)}
    return [
        {"a.safetensors": one, "b.safetensors": other}
        for one, other in zip(steps(base, 2), steps(small, 1), strict=True)
    ]


def shapes() -> list[dict[str, Tensors | bytes]]:
    """Return the files of each step."""
    dense = torch.randn(60, 64).bfloat16() * 0.02
    base = {
        "dense": dense, "gone": torch.randn(5), "grown": torch.randn(20, 10), "shrunk": torch.randn(9, 8),
        "old name": torch.randn(90), "retyped": torch.randn(64).bfloat16(), "same": torch.randn(8),
    }  # fmt: skip
    target = {
        "dense": torch.where(dense.abs() < 0.01, changed(dense, 9000), changed(dense, 90)),
        "added": torch.randn(30).double(),
        "grown": torch.cat([changed(base["grown"], 5), torch.randn(4, 10)]),
        "shrunk": changed(base["shrunk"], 5)[:5].clone(),
        "new name": base["old name"],
        "retyped": base["retyped"].float(),
        "same": base["same"],
    }
    final = {name: changed(one, 3) for name, one in target.items()}
    text = b"It was the best of times. " * 9
    return [
        {
            "spaced.safetensors": one,
            "tokens.txt": text * (number + 1),
            "config.json": b"%d" % number,
        }
        for number, one in enumerate((base, target, final))
    ]
