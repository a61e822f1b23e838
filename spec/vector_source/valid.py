"""The valid vectors: what each shows, its base, its target and its delta."""

from __future__ import annotations

import base64
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from vector_source.compressed_frames import FRAMES
from vector_source.writer import (
    BITS,
    SPAN,
    Checkpoint,
    Coding,
    Draft,
    Tensor,
    WeightFile,
    assemble,
    block,
    compact,
    draft,
    frame,
    tensor,
    windowed_frame,
)

WEIGHTS = "model.safetensors"
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
    return Tensor(one.dtype, one.shape, bytes(data))


def vector(
    name: str, shows: str, base: Checkpoint, target: Checkpoint, *codings: Any, **options: Any
) -> Valid:
    """Return a vector whose delta is the writer's plain one."""
    return Valid(name, shows, base, target, assemble(draft(base, target, *codings, **options)))


def example() -> list[Valid]:
    """Return the worked example of FORMAT §14: four values of 300 changed."""
    bits = [0x3F80] * 300
    bits[3], bits[290] = 0x8000, 0xBF80
    base = one_file({"w": tensor("BF16", bits)})
    for position, new in ((2, 0x3F81), (3, 0x0000), (289, 0x4080), (290, 0xBF82)):
        bits[position] = new
    shows = "the worked example of FORMAT \u00a714"
    return [vector("example", shows, base, one_file({"w": tensor("BF16", bits)}))]


def encodings() -> list[Valid]:
    """Return every index encoding with every value encoding, and their edges."""
    out = []
    base = one_file({"w": noise("BF16", 40, 1)})
    everything = one_file({"w": nudged(noise("BF16", 40, 1), range(40), 0x81)})
    target = one_file({"w": nudged(noise("BF16", 40, 1), (0, 3, 4, 17, 38), 0x81)})
    for index in ("gap8", "gap16", "bitmap", "all"):
        for values in ("ulp", "target"):
            reached = everything if index == "all" else target
            shows = f"index encoding {index} with value encoding {values}"
            coding = Coding(index, values)
            out.append(vector(f"{index}_{values}", shows, base, reached, default=coding))
    long = noise("U8", 1100, 2)
    gaps = one_file({"w": nudged(long, (254, 509, 765, 1099))})
    shows = "gap8 gaps of 254, 255, 256 and 334: the skip token at its edges"
    out.append(vector("gap8_skip", shows, one_file({"w": long}), gaps))
    gaps = one_file({"w": nudged(long, (1099,))})
    shows = (
        "gap8 with several skip tokens in a row before the only position, the last of the tensor"
    )
    out.append(vector("gap8_skips", shows, one_file({"w": long}), gaps))
    zeros = tensor("U8", bytes(200_000))
    far = one_file({"w": nudged(zeros, (65534, 131069, 131070, 199_999), 7)})
    shows = "gap16 gaps of 65534 and 65535 and one above: the skip token at its edges"
    delta = assemble(draft(one_file({"w": zeros}), far, default=Coding("gap16")))
    out.append(Valid("gap16_skip", shows, one_file({"w": zeros}), far, delta, zeros))
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
        coding = Coding("exponent", values, thresholds=(114, 122, 125), k=2)
        add(f"exponent_{values}", f"exponent with value encoding {values}", old, new, coding)
    coding = Coding("exponent", packing="exponent_steps", thresholds=(1, 114, 126, 255))
    add("exponent_both", "exponent with exponent_steps; a class of none", old, new, coding)
    coding = Coding("exponent", packing="steps", thresholds=(), k=4)
    add("exponent_one_class", "exponent without thresholds, with steps", old, new, coding)
    low = [p for p, bits in enumerate(old.elements()) if bits >> 7 & 255 < 126]
    coding = Coding("exponent", packing="scaled", thresholds=(126,), k=0)
    shows = "a class of which all is touched, and one of which nothing is"
    add("exponent_all_and_none", shows, old, moved(old, low, 2), coding)
    for dtype in ("F8_E4M3", "F16", "F32", "I8"):
        old = graded(dtype, 90, 2)
        new = moved(old, drawn(90, 0.3, 2), 2, 9)
        thresholds = (58, 61) if BITS[dtype] == 8 else (117, 119) if dtype == "F16" else (117, 125)
        coding = Coding("exponent", packing="exponent_steps", thresholds=thresholds, k=0)
        add(f"exponent_{dtype.lower()}", f"keys of {dtype}", old, new, coding)
    old, longer = graded("BF16", 40, 3), graded("BF16", 60, 3)
    longer = Tensor("BF16", (60,), old.data + longer.data[80:])
    longer = moved(longer, (3, 8, 20, 39), 3)
    coding = Coding("exponent", packing="scaled", thresholds=(1, 120))
    add("exponent_grown", "elements beyond keep count as zero", old, longer, coding)

    old = graded("BF16", 300, 6)
    for name, shows, share in (("rice", "rice", 0.1), ("rice_rest", "rice of the rest", 0.9)):
        new = moved(old, drawn(300, share, 6), 6)
        add(name, shows, old, new, Coding("rice", packing="steps", k=3))
    add(
        "rice_all",
        "rice without a gap: all is touched",
        old,
        moved(old, range(300), 6),
        Coding("rice"),
    )

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
    add("scaled_no_lower", "scaled without a second stream", old, new, coding)
    new = tensor("I32", [1, 2**32 - 1, 1, 1, 1, 1, 2**32 - 1, 1, 1])
    add("steps_short", "steps all of one unit", old, new, Coding("all", packing="steps", k=0))
    return out


