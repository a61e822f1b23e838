"""Invalid vectors of rows, chunks and contents: FORMAT §12, R15 to R20, and §10."""

from __future__ import annotations

from typing import Any

from blake3 import blake3

from vector_source import bits
from vector_source.samples import (
    CONFIG,
    HEADER,
    Invalid,
    at,
    sample,
    sample_base,
    with_header,
    with_manifest,
    with_side_file,
)
from vector_source.valid import WEIGHTS, folder, noise, nudged
from vector_source.writer import Coding, Draft, Tensor, WeightFile, assemble, draft, frame


def rows() -> list[Invalid]:
    """Return R15 and R16: sizes and rows."""
    out = []

    def add(name: str, why: str, delta: Draft, breaks: str = "R16") -> None:
        out.append(Invalid("row_" + name, why, breaks, "corrupt", assemble(delta)))

    def edit(name: str, why: str, edits: dict[str, Any], breaks: str = "R16") -> None:
        out.append(Invalid("row_" + name, why, breaks, "corrupt", with_manifest(edits)))

    for dtype, n in (("F4", 3), ("F6_E2M3", 3), ("F6_E3M2", 1)):
        change = {"tensors.-1.base.dtype": dtype, "tensors.-1.base.shape": [n]}
        edit(f"bits_{dtype.lower()}", f"a tensor of {n} values of {dtype}", change, "R15")
    w, same, new, gone, lost = range(5)
    edit("twice", "a name in two rows", {f"tensors.{lost}.name": "gone"})
    edit("twice_placed", "a removed tensor has the name of another", {f"tensors.{gone}.name": "w"})
    edit("metadata", "a tensor named __metadata__", {f"tensors.{gone}.name": "__metadata__"})
    edit("none", "neither base nor target", {f"tensors.{lost}.base": None})
    edit("keep", "keep above the number of elements", {f"tensors.{w}.delta.keep": 9})
    edit("keep_added", "keep of an added tensor", {f"tensors.{new}.delta.keep": 1})
    edit("no_delta", "a changed tensor without delta", {f"tensors.{w}.delta": None})
    digest = sample().manifest["tensors"][w]["base"]["digest"]
    change = {f"tensors.{w}.target.digest": digest}
    edit("delta_unchanged", "a delta of a tensor that is unchanged", change)
    empty: dict[str, Any] = {"keep": 0, "values": "ulp", "touched": None, "chunks": []}
    edit("delta_removed", "a delta of a tensor that is removed", {f"tensors.{gone}.delta": empty})
    edit("delta_same", "an empty delta of an unchanged tensor", {f"tensors.{same}.delta": empty})
    edit("digest_null", "one target digest null", {f"tensors.{w}.target.digest": None})
    edit("digest_known", "fingerprint null, digests known", {"target.fingerprint": None})
    unknown = {f"tensors.{same}.target.digest": None}
    edit("digest_unchanged", "target digest null and no delta", unknown)
    files = "target.weight_files"
    edit("n_less", "n_tensors add up to less", {f"{files}.0.n_tensors": 0})
    edit("n_more", "n_tensors add up to more", {f"{files}.0.n_tensors": 2})
    edit("n_most", "n_tensors of 2^63 - 1", {f"{files}.0.n_tensors": (1 << 63) - 1})
    for name, why, order in (
        ("removed_first", "a removed tensor before the others", [3, 0, 1, 2, 4]),
        ("removed_between", "a removed tensor between the others", [0, 1, 3, 2, 4]),
        ("removed_order", "removed tensors not sorted", [0, 1, 2, 4, 3]),
    ):
        delta = sample()
        listed = delta.manifest["tensors"]
        delta.manifest["tensors"] = [listed[i] for i in order]
        add(name, why, delta)
    for name, dtype, shape, keep in (
        ("keep_retyped", "F16", (40,), 1),
        ("keep_shrunk", "BF16", (5,), 6),
    ):
        base = folder(WeightFile(WEIGHTS, {"w": noise("BF16", 40, 21)}))
        n = shape[0]
        target = folder(WeightFile(WEIGHTS, {"w": Tensor(dtype, shape, noise("BF16", n, 1).data)}))
        delta = draft(base, target)
        delta.manifest["tensors"][0]["delta"]["keep"] = keep
        add(name, f"keep {keep} of a tensor that is {dtype} of {n} after BF16 of 40", delta)
    return out


