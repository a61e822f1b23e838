"""Invalid vectors of frames and limits: FORMAT §12, R10 and R13."""

from __future__ import annotations

from collections.abc import Callable

from vector_source.samples import (
    CONFIG,
    HEADER,
    Invalid,
    plain,
    with_header,
    with_header_text,
    with_manifest,
    with_side_file,
    with_text,
)
from vector_source.writer import assemble, block, frame, windowed_frame

MAGIC = b"\x28\xb5\x2f\xfd"


def frames() -> list[Invalid]:
    """Return R10: frames."""
    out = []
    content = b'{"a": 1}\n'  # of the carried file
    good = frame(content)

    def add(name: str, why: str, new: bytes) -> None:
        delta = with_side_file()
        delta.entries[CONFIG] = new
        out.append(Invalid("frame_" + name, why, "R10", "corrupt", assemble(delta)))

    skippable = bytes.fromhex("502a4d18") + (3).to_bytes(4, "little") + b"abc"
    raw = block(0, len(content), content, True)
    add("no_size", "a frame without content size", MAGIC + b"\x00\x00" + raw)
    add("small", "a frame of other size than the manifest says", frame(content[:-1]))
    add("states_less", "a frame that holds more than it states", frame(content + b"x", 9))
    add("states_more", "a frame that holds less than it states", frame(content[:-1], 9))
    bomb = MAGIC + b"\x20\x09" + block(1, 1 << 17, b"x", False) * 50 + block(1, 1 << 17, b"x", True)
    add("bomb", "a frame that states 9 bytes and holds 6 MiB", bomb)
    add("dictionary", "a frame with a dictionary id", MAGIC + b"\x21\x05\x09" + raw)
    add("trailing", "a byte after the frame", good + b"\0")
    add("second", "a second frame", good + frame(b""))
    add("second_same", "the frame twice", good + good)
    add("skippable_after", "a skippable frame after the frame", good + skippable)
    add("skippable_before", "a skippable frame before the frame", skippable + good)
    add("skippable_only", "a skippable frame in place of the frame", skippable)
    add("truncated", "a frame that ends early", good[:-1])
    add(
        "no_last_block",
        "a frame without a last block",
        MAGIC + b"\x20\x09" + block(0, 9, content, False),
    )
    add("header_only", "a frame that ends with its header", MAGIC + b"\x20\x09")
    add(
        "block_type",
        "a block of the reserved type",
        MAGIC + b"\x20\x09" + block(3, 9, content, True),
    )
    add("reserved_bit", "the reserved bit of the frame header is set", MAGIC + b"\x28\x09" + raw)
    add("checksum", "a wrong content checksum", MAGIC + b"\x24\x09" + raw + b"\0\0\0\0")
    add("window", "a window of 2^28 bytes", windowed_frame(content, 28))
    add("other_magic", "no frame: other magic", b"\x27" + good[1:])
    add("plain", "content that is not compressed at all", content)

    def empty(name: str, why: str, new: bytes) -> None:
        delta = with_side_file(content=b"")
        delta.entries[CONFIG] = new
        out.append(Invalid("frame_empty_" + name, why, "R10", "corrupt", assemble(delta)))

    none = frame(b"")
    empty("trailing", "a byte after a frame of no bytes", none + b"\0")
    empty("second", "a frame of no bytes twice", none + none)
    empty("truncated", "a frame of no bytes that ends early", none[:-1])
    empty("header_only", "a frame of no bytes that ends with its header", none[:6])
    empty("states_less", "a frame that states 0 bytes and holds 9", frame(content, 0))
    bomb = (
        windowed_frame(b"", 20)[:14] + block(1, 1 << 17, b"x", False) * 50 + block(0, 0, b"", True)
    )
    empty("bomb", "a frame that states 0 bytes and holds 6 MiB", bomb)

    def manifest(name: str, why: str, pack: Callable[[bytes], bytes]) -> None:
        data = assemble(plain(), pack=pack)
        out.append(Invalid("manifest_frame_" + name, why, "R10", "corrupt", data))

    manifest("plain", "a manifest that is not compressed", lambda text: text)
    manifest("trailing", "a byte after the manifest's frame", lambda text: frame(text) + b"\0")
    manifest("truncated", "the manifest's frame ends early", lambda text: frame(text)[:-1])

    def unsized(text: bytes) -> bytes:
        return MAGIC + b"\x00\x50" + windowed_frame(text, 20)[14:]

    manifest("no_size", "the manifest's frame has no content size", unsized)
    manifest("states_more", "it holds less than it states", lambda text: frame(text, len(text) + 1))
    for plane, name in ((0, "index"), (1, "plane")):
        delta = plain()
        chunk = delta.manifest["tensors"][0]["delta"]["chunks"][0]
        sizes = chunk[4]
        cut = sum(sizes[:plane])
        wrong = frame(bytes(1) * (chunk[3] + 1))
        old = delta.entries["w"]
        delta.entries["w"] = old[:cut] + wrong + old[cut + sizes[plane] :]
        sizes[plane] = len(wrong)
        why = f"the frame of the {name} holds a byte more than it must"
        out.append(Invalid(f"frame_{name}_size", why, "R10", "corrupt", assemble(delta)))
    delta = with_header()
    delta.entries[HEADER] += b"\0"
    why = "a byte after the frame of a stored header"
    out.append(Invalid("frame_header_trailing", why, "R10", "corrupt", assemble(delta)))
    return out