def large() -> list[Valid]:
    """Return a tensor of more than one chunk."""
    zeros = Tensor("U8", (2 * SPAN + 9,), bytes(2 * SPAN + 9))
    positions = [0, SPAN - 1, 2 * SPAN, 2 * SPAN + 8]
    base, target = one_file({"w": zeros}), one_file({"w": nudged(zeros, positions, 3)})
    coding = Coding("gap16", positions=positions)
    shows = "three spans, the middle one without a chunk, the last of 9 elements"
    delta = assemble(draft(base, target, default=coding))
    return [Valid("chunks", shows, base, target, delta, zeros)]


def codes() -> list[Valid]:
    """Return codes at the edges: zero codes, zero planes, streams left out."""
    base = one_file({"w": noise("BF16", 12, 4)})
    wiped = one_file({"w": tensor("BF16", [0] * 12)})
    shows = "chunks without any stored stream and so without an entry: `all`, and every plane zero"
    out = [vector("no_streams", shows, base, wiped, default=Coding("all", "target"))]
    target = one_file({"w": nudged(noise("BF16", 12, 4), (2,))})
    coding = Coding(positions=[2, 5, 7])
    shows = "codes of 0: touched positions that do not change"
    out.append(vector("code_zero", shows, base, target, default=coding))
    delta = draft(base, target)
    chunk = delta.manifest["tensors"][0]["delta"]["chunks"][0]
    extra = frame(bytes(1))
    chunk[4][2] = len(extra)
    delta.entries["w"] += extra
    shows = "a plane of zeros that is stored as a frame all the same"
    out.append(Valid("zero_plane_stored", shows, base, target, assemble(delta)))
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
    scalar, empty = tensor("F32", [0x3F800000], ()), Tensor("BF16", (2, 0, 3), b"")
    kept = nudged(w, (1, 2, 20))
    out = [
        to("unchanged", "nothing changed", {"w": w, "v": v}),
        to("unchanged_beside_changed", "one tensor changed, one not", {"w": kept, "v": v}),
        to("added", "a tensor added", {"w": w, "new": new, "v": v}, default=Coding("all")),
        to(
            "added_zeros",
            "a tensor of zeros added: no chunk, no entry",
            {"w": w, "z": zeros, "v": v},
        ),
        to("removed", "a tensor removed", {"w": w}),
        to("removed_all", "every tensor removed: a file without tensors", {}),
        to(
            "retyped",
            "another dtype, equal shape and other bytes",
            {"w": noise("F16", 24, 10, (6, 4)), "v": v},
        ),
        to(
            "retyped_same_bytes",
            "another dtype, equal bytes",
            {"w": Tensor("F16", (6, 4), w.data), "v": v},
        ),
        to(
            "reshaped",
            "another shape, equal bytes: no chunk",
            {"w": Tensor("BF16", (4, 6), w.data), "v": v},
        ),
        to(
            "reshaped_and_changed",
            "another shape and changes",
            {"w": Tensor("BF16", (24,), kept.data), "v": v},
        ),
        to("resized_grown", "more rows: the first kept, changes in them", {"w": grown, "v": v}),
        to("resized_shrunk", "fewer rows", {"w": shrunk, "v": v}),
        to("renamed", "a tensor under another name: one removed, one added", {"x": w, "v": v}),
        to(
            "keep_part",
            "keep below what could be kept",
            {"w": kept, "v": v},
            default=Coding(keep=7),
        ),
        to(
            "keep_none",
            "keep 0 though dtype and shape are equal",
            {"w": kept, "v": v},
            default=Coding(keep=0),
        ),
    ]
    few = one_file({"s": scalar, "e": empty, "i": Tensor("I64", (0,), b"")})
    more = {"s": nudged(scalar, (0,)), "e": empty, "t": tensor("BOOL", [1], ())}
    more |= {"i": Tensor("I64", (3, 0), b""), "j": Tensor("U8", (0,), b"")}
    shows = "tensors without dimensions and without elements: unchanged, reshaped, added"
    out.append(vector("scalars_and_empty", shows, few, one_file(more)))
    shows = "a target without digests and fingerprint"
    both = one_file({"w": kept, "v": v, "new": new})
    out.append(vector("target_unknown", shows, base, both, known=False))
    coding = Coding(touched=False)
    out.append(vector("touched_unknown", "no touched digests", base, both, default=coding))
    return out


