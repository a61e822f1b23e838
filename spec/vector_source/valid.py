"""The valid vectors: what each shows, its base, its target and its delta."""

from __future__ import annotations

import base64
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from vector_source import bits
from vector_source.compressed_frames import FRAMES
from vector_source.writer import (
    BITS,
    SPAN,
    Checkpoint,
    Coding,
    Draft,
    Place,
    Tensor,
    WeightFile,
    add_chunk,
    assemble,
    block,
    code,
    compact,
    draft,
    frame,
    tensor,
    windowed_frame,
)

WEIGHTS = "model.safetensors"
SHARDS = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
# (exponent bits, mantissa bits) of the float types that have infinities, NaN payloads or both
FLOAT_FIELDS = {
    "F8_E5M2": (5, 2),
    "F8_E4M3": (4, 3),
    "F16": (5, 10),
    "BF16": (8, 7),
    "F32": (8, 23),
    "F64": (11, 52),
}


@dataclass(frozen=True)
class Valid:
    """A valid vector. With `zeros` the base is one file of one tensor of zeros, not stored."""

    name: str
    shows: str
    base: Checkpoint
    target: Checkpoint
    delta: bytes
    zeros: Tensor | None = None


def one_file(
    tensors: dict[str, Tensor], metadata: dict[str, str] | None = None, path: str = WEIGHTS
) -> Checkpoint:
    """Return a checkpoint that is a single file."""
    return Checkpoint([WeightFile(path, tensors, metadata)], kind="file")


def folder(*files: WeightFile, side: dict[str, bytes] | None = None) -> Checkpoint:
    """Return a checkpoint that is a folder."""
    return Checkpoint(list(files), side or {})


