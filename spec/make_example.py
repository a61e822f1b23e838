"""Write the worked example of FORMAT.md from the vector `example`: `python make_example.py`.

The listing has every byte of the delta in order, as hex or as ASCII text in quotes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

from vector_source.valid import Valid, example
from vector_source.writer import code, gaps

FORMAT = Path(__file__).parent / "FORMAT.md"
BEGIN, END = "## 15 Worked example\n", "\n## 16 Changelog"
TEXT, HEX = 88, 16  # bytes on a line

Piece = tuple[bytes, str]


def cut(text: bytes, *marks: str) -> Iterator[bytes]:
    """Yield the parts of a text, which is cut before each mark; the marks occur in this order."""
    begin = 0
    for mark in marks:
        at = text.index(mark.encode(), begin)
        yield text[begin:at]
        begin = at
    yield text[begin:]


def numbers(data: bytes) -> list[int]:
    """Return the four sizes at the beginning of a manifest."""
    return [int.from_bytes(data[i : i + 4], "little") for i in range(0, 16, 4)]


def structure_pieces(text: bytes) -> list[Piece]:
    """Return each member of the structure with its meaning."""
    names = ("base", "target", "layouts", "tensors", "codings", "chunks")
    meanings = (
        "the structure: no feature beyond version 1",
        "the base: no hint where it can be found; rows refer to one file",
        "the target: one file of one row with a canonical header, no metadata",
        "one layout: 300 elements of 2 bytes, in float order",
        "one row: w, layout 0, its base tensor is w of base file 0, one chunk",
        "one coding",
        "one chunk: from 0, 300 elements, 4 touched, coding 0, with touched digests; its index "
        "stream holds 5 bytes; stored sizes",
    )
    return list(zip(cut(text, *(f'"{name}":' for name in names)), meanings, strict=True))


def pieces(delta: bytes) -> list[Piece]:
    """Return all bytes of the delta in pieces, each with its meaning."""
    start = 8 + int.from_bytes(delta[:8], "little")
    text = delta[8:start].rstrip(b" ")
    n_spaces = start - 8 - len(text)
    meta, manifest_entry, payload_entry = cut(text, '"manifest":', '"payload":')
    sizes = manifest_sizes(delta)
    manifest, payload = delta[start : start + sizes[0]], delta[start + sizes[0] :]
    n_structure, _, n_notes, _ = numbers(manifest)
    digests = manifest[16 + n_structure + n_notes :]
    return [
        (delta[:8], f"N = {start - 8}"),
        (meta, "the header, N bytes, with the digest of the manifest"),
        (manifest_entry, f"the manifest: m = {sizes[0]} bytes"),
        (payload_entry, f"the payload: p = {sizes[1]} bytes"),
        (b" " * n_spaces, f"spaces, so that N is a multiple of 8: {start - 8}"),
        (manifest[:8], f"the manifest: the structure has {n_structure} bytes, stored uncompressed"),
        (manifest[8:16], f"the notes have {n_notes} bytes, stored uncompressed"),
        *structure_pieces(manifest[16 : 16 + n_structure]),
        (manifest[16 + n_structure : 16 + n_structure + n_notes], "the notes"),
        (digests[:16], "digest of the header of model.safetensors"),
        (digests[16:32], "base digest of w"),
        (digests[32:48], "target digest of w"),
        (digests[48:64], "digest of the chunk, which is the 13 bytes of the payload"),
        (digests[64:72], "touched digest, before"),
        (digests[72:], "touched digest, after"),
        (payload[:1], "the payload, index stream: p = -1 + 2 + 1 = 2"),
        (payload[1:2], "p = 2 + 0 + 1 = 3"),
        (payload[2:3], "token 255: p = 3 + 255 = 258, not touched"),
        (payload[3:4], "p = 258 + 30 + 1 = 289"),
        (payload[4:5], "p = 289 + 0 + 1 = 290"),
        (payload[5:9], "plane 0: the low bytes of the four codes"),
        (payload[9:], "plane 1: the high bytes"),
    ]


def manifest_sizes(delta: bytes) -> list[int]:
    """Return the sizes of the manifest and the payload."""
    header = json.loads(delta[8 : 8 + int.from_bytes(delta[:8], "little")])
    return [header[name]["shape"][0] for name in ("manifest", "payload")]


def listing(delta: bytes) -> str:
    """Return every byte of a delta with its offset and its meaning."""
    lines, offset = [], 0
    for data, meaning in pieces(delta):
        is_text = len(data) > 6 and data.isascii() and data.decode().isprintable()
        step = TEXT if is_text else HEX
        lines.append(f"        # {meaning}")
        for begin in range(0, len(data), step):
            part = data[begin : begin + step]
            shown = f"'{part.decode()}'" if is_text else part.hex(" ")
            lines.append(f"{offset + begin:6}  {shown}")
        offset += len(data)
    if b"".join(data for data, _ in pieces(delta)) != delta:
        raise ValueError("the pieces do not add up to the delta; correct pieces()")
    return "\n".join(lines)


def ordered(bits: int) -> int:
    """Return M(bits) for 16 bits in float order (FORMAT §7.2)."""
    return bits + 0x8000 if bits < 0x8000 else 0xFFFF - bits


def arithmetic(vector: Valid) -> str:
    """Return the table of the changed values."""
    before, after = (c.tensors()["w"].elements() for c in (vector.base, vector.target))
    lines = ["| position | b | t | M(b) | M(t) | d | code |", "|---|---|---|---|---|---|---|"]
    for p, (b, t) in enumerate(zip(before, after, strict=True)):
        if b != t:
            moved = ordered(t) - ordered(b)
            zigzag = f"2 · {moved}" if moved >= 0 else f"−2 · ({moved}) − 1".replace("(-", "(−")
            bits = " | ".join(f"`{x:04x}`" for x in (b, t, ordered(b), ordered(t)))
            signed = f"{moved:+}".replace("-", "−")
            lines.append(
                f"| {p} | {bits} | {signed} | {zigzag} = `{code(b, t, 'ulp', 'f2'):04x}` |"
            )
    return "\n".join(lines)


def section() -> str:
    """Return the text of the section."""
    (vector,) = example()
    tensors = vector.base.tensors()["w"], vector.target.tensors()["w"]
    positions = [p for p in range(300) if tensors[0].elements()[p] != tensors[1].elements()[p]]
    touched = [b"".join(t.data[2 * p : 2 * p + 2] for p in positions).hex(" ") for t in tensors]
    canonical = vector.target.weight_files[0].canonical()
    n_spaces = len(canonical) - len(canonical.rstrip())
    header = canonical.decode().rstrip()
    return f"""
