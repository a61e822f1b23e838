"""Measures the delta's bytes on model pairs that others trained: chgnet and torchani.

    pip download --no-deps -d wheels chgnet==0.4.2 torchani==2.0
    python benchmarks/real_pairs.py wheels/*.whl

Compared with zstd -19 of the XOR of both files, with the bytes in order and in planes (all first bytes of the
values, then all second bytes, and so on). These hold no names, shapes, digests or headers. torchani has raw
float32 files. A checkpoint of chgnet is a pickle, which torch.load reads with the package's own code: run this
only on wheels that you trust.
"""

from __future__ import annotations

import glob
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import zstandard
from measuring import options_for, table, work_folder, write_result
from safetensors.numpy import save_file

import sparsedelta

Tensors = dict[str, npt.NDArray[Any]]


def chgnet(path: str) -> Tensors:
    """Return the tensors of a checkpoint of chgnet."""
    held = torch.load(path, map_location="cpu", weights_only=False)
    state = held["model"]["state_dict"] if "model" in held else held["state_dict"]
    return {name: value.contiguous().numpy() for name, value in state.items()}


def torchani(folder: str) -> Tensors:
    """Return the tensors of one network of torchani."""
    files = sorted(Path(folder).glob("*param"))
    return {path.name: np.fromfile(path, "<f4") for path in files}


def pairs(root: Path) -> Iterator[tuple[str, Tensors, Tensors]]:
    """Yield name, base and target of each pair in unpacked wheels."""
    old = glob.glob(f"{root}/chgnet/pretrained/0.3.0/*.tar")
    new = glob.glob(f"{root}/chgnet/pretrained/r2scan/*.tar")
    if old and new:
        yield "chgnet 0.3.0 → r2SCAN", chgnet(old[0]), chgnet(new[0])
    for number in range(8):
        folder = f"{root}/torchani/resources/{{}}/train{number}/networks"
        base, target = (torchani(folder.format(kind)) for kind in ("ani-1x_8x", "ani-1ccx_8x"))
        if base and target:
            yield f"ANI-1x → ANI-1ccx, network {number}", base, target


def xor_sizes(base: Tensors, target: Tensors) -> tuple[int, int]:
    """Return the sizes of zstd -19 of the XOR, with the bytes in order and in planes."""
    raw, planes = [], []
    for name, value in target.items():
        old = base[name].reshape(-1).view(np.uint8)
        mixed = old ^ value.reshape(-1).view(np.uint8)
        raw.append(mixed.tobytes())
        planes.append(mixed.reshape(-1, value.dtype.itemsize).T.tobytes())
    compressor = zstandard.ZstdCompressor(level=19)
    whole, apart = (len(compressor.compress(b"".join(parts))) for parts in (raw, planes))
    return whole, apart


def measure(base: Tensors, target: Tensors, work: Path) -> list[str]:
    """Return the cells of a row, after checking that the delta rebuilds the target."""
    paths = [work / name for name in ("base.safetensors", "target.safetensors")]
    for tensors, path in zip((base, target), paths, strict=True):
        save_file(tensors, path)
    sizes = []
    for level in ("default", "max"):
        with sparsedelta.diff(*paths, level=level) as delta:
            delta.save(work / "delta.sd", overwrite=True)
            changed = delta.nnz / delta.numel
        sparsedelta.apply(paths[0], work / "delta.sd", work / "out.safetensors", overwrite=True)
        if (work / "out.safetensors").read_bytes() != paths[1].read_bytes():
            raise SystemExit("the delta does not rebuild the target")
        sizes.append((work / "delta.sd").stat().st_size)
    sizes += xor_sizes(base, target)
    return [f"{changed:.1%}", f"{paths[1].stat().st_size:,}", *(f"{size:,}" for size in sizes)]


def main() -> None:
    """Measure all pairs in the wheels and write the table."""
    parser = options_for(__doc__, "real_pairs.md")
    parser.add_argument("wheels", nargs="+", type=Path)
    options = parser.parse_args()
    columns = [
        "pair",
        "changed",
        "target",
        "delta",
        "delta, level max",
        "XOR, zstd -19",
        "in planes",
    ]
    with work_folder(options.work_dir, keep=options.keep) as work:
        for wheel in options.wheels:
            zipfile.ZipFile(wheel).extractall(work / "unpacked")
        sys.path.insert(0, str(work / "unpacked"))
        rows = [
            [name, *measure(base, target, work)] for name, base, target in pairs(work / "unpacked")
        ]
        title = "Pairs of models that others trained, in bytes"
        write_result(options.result, title, [table(columns, rows)], where=work)


if __name__ == "__main__":
    main()