def limits() -> list[Invalid]:
    """Return R13: limits."""
    out = []

    def add(name: str, why: str, data: bytes) -> None:
        out.append(Invalid("limit_" + name, why, "R13", "limit_exceeded", data))

    whole = assemble(plain())
    most = (1 << 64) - 1
    add("header", "a header of 100 000 001 bytes", (100_000_001).to_bytes(8, "little") + whole[8:])
    add("header_most", "a header of 2^64 - 1 bytes", most.to_bytes(8, "little") + whole[8:])

    def states(size: int) -> Callable[[bytes], bytes]:
        return lambda content: windowed_frame(content, 20, size)

    limit = 1 << 27
    add(
        "manifest",
        "a manifest of 2^27 + 1 bytes, stated",
        assemble(plain(), pack=states(limit + 1)),
    )
    add(
        "manifest_most",
        "a manifest of 2^63 bytes, stated",
        assemble(plain(), pack=states(1 << 63)),
    )

    def spaced(text: bytes) -> bytes:
        missing = limit + 1 - len(text)
        runs = block(1, 1 << 17, b" ", False) * (missing >> 17)
        runs += block(1, missing % (1 << 17), b" ", True)
        return windowed_frame(text, 20, limit + 1)[:14] + block(0, len(text), text, False) + runs

    data = assemble(plain(), pack=spaced)
    add("manifest_bomb", "a manifest of 2^27 + 1 bytes, most of them spaces", data)
    delta = with_header()
    delta.entries[HEADER] = windowed_frame(b"{}", 20, limit + 1)
    add("stored_header", "a stored header of 2^27 + 1 bytes, stated", assemble(delta))
    delta = with_side_file()
    delta.manifest["target"]["side_files"][0]["n_bytes"] = limit + 1
    delta.entries[CONFIG] = windowed_frame(b"x", 20, limit + 1)
    add("carried", "a carried file of 2^27 + 1 bytes", assemble(delta))
    add("name", "a name of 65 536 bytes", with_manifest({"tensors.-1.name": "n" * 65536}, of=plain))
    folders = {"target.empty_folders": ["/".join(["d"] * 65)]}
    add("path", "a path of 65 components", with_manifest(folders, of=plain))
    shape = "tensors.-1.base.shape"
    add("dimensions", "a tensor of 65 dimensions", with_manifest({shape: [1] * 64 + [4]}, of=plain))
    add("bits", "a tensor of 2^63 bits", with_manifest({shape: [1 << 60]}, of=plain))
    add(
        "elements",
        "a tensor of 2^124 elements",
        with_manifest({shape: [1 << 62, 1 << 62]}, of=plain),
    )
    deep = '"info":{"a":' + "[" * 63 + "]" * 63 + "}"
    add("nesting", "JSON nested 65 deep", with_text('"info":{}', deep))
    deep = '"info":{"a":' + "[" * 100_000 + "]" * 100_000 + "}"
    add("nesting_much", "JSON nested 100 002 deep", with_text('"info":{}', deep))
    deep = '"info":{"a":' + '{"a":' * 63 + "0" + "}" * 63 + "}"
    add("nesting_objects", "objects nested 65 deep", with_text('"info":{}', deep))
    data = with_header_text(b'"w":', b'"v":' + b"[" * 64 + b"]" * 64 + b',"w":')
    add("nesting_header", "the header nested 65 deep", data)
    return out