This section explains every byte of the vector `vectors/valid/example`. Base and target are one file with one tensor `w` of 300
`BF16` values. Four of them change: 1.0 becomes the next larger value, −0.0 becomes 0.0, 1.0 becomes 4.0, −1.0 becomes −1.015625.
In the base, all values except those at positions 3 and 290 are 1.0, with bits `3f80`.

The changed values (§7.2), S = `8000`:

{arithmetic(vector)}

The index encoding is `gaps` (§6.3). Decoding starts at −1, so reaching the positions 2, 3, 289 and 290 takes steps of 3, 1, 286
and 1. A token is a step minus 1, and 286 = 255 + 31, so the tokens are `{gaps(positions).hex(" ")}`. The number of tokens may be
4 to 4 + 300 div 255 = 5; here it is 5.

The delta has {len(vector.delta)} bytes, and all of them are listed. Offsets are decimal; bytes are hex, or ASCII text in quotes.
Everything is stored uncompressed so that it can be read here. A frame of the structure would be smaller.

```
{listing(vector.delta)}
```

The digests:

- Header: BLAKE3(the {len(canonical)} bytes of the header below)[:16].
- Base and target digest: BLAKE3(the tensor's 600 bytes)[:16], before and after.
- Chunk: BLAKE3(the payload)[:16].
- Touched: BLAKE3(`{touched[0]}`)[:8], before; BLAKE3(`{touched[1]}`)[:8], after.
- `manifest_digest`: BLAKE3(the {manifest_sizes(vector.delta)[0]} bytes of the manifest).

The header of the target file is canonical: `{header}` and {n_spaces} spaces. The file consists of the `u64`
{len(canonical)}, the header of {len(canonical)} bytes and the 600 bytes of `w`.
"""


def main() -> int:
    """Write the section into FORMAT.md."""
    text = FORMAT.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    FORMAT.write_text(before + BEGIN + section() + END + after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