def noise(dtype: str, n: int, seed: int, shape: Sequence[int] | None = None) -> Tensor:
    """Return a tensor of n elements of random bits; the same for the same seed."""
    draw = random.Random(f"{dtype} {n} {seed}")
    return tensor(dtype, [draw.getrandbits(8 * max(BITS[dtype] // 8, 1)) for _ in range(n)], shape)


def nudged(one: Tensor, positions: Sequence[int], by: int = 1) -> Tensor:
    """Return a tensor with the bits at some positions moved."""
    data, w = bytearray(one.data), one.width
    for p in positions:
        bits = int.from_bytes(data[p * w : (p + 1) * w], "little") + by
        data[p * w : (p + 1) * w] = (bits % (1 << 8 * w)).to_bytes(w, "little")
    return Tensor(one.dtype, one.shape, bytes(data), one.own)


def vector(
    name: str, shows: str, base: Checkpoint, target: Checkpoint, *codings: Any, **options: Any
) -> Valid:
    """Return a vector whose delta is the writer's plain one."""
    return Valid(name, shows, base, target, assemble(draft(base, target, *codings, **options)))


def example() -> list[Valid]:
    """Return the worked example of FORMAT §15: four values of 300 changed."""
    bits = [0x3F80] * 300
    bits[3], bits[290] = 0x8000, 0xBF80
    base = one_file({"w": tensor("BF16", bits)})
    for position, new in ((2, 0x3F81), (3, 0x0000), (289, 0x4080), (290, 0xBF82)):
        bits[position] = new
    shows = "the worked example of FORMAT \u00a715"
    return [vector("example", shows, base, one_file({"w": tensor("BF16", bits)}))]


def encodings() -> list[Valid]:
    """Return every index encoding with every packing and value encoding, and their edges."""
    old: dict[str, Tensor] = {}
    new: dict[str, Tensor] = {}
    codings: dict[str, Coding] = {}
    bands = [int(r == 2) for r in range(6)], [int(c == 4) for c in range(10)]
    for index in ("gaps", "bitmap", "rice", "tiles"):
        for packing in ("planes", "steps", "scaled"):
            for values in ("ulp", "target"):
                name = f"{index} {packing} {values}"
                old[name] = graded("BF16", 60, len(old))
                new[name] = moved(old[name], drawn(60, 0.2, len(old)), len(old))
                codings[name] = Coding(index, values, packing=packing, bands=bands)
    shows = "every index encoding with every packing and value encoding"
    out = [vector("combinations", shows, one_file(old), one_file(new), codings)]
    base = one_file({"w": noise("BF16", 40, 1)})
    target = one_file({"w": nudged(noise("BF16", 40, 1), (0, 3, 4, 17, 38), 0x81)})
    for index in ("gaps", "bitmap"):
        for values in ("ulp", "target"):
            shows = f"index encoding {index} with value encoding {values}"
            coding = Coding(index, values)
            out.append(vector(f"{index}_{values}", shows, base, target, default=coding))
    long = noise("U8", 1100, 2)
    reached = one_file({"w": nudged(long, (254, 509, 765, 1099))})
    shows = "gaps of 254, 255, 256 and 334: the token 255 at its edges"
    out.append(vector("gaps_skip", shows, one_file({"w": long}), reached))
    reached = one_file({"w": nudged(long, (1099,))})
    shows = "several tokens 255 in a row before the only position, the last of the tensor"
    out.append(vector("gaps_skips", shows, one_file({"w": long}), reached))
    last = one_file({"w": nudged(noise("U8", 21, 3), (0, 7, 8, 20))})
    shows = "bitmap whose last byte is padded: 21 positions"
    base = one_file({"w": noise("U8", 21, 3)})
    out.append(vector("bitmap_padded", shows, base, last, default=Coding("bitmap")))
    return out


def graded(dtype: str, n: int, seed: int, shape: Sequence[int] | None = None) -> Tensor:
    """Return a tensor of values of many magnitudes and both signs."""
    draw = random.Random(f"graded {dtype} {n} {seed}")
    width = BITS[dtype] // 8
    top = {"BF16": 0x3F80, "F16": 0x3C00, "F32": 0x3F800000}.get(dtype, 0x40)
    lowest = top - (top >> 3)
    bits = [draw.randint(lowest, top) | draw.getrandbits(1) << 8 * width - 1 for _ in range(n)]
    return tensor(dtype, bits, shape)


def drawn(n: int, share: float, seed: int) -> list[int]:
    """Return some of n positions."""
    draw = random.Random(f"drawn {n} {seed}")
    return [p for p in range(n) if draw.random() < share]


def moved(one: Tensor, positions: Sequence[int], seed: int, most: int = 3) -> Tensor:
    """Return a tensor with the bits at some positions moved, mostly by one."""
    draw = random.Random(f"moved {seed}")
    for p in positions:
        by = draw.choice((1, 1, 1, 1, 2, most)) * draw.choice((1, -1))
        one = nudged(one, (p,), by)
    return one


def below_a_byte() -> list[Valid]:
    """Return the encodings that work below a byte, and their edges."""
    out = []

    def add(name: str, shows: str, old: Tensor, new: Tensor, coding: Coding) -> None:
        base, target = one_file({"w": old}), one_file({"w": new})
        out.append(vector(name, shows, base, target, default=coding))

    old = graded("BF16", 300, 1)
    new = moved(old, drawn(300, 0.2, 1), 1)
    for values in ("ulp", "target"):
        coding = Coding("rice", values, thresholds=(114, 122, 125), k=2)
        add(f"classes_{values}", f"rice in classes with value encoding {values}", old, new, coding)
    coding = Coding("rice", packing="steps", thresholds=(1, 114, 126, 255))
    add("classes_both", "rice and steps in classes; a class of no element", old, new, coding)
    coding = Coding(packing="steps", thresholds=(120, 125), k=2)
    add("classes_steps", "steps in classes, the index not", old, new, coding)
    coding = Coding("rice", packing="steps", thresholds=range(112, 127), k=0)
    add("classes_most", "fifteen thresholds", old, new, coding)
    coding = Coding("rice", packing="steps", classes=True, k=4)
    add("classes_none", "classes 1 without a threshold", old, new, coding)
    low = [p for p, bits in enumerate(old.elements()) if bits >> 7 & 255 < 126]
    coding = Coding("rice", packing="scaled", thresholds=(126,), k=0)
    shows = "a class of which all is touched, and one of which nothing is"
    add("classes_all_and_none", shows, old, moved(old, low, 2), coding)
    for dtype in ("F8_E4M3", "F16", "F32", "I8"):
        old = graded(dtype, 90, 2)
        new = moved(old, drawn(90, 0.3, 2), 2, 9)
        thresholds = (58, 61) if BITS[dtype] == 8 else (117, 119) if dtype == "F16" else (117, 125)
        coding = Coding("rice", packing="steps", thresholds=thresholds, k=0)
        add(f"classes_{dtype.lower()}", f"keys of {dtype}", old, new, coding)
    old, longer = graded("BF16", 40, 3), graded("BF16", 60, 3)
    longer = Tensor("BF16", (60,), old.data + longer.data[80:])
    longer = moved(longer, (3, 8, 20, 39), 3)
    coding = Coding("rice", packing="scaled", thresholds=(1, 120))
    add("classes_grown", "elements beyond those kept count as zero", old, longer, coding)

    old = graded("BF16", 300, 6)
    for name, shows, share in (("rice", "rice", 0.1), ("rice_rest", "rice of the rest", 0.9)):
        new = moved(old, drawn(300, share, 6), 6)
        add(name, shows, old, new, Coding("rice", packing="steps", k=3))
    everything = moved(old, range(300), 6)
    add("rice_all", "rice without a gap: all is touched", old, everything, Coding("rice"))
    words = tensor("BF16", [0x3F80] * 300)
    edges = nudged(words, (2, 3, 289, 290))
    add("rice_example", "the stream of FORMAT §6.5", words, edges, Coding("rice", k=6))
    keys = (127, 122, 121, 126, 120, 127, 122, 126, 122, 121)
    ten = tensor("BF16", [one << 7 for one in keys])
    coding = Coding("rice", thresholds=(124,), k=0)
    add("classes_example", "the classes of FORMAT §6.5", ten, nudged(ten, (1, 4, 5, 9)), coding)
    twenty = tensor("U8", range(20))
    coding = Coding("tiles", bands=([0, 1, 0, 0], [0, 0, 0, 1, 0]), k=1)
    changed = nudged(twenty, (3, 5, 6, 7, 9, 13))
    add("tiles_example", "the stream of FORMAT §6.6", twenty, changed, coding)

    old = graded("BF16", 300, 4, (12, 25))
    some = drawn(300, 0.1, 4) + [75 + c for c in range(25) if c != 9] + list(range(6, 300, 25))
    new = moved(old, sorted(set(some)), 4)
    rows, columns = [int(r == 3) for r in range(12)], [int(c == 6) for c in range(25)]
    add(
        "tiles",
        "tiles: one row and one column apart",
        old,
        new,
        Coding("tiles", bands=(rows, columns)),
    )
    labels = [0, 2, 1] * 4, [c % 4 for c in range(25)]
    coding = Coding("tiles", bands=labels, packing="steps", k=2)
    add("tiles_steps", "tiles of three by four bands, with steps", old, new, coding)
    rows = [int(r % 3 == 0) for r in range(44)]
    coding = Coding("tiles", "target", bands=(rows, [0, 0, 1, 0, 1, 1, 0]), first=5)
    shows = "tiles whose columns are not the tensor's, beginning in the fifth"
    add("tiles_first", shows, old, new, coding)
    coding = Coding("tiles", bands=([0] * 12, [0] * 25), k=0)
    add("tiles_one", "one tile, parameter 0", old, new, coding)
    coding = Coding("tiles", bands=([r % 16 for r in range(19)], [c % 16 for c in range(16)]), k=2)
    add("tiles_most", "sixteen by sixteen bands", old, new, coding)

    for dtype, most in (("U8", 127), ("BF16", 300), ("F32", 100_000), ("I64", 70_000)):
        old = graded(dtype, 80, 5) if dtype in ("BF16", "F32") else noise(dtype, 80, 5)
        new = moved(old, drawn(80, 0.5, 5), 5, most)
        for packing in ("steps", "scaled"):
            shows = f"packing {packing} for {dtype}"
            coding = Coding(packing=packing, k=3)
            add(f"{packing}_{dtype.lower()}", shows, old, new, coding)
    old = tensor("I32", [0] * 9)
    new = tensor("I32", [0, 1, 2**32 - 1, 2**31, 2**31 - 1, 2**30, 5, 2**32 - 3, 77])
    coding = Coding(packing="scaled", positions=range(9))
    add("scaled_widest", "scaled: codes of 0 to 32 bits", old, new, coding)
    new = tensor("I32", [0, 1, 2**32 - 1, 0, 0, 1, 0, 0, 0])
    coding = Coding(packing="scaled")
    add("scaled_no_lower", "scaled without lower bits", old, new, coding)
    new = tensor("I32", [1, 2**32 - 1, 1, 1, 1, 1, 2**32 - 1, 1, 1])
    add("steps_short", "steps all of one unit", old, new, Coding(packing="steps", k=0))
    new = tensor("I32", [2**31, 2**31 - 1, 2**31 + 1, 1, 0, 0, 0, 0, 0])
    coding = Coding(packing="steps", k=31, positions=range(4))
    add("steps_widest", "steps with codes of up to 32 bits, parameter 31", old, new, coding)
    return out


def large() -> list[Valid]:
    """Return chunks: where they may begin and end."""
    zeros = Tensor("U8", (2 * SPAN + 9,), bytes(2 * SPAN + 9))
    positions = [3, SPAN - 1, 2 * SPAN + 1, 2 * SPAN + 8]
    base, target = one_file({"w": zeros}), one_file({"w": nudged(zeros, positions, 3)})
    whole = (2 * SPAN + 1, 8, Coding("tiles", bands=([0] * 4, [0] * 2), k=0))
    coding = Coding(positions=positions, chunks=[(0, SPAN), whole])
    shows = "a chunk of the most elements, none of the next, and one that begins elsewhere"
    delta = assemble(draft(base, target, default=coding))
    out = [Valid("chunks_large", shows, base, target, delta, zeros)]
    old = graded("BF16", 200, 8)
    new = moved(old, [0, 1, 40, 41, 42, 99, 100, 150, 199], 8)
    parts = [
        (0, 2, Coding("bitmap", "target")),
        (40, 3, Coding("rice", packing="steps", thresholds=(120,))),
        (99, 1, Coding(touched=False)),
        (100, 51, Coding(packing="scaled")),
        (199, 1, Coding("bitmap", packing="steps")),
    ]
    both = {"w": old, "v": old}, {"w": new, "v": moved(old, (7, 8), 9)}
    codings = {"w": Coding(chunks=parts), "v": Coding(chunks=[(7, 1), (8, 192)])}
    shows = "chunks of one tensor that begin and end anywhere, each coded in its own way"
    out.append(vector("chunks", shows, one_file(both[0]), one_file(both[1]), codings))
    return out


def codes() -> list[Valid]:
    """Return codes at the edges: zero codes, zero planes, streams left out."""
    base = one_file({"w": noise("BF16", 12, 4)})
    wiped = one_file({"w": tensor("BF16", [0] * 12)})
    shows = "every plane zero and left out"
    out = [vector("planes_left_out", shows, base, wiped, default=Coding("bitmap", "target"))]
    target = one_file({"w": nudged(noise("BF16", 12, 4), (2,))})
    coding = Coding(positions=[2, 5, 7])
    shows = "codes of 0: touched positions that do not change"
    out.append(vector("code_zero", shows, base, target, default=coding))
    for name, one, n in (("plain", bytes(1), 1), ("frame", frame(bytes(100)), 100)):
        old = noise("BF16", n, 4)
        base, target = one_file({"w": old}), one_file({"w": nudged(old, range(n))})
        delta = draft(base, target)
        delta.structure["chunks"]["stored"][2] = len(one)
        delta.entries["chunk:0:2"] = one
        shows = f"a plane of zeros that is stored all the same, {name}"
        out.append(Valid(f"zero_plane_{name}", shows, base, target, assemble(delta)))
    shows = "values moved by the most that ulp can say, both ways, in wide and narrow integers"
    low = {t: tensor(t, [0, 0, 1, (1 << BITS[t]) - 1]) for t in ("I8", "U16", "I32", "U64")}
    high = {
        t: tensor(t, [1 << BITS[t] - 1, (1 << BITS[t] - 1) - 1, 0, 0])
        for t in ("I8", "U16", "I32", "U64")
    }
    out.append(vector("ulp_wraps", shows, one_file(low), one_file(high)))
    return out


def dtypes() -> list[Valid]:
    """Return every data type, and special floats."""
    base = {name.lower(): noise(name, 12, 5) for name in BITS if BITS[name] >= 8}
    base["f4"] = Tensor("F4", (3, 2), noise("U8", 3, 5).data)
    base |= {t.lower(): Tensor(t, (4, 2), noise("U8", 6, 5).data) for t in ("F6_E2M3", "F6_E3M2")}
    target = {name: nudged(one, (1, 2), -1) for name, one in base.items()}
    out = [
        vector(
            f"dtypes_{values}",
            f"every data type, those below a byte as bytes, with value encoding {values}",
            one_file(base),
            one_file(target),
            default=Coding(values=values),
        )
        for values in ("ulp", "target")
    ]
    before, after = {}, {}
    for dtype, (n_exponent, n_mantissa) in FLOAT_FIELDS.items():
        sign, top = 1 << n_exponent + n_mantissa, ((1 << n_exponent) - 1) << n_mantissa
        ones = (1 << n_mantissa) - 1
        plain = [0, 1, ones, ones + 1, top - 1, top, top | 1, top | ones, top | ones & ones >> 1]
        special = sorted({bits | s for bits in plain for s in (0, sign)})
        steps = (1, 5, len(special) - 1)
        before[dtype] = tensor(dtype, special * len(steps))
        turned = [special[(i + step) % len(special)] for step in steps for i in range(len(special))]
        after[dtype] = tensor(dtype, turned)
    shows = "signed zeros, subnormals, infinities and NaN payloads turned into each other"
    out.append(vector("float_specials", shows, one_file(before), one_file(after)))
    kinds = {"BF17": (17, "i1"), "Q4_K": (144 * 8 // 16, "f2"), "U128": (128, "i8")}
    kinds |= {"HUGE": (1024, "f8"), "BIT": (1, "f1"), "": (8, "i1"), "f32": (32, "f4")}
    old: dict[str, Tensor] = {}
    new: dict[str, Tensor] = {}
    for dtype, own in kinds.items():
        raw = noise("U8", own[0], len(old))
        old[dtype + "!"] = Tensor(dtype, (2, 4), raw.data, own)
        new[dtype + "!"] = nudged(old[dtype + "!"], (0,), 5)
    shows = "dtypes that are not of safetensors 0.8, by the bits and element type stated"
    out.append(vector("dtypes_unknown", shows, one_file(old), one_file(new)))
    return out


def structure() -> list[Valid]:
    """Return tensors that come, go and change type or shape."""
    w, v = noise("BF16", 24, 6, (6, 4)), noise("F32", 6, 7)
    base = one_file({"w": w, "v": v})
    new = noise("F16", 5, 8)

    def to(name: str, shows: str, tensors: dict[str, Tensor], **options: Any) -> Valid:
        return vector(name, shows, base, one_file(tensors), **options)

    zeros = tensor("F32", [0] * 9)
    grown = Tensor("BF16", (8, 4), nudged(w, (3,)).data + noise("BF16", 8, 9).data)
    shrunk = Tensor("BF16", (4, 4), nudged(w, (3,)).data[:32])
    more = Tensor("BF16", (8, 4), w.data + bytes(16))
    scalar, empty = tensor("F32", [0x3F800000], ()), Tensor("BF16", (2, 0, 3), b"")
    kept = nudged(w, (1, 2, 20))
    retyped = noise("F16", 24, 10, (6, 4))
    keep_7, keep_0 = {"w": Coding(keep=7)}, {"w": Coding(keep=0)}
    out = [
        to("unchanged", "nothing changed", {"w": w, "v": v}),
        to("unchanged_beside_changed", "one tensor changed, one not", {"w": kept, "v": v}),
        to("added", "a tensor added", {"w": w, "new": new, "v": v}, default=Coding("bitmap")),
        to("added_zeros", "a tensor of zeros added: no chunk", {"w": w, "z": zeros, "v": v}),
        to("removed", "a tensor removed: no row names it", {"w": w}),
        to("removed_all", "every tensor removed: a file without tensors", {}),
        to("retyped", "another dtype, equal shape, other bytes", {"w": retyped, "v": v}),
        to(
            "retyped_same_bytes",
            "another dtype, equal bytes",
            {"w": Tensor("F16", (6, 4), w.data), "v": v},
        ),
        to(
            "reshaped",
            "another shape, equal bytes: the row is copied",
            {"w": Tensor("BF16", (4, 6), w.data), "v": v},
        ),
        to(
            "reshaped_and_changed",
            "another shape and changes",
            {"w": Tensor("BF16", (24,), kept.data), "v": v},
        ),
        to("resized_grown", "more rows: the first kept, changes in them", {"w": grown, "v": v}),
        to("resized_zeros", "more rows, all zero: no chunk", {"w": more, "v": v}),
        to("resized_shrunk", "fewer rows", {"w": shrunk, "v": v}),
        to(
            "resized_cut",
            "fewer rows and no change: no chunk, but a target digest",
            {"w": Tensor("BF16", (3, 4), w.data[:24]), "v": v},
        ),
        to("keep_part", "fewer elements kept", {"w": kept, "v": v}, codings=keep_7),
        to(
            "keep_none",
            "no element kept, dtype and shape equal",
            {"w": kept, "v": v},
            codings=keep_0,
        ),
        to(
            "keep_no_chunk",
            "fewer elements kept, the others zero: no chunk",
            {"w": Tensor("BF16", (6, 4), w.data[:14] + bytes(34)), "v": v},
            codings=keep_7,
        ),
    ]
    few = one_file({"s": scalar, "e": empty, "i": Tensor("I64", (0,), b"")})
    many = {"s": nudged(scalar, (0,)), "e": empty, "t": tensor("BOOL", [1], ())}
    many |= {"i": Tensor("I64", (3, 0), b""), "j": Tensor("U8", (0,), b"")}
    many |= {"k": Tensor("F32", (1 << 40, 1 << 40, 0), b"")}
    shows = "tensors without dimensions and without elements: copied, reshaped, added"
    out.append(vector("scalars_and_empty", shows, few, one_file(many)))
    both = one_file({"w": kept, "v": v, "new": new})
    shows = "no target digests of tensors with a base, but touched digests"
    out.append(vector("target_unknown", shows, base, both, known=False))
    coding = Coding(touched=False)
    shows = "no touched digests, but target digests"
    out.append(vector("touched_unknown", shows, base, both, default=coding))
    return out


def sources() -> list[Valid]:
    """Return rows whose base tensor has another name or file."""
    a, b, c = noise("BF16", 8, 31), noise("F32", 5, 32), noise("I64", 2, 33)
    a2 = nudged(a, (1, 6))
    first, second = SHARDS
    base = folder(WeightFile(first, {"a": a}), WeightFile(second, {"b": b, "c": c}))
    out = []

    def add(
        name: str,
        shows: str,
        target: Checkpoint,
        places: dict[Place, Place | None],
        of: Checkpoint = base,
        **options: Any,
    ) -> None:
        out.append(vector(name, shows, of, target, sources=places, **options))

    target = one_file({"x": a, "y": nudged(b, (2,))})
    add(
        "renamed",
        "tensors under other names, one of them changed",
        target,
        {(WEIGHTS, "x"): (first, "a"), (WEIGHTS, "y"): (second, "b")},
    )
    target = one_file({"b": a, "a": c})
    places: dict[Place, Place | None] = {
        (WEIGHTS, "b"): (first, "a"),
        (WEIGHTS, "a"): (second, "c"),
    }
    add("renamed_crosswise", "two tensors that exchange their names", target, places)
    target = one_file({f"model.{name}": one for name, one in {"a": a2, "b": b, "c": c}.items()})
    add(
        "prefixed",
        "one more prefix before every name",
        target,
        {(WEIGHTS, f"model.{name}"): (path, name) for path, name in base.places()},
    )
    target = folder(WeightFile(first, {"a": a2, "b": b}), WeightFile(second, {"c": c}))
    add("moved", "a tensor that moves to another shard", target, {})
    target = one_file({"a": a2, "tied": a, "part": Tensor("BF16", (3,), a.data[:6])})
    add(
        "shared",
        "three rows made from one base tensor",
        target,
        {(WEIGHTS, name): (first, "a") for name in ("a", "tied", "part")},
    )
    twins = folder(
        WeightFile("model.fp16.safetensors", {"w": noise("F16", 8, 34), "v": b}),
        WeightFile(WEIGHTS, {"w": b, "v": nudged(b, (0,))}),
    )
    after = folder(
        WeightFile("model.fp16.safetensors", {"w": nudged(noise("F16", 8, 34), (3,)), "v": b}),
        WeightFile(WEIGHTS, {"w": nudged(b, (1,)), "v": nudged(b, (0,))}),
    )
    add("same_names", "two files with tensors of the same names", after, {}, twins)
    add("added_all", "no row has a base", after, dict.fromkeys(after.places()), twins)

    # The base is laid out otherwise than when the delta was written.
    def given(name: str, shows: str, delta: bytes, base: Checkpoint, target: Checkpoint) -> None:
        out.append(Valid(name, shows, base, target, delta))

    target = folder(WeightFile(first, {"a": a2}), WeightFile(second, {"b": b, "c": c}))
    single = one_file({"a": a, "b": b, "c": c})
    delta = assemble(draft(base, target))
    given("base_one_file", "made from shards; the base is one file", delta, single, target)
    delta = assemble(draft(single, target))
    given("base_in_shards", "made from one file; the base is in shards", delta, base, target)
    other = folder(
        WeightFile("w.safetensors", {"a": nudged(a, (7,)), "b": Tensor("I32", (5,), b.data)}),
        WeightFile("x.safetensors", {"a": a, "b": b}),
        WeightFile("y.safetensors", {"a": Tensor("F16", (8,), a.data), "c": c}),
    )
    shows = "base tensors found in other files: by dtype, then by digest"
    given("base_found", shows, delta, other, target)
    here = folder(
        WeightFile(WEIGHTS, {"a": Tensor("F16", (8,), a.data), "b": b, "c": c}),
        WeightFile("x.safetensors", {"a": a}),
    )
    shows = "the tensor of the right file and name has another dtype; it is found elsewhere"
    given("base_found_retyped", shows, delta, here, target)
    here = folder(*base.weight_files, WeightFile("more.safetensors", {"a": b, "d": b}))
    shows = "the base has tensors that no row names"
    given("base_further", shows, assemble(draft(base, target)), here, target)
    return out


def files() -> list[Valid]:
    """Return weight files: sharding, order, headers."""
    a, b, c = noise("BF16", 8, 11), noise("F32", 5, 12), noise("I64", 2, 13)
    a2 = nudged(a, (1, 6))
    first, second = SHARDS
    weight_map = {"weight_map": {"a": first, "b": second, "c": second}}
    index = {"model.safetensors.index.json": json.dumps(weight_map, indent=1).encode()}
    single = one_file({"a": a, "b": b, "c": c})
    sharded = folder(WeightFile(first, {"a": a}), WeightFile(second, {"b": b, "c": c}), side=index)
    changed = folder(WeightFile(first, {"a": a2}), WeightFile(second, {"b": b, "c": c}), side=index)
    backwards = folder(
        WeightFile(second, {"b": b, "c": c}), WeightFile(first, {"a": a2}), side=index
    )
    alone = folder(WeightFile(WEIGHTS, {"a": a2, "b": b, "c": c}))
    metadata = {"z": "last first", "format": "pt", "": "no key", "a": "x\ud7ff\ue000"}
    metadata["text"] = 'quote " slash \\ / tab \t bell \x07 line\u2028 del \x7f é \U0001f600'
    spelled = WeightFile(WEIGHTS, {"a": a2, "b": b}, header=None)
    spelled.header = json.dumps(json.loads(spelled.canonical()), indent=2).encode() + b"   "
    empty = {"x": Tensor("F32", (0,), b""), "y": Tensor("F32", (0,), b""), "a": a2}
    swapped = WeightFile(WEIGHTS, empty)
    entries = json.loads(swapped.canonical())
    order = {name: dict(reversed(entries[name].items())) for name in ("a", "y", "x")}
    swapped.header = compact(order | {"__metadata__": {"b": "1.5", "a": ""}})
    escaped = WeightFile(WEIGHTS, {"\u00e9\n": a2})
    escaped.header = rb'{"\u00E9\u000a":' + escaped.canonical().split(b":", 1)[1].rstrip()
    long = WeightFile(WEIGHTS, {"a": a2})
    long.header = long.canonical() + b" " * 3000
    none = one_file({"a": a})
    third = WeightFile("c/model.safetensors", {"a": a2}, header=long.header)
    mixed = folder(spelled, WeightFile("b.safetensors", {"a": a}, {"format": "pt"}), third)

    def headed(name: str, shows: str, file: WeightFile) -> Valid:
        return vector(name, shows, none, folder(file), sources=from_a(file))

    def from_a(file: WeightFile) -> dict[Place, Place | None]:
        return {(WEIGHTS, name): (WEIGHTS, "a") for name in file.tensors if len(name) == 2}

    return [
        vector("sharded", "a sharded folder; its index is the base's", sharded, changed),
        vector("sharded_backwards", "weight files not in the order of paths", sharded, backwards),
        vector("file_to_shards", "base a file, target sharded", single, changed),
        vector("shards_to_file", "base sharded, target a file", sharded, one_file(alone.tensors())),
        vector("shards_to_folder", "base sharded, target a folder of one file", sharded, alone),
        vector("order", "tensors in another order", single, one_file({"c": c, "a": a, "b": b})),
        vector("metadata", "metadata in the order given", single, one_file({"a": a2}, metadata)),
        vector("metadata_empty", "metadata without members", single, one_file({"a": a}, {})),
        vector("file_named", "a file of any name", none, one_file({"a": a2}, path="out put.bin")),
        vector(
            "no_tensors", "a weight file without tensors", none, folder(WeightFile(WEIGHTS, {}))
        ),
        headed("header_stored", "a header with spaces and line ends", spelled),
        headed("header_stored_order", "members of a stored header in another order", swapped),
        headed("header_stored_escapes", "a name with escapes in a stored header", escaped),
        headed("header_stored_frame", "a stored header that is a frame", long),
        vector("header_mixed", "stored and canonical headers in one target", single, mixed),
    ]


def side_files() -> list[Valid]:
    """Return side files and empty folders."""
    a = noise("BF16", 8, 14)
    there = {"config.json": b"{}\n", "sub/deep/kept.txt": b"kept", "gone.txt": b"gone", "none": b""}
    after = {
        "config.json": b'{"a": 1}\n',
        "sub/deep/kept.txt": b"kept",
        "sub/new.bin": bytes(range(256)) * 3,
        "none": b"",
        "empty.txt": b"",
        "long.txt": b"a" * 3000,
        "\u00e9t\u00e9 \U0001f600.txt": b"unicode",
        "sub.txt": b"a neighbour of the folder sub",
    }
    base = folder(WeightFile(WEIGHTS, {"a": a}), side=there)
    target = folder(WeightFile(WEIGHTS, {"a": nudged(a, (0,))}), side=after)
    shows = "side files changed, added, removed, the base's, empty, in subfolders, as a frame"
    out = [vector("side_files", shows, base, target)]
    shows = "a side file that the base has too is carried all the same"
    out.append(vector("side_files_carried", shows, base, target, carry=list(after)))
    hollow = folder(WeightFile(WEIGHTS, {"a": a}), side={"sub/f": b"f"})
    hollow.empty_folders = ["empty", "sub/a/b", "sub/c", "sub.d"]
    out.append(vector("empty_folders", "folders that hold nothing", base, hollow))
    bare = Checkpoint([], {"readme.md": b"text"})
    out.append(vector("no_weights", "a target without any weight file", base, bare))
    out.append(vector("nothing", "a target without any file", base, Checkpoint([])))
    side = ("model.safetensors.index.json", "other.SAFETENSORS", "safetensors")
    strange = folder(WeightFile(WEIGHTS, {"a": a}), side=dict.fromkeys(side, b""))
    odd = ["...a", ".gitignore", ".git2", "COM", "com10.txt", "LPTX", "a b", "-", "~a", "#a;'&%$"]
    odd += ["nul2", "c/.b", "\uffff", "\U0001f600", "\u0130", "\x80", "x" * 255, "\u00e9" * 127]
    odd += ["/".join("d" * 64), "/".join(["y" * 255] * 8), "w.safetensors", "other"]
    strange.empty_folders = odd
    out.append(vector("paths", "paths that are strange and allowed", base, strange))
    return out


def names() -> list[Valid]:
    """Return names that look like trouble."""
    tricky = [
        "sparsedelta:manifest",
        "manifest",
        "payload",
        "__metadata",
        "",
        ".",
        "..",
        "../up",
        "/root",
        "a/b",
        "a.b.c",
        "a:b",
        " space ",
        'quote " back \\ slash',
        "line\nbreak\ttab\x00null\x7f",
        "\b\f\r\x1f\u2028",
        "Stra\u00dfe",
        "e\u0301",
        "\u00e9",
        "\u6f22\u5b57",
        "\U0001f600",
        "\uffff",
        "A",
        "a",
        "null",
    ]
    base = {name: noise("U8", 3, i) for i, name in enumerate(tricky)}
    target = {name: nudged(one, (1,)) for name, one in base.items()}
    shows = "names that look like members, paths, escapes; normalisation and case keep them apart"
    out = [vector("names", shows, one_file(base), one_file(target))]
    long = {("layers." * 147)[:1023] + "w": noise("U8", 3, 1)}
    longer = {name: nudged(one, (1,)) for name, one in long.items()}
    shows = "a name of 1024 bytes, the longest"
    out.append(vector("name_long", shows, one_file(long), one_file(longer)))
    return out


def spelling() -> list[Valid]:
    """Return what a reader accepts though our writer does not write it."""
    a, b = noise("BF16", 8, 15), noise("F32", 5, 16)
    base = folder(WeightFile(WEIGHTS, {"a": a, "b": b}))
    target = folder(WeightFile(WEIGHTS, {"a": nudged(a, (1,)), "b": nudged(b, (0, 4))}))
    target.side_files["config.json"] = b"{}"

    def made(name: str, shows: str, of: Draft, **hooks: Any) -> Valid:
        return Valid(name, shows, base, target, assemble(of, **hooks))

    nested: Any = "deep"
    for _ in range(62):
        nested = [nested]
    info: dict[str, Any] = {"nested": nested, "float": -1.5e-300, "large": 1e300, "none": None}
    info |= {"most": 2**63, "least": -(2**63) - 1, "yes": True, "text": "\u00e9 \U0001f600 []{"}
    held = draft(base, target, notes={"more": [], "info": info}, base_id="org/model@0123456789abc")
    out = [made("notes", "free content in notes, nested 64 deep; a base id", held)]
    loose = draft(base, target)
    loose.notes = b' \t\r\n{ "\\ud83d\\ude00" : [ 1 , -0 , 1E4 , 0.50 ] ,\n"\\u0069nfo":{} } \n'
    out.append(made("notes_spelling", "notes with spaces, escapes and numbers of any form", loose))
    loose = draft(base, target, notes={"info": "x" * 2000})
    out.append(made("notes_frame", "notes that are a frame", loose))

    text = b"z" * 40 + bytes(range(97, 123)) + b"z" * 40
    other = folder(*target.weight_files, side={"config.json": text})
    wide = draft(base, other)
    parts = [block(1, 40, b"z", False), block(0, 26, text[40:66], False), block(1, 40, b"z", True)]
    stored = windowed_frame(b"", 27, len(text))[:14] + b"".join(parts)
    wide.entries["file:config.json"] = stored
    wide.structure["target"]["side_files"][0][2] = len(stored)
    shows = "a frame with the widest window and in several blocks"
    out.append(Valid("frame_windowed", shows, base, other, assemble(wide)))
    shows = "lists that hold more than the rows need: layouts, codings, base files"
    spare = draft(base, target)
    spare.structure["layouts"] += [["F4", 4, "i1", [2]], spare.structure["layouts"][0]]
    spare.structure["codings"] += [["target", "tiles", "steps", 1]]
    spare.structure["base"]["files"] += ["spare.bin", WEIGHTS]
    out.append(made("spare", shows, spare))
    out.append(padded())
    out.append(compressed())
    return out


def padded() -> Valid:
    """Return a delta whose streams spell numbers in more bytes than they need."""
    old = graded("BF16", 24, 9)
    base, target = one_file({"w": old}), one_file({"w": nudged(old, (5, 6))})
    delta = draft(base, target, default=Coding("tiles", bands=([0] * 4, [0] * 6), packing="steps"))
    lengths = b"".join(bits.number(n, 5) for n in (6, 0, 1, 0, 1, 0))
    part, sequence = bits.subset([5, 6], 24, 1)
    index = lengths + bits.number(part[0], 3) + bits.number(part[1], 2)
    index += bits.rice([([0] * 4, 0), ([0] * 6, 0), sequence])
    steps = b"\0" + bits.number(0, 5) + bits.number(0, 4) + b"\0"
    codes = [code(b, b + 1, "ulp", "f2") for b in (old.elements()[p] for p in (5, 6))]
    steps = steps[:-1] + bits.packed([(c - 1) % 2 for c in codes], 1)
    structure = delta.structure
    structure["chunks"] |= {name: [] for name in structure["chunks"]}
    structure["codings"], delta.entries = [], {}
    delta.digests["chunks"] = []
    add_chunk(delta, Coding("tiles", packing="steps"), 0, 24, 2, [index, steps])
    shows = "numbers in more groups of seven bits than they need"
    return Valid("numbers_padded", shows, base, target, assemble(delta))


def repetitive() -> tuple[Checkpoint, Checkpoint]:
    """Return base and target whose streams compress: short gaps, small steps, text that repeats."""
    draw = random.Random("repetitive")
    before = [0x3C00 + draw.getrandbits(9) for _ in range(1200)]
    after = list(before)
    position = draw.randrange(4)
    while position < len(after):
        after[position] += draw.choice((1, 1, 1, -1, -1, 2, -2, 300))
        position += 1 + min(int(draw.expovariate(0.4)), 20)
    text = "\n".join(f'"{n}": "token {n % 7}",' for n in range(90)).encode()
    old, new = (WeightFile(WEIGHTS, {"w": tensor("BF16", bits)}) for bits in (before, after))
    return folder(old), folder(new, side={"vocabulary.json": text})


def compressed() -> Valid:
    """Return a delta whose streams are frames of a compressor, kept in compressed_frames.py."""
    base, target = repetitive()
    delta = draft(base, target)
    frames = [base64.b85decode(one) for one in FRAMES]
    delta.entries = dict(zip(delta.entries, frames, strict=True))
    delta.structure["target"]["side_files"][0][2] = len(frames[0])
    delta.structure["chunks"]["stored"] = [len(one) for one in frames[1:]]
    shows = "frames with compressed blocks, one with a checksum: entropy coding, matches"
    return Valid("frames_compressed", shows, base, target, assemble(delta))


SECTIONS: tuple[Callable[[], list[Valid]], ...] = (
    example,
    encodings,
    below_a_byte,
    large,
    codes,
    dtypes,
    structure,
    sources,
    files,
    side_files,
    names,
    spelling,
)


def valid_vectors() -> list[Valid]:
    """Return all valid vectors."""
    return [one for section in SECTIONS for one in section()]
