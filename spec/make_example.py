"""Write the worked example of FORMAT.md from the vector `example`: `python make_example.py`.

Every byte of the delta stands in the listing, in its order: as hex, or in quotes as ASCII text.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

from vector_source.valid import Valid, example
from vector_source.writer import code, index_stream

FORMAT = Path(__file__).parent / "FORMAT.md"
BEGIN, END = "## 14 Worked example\n", "\n## 15 Changelog"
TEXT, HEX = 88, 16  # bytes on a line

Piece = tuple[bytes, str]


def frame_pieces(data: bytes, name: str, content: list[Piece]) -> list[Piece]:
    """Return the pieces of a frame of one raw block."""
    n_size = 1 if data[4] == 0x20 else 2
    size = int.from_bytes(data[5 : 5 + n_size], "little") + (256 if n_size == 2 else 0)
    sized = f"content size {size}" + (f" = 256 + {size - 256}" if n_size == 2 else "")
    head = [
        (data[:4], f"{name}: magic number of a Zstandard frame"),
        (data[4:5], f"single segment, content size in {n_size} byte{'s' * (n_size > 1)}"),
        (data[5 : 5 + n_size], sized),
        (data[5 + n_size : 8 + n_size], f"the last block, raw, {size} bytes: 1 + 8 * {size}"),
    ]
    body = data[8 + n_size :]
    if sum(len(piece) for piece, _ in content) != len(body):
        raise ValueError(f"the pieces are not the content of {name}")
    return head + content


def cut(text: bytes, *marks: str) -> Iterator[bytes]:
    """Yield text in pieces that begin at the marks, in order."""
    begin = 0
    for mark in marks:
        at = text.index(mark.encode(), begin)
        yield text[begin:at]
        begin = at
    yield text[begin:]


def entry_sizes(delta: bytes) -> list[int]:
    """Return the sizes of the entries, in data order."""
    header = json.loads(delta[8 : 8 + int.from_bytes(delta[:8], "little")])
    return [entry["shape"][0] for key, entry in header.items() if key != "__metadata__"]


def pieces(delta: bytes) -> list[Piece]:
    """Return the delta's bytes, explained one after the other."""
    start = 8 + int.from_bytes(delta[:8], "little")
    text = delta[8:start].rstrip(b" ")
    n_spaces = start - 8 - len(text)
    meta, manifest_entry, tensor_entry = cut(text, '"sparsedelta:', '"w"')
    n_manifest, n_tensor = entry_sizes(delta)
    manifest = delta[start : start + n_manifest]
    base, target, tensors, in_base, in_target, change, rest = cut(
        manifest[10:], '"target"', '"tensors"', '"base"', '"target"', '"delta"', '"info"'
    )
    streams = delta[start + n_manifest :]
    index, low = 9 + 5, 9 + 4
    return [
        (delta[:8], f"N = {start - 8}"),
        (meta, "the header, N bytes; the digest is that of the manifest entry"),
        (manifest_entry, f"the manifest is the first {n_manifest} bytes of the data section"),
        (tensor_entry, f"the coded chunks of w are the other {n_tensor}"),
        (b" " * n_spaces, f"space{'s' * (n_spaces > 1)}: N becomes a multiple of 8"),
        *frame_pieces(
            manifest,
            "manifest",
            [
                (base, "the base: nothing is said of where; its fingerprint"),
                (target, "the target: one file with a canonical header"),
                (tensors, "the rows: one"),
                (in_base, "the tensor in the base"),
                (in_target, "the tensor in the target: only the digest differs"),
                (
                    change,
                    "all 300 elements begin as the base's; one chunk, number 0, of 4 positions",
                ),
                (rest, "the digest of everything after the manifest entry"),
            ],
        ),
        *frame_pieces(
            streams[:index],
            "index stream",
            [
                (streams[8 + 1 : 8 + 2], "p = -1 + 2 + 1 = 2"),
                (streams[10:11], "p = 2 + 0 + 1 = 3"),
                (streams[11:12], "skip: p = 3 + 255 = 258, not touched"),
                (streams[12:13], "p = 258 + 30 + 1 = 289"),
                (streams[13:14], "p = 289 + 0 + 1 = 290"),
            ],
        ),
        *frame_pieces(
            streams[index : index + low],
            "value plane 0",
            [(streams[index + 9 : index + low], "the low bytes of the four codes")],
        ),
        *frame_pieces(
            streams[index + low :],
            "value plane 1",
            [(streams[index + low + 9 :], "the high bytes")],
        ),
    ]


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
        raise ValueError("the pieces are not the delta")
    return "\n".join(lines)


