"""Give damaged streams to the compiled kernels and to numpy; both must return the same or both refuse.

    python tests/fuzz_kernels.py [--streams 200000] [--seed 0]

``make sanitize`` runs it with kernels in which every wrong memory access ends the process.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial

import numpy as np
from kernel_cases import SPANS, Draw, both, damaged, drawn, native, reader

from sparsedelta.codecs.chunk import Span, decode_chunk, encode_chunk
from sparsedelta.codecs.context import ChunkContext
from sparsedelta.codecs.exponent_classes import keys_of
from sparsedelta.codecs.indices import INDEX_ENCODINGS
from sparsedelta.codecs.packings import VALUE_PACKINGS
from sparsedelta.codecs.zstd import Level
from sparsedelta.dtypes import DTYPES

DAMAGES = 40  # of each sound stream
DTYPE_OF = {1: "I8", 2: "BF16", 4: "F32", 8: "F64"}
Trial = tuple[str, object, object]  # what was decoded, the outcomes of both


def index_trials(seed: int, draw: Draw) -> Iterator[Trial]:
    """Yield trials of every index encoding on streams of the same positions."""
    positions, _, before = drawn(seed, int(draw.choice([1, 2, 4, 8])), SPANS)
    span, bits, columns = len(before), reader(before), int(draw.choice([2, 7, 64]))
    for name, encoding in INDEX_ENCODINGS.items():
        for classes in {False, encoding.has_classes}:
            stream = encoding.encode(positions, span, ChunkContext(bits, columns, classes=classes))
            for _ in range(DAMAGES if stream is not None else 0):
                raw = damaged(stream.tobytes() if stream is not None else b"", draw)
                nnz = len(positions) + int(draw.choice([0, 0, 0, 1, -1]))
                if 1 <= nnz <= span and encoding.possible(len(raw), nnz, span):
                    context = ChunkContext(bits, classes=classes)
                    yield name, *both(encoding.decode, raw, nnz, span, context)


def value_trials(seed: int, draw: Draw) -> Iterator[Trial]:
    """Yield trials of every value packing on streams of the same codes."""
    width = int(draw.choice([1, 2, 4, 8]))
    positions, codes, before = drawn(seed, width, SPANS)
    for name, packing in VALUE_PACKINGS.items():
        for keys in (None, keys_of(before[positions])) if packing.has_classes else (None,):
            streams = packing.encode(codes, keys)
            for _ in range(DAMAGES if streams else 0):
                parts = [stream.tobytes() for stream in streams or ()]
                which = int(draw.integers(len(parts)))
                if parts[which]:
                    parts[which] = damaged(parts[which], draw)
                stated = len(parts[-1]) if packing.states_size else 0
                sizes = packing.stream_sizes(stated, len(codes), width)
                fit = all(
                    len(part) == size or (not part and name == "planes")
                    for part, size in zip(parts, sizes, strict=True)
                )
                if fit and packing.possible(stated, len(codes), width):
                    yield name, *both(packing.decode, parts, len(codes), width, keys)


def chunk_trials(seed: int, draw: Draw) -> Iterator[Trial]:
    """Yield trials of whole chunks: encoding, and decoding over another base."""
    width = int(draw.choice([1, 2, 4, 8]))
    positions, codes, before = drawn(seed, width, (5000, 60_000))  # enough for classes
    span = Span(0, len(before), 64, reader(before))
    encode = partial(encode_chunk, values="ulp", touched=None, level=Level.DEFAULT)
    yield "encode", *both(encode, span, positions, codes)
    chunk, streams = encode(span, positions, codes)
    for _ in range(DAMAGES // 8):
        other = before.copy()
        for _ in range(int(draw.integers(4))):
            other[int(draw.integers(len(other)))] ^= other.dtype.type(1 << draw.integers(8 * width))
        decode = partial(decode_chunk, before=reader(other))
        kind = "classes" if chunk.coding.classes else "chunk"
        yield kind, *both(decode, chunk, DTYPES[DTYPE_OF[width]], b"".join(streams))


def main() -> int:
    """Run the trials; exit status 1: the two differed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--streams", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if native is None:
        sys.exit("the compiled kernels are not built, or turned off")
    found: Counter[tuple[str, bool]] = Counter()
    seed, start = options.seed, time.monotonic()
    while found.total() < options.streams:
        draw = np.random.default_rng([seed, 1])
        for trials in (index_trials, value_trials, chunk_trials):
            for name, compiled, reference in trials(seed, draw):
                found[name, compiled == "refused"] += 1
                if compiled != reference:
                    sys.exit(f"{name} differs at --seed {seed}:\n{compiled!r}\n{reference!r}")
        seed += 1
    for name in sorted({name for name, _ in found}):
        n_accepted, n_refused = found[name, False], found[name, True]
        sys.stdout.write(f"{name:8} {n_accepted:8} accepted, {n_refused:8} refused by both\n")
    took = time.monotonic() - start
    sys.stdout.write(
        f"{found.total()} streams in {took:.0f} s, seeds {options.seed} to {seed - 1}\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
