"""The compiled kernels beside numpy: every coding, whole commands, and many small tensors, on one core.

    python benchmarks/kernels.py [--gb 0.5] [--rounds 5] [--parts codings commands tensors]

Both are measured in one process, in turn. A figure is the least CPU time of the rounds. A floor is the
sum of the stages that the command cannot avoid, each measured alone as in ``stages.py``.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from measuring import RESULTS, beside, options_for, table, warm, work_folder, write_result
from stages import COMPARE, DIGEST, READ, WRITE, least, stages_of

import sparsedelta
from sparsedelta.codecs import kernels
from sparsedelta.codecs.chunk import MAX_SPAN, Span, decode_chunk, encode_chunk
from sparsedelta.codecs.context import ChunkContext, StartBits
from sparsedelta.codecs.exponent_classes import keys_of
from sparsedelta.codecs.indices import INDEX_ENCODINGS
from sparsedelta.codecs.packings import VALUE_PACKINGS
from sparsedelta.codecs.values import VALUE_ENCODINGS, change, differences
from sparsedelta.codecs.zstd import Level
from sparsedelta.dtypes import DTYPES
from sparsedelta.files.checkpoint import Checkpoint
from sparsedelta.format.safetensors_header import HeaderEntry, render_header

RESULT = "kernels.md"
BF16 = DTYPES["BF16"]
COLUMNS = 1 << 12
LEARNING_RATE = 1e-6
RANDOM_SHARE = 0.01
N_FEW, N_MANY, TENSOR_BYTES = 300, 20_000, 1000
WAYS = {"numpy": None, "compiled": kernels.native}

Bits = npt.NDArray[Any]
Draw = np.random.Generator
Work = Callable[[], object]


def rounded(values: npt.NDArray[np.float32]) -> Bits:
    """Return fp32 values as the bits of the nearest bf16."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def small_step(draw: Draw, n: int) -> tuple[Bits, Bits]:
    """Return bf16 weights before and after a step as Adam takes it, on fp32 masters."""
    masters = draw.standard_normal(n, np.float32) * np.float32(0.02)
    steps = np.clip(draw.standard_normal(n, np.float32), -1.5, 1.5) * np.float32(LEARNING_RATE)
    return rounded(masters), rounded(masters + steps)


def random_changes(draw: Draw, n: int, share: float = RANDOM_SHARE) -> tuple[Bits, Bits]:
    """Return bf16 weights, and the same with a share changed by a few ulps at random positions."""
    before = rounded(draw.standard_normal(n, np.float32) * np.float32(0.02))
    steps = draw.geometric(0.7, n) * draw.choice([-1, 1], n)
    return before, before + (steps * (draw.random(n, np.float32) < share)).astype(np.uint16)