def ordered(bits: int) -> int:
    """Return M of 16 bits in float order (FORMAT §7.2)."""
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
                f"| {p} | {bits} | {signed} | {zigzag} = `{code(b, t, 'ulp', 'BF16'):04x}` |"
            )
    return "\n".join(lines)


def section() -> str:
    """Return the text of the section."""
    (vector,) = example()
    tensors = vector.base.tensors()["w"], vector.target.tensors()["w"]
    positions = [p for p in range(300) if tensors[0].elements()[p] != tensors[1].elements()[p]]
    touched = [b"".join(t.data[2 * p : 2 * p + 2] for p in positions).hex(" ") for t in tensors]
    (name,) = vector.base.tensors()
    canonical = vector.target.weight_files[0].canonical()
    n_spaces = len(canonical) - len(canonical.rstrip())
    head = b"sparsedelta fingerprint 1\0"
    described = (1).to_bytes(4, "little") + name.encode() + b"\x04BF16" + (1).to_bytes(4, "little")
    described += (300).to_bytes(8, "little")
    tokens = index_stream("gap8", positions, 300).hex(" ")
    header = canonical.decode().rstrip()
    return f"""
The vector `vectors/valid/example`, whole. Base and target are one file with one tensor `w` of
300 `BF16` values; four of them change: 1.0 becomes the next larger value, −0.0 becomes 0.0, 1.0
becomes 4.0, −1.0 becomes −1.015625. In the base all values but those at positions 3 and 290 are
1.0, bits `3f80`.

The changed values (§7.2), S = `8000`:

{arithmetic(vector)}

The positions 2, 3, 289 and 290 as `gap8` (§6.1): they lie 3, 1, 286 and 1 after the one before. A
token is that less one, and 286 is 255 + 31, so the tokens are `{tokens}`. Their number
may be 4 to 4 + 300 div 255 = 5, and is 5.

The delta is {len(vector.delta)} bytes. Offsets are decimal; bytes are hex, or ASCII text within
quotes; no byte is left out. Its frames hold their content raw, so that it can be read here; a
writer compresses.

```
{listing(vector.delta)}
```

The digests in it:

- `tensors[0].base.digest` and `.target.digest`: BLAKE3(the tensor's 600 bytes)[:16], before and
  after.
- `touched`: BLAKE3(`{touched[0]}`)[:8], before;
  BLAKE3(`{touched[1]}`)[:8], after.
- `base.fingerprint` and `target.fingerprint`: BLAKE3 of the bytes
  `{head.hex(" ")}`
  (the text `sparsedelta fingerprint 1` and a zero byte), then
  `{described.hex(" ")}`
  (1, `w`; 4, `BF16`; 1 dimension: 300), then the 32 bytes of BLAKE3 of the tensor's 600 bytes.
- `manifest_digest`: BLAKE3 of the manifest entry, {entry_sizes(vector.delta)[0]} bytes.
- `payload_digest`: BLAKE3 of the last {entry_sizes(vector.delta)[1]} bytes of the file.

The target file follows from this. Its header is canonical:
`{header}` and {n_spaces} spaces.
The file is the `u64` {len(canonical)}, the header of {len(canonical)} bytes and the 600 bytes
of `w`.
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
