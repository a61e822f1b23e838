"""Valid vectors of index encodings, packings, value encodings, chunks and dtypes."""

from __future__ import annotations

import random
from collections.abc import Sequence

from vector_source import bits
from vector_source.checkpoints import (
    BITS,
    Tensor,
    noise,
    nudged,
    one_file,
    tensor,
)
from vector_source.frames import frame
from vector_source.vectors import Valid, vector
from vector_source.writer import SPAN, Coding, add_chunk, assemble, code, draft

# (exponent bits, mantissa bits) of the float types that have infinities, NaN payloads or both
FLOAT_FIELDS = {
    "F8_E5M2": (5, 2),
    "F8_E4M3": (4, 3),
    "F16": (5, 10),
    "BF16": (8, 7),
    "F32": (8, 23),
    "F64": (11, 52),
}


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

    none = Coding("rice", "target", packing="steps", thresholds=(1, 9), k=12, keep=0)
    shows = "classes of a tensor that keeps nothing: all keys are zero"
    add("classes_keep_none", shows, graded("BF16", 20, 3), graded("BF16", 20, 4), none)
    coding = Coding("rice", "target", thresholds=(1,), k=1)
    tensors = {"w": old}, {"w": old, "new": tensor("F16", [0, 0x3C00, 0, 0, 0xBC00])}
    shows = "classes of an added tensor: all keys are zero"
    base, target = (one_file(one) for one in tensors)
    out.append(vector("classes_added", shows, base, target, default=coding))

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
    n = 70_000
    zeros = tensor("U8", bytes(n))
    base, target = one_file({"w": zeros}), one_file({"w": tensor("U8", b"\1" * n)})
    delta = assemble(draft(base, target, default=Coding("bitmap")))
    shows = "a stream of a chunk that expands more than other streams may"
    out.append(Valid("frame_expands", shows, base, target, delta, zeros))
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


def padded() -> list[Valid]:
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
    return [Valid("numbers_padded", shows, base, target, assemble(delta))]
