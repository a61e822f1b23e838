"""Measures how much a delta's payload grows without one index encoding or value packing.

    python benchmarks/encodings.py [--only uni-bf16-0.01]

The changes are synthetic, in one tensor or in many small ones. For every chunk that ``diff`` encodes, the
script records the size of each candidate and repeats the encoder's choice without one of them. That
choice includes candidates that the encoder skips when the removed one is available. Prints a table.
"""

from __future__ import annotations

import argparse
import sys
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from measuring import table
from safetensors.torch import save_file
from synthetic import ULP_SUCCESS

import sparsedelta
from sparsedelta.codecs import choice as choosing
from sparsedelta.codecs import chunk as coding
from sparsedelta.codecs.context import ChunkContext, Stream
from sparsedelta.codecs.indices import INDEX_ENCODINGS
from sparsedelta.codecs.packings import VALUE_PACKINGS, scaled, steps
from sparsedelta.codecs.zstd import compress_stream
from sparsedelta.tensors import compare

NAMES = (*INDEX_ENCODINGS, *VALUE_PACKINGS)
SHAPE, N = (2048, 1024), 1 << 21
MOST_LOST = 1.01  # the encoder chooses by a sample of a large chunk
N_TINY = 150  # number of tensors in a checkpoint of tiny tensors
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp8": torch.float8_e4m3fn}
_encode = coding.encode_chunk

Tensors = dict[str, torch.Tensor]
Pair = tuple[Tensors, Tensors]
Draw = np.random.Generator


class Candidate(NamedTuple):
    """One way to code the positions or the values of a chunk."""

    name: str
    classes: bool
    is_tried: bool  # whether the encoder tries it when all candidates are available
    n_bytes: int


def candidate(name: str, classes: bool, is_tried: bool, streams: Sequence[Stream]) -> Candidate:
    """Return the candidate with the size of these streams."""
    n_bytes = sum(len(compress_stream(stream.data)) for stream in streams)
    return Candidate(name, classes, is_tried, n_bytes)


Parts = tuple[list[Candidate], list[Candidate]]  # candidates for positions, candidates for values


def note(found: list[Parts], span: coding.Span, at: Any, codes: Any, **rest: Any) -> Any:
    """Encode a chunk as ``encode_chunk`` does, and record all candidates."""
    first = span.start % span.columns if span.columns else 0
    keys = rest["keys"] if span.before else None
    context = ChunkContext(span.before, span.columns, first, keys)
    parts: Parts = ([], [])
    for name, encoding in INDEX_ENCODINGS.items():
        is_tried = encoding.worth_trying(len(at), span.n)
        if is_tried or name != "tiles":  # skipped where the encoder skips it, since it is slow
            for classes in (False, True) if encoding.has_classes and span.before else (False,):
                stream = encoding.encode(at, span.n, context.sorted(classes))
                if stream is not None:
                    parts[0].append(candidate(name, classes, is_tried, [stream]))
    for name, packing in VALUE_PACKINGS.items():
        for classes in (False, True) if packing.has_classes and span.before else (False,):
            streams = packing.encode(codes, keys if classes else None)
            is_tried = streams is not None
            if not is_tried:
                with patch.object(steps, "_LONG", 1 << 31), patch.object(scaled, "_SHORT", 0):
                    streams = packing.encode(codes, keys if classes else None)
            if streams is not None:
                parts[1].append(candidate(name, classes, is_tried, streams))
    made, coded = _encode(span, at, codes, **rest)
    if made.stored_bytes > MOST_LOST * sum(c.n_bytes for c in choice(parts)):
        raise AssertionError("the encoder's choice is not the smallest")
    found.append(parts)
    return made, coded


def choice(parts: Parts, without: str = "") -> list[Candidate]:
    """Return the candidates that the encoder would choose for the positions and the values."""
    kept: list[Candidate] = []
    for with_classes in (False, True):
        for part in parts:
            left = [c for c in part if c.name != without]
            usable = [c for c in left if c.is_tried or len(left) < len(part)]
            kept.append(
                min((c for c in usable if with_classes or not c.classes), key=lambda c: c.n_bytes)
            )
    apart, smallest = sum(c.n_bytes for c in kept[:2]), sum(c.n_bytes for c in kept[2:])
    enough = max(choosing.CLASSES_SAVE_BYTES, choosing.CLASSES_SAVE * apart)
    return kept[2:] if apart - smallest >= enough else kept[:2]