def chunks() -> list[Invalid]:
    """Return R17 and R18: chunks and index streams, in deltas of one tensor."""
    out = []

    def add(
        rule: str,
        name: str,
        why: str,
        n_elements: int,
        parts: list[tuple[list[Any], list[bytes]]],
        after: bytes = b"",
    ) -> None:
        """Add a vector of one U8 tensor, of chunks given by their lists and streams."""
        held = b""
        listed = []
        for chunk, streams in parts:
            packed = [frame(stream) if stream else b"" for stream in streams]
            sizes = [len(one) for one in packed]
            listed.append([*chunk, sizes] if len(chunk) == 4 else chunk)
            held += b"".join(packed)
        shape = {"dtype": "U8", "shape": [n_elements]}
        delta = {"keep": n_elements, "values": "ulp", "touched": None, "chunks": listed}
        row: dict[str, Any] = {"name": "w", "base": shape | {"digest": "00" * 16}}
        row |= {"target": shape | {"digest": "01" * 16}, "delta": delta}
        member = {"path": WEIGHTS, "n_tensors": 1, "header": "canonical", "metadata": None}
        target: dict[str, Any] = {
            "kind": "folder",
            "fingerprint": "01" * 32,
            "weight_files": [member],
        }
        target |= {"side_files": [], "empty_folders": []}
        manifest: dict[str, Any] = {
            "base": {"id": None, "fingerprint": "00" * 32},
            "target": target,
        }
        manifest |= {"tensors": [row], "info": {}}
        entry = {"w": held + after} if held + after else {}
        made = assemble(Draft(manifest, entry))
        prefix = "chunk_" if rule == "R17" else "index_"
        out.append(Invalid(prefix + name, why, rule, "corrupt", made))

    def one(rule: str, name: str, why: str, n: int, encoding: str, nnz: int, stream: bytes) -> None:
        """Add a vector of one chunk of plausible values."""
        parts = [([0, nnz, encoding, len(stream)], [stream, b"\x02" * nnz])]
        add(rule, name, why, n, parts)

    span = 1 << 24
    good = [1, b"\x02"]

    def at_number(number: int) -> tuple[list[Any], list[bytes]]:
        return [number, good[0], "gap8", 1], [b"\0", b"\x02"]

    add("R17", "order", "chunks in descending order", 2 * span, [at_number(1), at_number(0)])
    add("R17", "twice", "a chunk number twice", 2 * span, [at_number(0), at_number(0)])
    add("R17", "outside", "a chunk number outside the tensor", span, [at_number(1)])
    add("R17", "outside_far", "a chunk number of 2^62", span, [at_number(1 << 62)])
    add("R17", "none", "no position", 600, [([0, 0, "gap8", 1], [b"\0", b""])])
    one("R17", "nnz", "more positions than the span has", 3, "gap8", 4, bytes(4))
    one("R17", "gap8_short", "fewer tokens than positions", 600, "gap8", 3, bytes(2))
    one("R17", "gap8_long", "more tokens than can be", 600, "gap8", 3, b"\0\0\0\xff\xff\xff")
    one("R17", "gap16_odd", "an odd number of bytes", 600, "gap16", 3, bytes(7))
    one("R17", "gap16_short", "fewer tokens than positions", 600, "gap16", 3, bytes(4))
    one("R17", "gap16_long", "more tokens than can be", 600, "gap16", 3, bytes(8))
    one("R17", "bitmap_short", "a bitmap too short", 601, "bitmap", 3, b"\x07" + bytes(74))
    one("R17", "bitmap_long", "a bitmap too long", 600, "bitmap", 3, b"\x07" + bytes(75))
    one("R17", "all_stream", "`all` with an index stream", 3, "all", 3, bytes(3))
    one("R17", "all_nnz", "`all` with fewer positions than the span", 4, "all", 3, b"")
    n = len(frame(b"\0"))
    stream = [b"\0", b"\x02"]
    listed = [0, 1, "gap8", 1]
    add("R17", "sizes_few", "a coded size too few", 600, [([*listed, [n]], stream)])
    add("R17", "sizes_many", "a coded size too many", 600, [([*listed, [n, n, 0]], stream)])
    add(
        "R17",
        "sizes_below",
        "coded sizes below the entry's",
        600,
        [([*listed, [n, n]], stream)],
        b"\0",
    )
    add(
        "R17",
        "sizes_above",
        "coded sizes above the entry's",
        600,
        [([*listed, [n, n + 1]], stream)],
    )
    huge = [n, (1 << 63) - 1]
    add("R17", "sizes_huge", "a coded size of 2^63 - 1", 600, [([*listed, huge], stream)])
    add(
        "R17",
        "index_left_out",
        "an index stream left out that is not empty",
        600,
        [(listed, [b"", b"\x02"])],
    )
    empty = len(frame(b""))
    stored = [([0, 3, "all", 0, [empty, n + 2]], [b"", b"\x02" * 3])]
    stored[0][0][4] = [empty, len(frame(b"\x02" * 3))]
    shown = "an empty index stream that is stored"
    held = frame(b"") + frame(b"\x02" * 3)
    add("R17", "index_stored", shown, 3, [(stored[0][0], [])], held)

    one("R18", "gap8_few", "fewer positions than nnz", 600, "gap8", 3, b"\0\xff\0")
    one("R18", "gap8_many", "more positions than nnz", 600, "gap8", 3, bytes(4))
    one("R18", "gap8_beyond", "a position beyond the span", 600, "gap8", 3, b"\xfe\xfe\x5a")
    one("R18", "gap8_beyond_skip", "beyond by skip tokens", 600, "gap8", 1, b"\xff\xff\x5a")
    one("R18", "gap8_trailing", "a trailing skip token", 600, "gap8", 3, b"\0\0\0\xff")
    one("R18", "gap8_skip_only", "nothing but a skip token", 600, "gap8", 1, b"\xff")

    def wide(*tokens: int) -> bytes:
        return bytes(t & 255 for t in tokens) + bytes(t >> 8 for t in tokens)

    one("R18", "gap16_few", "fewer positions than nnz", 70_000, "gap16", 2, wide(0, 65535))
    one("R18", "gap16_many", "more positions than nnz", 70_000, "gap16", 2, wide(0, 0, 0))
    one("R18", "gap16_beyond", "a position beyond the span", 70_000, "gap16", 1, wide(65535, 4465))
    one("R18", "gap16_trailing", "a trailing skip token", 70_000, "gap16", 2, wide(0, 0, 65535))
    one("R18", "bitmap_few", "fewer bits than nnz", 21, "bitmap", 3, b"\x01\x01\x00")
    one("R18", "bitmap_many", "more bits than nnz", 21, "bitmap", 3, b"\x0f\x00\x00")
    one("R18", "bitmap_padding", "a padding bit is set", 21, "bitmap", 3, b"\x03\x00\x20")
    one(
        "R18",
        "bitmap_padding_more",
        "a padding bit beside nnz others",
        21,
        "bitmap",
        3,
        b"\x07\x00\x80",
    )
    return out


