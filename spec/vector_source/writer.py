"""A writer for the vectors: it writes what it is told, right or wrong, independent of any library.

Frames are put together by hand from raw and run-length blocks, so that the bytes of the vectors
depend on no version of a compressor.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from blake3 import blake3

from vector_source import bits

SPAN = 1 << 24
RUN = 600  # runs of one byte at least this long become run-length blocks
FLOATS = ("F8_E5M2", "F8_E4M3", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F16", "BF16", "F32", "F64")
BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E8M0", *FLOATS[:4]), 8),
    **{"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U16": 16, "I16": 16, "F16": 16, "BF16": 16},
    **{"U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "C64": 64, "F64": 64},
}


@dataclass(frozen=True)
class Tensor:
    """A tensor with its bytes."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes

    @property
    def width(self) -> int:
        """The size of an element in bytes."""
        return max(BITS[self.dtype] // 8, 1)

    def elements(self) -> Sequence[int]:
        """Return the bits of all elements."""
        if self.width == 1:
            return self.data
        w = self.width
        return [int.from_bytes(self.data[i : i + w], "little") for i in range(0, len(self.data), w)]


def tensor(dtype: str, elements: Sequence[int], shape: Sequence[int] | None = None) -> Tensor:
    """Return a tensor of the given bits, of one dimension unless a shape is given."""
    width = max(BITS[dtype] // 8, 1)
    data = b"".join(bits.to_bytes(width, "little") for bits in elements)
    return Tensor(dtype, tuple((len(data) * 8 // BITS[dtype],) if shape is None else shape), data)


@dataclass
class WeightFile:
    """A safetensors file: tensors by own name in data order; `header` replaces the usual one."""

    path: str
    tensors: dict[str, Tensor]
    metadata: dict[str, str] | None = None
    header: bytes | None = None
    prefix: str = ""

    def content(self) -> bytes:
        """Return the bytes of the file."""
        header = self.canonical() if self.header is None else self.header
        data = b"".join(tensor.data for tensor in self.tensors.values())
        return len(header).to_bytes(8, "little") + header + data

    def canonical(self) -> bytes:
        """Return the canonical header."""
        out: dict[str, Any] = {} if self.metadata is None else {"__metadata__": self.metadata}
        begin = 0
        for name, one in self.tensors.items():
            end = begin + len(one.data)
            out[name] = {"dtype": one.dtype, "shape": one.shape, "data_offsets": [begin, end]}
            begin = end
        text = compact(out)
        return text + b" " * (-len(text) % 8)


@dataclass
class Checkpoint:
    """A base or target; one of kind `file` has one weight file and nothing else."""

    weight_files: list[WeightFile]
    side_files: dict[str, bytes] = field(default_factory=dict)
    empty_folders: list[str] = field(default_factory=list)
    kind: str = "folder"

    def files(self) -> dict[str, bytes]:
        """Return the content of every file by path."""
        return {file.path: file.content() for file in self.weight_files} | self.side_files

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by the names that rows use."""
        files = self.weight_files
        return {file.prefix + name: one for file in files for name, one in file.tensors.items()}


@dataclass(frozen=True)
class Coding:
    """How a tensor is coded; None: keep as much as can be, touch what changes.

    Thresholds are of `exponent` and `exponent_steps`, bands and `first` of `tiles`, `k` of all these.
    """

    index: str = "gap8"
    values: str = "ulp"
    keep: int | None = None
    positions: Sequence[int] | None = None
    touched: bool = True
    packing: str = "planes"
    thresholds: Sequence[int] = ()
    bands: tuple[Sequence[int], Sequence[int]] = ((), ())
    first: int = 0
    k: int = 1


@dataclass
class Draft:
    """A delta before it is put together: its manifest and its entries, in data order, as frames."""

    manifest: dict[str, Any]
    entries: dict[str, bytes]


def compact(value: object) -> bytes:
    """Return compact JSON (FORMAT §3.2)."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def block(kind: int, size: int, body: bytes, last: bool) -> bytes:
    """Return one block of a frame: kind 0 is raw, 1 is run-length."""
    return (int(last) | kind << 1 | size << 3).to_bytes(3, "little") + body


def blocks(content: bytes) -> bytes:
    """Return content as raw blocks, with run-length blocks for long runs of one byte."""
    parts: list[tuple[int, int, bytes]] = []
    begin = at = 0
    limit = 1 << 17
    while at < len(content):
        run = 1
        if content[at : at + RUN] == content[at : at + 1] * RUN:
            run = len(content) - at - len(content[at:].lstrip(content[at : at + 1]))
            run = min(run, limit)
        if run > 1 or at - begin == limit:
            parts += [(0, at - begin, content[begin:at])] if at > begin else []
            begin = at
        if run > 1:
            parts.append((1, run, content[at : at + 1]))
            begin = at + run
        at += run
    if begin < at or not parts:
        parts.append((0, at - begin, content[begin:at]))
    return b"".join(block(*part, part is parts[-1]) for part in parts)


def frame(content: bytes, stated: int | None = None) -> bytes:
    """Return a single-segment frame of content, stating its size or a wrong one."""
    size = len(content) if stated is None else stated
    if size < 256:
        head = b"\x20" + size.to_bytes(1, "little")
    elif size < 256 + 65536:
        head = b"\x60" + (size - 256).to_bytes(2, "little")
    else:
        head = b"\xa0" + size.to_bytes(4, "little")
    return b"\x28\xb5\x2f\xfd" + head + blocks(content)


def windowed_frame(content: bytes, window_log: int, stated: int | None = None) -> bytes:
    """Return a frame with a window of 2^window_log bytes and a stated size of 8 bytes."""
    size = len(content) if stated is None else stated
    head = b"\xc0" + bytes([window_log - 10 << 3]) + size.to_bytes(8, "little")
    return b"\x28\xb5\x2f\xfd" + head + blocks(content)


def index_stream(encoding: str, positions: Sequence[int], length: int) -> bytes:
    """Return the index stream of positions within a span (FORMAT §6)."""
    if encoding == "all":
        return b""
    if encoding == "bitmap":
        bitmap = bytearray((length + 7) // 8)
        for p in positions:
            bitmap[p // 8] |= 1 << p % 8
        return bytes(bitmap)
    skip = 255 if encoding == "gap8" else 65535
    tokens: list[int] = []
    before = -1
    for p in positions:
        gap = p - before - 1
        tokens += [skip] * (gap // skip) + [gap % skip]
        before = p
    if encoding == "gap8":
        return bytes(tokens)
    return bytes(t & 255 for t in tokens) + bytes(t >> 8 for t in tokens)


def code(before: int, after: int, values: str, dtype: str) -> int:
    """Return the code of one changed element (FORMAT §7)."""
    if values == "target":
        return after
    width = max(BITS[dtype] // 8, 1)
    modulus, half = 1 << 8 * width, 1 << 8 * width - 1
    if dtype in FLOATS:
        before, after = (x + half if x < half else modulus - 1 - x for x in (before, after))
    d = (after - before) % modulus
    return 2 * d if d < half else 2 * (modulus - d) - 1


def coded(
    positions: Sequence[int],
    codes: Sequence[int],
    coding: Coding,
    before: Sequence[int],
    width: int,
) -> tuple[list[Any], bytes]:
    """Return a chunk without its number, and its coded streams; `before` are the span's bits."""
    keys = [bits.key(one, width) for one in before] if needs_base(coding) else []
    if coding.index == "exponent":
        stream = bits.exponent(positions, keys, coding.thresholds, coding.k)
    elif coding.index == "rice":
        head, gaps = bits.subset(positions, len(before), coding.k)
        stream = head + bits.rice([gaps])
    elif coding.index == "tiles":
        stream = bits.tiles(positions, coding.first, *coding.bands, coding.k)
    else:
        stream = index_stream(coding.index, positions, len(before))
    streams = [bytes(c >> 8 * j & 255 for c in codes) for j in range(width)]
    left_out = [not any(plane) for plane in streams]
    if coding.packing == "scaled":
        streams = [*bits.scaled(codes)]
    elif coding.packing != "planes":
        touched = [keys[p] for p in positions] if keys else [0] * len(codes)
        streams = [bits.steps(codes, touched, coding.thresholds if keys else (), coding.k)]
    if coding.packing != "planes":
        left_out = [not one for one in streams]
    frames = [frame(stream) if stream else b""]
    frames += [b"" if out else frame(one) for one, out in zip(streams, left_out, strict=True)]
    chunk: list[Any] = [len(positions), coding.index, len(stream), [len(one) for one in frames]]
    if coding.packing != "planes":
        chunk += [coding.packing, len(streams[-1])]
    return chunk, b"".join(frames)


def needs_base(coding: Coding) -> bool:
    """Return whether the base is needed to read what is coded so."""
    return coding.index == "exponent" or coding.packing == "exponent_steps"


def delta_of(base: Tensor | None, target: Tensor, coding: Coding) -> tuple[dict[str, Any], bytes]:
    """Return the delta of one row and the tensor's entry."""
    w = target.width
    keep = coding.keep
    if keep is None:
        same = base is not None and base.dtype == target.dtype
        keep = min(len(base.data), len(target.data)) // w if base and same else 0
    old = (base.data[: keep * w] if base else b"").ljust(len(target.data), b"\0")
    before = Tensor(target.dtype, target.shape, old).elements()
    after = target.elements()
    touched = coding.positions
    if touched is None:
        everything = coding.index == "all"
        touched = [p for p in range(len(after)) if everything or before[p] != after[p]]
    chunks, entry = [], b""
    for number in sorted({p // SPAN for p in touched}):
        start = number * SPAN
        mine = [p for p in touched if p // SPAN == number]
        codes = [code(before[p], after[p], coding.values, target.dtype) for p in mine]
        span = before[start : start + SPAN]
        chunk, data = coded([p - start for p in mine], codes, coding, span, w)
        chunks.append([number, *chunk])
        entry += data
    pieces = (b"".join(bits[p].to_bytes(w, "little") for p in touched) for bits in (before, after))
    digests = [blake3(piece).hexdigest()[:16] for piece in pieces] if coding.touched else None
    return {"keep": keep, "values": coding.values, "touched": digests, "chunks": chunks}, entry


def row_tensor(one: Tensor | None) -> dict[str, Any] | None:
    """Return a tensor as a row tells it."""
    if one is None:
        return None
    digest = blake3(one.data).hexdigest()[:32]
    return {"dtype": one.dtype, "shape": list(one.shape), "digest": digest}


def fingerprint(tensors: dict[str, Tensor]) -> str:
    """Return the fingerprint of a checkpoint in hex (FORMAT §9)."""
    out = b"sparsedelta fingerprint 1\0"
    for name in sorted(tensors, key=str.encode):
        one = tensors[name]
        out += len(name.encode()).to_bytes(4, "little") + name.encode()
        out += len(one.dtype).to_bytes(1, "little") + one.dtype.encode()
        out += len(one.shape).to_bytes(4, "little")
        out += b"".join(n.to_bytes(8, "little") for n in one.shape) + blake3(one.data).digest()
    return blake3(out).hexdigest()


def entry_key(name: str) -> str:
    """Return the key of the entry of a tensor."""
    return "sparsedelta:tensor/" + name if name.startswith("sparsedelta:") else name


def draft(
    base: Checkpoint,
    target: Checkpoint,
    codings: dict[str, Coding] | None = None,
    *,
    default: Coding | None = None,
    carry: Sequence[str] | None = None,
    known: bool = True,
    base_id: str | None = None,
    info: dict[str, Any] | None = None,
) -> Draft:
    """Return the delta from base to target.

    Args:
        base: where the delta starts; its side files are those that can be left with it.
        target: what it makes.
        codings: how tensors are coded, by row name; the others as `default`.
        default: gap8 and ulp unless given.
        carry: the side files carried; those that the base lacks or has otherwise unless given.
        known: whether the target's fingerprint and digests are stored.
        base_id: where the base may be found.
        info: free.
    """
    old, new = base.tensors(), target.tensors()
    rows, tensor_entries = [], {}
    for name in [*new, *sorted(old.keys() - new.keys(), key=str.encode)]:
        row: dict[str, Any] = {"name": name, "base": row_tensor(old.get(name))}
        row |= {"target": row_tensor(new.get(name)), "delta": None}
        if name in new and row["base"] != row["target"]:
            coding = (codings or {}).get(name, default or Coding())
            row["delta"], entry = delta_of(old.get(name), new[name], coding)
            if entry:
                tensor_entries[entry_key(name)] = entry
            if not known:
                row["target"]["digest"] = None
        rows.append(row)
    side_files, entries, headers = [], {}, {}
    for path in sorted(target.side_files, key=str.encode):
        content = target.side_files[path]
        carried = base.side_files.get(path) != content if carry is None else path in carry
        member = {"path": path, "n_bytes": len(content), "digest": blake3(content).hexdigest()}
        side_files.append(member | {"carried": carried})
        if carried:
            entries["sparsedelta:file/" + path] = frame(content)
    weight_files = []
    for file in target.weight_files:
        kind = "canonical" if file.header is None else "stored"
        member = {"path": file.path, "n_tensors": len(file.tensors), "header": kind}
        weight_files.append(member | {"metadata": file.metadata if kind == "canonical" else None})
        if file.header is not None:
            headers["sparsedelta:header/" + file.path] = frame(file.header)
    parts: dict[str, Any] = {
        "kind": target.kind,
        "fingerprint": fingerprint(new) if known else None,
    }
    parts |= {"weight_files": weight_files, "side_files": side_files}
    parts |= {"empty_folders": sorted(target.empty_folders, key=str.encode)}
    manifest: dict[str, Any] = {
        "base": {"id": base_id, "fingerprint": fingerprint(old)},
        "target": parts,
    }
    manifest |= {"tensors": rows, "info": info or {}}
    return Draft(manifest, entries | headers | tensor_entries)


def same(value: Any) -> Any:
    """Return a value as it is."""
    return value


def assemble(
    delta: Draft,
    *,
    text: Callable[[bytes], bytes] = same,
    pack: Callable[[bytes], bytes] = frame,
    header: Callable[[dict[str, Any]], dict[str, Any]] = same,
    header_text: Callable[[bytes], bytes] = same,
    whole: Callable[[bytes], bytes] = same,
) -> bytes:
    """Return the bytes of a delta; a hook may alter each stage, and later digests are true to it.

    Args:
        delta: manifest and entries; a `payload_digest` that the manifest already has stays.
        text: alters the JSON of the manifest.
        pack: makes its frame.
        header: alters the header of the container.
        header_text: alters the text of the header, its padding not yet there.
        whole: alters the whole file.
    """
    payload = b"".join(delta.entries.values())
    manifest = delta.manifest | {
        "payload_digest": delta.manifest.get("payload_digest", blake3(payload).hexdigest())
    }
    packed = pack(text(compact(manifest)))
    meta = {"format": "sparsedelta", "format_version": "1"}
    top: dict[str, Any] = {"__metadata__": meta | {"manifest_digest": blake3(packed).hexdigest()}}
    begin = 0
    for key, data in [("sparsedelta:manifest", packed), *delta.entries.items()]:
        offsets = [begin, begin + len(data)]
        top[key] = {"dtype": "U8", "shape": [len(data)], "data_offsets": offsets}
        begin += len(data)
    written = header_text(compact(header(top)))
    written += b" " * (-len(written) % 8)
    return whole(len(written).to_bytes(8, "little") + written + packed + payload)
