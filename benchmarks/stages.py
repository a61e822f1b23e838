"""Measures each stage of ``diff`` and ``apply`` on one core, beside the machine's limits.

    taskset -c 0 python benchmarks/stages.py [--gb 1]

Every stage runs alone over the same checkpoint, block by block as in ``diff`` and ``apply``. Its input is
in the page cache or in the processor's cache. The table shows CPU seconds per GB of the base, the least
of several rounds.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from blake3 import blake3
from measuring import options_for, table, warm, work_folder, write_result
from synthetic import write_tensors

import sparsedelta
from sparsedelta.codecs.chunk import MAX_SPAN, Chunk, Span, decode_chunk, encode_chunk
from sparsedelta.codecs.values import VALUE_ENCODINGS
from sparsedelta.codecs.zstd import Level
from sparsedelta.dtypes import DTYPES
from sparsedelta.files.checkpoint import Checkpoint, Tensor
from sparsedelta.system import reserve
from sparsedelta.tensors.compare import BLOCK_BYTES

BF16 = DTYPES["BF16"]
COLUMNS = 1 << 12
READ, DIGEST, COMPARE, WRITE, COPY = (
    "read from the page cache", "digest (BLAKE3)", "compare two blocks", "write to a new file",
    "copy memory",
)  # fmt: skip


def least(work: Callable[[], object], n_rounds: int) -> float:
    """Return the least CPU seconds of some runs."""
    took = []
    for _ in range(n_rounds):
        start = time.process_time()
        work()
        took.append(time.process_time() - start)
    return min(took)


def stages_of(
    base: Tensor, target: Tensor, out: Path
) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield the stages that process every byte, each as a function to run."""
    n_blocks = base.spec.n_bytes // BLOCK_BYTES
    old, new = np.empty((2, BLOCK_BYTES // 2), np.uint16)
    base.read_into(old.view(np.uint8).data, 0)
    target.read_into(new.view(np.uint8).data, 0)
    raw, different = old.view(np.uint8).data, np.empty(len(old), np.bool_)

    def write() -> None:
        out.unlink(missing_ok=True)
        with open(out, "xb", buffering=0) as file:
            reserve(file.fileno(), n_blocks * BLOCK_BYTES)
            for i in range(n_blocks):
                os.pwrite(file.fileno(), raw, i * BLOCK_BYTES)

    def repeat(work: Callable[[int], object]) -> Callable[[], object]:
        return lambda: [work(i) for i in range(n_blocks)]

    hasher, spare = blake3(), np.empty_like(old)
    far, away = np.ones((2, 1 << 26), np.uint8)

    def copy() -> None:
        for _ in range(base.spec.n_bytes >> 26):
            away[:] = far

    yield COPY, copy
    yield READ, repeat(lambda i: base.read_into(spare.view(np.uint8).data, i * BLOCK_BYTES))
    yield DIGEST, repeat(lambda _: hasher.update(raw))
    yield COMPARE, repeat(lambda _: np.flatnonzero(np.not_equal(old, new, out=different)))
    yield WRITE, write


def chunk_stages(
    base: Tensor, target: Tensor, level: Level, n_rounds: int
) -> Iterator[tuple[str, float, float]]:
    """Yield name, CPU seconds and millions of values per second of coding the first chunk."""
    span = min(MAX_SPAN, base.spec.n_elements)
    old, new = np.empty((2, span), np.uint16)
    base.read_into(old.view(np.uint8).data, 0)
    target.read_into(new.view(np.uint8).data, 0)
    positions = np.flatnonzero(old != new).astype(np.uint32)
    codes = VALUE_ENCODINGS["ulp"].encode(BF16, old[positions], new[positions])

    def bits(start: int, n: int) -> np.ndarray[tuple[int], np.dtype[np.uint16]]:
        return old[start : start + n]

    def encode() -> tuple[Chunk, list[bytes]]:
        whole = Span(0, span, COLUMNS, bits)
        return encode_chunk(whole, positions, codes, values="ulp", touched=None, level=level)

    chunk, streams = encode()
    coded = b"".join(streams)
    for name, work in (
        ("encode", encode),
        ("decode", lambda: decode_chunk(chunk, BF16, coded, before=bits)),
    ):
        seconds = least(work, n_rounds)
        yield (
            f"{name}, {level.value}",
            seconds * base.spec.n_elements / span,
            len(positions) / seconds / 1e6,
        )


def main() -> int:
    """Run the benchmark."""
    parser = options_for(__doc__, "stages.md")
    parser.add_argument("--gb", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with work_folder(options.work_dir, keep=options.keep) as work:
        base_path, target_path = (work / f"{name}.safetensors" for name in ("base", "target"))
        n_rows = round(options.gb * 1e9) // 2 // COLUMNS
        n_rows -= n_rows * COLUMNS % MAX_SPAN // COLUMNS  # whole chunks
        with open(base_path, "xb") as old, open(target_path, "xb") as new:
            write_tensors(old, new, [("weight", (n_rows, COLUMNS))], 0)
        warm(work)
        with Checkpoint(base_path) as one, Checkpoint(target_path) as other:
            (base,), (target,) = one.tensors.values(), other.tensors.values()
            gigabytes = base.spec.n_bytes / 1e9
            rows = []
            for name, run in stages_of(base, target, work / "out"):
                seconds = least(run, options.rounds) / gigabytes
                rows.append((name, f"{seconds:.3f}", f"{1 / seconds:.1f}", ""))
            for level in (Level.FAST, Level.DEFAULT):
                for name, took, speed in chunk_stages(base, target, level, options.rounds):
                    rows.append((name, f"{took / gigabytes:.3f}", "", f"{speed:.0f}"))
        delta, out = work / "delta.sd", work / "whole.safetensors"

        def diff() -> None:
            with sparsedelta.diff(base_path, target_path) as made:
                made.save(delta, overwrite=True)

        def apply() -> None:
            sparsedelta.apply(base_path, delta, out, overwrite=True)

        for name, run in (("all of `diff`", diff), ("all of `apply`", apply)):
            seconds = least(run, options.rounds) / gigabytes
            rows.append((name, f"{seconds:.3f}", f"{1 / seconds:.1f}", ""))
        columns = ("stage", "CPU s per GB of base", "GB/s", "million values/s")
        write_result(options.result, "What bounds each stage", [table(columns, rows)], where=work)
    return 0


if __name__ == "__main__":
    sys.exit(main())