def below_a_byte() -> list[Invalid]:
    """Return R17, R18 and R21: encodings that work below a byte."""
    out = []

    def add(rule: str, name: str, why: str, delta: Draft, of_base: bool = False) -> None:
        prefix = {"R17": "chunk_", "R18": "index_", "R21": "values_"}[rule]
        made = assemble(delta)
        out.append(Invalid(prefix + name, why, rule, "corrupt", made, on_apply=of_base))

    def recoded(chunk: list[Any], streams: list[bytes], of: Coding = Coding()) -> Draft:  # noqa: B008
        delta = sample(of)
        frames = [frame(stream) if stream else b"" for stream in streams]
        chunk[4:5] = [[len(one) for one in frames]]
        delta.manifest["tensors"][0]["delta"]["chunks"] = [chunk]
        delta.entries["w"] = b"".join(frames)
        return delta

    planes = [b"\x02" * 4, b"\0\0\1\0"]

    def tiled(rule: str, name: str, why: str, stream: bytes, nnz: int = 3) -> None:
        streams = [stream, *(plane[:nnz] for plane in planes)]
        add(rule, "tiles_" + name, why, recoded([0, nnz, "tiles", len(stream), None], streams))

    # 8 elements as rows of 4: bands by row and column, then the subset of each tile.
    rows, columns = ([0, 1], 1), ([0, 0, 1, 0], 1)
    head = bits.number(4) + bits.number(0) + bytes([2, 1, 2, 1])
    tiles = [bits.subset(*one, 1) for one in (([1], 3), ([], 1), ([], 3), ([0], 1))]
    tiles[2] = bits.subset([0], 3, 1)
    gaps = [sequence for _, sequence in tiles]
    heads = b"".join(part for part, _ in tiles)
    good = head + heads + bits.rice([rows, columns, *gaps])
    tiled("R17", "short", "a tiles stream of 7 bytes", good[:7])
    tiled("R17", "long", "a tiles stream of 32 771 bytes", good + bytes(32_771 - len(good)))
    tiled("R18", "few", "fewer positions than nnz", good, 4)
    tiled("R18", "many", "more positions than nnz", good, 2)
    tiled("R18", "trailing", "a byte after the stream", good + b"\0")
    tiled("R18", "trailing_one", "a number after the stream", good + b"\1")
    tiled("R18", "truncated", "the stream ends early", good[:-1])
    for name, why, start in (
        ("columns", "rows of one element", bytes([1, 0, 2, 1, 2, 1])),
        ("columns_many", "rows longer than the span", bytes([9, 0, 2, 1, 2, 1])),
        ("first", "the first element beyond the end of its row", bytes([4, 4, 2, 1, 2, 1])),
        ("bands", "no band of rows", bytes([4, 0, 0, 1, 2, 1])),
        ("bands_many", "65 bands of columns", bytes([4, 0, 2, 1, 65, 1])),
        ("parameter", "a parameter of 32", bytes([4, 0, 2, 32, 2, 1])),
        ("number", "a number of six bytes", b"\x84\x80\x80\x80\x80\0" + bytes([0, 2, 1, 2, 1])),
        ("number_large", "a number of 33 bits", b"\x84\x80\x80\x80\x10" + bytes([0, 2, 1, 2, 1])),
    ):
        tiled("R18", name, why, start + heads + bits.rice([rows, columns, *gaps]))
    wrong = head + heads + bits.rice([([0, 2], 1), columns, *gaps])
    tiled("R18", "label", "a row in a band that is none", wrong)
    wrong = head + heads + bits.rice([rows, columns, ([3], 1), *gaps[1:]])
    tiled("R18", "beyond", "a place beyond its tile", wrong)
    wrong = head + heads + bits.rice([rows, columns, ([1 << 32], 1), *gaps[1:]])[:0]
    tiled("R18", "no_numbers", "no numbers at all", wrong)
    shifted = bits.number(4) + bits.number(1) + bytes([1, 0, 1, 0])
    for name, why, cells in (("before", "before", [0, 4, 5]), ("after", "after", [1, 4, 9])):
        part, sequence = bits.subset(cells, 12, 1)
        stream = shifted + part + bits.rice([([0] * 3, 0), ([0] * 4, 0), sequence])
        tiled("R18", name, f"a position {why} the span", stream)
    low = bytearray(good)
    low[len(head + heads)] |= 0x80
    tiled("R18", "padding", "a bit set behind packed numbers", bytes(low))

    part, sequence = bits.subset([1, 2, 5], 8, 1)
    for name, why, stream, nnz in (
        ("few", "fewer positions than nnz", part + bits.rice([sequence]), 4),
        ("beyond", "a position beyond the span", part + bits.rice([([1, 0, 6], 1)]), 3),
        ("trailing", "a byte after the stream", part + bits.rice([sequence]) + b"\0", 3),
        ("truncated", "the stream ends early", part + bits.rice([sequence])[:-1], 3),
        ("parameter", "a parameter of 32", part[:1] + b"\x20" + bits.rice([sequence]), 3),
    ):
        streams = [stream, *(plane[:nnz] for plane in planes)]
        chunk = [0, nnz, "rice", len(stream), None]
        add("R18", "rice_" + name, why, recoded(chunk, streams))

    def packed(rule: str, name: str, why: str, packing: str, *streams: bytes) -> None:
        index = bytes([2, 0, 2])
        chunk = [0, 3, "gap8", len(index), None, packing, len(streams[-1])]
        add(rule, f"{packing}_{name}", why, recoded(chunk, [index, *streams]))

    part, sequence = bits.subset([1], 3, 0)
    body = bits.rice([sequence, ([2], 1)])
    good = b"\0" + part + b"\1" + b"\5" + body
    packed("R17", "short", "a stream of 3 bytes", "steps", good[:3])
    packed("R17", "long", "a stream of 32 778 bytes", "steps", good + bytes(32_778 - len(good)))
    packed("R21", "trailing", "a byte after the stream", "steps", good + b"\0")
    packed("R21", "truncated", "the stream ends early", "steps", good[:-1])
    packed("R21", "no_signs", "the stream ends before the signs", "steps", good[:4])
    packed("R21", "sign", "a bit set behind the signs", "steps", good.replace(b"\5", b"\x0d"))
    packed("R21", "classes", "steps in classes", "steps", b"\1\5" + part + b"\1" + good[1:])
    packed("R21", "parameter", "a parameter of 32", "steps", b"\0" + part + b"\x20\5" + body)
    many = b"\0" + bits.number(8) + b"\0\0\5" + bits.rice([([0] * 4, 0), ([0] * 4, 0)])
    packed("R21", "many", "more long steps than steps", "steps", many)
    wrong = b"\0" + part + b"\1\5" + bits.rice([([3], 0), ([2], 1)])
    packed("R21", "beyond", "a long step that is none", "steps", wrong)
    wide = b"\0" + part + b"\x0f\5" + bits.rice([sequence, ([1 << 15], 15)])
    packed("R21", "wide", "a code of more than two bytes", "steps", wide)
    symbols, lower = bits.scaled([2, 9, 300])
    packed(
        "R17", "long", "a second stream above 2 bytes a code", "scaled", symbols, lower + bytes(7)
    )
    packed("R21", "symbol", "a symbol of more than two bytes", "scaled", b"\x02\x02\x20", lower)
    packed("R21", "trailing", "a byte after the stream", "scaled", symbols, lower + b"\0")
    packed("R21", "truncated", "the stream ends early", "scaled", symbols, lower[:-1])
    padded = bytes([lower[0] | 4]) + lower[1:]
    packed("R21", "padding", "a bit set behind packed numbers", "scaled", symbols, padded)
    delta = recoded([0, 3, "gap8", 3, None, "scaled", 0], [bytes([2, 0, 2]), b"\2\2\2", b""])
    delta.manifest["tensors"][0]["delta"]["chunks"][0][4][1] = 0
    delta.entries["w"] = delta.entries["w"][:-12]
    add("R17", "scaled_left_out", "a first stream of scaled left out", delta)
    chunk = [0, 3, "gap8", 3, None, "steps"]
    delta = recoded(chunk, [bytes([2, 0, 2]), good])
    add("R17", "six", "a chunk that is a list of six", delta)

    # What only the base makes readable is refused where it meets its base.
    keys = [bits.key(one, 2) for one in sample_base().tensors()["w"].elements()]
    middle = (sorted(keys)[4],)

    def of_base(name: str, why: str, stream: bytes, nnz: int = 3) -> None:
        chunk = [0, nnz, "exponent", len(stream), None]
        delta = recoded(chunk, [stream, *(plane[:nnz] for plane in planes)])
        add("R18", "exponent_" + name, why, delta, of_base=True)

    good = bits.exponent([2, 3, 6], keys, middle, 1)
    of_base("few", "fewer positions than nnz", good, 4)
    of_base("many", "more positions than nnz", good, 2)
    of_base("trailing", "a byte after the stream", good + b"\0")
    of_base("truncated", "the stream ends early", good[:-1])
    of_base("thresholds", "thresholds that do not ascend", b"\2\5\5" + good[2:])
    of_base("threshold_zero", "a threshold of 0", b"\1\0" + good[2:])
    of_base("thresholds_end", "more thresholds than bytes", b"\xff" + good[1:])
    beyond = bytes([1, *middle, 2, 0, 0]) + bits.rice([([8], 0), ([], 0)])
    of_base("beyond", "a place beyond its class", beyond, 1)
    stream = bits.steps([2, 2, 9], [keys[p] for p in (2, 3, 6)], middle, 1)
    for name, why, wrong in (
        ("trailing", "a byte after the stream", stream + b"\0"),
        ("truncated", "the stream ends early", stream[:-1]),
        ("thresholds", "thresholds that do not ascend", b"\2\5\5" + stream[2:]),
    ):
        chunk = [0, 3, "gap8", 3, None, "exponent_steps", len(wrong)]
        delta = recoded(chunk, [bytes([2, 0, 2]), wrong])
        add("R21", "exponent_steps_" + name, why, delta, of_base=True)
    return out