def files() -> list[Valid]:
    """Return weight files: sharding, order, headers, weight sets."""
    a, b, c = noise("BF16", 8, 11), noise("F32", 5, 12), noise("I64", 2, 13)
    a2 = nudged(a, (1, 6))
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    weight_map = {"weight_map": {"a": first, "b": second, "c": second}}
    index = {"model.safetensors.index.json": json.dumps(weight_map, indent=1).encode()}
    single = one_file({"a": a, "b": b, "c": c})
    sharded = folder(WeightFile(first, {"a": a}), WeightFile(second, {"b": b, "c": c}), side=index)
    changed = folder(WeightFile(first, {"a": a2}), WeightFile(second, {"b": b, "c": c}), side=index)
    backwards = folder(
        WeightFile(second, {"b": b, "c": c}), WeightFile(first, {"a": a2}), side=index
    )
    alone = folder(WeightFile(WEIGHTS, {"a": a2, "b": b, "c": c}))
    metadata = {"format": "pt", "z": 'quote " slash \\ tab \t bell \x07 line\u2028 del \x7f é'}
    spelled = WeightFile(WEIGHTS, {"a": a2, "b": b}, header=None)
    spelled.header = json.dumps(json.loads(spelled.canonical()), indent=2).encode() + b"   "
    empty = {"x": Tensor("F32", (0,), b""), "y": Tensor("F32", (0,), b""), "a": a2}
    swapped = WeightFile(WEIGHTS, empty)
    entries = json.loads(swapped.canonical())
    swapped.header = compact(
        {name: entries[name] for name in ("a", "y", "x")} | {"__metadata__": {}}
    )
    none = one_file({"a": a})
    out = [
        vector("sharded", "a sharded folder; its index is the base's", sharded, changed),
        vector("sharded_backwards", "weight files listed not by path", sharded, backwards),
        vector("file_to_shards", "base a file, target sharded", single, changed),
        vector("shards_to_file", "base sharded, target a file", sharded, one_file(alone.tensors())),
        vector("shards_to_folder", "base sharded, target a folder of one file", sharded, alone),
        vector("order", "tensors in another order", single, one_file({"c": c, "a": a, "b": b})),
        vector(
            "metadata_kept", "header metadata, the target's", single, one_file({"a": a2}, metadata)
        ),
        vector("metadata_empty", "header metadata without members", single, one_file({"a": a}, {})),
        vector(
            "file_named", "a file of another name", none, one_file({"a": a2}, path="out put.bin")
        ),
        vector("header_stored", "a header of another spelling", single, folder(spelled)),
        vector(
            "header_stored_empty",
            "a stored header that lists tensors of zero bytes in another order, metadata last",
            none,
            folder(swapped),
        ),
    ]

    def sets(of_a: Tensor, of_b: Tensor) -> Checkpoint:
        left, right = "left.safetensors", "right.safetensors"
        shards = {"weight_map": {"a": left, "x:a": left, "b": right}}
        side = {"vae/net.safetensors.index.json": json.dumps(shards).encode()}
        return folder(
            WeightFile(WEIGHTS, {"a": of_a}),
            WeightFile(
                "unet/diffusion-00001-of-00002.safetensors", {"a": b}, prefix="unet/diffusion:"
            ),
            WeightFile(
                "unet/diffusion-00002-of-00002.safetensors", {"b": of_b}, prefix="unet/diffusion:"
            ),
            WeightFile("vae/left.safetensors", {"a": of_b, "x:a": a}, prefix="vae/net:"),
            WeightFile("vae/right.safetensors", {"b": b}, {"k": "v"}, prefix="vae/net:"),
            side=side,
        )

    shows = "three weight sets; one is named by an index whose shards have names of their own"
    out.append(vector("weight_sets", shows, sets(a, c), sets(a2, nudged(c, (0,)))))
    stored = sets(a2, c)
    for file in stored.weight_files:
        file.header = file.canonical() + b"        "
    out.append(vector("weight_sets_stored", "weight sets with stored headers", sets(a, c), stored))
    shows = "one weight set, not named model: the primary one all the same"
    lone = [folder(WeightFile("sub/net.safetensors", {"a": one})) for one in (a, a2)]
    out.append(vector("weight_set_alone", shows, *lone))
    shows = "two weight sets and none named model: no primary one"
    paths = ("p.safetensors", "q.safetensors")
    two = [
        folder(*(WeightFile(path, {"a": one}, prefix=path[0] + ":") for path in paths))
        for one in (a, a2)
    ]
    out.append(vector("weight_sets_no_primary", shows, *two))
    other = WeightFile("other/net.safetensors", {"a": a}, prefix="other/net:")
    base = folder(WeightFile(WEIGHTS, {"a": a}))
    delta = assemble(draft(base, folder(WeightFile(WEIGHTS, {"a": a2}))))
    base.weight_files.append(other)
    shows = "the base has a weight set that no row names: it is ignored"
    out.append(
        Valid("weight_set_ignored", shows, base, folder(WeightFile(WEIGHTS, {"a": a2})), delta)
    )
    return out


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
        "\u00e9t\u00e9 \U0001f600.txt": b"unicode",
        "sub.txt": b"a neighbour of the folder sub",
    }
    base = folder(WeightFile(WEIGHTS, {"a": a}), side=there)
    target = folder(WeightFile(WEIGHTS, {"a": nudged(a, (0,))}), side=after)
    shows = "side files changed, added, removed, kept, empty, in subfolders"
    out = [vector("side_files", shows, base, target)]
    shows = "a side file that the base has too is carried all the same"
    out.append(vector("side_files_carried", shows, base, target, carry=list(after)))
    hollow = folder(WeightFile(WEIGHTS, {"a": a}), side={"sub/f": b"f"})
    hollow.empty_folders = ["empty", "sub/a/b", "sub/c"]
    out.append(vector("empty_folders", "folders that hold nothing", base, hollow))
    bare = Checkpoint([], {"readme.md": b"text"})
    shows = "a target without any weight file"
    out.append(vector("no_weights", shows, base, bare))
    return out


