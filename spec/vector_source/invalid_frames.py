"""Invalid vectors of streams and limits, FORMAT §12: R8, R9, R10 and R12."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from vector_source.checkpoints import noise
from vector_source.frames import block, frame, windowed_frame
from vector_source.samples import (
    CONFIG,
    HEADER,
    at,
    plain,
    with_header,
    with_manifest,
    with_side_file,
    with_streams,
)
from vector_source.vectors import Invalid
from vector_source.writer import Coding, Draft, assemble, same

MAGIC = b"\x28\xb5\x2f\xfd"
CONTENT = b"a" * 60 + b"b" * 60


def stored_as(delta: Draft, entry: str, stored: bytes, size_path: str) -> Draft:
    """Return a delta with other stored bytes of one stream; its size follows."""
    delta.entries[entry] = stored
    holder, key = at(delta.structure, size_path)
    holder[key] = len(stored)
    return delta


def side_as(stored: bytes, content: bytes = CONTENT) -> bytes:
    """Return a delta with a carried file that is stored as these bytes."""
    delta = with_side_file(content=content)
    return assemble(stored_as(delta, CONFIG, stored, "target.side_files.0.2"))


def streams() -> list[Invalid]:
    """Return R8: stored sizes."""
    out = []

    def add(name: str, why: str, data: bytes) -> None:
        out.append(Invalid("stored_" + name, why, "R8", "corrupt", data))

    add("side_more", "a side file with more stored bytes than its own", side_as(b"ab", b"a"))
    add(
        "side_frame",
        "a side file of 9 bytes as a frame of 18",
        side_as(frame(b"123456789"), b"123456789"),
    )
    add("side_none", "a side file without stored bytes", side_as(b""))
    add("side_empty", "an empty side file with a stored byte", side_as(b"a", b""))
    delta = stored_as(with_header(), HEADER, b"", "target.weight_files.0.2.2")
    add("header_none", "a stored header without stored bytes", assemble(delta))
    text = with_header().entries[HEADER]
    delta = stored_as(with_header(), HEADER, text + b" ", "target.weight_files.0.2.2")
    add("header_more", "a stored header with more stored bytes than its own", assemble(delta))

    def packed(of: bool, change: Callable[[bytes], bytes]) -> Callable[[bytes], bytes]:
        return lambda text: change(text) if (text == b"{}") == of else text

    for name, is_notes in (("structure", False), ("notes", True)):
        data = assemble(plain(), pack=packed(is_notes, lambda text: text + b" "))
        add(f"{name}_more", f"{name} with more stored bytes than their own", data)
        data = assemble(plain(), pack=packed(is_notes, lambda text: b""))
        add(f"{name}_none", f"{name} without stored bytes", data)
    for name, j, coding in (
        ("index", 0, Coding()),
        ("plane", 1, Coding()),
        ("steps", 1, Coding(packing="steps")),
        ("symbols", 1, Coding(packing="scaled")),
        ("lower", 2, Coding(packing="scaled")),
    ):
        raw = {"planes": [b"\2\2", b"\0\0"], "scaled": [b"\4\4", b"\3"]}
        raw["steps"] = [b"\0\0\0\0"]
        for kind in ("more", "none"):
            if (name, kind) != ("plane", "none"):
                delta = with_streams(coding, 2, [b"\0\0", *raw[coding.packing]])
                key = f"chunk:0:{j}"
                stored = delta.entries[key] + b"\0" if kind == "more" else b""
                delta = stored_as(delta, key, stored, f"chunks.stored.{j}")
                why = "with a byte too many" if kind == "more" else "without stored bytes"
                add(f"{name}_{kind}", f"a stream ({name}) {why}", assemble(delta))
    delta = with_streams(Coding(packing="scaled"), 2, [b"\0\0", b"\2\2", b""])
    delta = stored_as(delta, "chunk:0:2", b"\0", "chunks.stored.2")
    add("lower_empty", "a stream of no bytes with a stored byte", assemble(delta))
    return out


def frames() -> list[Invalid]:
    """Return R9: frames."""
    out = []
    good = frame(CONTENT)  # 26 bytes
    first, second = block(1, 60, b"a", False), block(1, 60, b"b", True)
    size = bytes([len(CONTENT)])

    def add(name: str, why: str, stored: bytes) -> None:
        out.append(Invalid("frame_" + name, why, "R9", "corrupt", side_as(stored)))

    skippable = bytes.fromhex("502a4d18") + (3).to_bytes(4, "little") + b"abc"
    add("no_size", "a frame without content size", MAGIC + b"\x00\x00" + first + second)
    add("small", "a frame of other size than the manifest says", frame(CONTENT[:-1]))
    add("states_less", "a frame that holds more than it states", frame(CONTENT + b"b", 120))
    add("states_more", "a frame that holds less than it states", frame(CONTENT[:-1], 120))
    add("holds_nothing", "a frame that holds nothing", frame(b"", 120))
    bomb = block(1, 1 << 17, b"x", False) * 15 + block(1, 1 << 17, b"x", True)
    add("bomb", "a frame that states 120 bytes and holds 2 MiB", MAGIC + b"\x20" + size + bomb)
    add("dictionary", "a frame with a dictionary id", MAGIC + b"\x21\x05" + size + first + second)
    add("trailing", "a byte after the frame", good + b"\0")
    add("second", "a second frame", good + frame(b""))
    add("second_same", "the frame twice", good + good)
    add("skippable_after", "a skippable frame after the frame", good + skippable)
    add("skippable_before", "a skippable frame before the frame", skippable + good)
    add("skippable_only", "a skippable frame instead of the frame", skippable)
    add("truncated", "a frame that ends early", good[:-1])
    add("no_last_block", "a frame without a last block", good[:-4] + block(1, 60, b"b", False))
    add("header_only", "a frame that ends with its header", good[:6])
    add("magic_only", "a frame that ends with its magic number", good[:4])
    add("one_byte", "one byte", good[:1])
    wrong = good[:-4] + block(3, 60, b"b", True)
    add("block_type", "a block of the reserved type", wrong)
    add("reserved_bit", "the reserved bit of the frame header is set", MAGIC + b"\x28" + good[5:])
    add("checksum", "a wrong content checksum", MAGIC + b"\x24" + good[5:] + b"\0\0\0\0")
    add("window", "a window of 2^28 bytes", windowed_frame(CONTENT, 28))
    add("other_magic", "not a frame: another magic number", b"\x27" + good[1:])
    add("plain", "not a frame: the raw bytes without the last", CONTENT[:-1])

    def of(name: str, why: str, delta: Draft | bytes) -> None:
        data = delta if isinstance(delta, bytes) else assemble(delta)
        out.append(Invalid("frame_" + name, why, "R9", "corrupt", data))

    old = noise("U8", 200, 1)
    for j, name in ((0, "index"), (1, "plane")):
        for kind, content in (("size", bytes(199)), ("more", bytes(201))):
            delta = with_streams(Coding(), 200, [bytes(200), b"\2" * 200], old=old)
            key = f"chunk:0:{j}"
            delta = stored_as(delta, key, frame(content), f"chunks.stored.{j}")
            why = f"the frame of a stream ({name}) is of {len(content)} bytes instead of 200"
            of(f"{name}_{kind}", why, delta)
    delta = with_header()
    spaced = delta.entries[HEADER] + b" " * 200
    delta.structure["target"]["weight_files"][0][2][1] = len(spaced)
    stored = frame(spaced) + b"\0"
    delta = stored_as(delta, HEADER, stored, "target.weight_files.0.2.2")
    of("header_trailing", "a byte after the frame of a stored header", delta)
    notes = plain()
    notes.notes = b'{"info":"' + b"x" * 300 + b'"}'
    longer = plain()
    longer.structure["base"]["id"] = "x" * 300
    for name, one, begin in (("notes", notes, b'{"info'), ("structure", longer, b'{"req')):

        def packed(
            change: Callable[[bytes], bytes], begin: bytes = begin
        ) -> Callable[[bytes], bytes]:
            return lambda raw: change(raw) if raw.startswith(begin) else raw

        pack = packed(lambda raw: frame(raw) + b"\0")
        of(f"{name}_trailing", f"a byte after the frame of {name}", assemble(one, pack=pack))
        pack = packed(lambda raw: frame(raw)[:-1])
        of(f"{name}_truncated", f"the frame of {name} ends early", assemble(one, pack=pack))
        pack = packed(lambda raw: frame(raw, len(raw) - 1))
        of(f"{name}_states_less", f"the frame of {name} states less", assemble(one, pack=pack))
    return out


def expansion() -> list[Invalid]:
    """Return R10: frames that expand too much."""
    out = []

    def add(name: str, why: str, data: bytes) -> None:
        out.append(Invalid("expand_" + name, why, "R10", "limit_exceeded", data))

    # One run-length block in a frame of 11 bytes, which may hold 64 * 11 + 1024.
    content = b"a" * (64 * 11 + 1024 + 1)
    add("side", "a side file of 11 bytes that holds 1 729", side_as(frame(content), content))
    delta = with_header()
    spaced = delta.entries[HEADER] + b" " * 100_000
    delta.structure["target"]["weight_files"][0][2][1] = len(spaced)
    delta = stored_as(delta, HEADER, frame(spaced), "target.weight_files.0.2.2")
    add("header", "a stored header that expands too much", assemble(delta))
    return out


def limits() -> list[Invalid]:
    """Return R12: limits of what the manifest states."""
    out = []

    def add(name: str, why: str, data: bytes, *also: str) -> None:
        out.append(Invalid("limit_" + name, why, "R12", "limit_exceeded", data, also=also))

    def edit(name: str, why: str, edits: dict[str, Any], *also: str) -> None:
        delta = plain()
        for path, value in edits.items():
            holder, key = at(delta.structure, path)
            holder[key] = value
        add(name, why, assemble(delta, pack=same), *also)

    def stated(i: int, size: int) -> bytes:
        return assemble(plain(), sizes=lambda four: [*four[:i], size, *four[i + 1 :]])

    limit = 1 << 27
    whole = assemble(plain())
    manifest = json.loads(whole[8:].split(b"}}")[0] + b"}}")["manifest"]["shape"][0]
    most = 4 * manifest + (1 << 19)
    add("structure", "a structure of a byte too many, stated", stated(0, most + 1), "corrupt")
    data = with_manifest({"base.id": "x" * 620_000}, of=plain)
    add("structure_held", "a structure of too many bytes for the manifest", data)
    data = with_manifest({"base.id": "," * 66_500}, of=plain)
    add("structure_values", "a structure of too many values for the manifest", data)
    add("structure_most", "a structure of 2^32 - 1 bytes", stated(0, (1 << 32) - 1), "corrupt")
    add("notes", "notes of 2^20 + 1 bytes, stated", stated(2, (1 << 20) + 1), "corrupt")
    noted = plain()
    noted.notes = b'{"info":"' + b"x" * (1 << 20) + b'"}'
    add("notes_held", "notes of more than 2^20 bytes", assemble(noted, pack=same))
    edit("name", "a name of 1025 bytes", {"tensors.names.0": "n" * 1025})
    edit("name_utf8", "a name of 1026 bytes and 513 letters", {"tensors.names.0": "é" * 513})
    edit("base_name", "a base name of 1025 bytes", {"tensors.base_names": [[0, "n" * 1025]]})
    shape = "layouts.0.3"
    edit("dimensions", "a tensor of 65 dimensions", {shape: [1] * 64 + [4]})
    edit("dtype", "a dtype of 65 bytes", {"layouts.0.0": "D" * 65}, "corrupt")
    edit("bits", "1025 bits a value", {"layouts.0": ["X", 1025, "i1", [8]]}, "corrupt")
    edit("size", "a tensor of 2^63 bits", {shape: [1 << 59]}, "corrupt")
    spare = {"layouts": [*plain().structure["layouts"], ["U8", 8, "i1", [1 << 60]]]}
    edit("size_unused", "a layout of 2^63 bits that no row has", spare)
    edit("elements", "a tensor of 2^122 elements", {shape: [1 << 61, 1 << 61]}, "corrupt")
    half = {"layouts": [["U8", 8, "i1", [1 << 59]]], "tensors.layouts": [0, 0]}
    half |= {"tensors.names": ["v", "w"], "tensors.base_files": [-1, -1]}
    half |= {"tensors.n_chunks": [0, 0], "target.weight_files.0.1": 2}
    edit("sum", "two tensors of 2^62 bits each", half, "corrupt")
    empty = with_side_file()
    header = ["stored", limit + 1, limit + 1]
    empty.structure["target"] |= {"side_files": [], "weight_files": [["w.safetensors", 0, header]]}
    empty.entries, empty.digests["side_files"] = {}, []
    why = "a stored header of 2^27 + 1 bytes, stated"
    add("stored_header", why, assemble(empty), "corrupt", "truncated")
    sides = {"target.side_files": [["a", limit + 1, 13]]}
    edit("carried", "a carried file of 2^27 + 1 bytes, stated", sides, "corrupt")
    files = [[f"{n:05}", 0, ["canonical", None]] for n in range((1 << 16) + 1)]
    edit("weight_files", "2^16 + 1 weight files", {"target.weight_files": files}, "corrupt")
    sides = {"target.side_files": [[f"{n:05}", 0, -1] for n in range((1 << 16) + 1)]}
    edit("side_files", "2^16 + 1 side files", sides, "corrupt")
    paths = {"base.files": [f"{n:05}" for n in range((1 << 16) + 1)]}
    edit("base_files", "2^16 + 1 base files", paths)
    folders = {"target.empty_folders": [f"{n:04}" for n in range((1 << 12) + 1)]}
    edit("folders", "2^12 + 1 empty folders", folders)
    n = (1 << 19) + 1
    edit("rows", "2^19 + 1 rows", {"tensors.names": [""] * n}, "corrupt")
    edit("chunks", "2^20 + 1 chunks", {"tensors.n_chunks": [(1 << 20) + 1]}, "corrupt")
    edit("chunks_most", "2^63 - 1 chunks", {"tensors.n_chunks": [(1 << 63) - 1]}, "corrupt")
    wrapped = {"tensors.n_chunks": [1 << 62, 1 << 62, 1 << 62, (1 << 62) + 3]}
    add(
        "chunks_wrapped", "2^64 + 3 chunks, and 3 in the columns", with_manifest(wrapped), "corrupt"
    )
    return out