def contents() -> list[Invalid]:
    """Return R19 and R20: stored headers and carried files."""
    out = []
    packed = with_header().entries[HEADER]
    text = packed[packed.index(b"{") :]

    def add(name: str, why: str, content: bytes) -> None:
        delta = with_header()
        delta.entries[HEADER] = frame(content)
        out.append(Invalid("stored_" + name, why, "R19", "corrupt", assemble(delta)))

    def altered(name: str, why: str, old: bytes, new: bytes) -> None:
        if text.count(old) != 1:
            raise ValueError(f"{old!r} is not once in {text!r}")
        add(name, why, text.replace(old, new))

    add("empty", "an empty stored header", b"")
    add("text", "a stored header that is no JSON", text.rstrip()[:-1])
    add("list", "a stored header that is a list", b"[" + text.rstrip() + b"]")
    add("utf8", "a stored header that is no UTF-8", text.replace(b"new", b"n\xffw"))
    altered("name", "another name", b'"new"', b'"old"')
    altered("dtype", "another dtype", b'"I32"', b'"U32"')
    altered("shape", "another shape of equal size", b"[3,1]", b"[1,3]")
    altered("offsets", "offsets that leave a hole", b"[12,24]", b"[16,28]")
    altered("order", "offsets that put the tensors in another order", b"[0,12]", b"[12,24]")
    add(
        "swapped",
        "the tensors in another order",
        text.replace(b"[0,12]", b"[]").replace(b"[12,24]", b"[0,12]").replace(b"[]", b"[12,24]"),
    )
    add("less", "a tensor less", text[: text.index(b',"new"')] + b"}")
    extra = b',"z":{"dtype":"U8","shape":[0],"data_offsets":[24,24]}}'
    add("more", "a tensor more", text.rstrip()[:-1] + extra)
    altered(
        "twice",
        "a tensor twice",
        b"[12,24]}",
        b"[12,24]}," + text[text.index(b'"new"') : text.rindex(b"}")],
    )
    altered("entry", "a tensor that is no object", text[8:].split(b',"new":')[0], b"5")
    altered("float", "an offset with a fraction", b"[12,24]", b"[12.0,24]")
    delta = with_side_file()
    delta.manifest["target"]["side_files"][0]["digest"] = blake3(b"other").hexdigest()
    why = "the digest of a carried file is wrong"
    out.append(Invalid("carried_digest", why, "R20", "corrupt", assemble(delta)))
    delta = with_side_file()
    delta.entries[CONFIG] = frame(b'{"a": 2}\n')
    why = "a carried file of the right size and other content"
    out.append(Invalid("carried_content", why, "R20", "corrupt", assemble(delta)))
    return out