def payload(parts: Parts, without: str) -> int:
    """Return the bytes of a chunk's streams without one encoding."""
    chosen = choice(parts)
    chosen = choice(parts, without) if without in (c.name for c in chosen) else chosen
    return sum(c.n_bytes for c in chosen)


def row(name: str, pair: Pair, folder: Path) -> list[str]:
    """Return the row of one workload."""
    paths = [folder / f"{side}.safetensors" for side in ("base", "target")]
    for tensors, path in zip(pair, paths, strict=True):
        save_file(tensors, path)
    found: list[Parts] = []
    with patch.object(compare, "encode_chunk", partial(note, found)):
        sparsedelta.diff(*paths).close()
    n_bytes = sum(payload(chunk, "") for chunk in found)
    grown = [sum(payload(chunk, name) for chunk in found) - n_bytes for name in NAMES]
    cells = [f"{100 * more / n_bytes:.2f}" if more else "" for more in grown]
    return [name, f"{n_bytes:,}", *cells]


def normal(draw: Draw, scale: float, shape: tuple[int, ...] = SHAPE) -> torch.Tensor:
    """Return values from a normal distribution."""
    return torch.from_numpy(scale * draw.standard_normal(shape, np.float32))


def ulps(dtype: str, n_tensors: int, n_changed: int, n: int, draw: Draw) -> Pair:
    """Change elements drawn at random by a few units in the last place."""
    shape, dt = (n,) if n_tensors > 1 else SHAPE, DTYPES[dtype]
    before = {f"{i:03}": normal(draw, 0.02, shape).to(dt) for i in range(n_tensors)}
    after = {name: tensor.clone() for name, tensor in before.items()}
    for tensor in after.values():
        bits = tensor.reshape(-1).view(torch.uint8).numpy().view(f"<u{tensor.element_size()}")
        change = draw.geometric(ULP_SUCCESS, n_changed) * draw.choice([-1, 1], n_changed)
        bits[draw.choice(n, n_changed, False)] += change.astype(bits.dtype)
    return before, after


def stepped(dtype: str, scale: float, mask: Callable[[Draw], Any], draw: Draw) -> Pair:
    """Change the elements in a mask by normal steps of fp32 weights, clipped to Adam's range."""
    before = normal(draw, 0.02)
    after = before + scale * normal(draw, 1).clamp(-1.5, 1.5)
    where = torch.from_numpy(np.broadcast_to(mask(draw), SHAPE).copy())
    old, new = (tensor.to(DTYPES[dtype]) for tensor in (before, after))
    return {"weight": old}, {"weight": torch.where(where, new, old)}


def workloads() -> dict[str, Callable[[Draw], Pair]]:
    """Return the function that creates each pair, by name."""
    made: dict[str, Callable[[Draw], Pair]] = {}
    for dtype, d in product(DTYPES, (1e-4, 1e-3, 3e-3, 0.01, 0.1, 0.5, 0.99, 1.0)):
        made[f"uni-{dtype}-{d:g}"] = partial(ulps, dtype, 1, round(d * N), N)
    masks: dict[str, Callable[[Draw], Any]] = {
        "all": lambda draw: np.True_,
        "1%": lambda draw: draw.random(SHAPE) < 0.01,
        "rows": lambda draw: draw.random((SHAPE[0], 1)) < 0.01,
        "cols": lambda draw: draw.random(SHAPE[1]) < 0.03,
        "blocks64": lambda draw: (draw.random((32, 16)) < 0.1).repeat(64, 0).repeat(64, 1),
        "crowded": lambda d: d.random((2048, 1)) ** 4 * d.random(1024) ** 4 > 1.5 * d.random(SHAPE),
    }
    for dtype in ("bf16", "fp32"):
        for rate, mask in product((1e-6, 1e-5, 1e-4, 1e-3, 1.0), masks):
            made[f"step-{dtype}-{rate:g}-{mask}"] = partial(stepped, dtype, rate, masks[mask])
        for k, n in ((1, 384), (4, 384), (40, 384), (384, 384), (4, 4096), (3, 65536)):
            made[f"tiny-{dtype}-{k}of{n}"] = partial(ulps, dtype, N_TINY, k, n)
    return made


def main() -> int:
    """Print the table."""
    todo = workloads()
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", choices=todo, metavar="NAME")
    only = parser.parse_args().only
    torch.set_num_threads(1)
    rows = []
    for name in [only] if only else todo:
        with TemporaryDirectory() as work:
            draw = np.random.default_rng(zlib.crc32(name.encode()))
            rows.append(row(name, todo[name](draw), Path(work)))
    print(table(("workload", "payload", *NAMES), rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
