"""Invalid vectors of chunks and their streams, FORMAT §12: R17, R18 and R20."""

from __future__ import annotations

from typing import Any

from vector_source import bits
from vector_source.checkpoints import Tensor, noise, nudged
from vector_source.samples import (
    plain,
    sample,
    sample_base,
    with_manifest,
    with_streams,
    with_true_header,
)
from vector_source.vectors import Invalid
from vector_source.writer import Coding, Draft, assemble

OLD = noise("U8", 600, 1)


def chunks() -> list[Invalid]:
    """Return R17: columns, spans and sizes."""
    out = []

    def add(name: str, why: str, data: Draft | bytes) -> None:
        made = data if isinstance(data, bytes) else assemble(data)
        out.append(Invalid("chunk_" + name, why, "R17", "corrupt", made))

    def edit(name: str, why: str, edits: dict[str, Any]) -> None:
        add(name, why, with_manifest(edits, of=plain))

    columns = sample().structure["chunks"]
    for column in ("starts", "spans", "nnz", "codings", "touched"):
        less = {f"chunks.{column}": columns[column][:-1]}
        add(f"{column}_less", f"one entry of {column} too few", with_manifest(less))
        more = {f"chunks.{column}": [*columns[column], columns[column][0]]}
        add(f"{column}_more", f"one entry of {column} too many", with_manifest(more))
    for column in ("raw", "stored"):
        more = {f"chunks.{column}": [*columns[column], 0]}
        add(f"{column}_more", f"one entry of {column} too many", with_manifest(more))
    edit("raw_less", "a raw size is missing", {"chunks.raw": []})
    delta = plain()
    delta.structure["chunks"]["stored"].pop()
    del delta.entries["chunk:0:2"]
    add("stored_less", "a stored size and its stream are missing", delta)
    n_chunks = sample().structure["tensors"]["n_chunks"]
    for name, counts in (("less", [0, *n_chunks[1:]]), ("more", [2, *n_chunks[1:]])):
        data = with_manifest({"tensors.n_chunks": counts})
        add(f"n_{name}", f"n_chunks add up to {name} than there are", data)
    edit("coding", "a coding that is not there", {"chunks.codings": [1]})
    edit("coding_far", "coding 2^62", {"chunks.codings": [1 << 62]})

    def placed(name: str, why: str, *places: tuple[int, int], nnz: int = 1) -> None:
        delta = None
        for start, span in places:
            streams = [bytes(max(nnz, 1)), b"\2" * nnz]
            delta = with_streams(Coding(), nnz, streams, span=span, start=start, old=OLD, of=delta)
        if delta:
            add(name, why, delta)

    placed("order", "chunks in descending order", (300, 10), (0, 10))
    placed("twice", "the same chunk twice", (0, 10), (0, 10))
    placed("overlap", "two chunks that share an element", (0, 11), (10, 10))
    placed("within", "a chunk within another", (0, 100), (10, 10))
    placed("outside", "a chunk behind the tensor", (600, 1))
    placed("beyond", "a chunk that ends beyond the tensor", (591, 10))
    placed("far", "a chunk at 2^62", (1 << 62, 1))
    placed("empty_span", "a chunk of no element", (0, 0))
    placed("none", "a chunk without a position", (0, 10), nnz=0)
    placed("nnz", "more positions than elements", (0, 3), nnz=4)
    delta = plain()
    delta.structure["layouts"][0][3] = [1 << 25]
    delta.structure["chunks"]["spans"] = [(1 << 24) + 1]
    header = {"w": {"dtype": "BF16", "shape": [1 << 25], "data_offsets": [0, 1 << 26]}}
    add("span", "a chunk of 2^24 + 1 elements", with_true_header(delta, header))
    add(
        "no_elements",
        "a chunk of a tensor without elements",
        with_streams(Coding(), 1, [b"\0", b"\2"], span=1, old=Tensor("U8", (0,), b"")),
    )

    def sized(index: str, name: str, why: str, nnz: int, stream: bytes, old: Tensor = OLD) -> None:
        streams = [stream, b"\2" * nnz]
        add(f"{index}_{name}", why, with_streams(Coding(index), nnz, streams, old=old))

    sized("gaps", "short", "fewer tokens than positions", 3, bytes(2))
    sized("gaps", "long", "more tokens than can be", 3, b"\0\0\0\xff\xff\xff")
    for name, size in (("short", 74), ("long", 76)):
        delta = with_streams(Coding("bitmap"), 3, [b"\x07" + bytes(size - 1), b"\2" * 3], old=OLD)
        delta.entries["chunk:0:0"] = b"\x07" + bytes(size - 1)
        delta.structure["chunks"]["stored"][0] = size
        why = f"a bitmap of {size} bytes instead of 75"
        code = "R8" if name == "long" else "R9"
        made = assemble(delta)
        out.append(Invalid(f"chunk_bitmap_{name}", why, code, "corrupt", made))
    sized("rice", "short", "a rice stream of 1 byte", 3, b"\0")
    sized("tiles", "short", "a tiles stream of 7 bytes", 3, bytes([20, 0, 1, 0, 1, 0, 0]))

    def packed(packing: str, name: str, why: str, *streams: bytes, old: Tensor = OLD) -> None:
        held = [b"\0\0\0", *streams]
        add(f"{packing}_{name}", why, with_streams(Coding(packing=packing), 3, held, old=old))

    packed("steps", "short", "a steps stream of 3 bytes", b"\0\0\0")
    packed("scaled", "long", "more than a byte a code", b"\2\2\2", bytes(4))
    wide = noise("I64", 9, 1)
    packed("scaled", "long_wide", "more than four bytes a code", b"\2\2\2", bytes(13), old=wide)
    # All of 10 000 elements are touched, and the parameter is as bad as can be.
    n = 10_000
    every, gaps, changed = noise("U8", n, 1), ([0] * n, 31), b"\2" * n
    head = bits.number(2 * n) + b"\x1f"
    worst = {"rice": b"\0" + head + bits.rice([gaps])}
    frame = bits.number(100) + bytes([0, 1, 0, 1, 0]) + head
    worst["tiles"] = frame + bits.rice([([0] * 100, 0), ([0] * 100, 0), gaps])
    for index, stream in worst.items():
        delta = with_streams(Coding(index), n, [stream, changed], old=every)
        add(f"{index}_long", f"a {index} stream above L div 4 + 32 768 bytes", delta)
    stream = b"\0" + head + b"\x1f" + bytes(n // 8) + bits.rice([gaps, gaps])
    delta = with_streams(Coding(packing="steps"), n, [bytes(n), stream], old=every)
    add("steps_long", "a steps stream above 2 nnz + 32 768 bytes", delta)
    for name, coding in (
        ("planes", Coding(classes=True)),
        ("bitmap", Coding("bitmap", packing="scaled", classes=True)),
        ("tiles", Coding("tiles", classes=True)),
    ):
        kind = [coding.values, coding.index, coding.packing, 1]
        why = f"classes 1 of {coding.index} with {coding.packing}"
        edit(f"classes_{name}", why, {"codings.0": kind})
        edit(f"classes_{name}_unused", why, {"codings": [["ulp", "gaps", "planes", 0], kind]})
    return out


def plain_streams() -> list[Invalid]:
    """Return R18: `gaps` and `bitmap`."""
    out = []

    def add(index: str, name: str, why: str, nnz: int, stream: bytes, n: int = 600) -> None:
        delta = with_streams(Coding(index), nnz, [stream, b"\2" * nnz], old=noise("U8", n, 1))
        out.append(Invalid(f"index_{index}_{name}", why, "R18", "corrupt", assemble(delta)))

    add("gaps", "few", "fewer positions than nnz", 3, b"\0\xff\0")
    add("gaps", "many", "more positions than nnz", 3, bytes(4))
    add("gaps", "beyond", "a position beyond the chunk", 3, b"\xfe\xfe\x5a")
    add("gaps", "beyond_skip", "beyond by tokens 255", 1, b"\xff\xff\x5a")
    add("gaps", "trailing", "the last token is 255", 3, b"\0\0\0\xff")
    add("gaps", "skip_only", "nothing but a token 255", 1, b"\xff")
    add("bitmap", "few", "fewer bits than nnz", 3, b"\x01\x01\x00", 21)
    add("bitmap", "many", "more bits than nnz", 3, b"\x0f\x00\x00", 21)
    add("bitmap", "padding", "a padding bit is set", 3, b"\x03\x00\x20", 21)
    add("bitmap", "padding_more", "a padding bit beside nnz others", 3, b"\x07\x00\x80", 21)
    delta = with_streams(Coding(), 2, [b"\0\x09", b"\2\2"], start=5, span=10, old=OLD)
    why = "a position beyond a chunk that ends within the tensor"
    out.append(Invalid("index_gaps_beyond_span", why, "R18", "corrupt", assemble(delta)))
    return out


def tiles() -> list[Invalid]:
    """Return R18: `tiles`, of eight elements in rows of four."""
    out = []

    def add(name: str, why: str, stream: bytes, nnz: int = 3) -> None:
        delta = with_streams(Coding("tiles"), nnz, [stream, b"\2" * nnz, bytes(nnz)])
        out.append(Invalid("index_tiles_" + name, why, "R18", "corrupt", assemble(delta)))

    # Bands by row and column, then the subset of each tile.
    rows, columns = ([0, 1], 1), ([0, 0, 1, 0], 1)
    head = bits.number(4) + bits.number(0) + bytes([2, 1, 2, 1])
    subsets = [bits.subset(*one, 1) for one in (([1], 3), ([], 1), ([0], 3), ([0], 1))]
    gaps = [sequence for _, sequence in subsets]
    heads = b"".join(part for part, _ in subsets)
    good = head + heads + bits.rice([rows, columns, *gaps])
    add("few", "fewer positions than nnz", good, 4)
    add("many", "more positions than nnz", good, 2)
    add("trailing", "a byte after the stream", good + b"\0")
    add("trailing_one", "a number after the stream", good + b"\1")
    add("truncated", "the stream ends early", good[:-1])
    add("no_heads", "the stream ends within the heads", good[:8])
    for name, why, start in (
        ("columns", "rows of one element", bytes([1, 0, 2, 1, 2, 1])),
        ("columns_none", "rows of no element", bytes([0, 0, 2, 1, 2, 1])),
        ("columns_many", "rows longer than the chunk", bytes([9, 0, 2, 1, 2, 1])),
        ("first", "the first element beyond the end of its row", bytes([4, 4, 2, 1, 2, 1])),
        ("bands", "no band of rows", bytes([4, 0, 0, 1, 2, 1])),
        ("bands_columns", "no band of columns", bytes([4, 0, 2, 1, 0, 1])),
        ("parameter", "a parameter of 32 of rows", bytes([4, 0, 2, 32, 2, 1])),
        ("parameter_columns", "a parameter of 32 of columns", bytes([4, 0, 2, 1, 2, 32])),
        ("number", "a number of six bytes", b"\x84\x80\x80\x80\x80\0" + bytes([0, 2, 1, 2, 1])),
        ("number_large", "a number of 33 bits", b"\x84\x80\x80\x80\x10" + bytes([0, 2, 1, 2, 1])),
    ):
        add(name, why, start + heads + bits.rice([rows, columns, *gaps]))
    parts = [part for part, _ in subsets]
    more = bytes([4, 0, 2, 1, 17, 1]) + b"".join([*parts[:2], bytes(15), *parts[2:], bytes(15)])
    add("bands_many", "17 bands of columns", more + bits.rice([rows, columns, *gaps]))
    more = bytes([4, 0, 17, 1, 2, 1]) + heads + bytes(30)
    add("bands_many_rows", "17 bands of rows", more + bits.rice([rows, columns, *gaps]))
    # Rows and columns that are in no tile hold nothing.
    three, no = bits.subset([0, 1, 2], 3, 1), bits.subset([], 9, 1)
    first = three[0] + no[0] * 3 + bits.rice([([0, 2], 1), columns, three[1]])
    add("label", "a row in a band that is not there", head + first)
    pair = bits.subset([0, 1], 2, 1)
    first = pair[0] + no[0] * 3 + bits.rice([([0, 1], 1), ([0, 2, 2, 0], 1), pair[1]])
    add("label_column", "a column in a band that is not there", head + first, 2)
    wrong = head + heads + bits.rice([rows, columns, ([3], 1), *gaps[1:]])
    add("cell", "a cell that the tile does not have", wrong)
    add("no_numbers", "no numbers at all", head + heads)
    far = bits.number(4) + bytes([0, 1, 0, 1, 0]) + bytes([2, 31])
    far += bits.rice([([0] * 2, 0), ([0] * 4, 0), ([2 << 31], 31)])
    add("number_wide", "a gap of 33 bits", far, 1)
    many = bits.number(4) + bytes([0, 1, 0, 1, 0]) + bits.number((1 << 32) - 2) + b"\0\x3f"
    add("gaps_many", "a subset of 2^31 - 1 gaps", many, 1)
    shifted = bits.number(4) + bits.number(1) + bytes([1, 0, 1, 0])
    for name, why, cells in (("before", "before", [0, 4, 5]), ("after", "after", [1, 4, 9])):
        part, sequence = bits.subset(cells, 12, 1)
        stream = shifted + part + bits.rice([([0] * 3, 0), ([0] * 4, 0), sequence])
        add(name, f"a cell {why} the chunk", stream)
    low = bytearray(good)
    low[len(head + heads)] |= 0x80
    add("padding", "a bit set behind packed numbers", bytes(low))
    return out


def rice() -> list[Invalid]:
    """Return R18: `rice`, of eight elements."""
    out = []

    def add(name: str, why: str, stream: bytes, nnz: int = 3) -> None:
        delta = with_streams(Coding("rice"), nnz, [stream, b"\2" * nnz, bytes(nnz)])
        out.append(Invalid("index_rice_" + name, why, "R18", "corrupt", assemble(delta)))

    part, sequence = bits.subset([1, 2, 5], 8, 1)
    head = b"\0" + part
    good = head + bits.rice([sequence])
    add("few", "fewer positions than nnz", good, 4)
    add("many", "more positions than nnz", good, 2)
    add("none", "no position", b"\0\0", 1)
    add("beyond", "an element that is not there", head + bits.rice([([1, 0, 6], 1)]))
    add("trailing", "a byte after the stream", good + b"\0")
    add("trailing_one", "a number after the stream", good + b"\1")
    add("truncated", "the stream ends early", good[:-1])
    add("padding", "a bit set behind the last number", good[:-1] + bytes([good[-1] | 0x80]))
    wrong = b"\0" + part[:1] + b"\x20" + bits.rice([sequence])
    add("parameter", "a parameter of 32", wrong)
    wrong = b"\0" + bits.number(6) + b"\0" + bytes(5)
    add("no_one", "a number without its one", wrong)
    add("rest", "gaps of the rest beyond the end", b"\0\x03\0" + bits.rice([([8], 0)]), 7)
    old = sample_base().tensors()["w"]
    keys = [bits.key(one, 2) for one in old.elements()]
    classes = bits.rice_index([1, 2, 5], keys, (sorted(keys)[4],), 1)
    add("classes", "a threshold where classes is 0", classes)
    add("thresholds", "16 thresholds", bytes([16, *range(1, 17)]) + b"\0" * 17)
    return out


def values() -> list[Invalid]:
    """Return R20: `steps` and `scaled`, of three codes."""
    out = []

    def add(packing: str, name: str, why: str, *streams: bytes, old: Tensor | None = None) -> None:
        held = [b"\0\0\0", *streams]
        delta = with_streams(Coding(packing=packing), 3, held, old=old)
        made = assemble(delta)
        out.append(Invalid(f"values_{packing}_{name}", why, "R20", "corrupt", made))

    part, sequence = bits.subset([1], 3, 0)
    body = bits.rice([sequence, ([2], 1)])
    good = b"\0" + part + b"\1" + b"\5" + body
    add("steps", "trailing", "a byte after the stream", good + b"\0")
    add("steps", "truncated", "the stream ends early", good[:-1])
    add("steps", "no_signs", "the stream ends before the signs", good[:4])
    add("steps", "sign", "a bit set behind the signs", good.replace(b"\5", b"\x0d"))
    add("steps", "classes", "a threshold where classes is 0", b"\1\5" + part + b"\1" + good[1:])
    add("steps", "parameter", "a parameter of 32", b"\0" + part + b"\x20\5" + body)
    add("steps", "parameter_unused", "a parameter of 32 of no excess", b"\0\0\x20\5")
    many = b"\0" + bits.number(8) + b"\0\0\5" + bits.rice([([0] * 4, 0), ([0] * 4, 0)])
    add("steps", "many", "more codes with u > 0 than codes", many)
    many = b"\0" + bits.number(9) + b"\0\0\5" + bits.rice([([0] * 4, 0)])
    add("steps", "many_rest", "more codes with u = 0 than codes", many)
    wrong = b"\0" + part + b"\1\5" + bits.rice([([3], 0), ([2], 1)])
    add("steps", "beyond", "a code with u > 0 that is not there", wrong)
    wide = b"\0" + part + b"\x0f\5" + bits.rice([sequence, ([1 << 15], 15)])
    add("steps", "wide", "a code of more than two bytes", wide)
    wide = b"\0" + part + b"\x1e\5" + bits.rice([sequence, ([(1 << 31) - 1], 30)])
    add("steps", "wide_most", "a code of 33 bits", wide, old=noise("I64", 9, 1))
    padded = good[:-1] + bytes([good[-1] | 0x80])
    add("steps", "padding", "a bit set behind the last number", padded)
    symbols, lower = bits.scaled([2, 9, 300])
    add("scaled", "symbol", "a symbol of more than two bytes", b"\x02\x02\x20", lower)
    wide = bytes([2, 2, 64])
    add("scaled", "symbol_most", "a symbol of 64", wide, bytes(4), old=noise("I64", 9, 1))
    add("scaled", "trailing", "a byte after the stream", symbols, lower + b"\0")
    add("scaled", "truncated", "the stream ends early", symbols, lower[:-1])
    add("scaled", "none", "no lower bits", symbols, b"")
    padded = bytes([lower[0] | 4]) + lower[1:]
    add("scaled", "padding", "a bit set behind packed numbers", symbols, padded)
    return out


def moved_by(old: Tensor, codes: dict[int, int]) -> Tensor:
    """Return a tensor of 16-bit floats whose elements are moved by codes of `ulp`."""
    for p, code in codes.items():
        up = code // 2 if code % 2 == 0 else -(code + 1) // 2
        old = nudged(old, (p,), -up if old.elements()[p] >= 0x8000 else up)
    return old


def classes() -> list[Invalid]:
    """Return R18 and R20 of streams in classes: refused when they are applied to the base."""
    out = []
    old = sample_base().tensors()["w"]
    keys = [bits.key(one, 2) for one in old.elements()]
    middle = (sorted(keys)[4],)
    wrong = {
        "thresholds": ("thresholds that are equal", (*middle, *middle)),
        "thresholds_down": ("thresholds that descend", (middle[0] + 1, middle[0])),
        "threshold_zero": ("a threshold of 0", (0,)),
        "thresholds_many": ("16 thresholds", range(1, 17)),
    }

    def add(rule: str, name: str, why: str, codes: dict[int, int], *streams: bytes) -> None:
        coding = (
            Coding("rice", classes=True) if rule == "R18" else Coding(packing="steps", classes=True)
        )
        made = assemble(with_streams(coding, len(codes), streams, new=moved_by(old, codes)))
        prefix = "index_classes_" if rule == "R18" else "values_classes_"
        out.append(Invalid(prefix + name, why, rule, "corrupt", made, on_apply=True))

    def index(name: str, why: str, stream: bytes, *positions: int) -> None:
        codes = dict.fromkeys(positions or (2, 3, 6), 2)
        add("R18", name, why, codes, stream, b"\2" * len(codes), bytes(len(codes)))

    good = bits.rice_index([2, 3, 6], keys, middle, 1)
    index("few", "fewer positions than nnz", good, 2, 3, 6, 7)
    index("many", "more positions than nnz", good, 2, 3)
    index("trailing", "a byte after the stream", good + b"\0")
    index("truncated", "the stream ends early", good[:-1])
    index("thresholds_end", "more thresholds than bytes", b"\x0f" + good[1:])
    for name, (why, thresholds) in wrong.items():
        index(name, why, bits.rice_index([2, 3, 6], keys, thresholds, 1))
    beyond = bytes([1, *middle, 2, 0, 0]) + bits.rice([([8], 0), ([], 0)])
    index("beyond", "an element that the class does not have", beyond, 1)

    def steps(name: str, why: str, stream: bytes) -> None:
        add("R20", name, why, {2: 2, 3: 2, 6: 9}, bytes([2, 0, 2]), stream)

    touched = [keys[p] for p in (2, 3, 6)]
    good = bits.steps([2, 2, 9], touched, middle, 1)
    steps("trailing", "a byte after the stream", good + b"\0")
    steps("truncated", "the stream ends early", good[:-1])
    for name, (why, thresholds) in wrong.items():
        steps(name, why, bits.steps([2, 2, 9], touched, thresholds, 1))
    return out