def names() -> list[Valid]:
    """Return names that look like trouble."""
    tricky = [
        "sparsedelta:manifest",
        "sparsedelta:file/config.json",
        "sparsedelta:tensor/w",
        "sparsedelta:",
        "__manifest__",
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
    shows = "names that look like entries, paths, escapes; normalisation and case keep them apart"
    out = [vector("names", shows, one_file(base), one_file(target))]
    shows = "removed names sorted by their bytes, where UTF-16 would sort otherwise"
    left = {name: base[name] for name in tricky[:2]}
    out.append(vector("names_removed", shows, one_file(base), one_file(left)))
    long = {"layers." * 300 + "w": noise("U8", 3, 1)}
    longer = {name: nudged(one, (1,)) for name, one in long.items()}
    out.append(vector("name_long", "a long name", one_file(long), one_file(longer)))
    return out


def spelling() -> list[Valid]:
    """Return what a reader accepts though our writer does not write it: spelling, order, frames."""
    a, b = noise("BF16", 8, 15), noise("F32", 5, 16)
    base = folder(WeightFile(WEIGHTS, {"a": a, "b": b}))
    target = folder(WeightFile(WEIGHTS, {"a": nudged(a, (1,)), "b": nudged(b, (0, 4))}))
    target.side_files["config.json"] = b"{}"

    def made(name: str, shows: str, of: Draft | None = None, **hooks: Any) -> Valid:
        return Valid(name, shows, base, target, assemble(of or draft(base, target), **hooks))

    def loose(text: bytes) -> bytes:
        return json.dumps(json.loads(text), indent=3, sort_keys=True).encode()

    def backwards(header: dict[str, Any]) -> dict[str, Any]:
        return dict(reversed(header.items()))

    shuffled = draft(base, target)
    shuffled.entries = dict(reversed(shuffled.entries.items()))
    out = [
        made("entries_any_order", "entries after the manifest in another order", shuffled),
        made(
            "header_any_spelling",
            "a header in another spelling and order",
            header=backwards,
            header_text=loose,
        ),
        made(
            "manifest_any_spelling",
            "a manifest with spaces, escapes and members sorted",
            text=loose,
        ),
    ]
    nested: Any = "deep"
    for _ in range(62):
        nested = [nested]
    info: dict[str, Any] = {"nested": nested, "float": -1.5e-300, "large": 1e300, "none": None}
    info |= {"most": 2**63 - 1, "least": -(2**63), "yes": True, "text": "\u00e9 \U0001f600"}
    held = draft(base, target, info=info, base_id="org/model@0123456789abcdef")
    out.append(made("info", "free content in info, nested 64 deep in all; a base id", held))

    manifest_of = draft(base, target)
    shows = "frames with a window instead of a single segment, and in several blocks"

    def windowed(content: bytes) -> bytes:
        whole = windowed_frame(content, 27)
        head = whole[: len(whole) - 3 - len(content)]
        middle = len(content) // 2
        parts = block(0, middle, content[:middle], False) + block(0, 0, b"", False)
        return head + parts + block(0, len(content) - middle, content[middle:], True)

    out.append(made("frames_windowed", shows, manifest_of, pack=windowed))
    out.append(compressed())
    return out


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
    """Return a delta whose streams are frames of a compressor, kept in _compressed_frames.py."""
    base, target = repetitive()
    delta = draft(base, target)
    text, index, low, high = (base64.b85decode(one) for one in FRAMES)
    delta.entries = {"sparsedelta:file/vocabulary.json": text, "w": index + low + high}
    delta.manifest["tensors"][0]["delta"]["chunks"][0][4] = [len(index), len(low), len(high)]
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
    files,
    side_files,
    names,
    spelling,
)


def valid_vectors() -> list[Valid]:
    """Return all valid vectors."""
    return [one for section in SECTIONS for one in section()]