def against_the_base() -> list[Invalid]:
    """Return deltas that are refused where they meet the base (FORMAT §10)."""
    out = []

    def add(name: str, why: str, step: str, code: str, delta: Draft) -> None:
        out.append(Invalid("apply_" + name, why, step, code, assemble(delta), on_apply=True))

    def edit(name: str, why: str, step: str, code: str, path: str, value: Any) -> None:
        # Coded so that the target's digest proves nothing of the base: a reader must look at it.
        delta = sample(Coding(values="target"))
        holder, key = at(delta.manifest, path)
        holder[key] = value
        add(name, why, step, code, delta)

    w, same, gone = 0, 1, 3
    structure, mismatch = "structure_mismatch", "base_mismatch"
    change = f"tensors.{gone}.base."
    edit("shape", "a shape is not the base's", "§10.2", structure, change + "shape", [2, 2])
    edit("dtype", "a dtype is not the base's", "§10.2", structure, change + "dtype", "I8")
    edit("name", "a tensor the base lacks", "§10.2", structure, f"tensors.{gone}.name", "game")
    delta = sample()
    del delta.manifest["tensors"][gone]
    add("further", "a tensor of the base in no row", "§10.2", structure, delta)
    kept = "target.side_files.1."
    edit(
        "side_digest",
        "a side file is not the base's",
        "§10.3",
        mismatch,
        kept + "digest",
        "00" * 32,
    )
    edit(
        "side_size",
        "the size of a side file is not the base's",
        "§10.3",
        mismatch,
        kept + "n_bytes",
        6,
    )
    edit("side_missing", "a side file the base lacks", "§10.3", mismatch, kept + "path", "lost.txt")
    zeros = "00" * 16
    edit(
        "base_digest",
        "a changed tensor is not the base's",
        "§10.5",
        mismatch,
        f"tensors.{w}.base.digest",
        zeros,
    )
    edit(
        "removed_digest",
        "a removed tensor is not the base's",
        "§10.5",
        mismatch,
        change + "digest",
        zeros,
    )
    delta = sample()
    for side in ("base", "target"):
        delta.manifest["tensors"][same][side]["digest"] = zeros
    add("unchanged_digest", "an unchanged tensor is not the base's", "§10.5", mismatch, delta)
    edit(
        "base_fingerprint",
        "the base's fingerprint is wrong",
        "§10.5",
        mismatch,
        "base.fingerprint",
        zeros * 2,
    )
    edit(
        "target_digest",
        "a target digest is wrong",
        "§10.5",
        "corrupt",
        f"tensors.{w}.target.digest",
        zeros,
    )
    edit(
        "target_fingerprint",
        "the target's fingerprint is wrong",
        "§10.5",
        "corrupt",
        "target.fingerprint",
        zeros * 2,
    )
    done = sample_base()
    (file,) = done.weight_files
    before = sample_base()
    before.weight_files[0].tensors |= {
        "w": nudged(file.tensors["w"], (1,)),
        "same": nudged(file.tensors["same"], (1,)),
    }
    add("already", "the base is the target", "§10.5", "already_applied", draft(before, done))
    before.weight_files[0].tensors["same"] = file.tensors["same"]
    done.weight_files[0].tensors["same"] = nudged(file.tensors["same"], (2,))
    why = "one changed tensor is the target's, the other the base's"
    add("partly", why, "§10.5", "partly_applied", draft(before, done))
    return out