def crowded(draw: Draw, n: int) -> tuple[Bits, Bits]:
    """Return bf16 weights, and the same changed mostly in a few rows and columns."""
    before, after = random_changes(draw, n, 1)
    rows, columns = draw.random((n // COLUMNS, 1)) ** 4, draw.random(COLUMNS) ** 4
    where = (draw.random((n // COLUMNS, COLUMNS)) < rows * columns).ravel()
    return before, np.where(where, after, before)


WORKLOADS: dict[str, Callable[[Draw, int], tuple[Bits, Bits]]] = {
    "small step": small_step,
    "random 1 %": random_changes,
    "random 25 %": lambda draw, n: random_changes(draw, n, 0.25),
    "rows and columns": crowded,
}
# The coding, the workload that it is for, and whether by classes of the base's exponents.
CODINGS = (
    ("gaps", "random 1 %", False), ("bitmap", "random 25 %", False),
    ("rice", "random 1 %", False), ("rice", "small step", True),
    ("tiles", "rows and columns", False),
    ("planes", "random 1 %", False), ("steps", "random 1 %", False),
    ("steps", "small step", True), ("scaled", "rows and columns", False),
)  # fmt: skip


def both(work: Work, n_rounds: int) -> dict[str, float]:
    """Return the least CPU seconds of some work by numpy and compiled, which take turns."""
    took = dict.fromkeys(WAYS, math.inf)
    for _ in range(n_rounds):
        for way, module in WAYS.items():
            kernels.native = module
            took[way] = min(took[way], least(work, 1))
    return took


def rates(name: str, n: int, n_rounds: int, encode: Work, decode: Work | None) -> list[str]:
    """Return a row: millions of values a second, encoding and decoding, by numpy and compiled."""
    cells = [name, f"{n / 1e6:.2f}"]
    for work in (encode, decode):
        seconds = both(work, n_rounds) if work else {}
        cells += [f"{n / seconds[way] / 1e6:.0f}" if work else "" for way in WAYS]
    return cells


def codings(n_rounds: int) -> Iterator[list[str]]:
    """Yield a row for every coding, on one chunk, without compression by zstd; then of whole chunks."""
    pairs = {name: make(np.random.default_rng(1), MAX_SPAN) for name, make in WORKLOADS.items()}
    for name, workload, classes in CODINGS:
        label = f"`{name}`{' by classes' if classes else ''}, {workload}"
        row = packing_row if name in VALUE_PACKINGS else index_row
        yield row(label, name, pairs[workload], classes, n_rounds)
    for workload in ("random 1 %", "small step"):
        yield whole_chunk(*pairs[workload], workload, Level.DEFAULT, n_rounds)
    yield from walks(*pairs["random 1 %"], n_rounds)


def changes(before: Bits, after: Bits) -> tuple[Bits, Bits, Bits]:
    """Return positions, ulp codes, and the keys before the change."""
    positions = np.flatnonzero(before != after).astype(np.uint32)
    old, new = before[positions], after[positions]
    return positions, VALUE_ENCODINGS["ulp"].encode(BF16, old, new), keys_of(old)


def packing_row(
    label: str, name: str, pair: tuple[Bits, Bits], classes: bool, n_rounds: int
) -> list[str]:
    """Return the row of a value packing."""
    packing, (_, codes, keys) = VALUE_PACKINGS[name], changes(*pair)
    n, used = len(codes), keys if classes else None
    if name == "scaled":  # codes as after a large step
        codes = np.random.default_rng(2).integers(1, 2000, n).astype(np.uint16)
    parts = [stream.tobytes() for stream in packing.encode(codes, used) or ()]
    return rates(
        label, n, n_rounds, lambda: packing.encode(codes, used),
        lambda: packing.decode(parts, n, 2, used),
    )  # fmt: skip


def index_row(
    label: str, name: str, pair: tuple[Bits, Bits], classes: bool, n_rounds: int
) -> list[str]:
    """Return the row of an index encoding."""
    index, (positions, _, keys) = INDEX_ENCODINGS[name], changes(*pair)
    bits, n = reader(pair[0]), len(positions)
    context = ChunkContext(bits, COLUMNS, 0, keys, classes)
    stream = index.encode(positions, MAX_SPAN, context)
    if stream is None:
        raise AssertionError(f"{name} declines the positions that it is measured with")
    raw = stream.tobytes()
    return rates(
        label, n, n_rounds, lambda: index.encode(positions, MAX_SPAN, context),
        lambda: index.decode(raw, n, MAX_SPAN, ChunkContext(bits, classes=classes)),
    )  # fmt: skip


def reader(bits: Bits) -> StartBits:
    """Return a function that reads a span of these elements."""
    return lambda start, n: bits[start : start + n]


def whole_chunk(before: Bits, after: Bits, workload: str, level: Level, n_rounds: int) -> list[str]:
    """Return the row of ``encode_chunk`` and ``decode_chunk``, zstd and the choice included."""
    (positions, codes, keys), bits = changes(before, after), reader(before)

    def encode() -> tuple[Any, list[bytes]]:
        span = Span(0, MAX_SPAN, COLUMNS, bits)
        return encode_chunk(
            span, positions, codes, values="ulp", touched=None, level=level, keys=keys
        )

    chunk, streams = encode()
    coded = b"".join(streams)
    name = f"whole chunk, {level.value} level, {workload}"
    return rates(
        name, len(positions), n_rounds, encode,
        lambda: decode_chunk(chunk, BF16, coded, before=bits),
    )  # fmt: skip


def walks(before: Bits, after: Bits, n_rounds: int) -> Iterator[list[str]]:
    """Yield what goes over every element: finding changes; and over every change: making them."""
    n_block = 1 << 19
    room = np.empty(n_block, np.uint32)
    old, new = before[:n_block].copy(), after[:n_block].copy()
    yield rates(
        "compare and gather, of all elements", n_block, 20 * n_rounds,
        lambda: differences(old, new, 0, room), None,
    )  # fmt: skip
    where = np.flatnonzero(old != new).astype(np.uint32)
    codes = VALUE_ENCODINGS["ulp"].encode(BF16, old[where], new[where])
    yield rates(
        "`ulp` codes", len(where), 20 * n_rounds,
        lambda: VALUE_ENCODINGS["ulp"].encode(BF16, old[where], new[where]),
        lambda: change(BF16, old.copy()[: where[-1] + 1], 0, where, "ulp", codes),
    )  # fmt: skip


def write_pair(folder: Path, shapes: list[tuple[int, ...]], make: Any, seed: int) -> None:
    """Write ``base.safetensors`` and ``target.safetensors`` of bf16 tensors."""
    folder.mkdir()
    entries, end = [], 0
    for number, shape in enumerate(shapes):
        begin, end = end, end + 2 * math.prod(shape)
        name = f"model.layers.{number // 256}.experts.{number % 256}.weight"
        entries.append(HeaderEntry(name, "BF16", shape, begin, end))
    header = render_header({}, entries)
    draw = np.random.default_rng(seed)
    with (
        open(folder / "base.safetensors", "xb") as base,
        open(folder / "target.safetensors", "xb") as target,
    ):
        for file in (base, target):
            file.write(len(header).to_bytes(8, "little") + header)
        for start in range(0, end // 2, MAX_SPAN):
            for file, bits in zip(
                (base, target), make(draw, min(MAX_SPAN, end // 2 - start)), strict=True
            ):
                file.write(bits.data)
    warm(folder)


def operations(folder: Path) -> dict[str, Work]:
    """Return the verbs on a pair, in an order in which each finds what it needs."""
    base, target = folder / "base.safetensors", folder / "target.safetensors"
    delta, out = folder / "delta.sd", folder / "out.safetensors"

    def diff() -> None:
        with sparsedelta.diff(base, target) as made:
            made.save(delta, overwrite=True)

    return {
        "diff": diff,
        "apply --verify full": lambda: sparsedelta.apply(base, delta, out, overwrite=True),
        "apply --no-durable": lambda: sparsedelta.apply(
            base, delta, out, overwrite=True, durable=False
        ),
        "verify": lambda: sparsedelta.verify(delta, base=base),
        "merge": lambda: sparsedelta.merge(base, delta, delta).close(),
    }


def commands(work: Path, gigabytes: float, n_rounds: int) -> Iterator[list[str]]:
    """Yield for two workloads what ``diff`` and ``apply`` take, beside the floor of each."""
    n_rows = max(1, round(gigabytes * 1e9 / 2 / MAX_SPAN)) * MAX_SPAN // COLUMNS
    for workload in ("small step", "random 1 %"):
        folder = work / workload.replace(" %", "").replace(" ", "-")
        write_pair(folder, [(n_rows, COLUMNS)], WORKLOADS[workload], 3)
        size = 2 * n_rows * COLUMNS / 1e9
        with (
            Checkpoint(folder / "base.safetensors") as one,
            Checkpoint(folder / "target.safetensors") as other,
        ):
            (base,), (target,) = one.tensors.values(), other.tensors.values()
            stages = {n: least(w, n_rounds) for n, w in stages_of(base, target, folder / "stage")}
        (folder / "stage").unlink()
        floors = {
            "diff": 2 * stages[READ] + 2 * stages[DIGEST] + stages[COMPARE],
            "apply --verify full": stages[READ] + stages[DIGEST] + stages[WRITE],
        }
        floors["apply --no-durable"] = floors["apply --verify full"]
        verbs = operations(folder)
        for name, floor in floors.items():
            took = both(verbs[name], n_rounds)
            cells = [f"{took[w] / size:.3f} ({took[w] / floor:.2f} ×)" for w in WAYS]
            yield [f"{workload}, `{name}`", f"{floor / size:.3f}", *cells]


def tensors(work: Path, n_rounds: int) -> Iterator[list[str]]:
    """Yield what each verb takes on many small tensors, and on few with as many bytes."""
    total = N_MANY * TENSOR_BYTES // 2
    counts = {N_FEW: total // N_FEW, N_MANY: total // N_MANY}
    for n, n_elements in counts.items():
        write_pair(work / f"tensors-{n}", [(n_elements,)] * n, random_changes, 4)
    took = {
        n: {name: both(run, n_rounds) for name, run in operations(work / f"tensors-{n}").items()}
        for n in counts
    }
    for name in took[N_FEW]:
        few, many = took[N_FEW][name], took[N_MANY][name]
        cells = [f"{few[w]:.2f} → {many[w]:.2f} ({many[w] / few[w]:.1f} ×)" for w in WAYS]
        yield [f"`{name}`", *cells]


def main() -> int:
    """Run the benchmark."""
    parser = options_for(__doc__, RESULT)
    parser.add_argument("--gb", type=float, default=0.5)
    parser.add_argument("--rounds", type=int, default=5)
    names = ("codings", "commands", "tensors")
    parser.add_argument("--parts", nargs="+", choices=names, default=names)
    options = parser.parse_args()
    if kernels.native is None:
        sys.exit("the compiled kernels are not built, or turned off")
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    sections = []
    with work_folder(options.work_dir, keep=options.keep) as work:
        if "codings" in options.parts:
            columns = (
                "coding",
                "million values",
                "encode: numpy",
                "compiled",
                "decode: numpy",
                "compiled",
            )
            sections += [
                "## Codings, million values a second",
                table(columns, codings(options.rounds)),
            ]
        if "commands" in options.parts:
            heads = ("CPU s per GB of base (× floor)", "floor", *WAYS)
            sections += [
                "## Whole commands",
                table(heads, commands(work, options.gb, options.rounds)),
            ]
        if "tensors" in options.parts:
            verbs = (f"CPU s, {N_FEW} → {N_MANY:,} tensors of {TENSOR_BYTES} bytes", *WAYS)
            sections += ["## Many small tensors", table(verbs, tensors(work, options.rounds))]
        write_result(options.result, "Compiled kernels beside numpy", sections, where=work)
    if options.result != RESULTS / RESULT:
        print(f"\nrecorded → now\n{beside(RESULTS / RESULT, options.result)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
