"""A writer for the vectors: it writes what it is given, right or wrong, independent of any library.

A stream is stored as a frame where that is smaller, and plain otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from blake3 import blake3

from vector_source import bits
from vector_source.checkpoints import Checkpoint, Place, Tensor, WeightFile, compact, tensor
from vector_source.frames import block, frame, smaller, windowed_frame

__all__ = [
    "Checkpoint",
    "Coding",
    "Draft",
    "Place",
    "Tensor",
    "WeightFile",
    "add_chunk",
    "assemble",
    "block",
    "code",
    "compact",
    "container_header",
    "draft",
    "frame",
    "gaps",
    "same",
    "smaller",
    "tensor",
    "windowed_frame",
]
SPAN = 1 << 24
DIGESTS = ("headers", "side_files", "base", "target", "chunks", "touched")


@dataclass(frozen=True)
class Coding:
    """How a tensor is coded; None: keep as much as can be, touch what changes.

    Thresholds are of `rice` and `steps`, bands and `first` of `tiles`, `k` of all these. `chunks`
    are (start, span), or (start, span, coding) for a coding of its own.
    """

    index: str = "gaps"
    values: str = "ulp"
    keep: int | None = None
    positions: Sequence[int] | None = None
    touched: bool = True
    packing: str = "planes"
    thresholds: Sequence[int] = ()
    classes: bool | None = None
    bands: tuple[Sequence[int], Sequence[int]] = ((), ())
    first: int = 0
    k: int = 1
    chunks: Sequence[tuple[Any, ...]] | None = None


@dataclass
class Draft:
    """A delta before it is put together.

    `structure` is its JSON. `entries` are the parts of the payload in order: `file:PATH`,
    `header:PATH`, and `chunk:I:J` for stream J of chunk I. `digests` are lists by kind; a chunk's
    that is None follows from its streams. `notes` are JSON, or its text.
    """

    structure: dict[str, Any]
    entries: dict[str, bytes]
    digests: dict[str, list[Any]]
    notes: dict[str, Any] | bytes = field(default_factory=dict)


def gaps(positions: Sequence[int]) -> bytes:
    """Return a `gaps` stream (FORMAT §6.3)."""
    tokens: list[int] = []
    before = -1
    for p in positions:
        gap = p - before - 1
        tokens += [255] * (gap // 255) + [gap % 255]
        before = p
    return bytes(tokens)


def bitmap(positions: Sequence[int], span: int) -> bytes:
    """Return a `bitmap` stream (FORMAT §6.4)."""
    out = bytearray((span + 7) // 8)
    for p in positions:
        out[p // 8] |= 1 << p % 8
    return bytes(out)


def code(before: int, after: int, values: str, element: str) -> int:
    """Return the code of one changed element (FORMAT §7.1, §7.2)."""
    if values == "target":
        return after
    width = int(element[1])
    modulus, half = 1 << 8 * width, 1 << 8 * width - 1
    if element[0] == "f":
        before, after = (x + half if x < half else modulus - 1 - x for x in (before, after))
    d = (after - before) % modulus
    return 2 * d if d < half else 2 * (modulus - d) - 1


def raw_streams(
    coding: Coding, positions: Sequence[int], codes: Sequence[int], before: Sequence[int], w: int
) -> list[bytes]:
    """Return the streams of a chunk, raw; `before` are the bits of its elements in the start."""
    in_classes = coding.index == "rice" or coding.packing == "steps"
    keys = [bits.key(one, w) for one in before] if in_classes else []
    if coding.index == "gaps":
        streams = [gaps(positions)]
    elif coding.index == "bitmap":
        streams = [bitmap(positions, len(before))]
    elif coding.index == "rice":
        streams = [bits.rice_index(positions, keys, coding.thresholds, coding.k)]
    else:
        streams = [bits.tiles(positions, coding.first, *coding.bands, coding.k)]
    if coding.packing == "planes":
        return streams + [bytes(c >> 8 * j & 255 for c in codes) for j in range(w)]
    if coding.packing == "scaled":
        return [*streams, *bits.scaled(codes)]
    touched = [keys[p] for p in positions]
    return [*streams, bits.steps(codes, touched, coding.thresholds, coding.k)]


def stated_sizes(coding: Coding, streams: Sequence[bytes]) -> list[int]:
    """Return the raw sizes that a chunk states (FORMAT §6, §7)."""
    sizes = [] if coding.index == "bitmap" else [len(streams[0])]
    return sizes + ([] if coding.packing == "planes" else [len(streams[-1])])


def add_chunk(
    delta: Draft, coding: Coding, start: int, span: int, nnz: int, streams: Sequence[bytes]
) -> None:
    """Append a chunk of raw streams to a draft; the caller counts it in its row."""
    structure = delta.structure
    chunks, codings = structure["chunks"], structure["codings"]
    i = len(chunks["starts"])
    in_classes = bool(coding.thresholds) if coding.classes is None else coding.classes
    kind = [coding.values, coding.index, coding.packing, int(in_classes)]
    if kind not in codings:
        codings.append(kind)
    columns = {"starts": start, "spans": span, "nnz": nnz, "codings": codings.index(kind)}
    for column, value in (columns | {"touched": int(coding.touched)}).items():
        chunks[column].append(value)
    chunks["raw"] += stated_sizes(coding, streams)
    delta.digests["chunks"].append(None)
    for j, stream in enumerate(streams):
        is_zero_plane = coding.packing == "planes" and j > 0 and not any(stream)
        stored = b"" if is_zero_plane else smaller(stream)
        chunks["stored"].append(len(stored))
        delta.entries[f"chunk:{i}:{j}"] = stored


def add_changes(delta: Draft, start: Tensor, target: Tensor, coding: Coding) -> int:
    """Append the chunks that turn the start of a row into the target; return their number."""
    before, after = start.elements(), target.elements()
    changed = coding.positions
    if changed is None:
        changed = [p for p in range(len(after)) if before[p] != after[p]]
    parts = coding.chunks
    if parts is None:
        firsts = sorted({p // SPAN * SPAN for p in changed})
        parts = [(first, min(SPAN, len(after) - first)) for first in firsts]
    for begin, span, *own in parts:
        one = own[0] if own else coding
        mine = [p for p in changed if begin <= p < begin + span]
        codes = [code(before[p], after[p], one.values, target.element) for p in mine]
        bits_before, w = before[begin : begin + span], target.width
        streams = raw_streams(one, [p - begin for p in mine], codes, bits_before, w)
        add_chunk(delta, one, begin, span, len(mine), streams)
        if one.touched:
            both = (b"".join(b[p].to_bytes(w, "little") for p in mine) for b in (before, after))
            digest = b"".join(blake3(data).digest()[:8] for data in both)
            delta.digests["touched"].append(digest)
    return len(parts)


def empty_structure() -> dict[str, Any]:
    """Return the structure of a delta without rows (FORMAT §3.1)."""
    rows = ("names", "layouts", "base_files", "base_names", "base_layouts", "keep", "n_chunks")
    chunks = ("starts", "spans", "nnz", "codings", "touched", "raw", "stored")
    target = {"kind": "folder", "digests": True}
    return {
        "requires": [],
        "base": {"id": None, "n_unused": 0, "files": []},
        "target": target | {name: [] for name in ("weight_files", "side_files", "empty_folders")},
        "layouts": [],
        "tensors": {name: [] for name in rows},
        "codings": [],
        "chunks": {name: [] for name in chunks},
    }


def counterpart(base: Checkpoint, place: Place) -> Place | None:
    """Return where the base has the tensor of a row: in the file of that path, or in another."""
    there = base.places()
    if place in there:
        return place
    return next((other for other in there if other[1] == place[1]), None)


def number_of(value: Any, within: list[Any]) -> int:
    """Return the index of a value in a list, to which it is appended if it is missing."""
    if value not in within:
        within.append(value)
    return within.index(value)


def add_row(
    delta: Draft, place: Place, target: Tensor, source: Place | None, base: Checkpoint, how: Coding
) -> None:
    """Append a row with its chunks and digests."""
    structure, columns = delta.structure, delta.structure["tensors"]
    row, w = len(columns["names"]), target.width
    old = base.places()[source] if source else None
    columns["names"].append(place[1])
    layout = number_of(target.layout, structure["layouts"])
    columns["layouts"].append(layout)
    could_keep = kept = 0
    if source is None or old is None:
        columns["base_files"].append(-1)
    else:
        columns["base_files"].append(number_of(source[0], structure["base"]["files"]))
        if source[1] != place[1]:
            columns["base_names"].append([row, source[1]])
        base_layout = number_of(old.layout, structure["layouts"])
        if base_layout != layout:
            columns["base_layouts"].append([row, base_layout])
        if old.layout[:3] == target.layout[:3]:
            could_keep = min(len(old.data), len(target.data)) // w
        kept = could_keep if how.keep is None else how.keep
        if kept != could_keep:
            columns["keep"].append([row, kept])
        delta.digests["base"].append(old.digest())
    data = (old.data[: kept * w] if old else b"").ljust(len(target.data), b"\0")
    start = Tensor(target.dtype, target.shape, data, target.own)
    columns["n_chunks"].append(add_changes(delta, start, target, how))
    sizes = {kept * w, len(target.data), len(old.data) if old else -1}
    if len(sizes) > 1 or columns["n_chunks"][-1]:
        is_given = structure["target"]["digests"] or old is None
        delta.digests["target"] += [target.digest()] if is_given else []


def draft(
    base: Checkpoint,
    target: Checkpoint,
    codings: dict[str, Coding] | None = None,
    *,
    default: Coding | None = None,
    sources: dict[Place, Place | None] | None = None,
    carry: Sequence[str] | None = None,
    known: bool = True,
    base_id: str | None = None,
    notes: dict[str, Any] | None = None,
) -> Draft:
    """Return the delta from base to target.

    Args:
        base: where the delta starts; its side files are those that can be left with it.
        target: what it gives.
        codings: how tensors are coded, by name; the others as `default`.
        default: gaps and ulp unless given.
        sources: the base tensors of rows, None for none; by default those of `counterpart`.
        carry: the side files carried; those that the base lacks or has otherwise unless given.
        known: whether the target digests of tensors with a base are stored.
        base_id: where the base may be found.
        notes: free.
    """
    delta = Draft(empty_structure(), {}, {kind: [] for kind in DIGESTS}, notes or {})
    parts = delta.structure["target"]
    parts |= {"kind": target.kind, "digests": known}
    delta.structure["base"]["id"] = base_id
    for path in sorted(target.side_files, key=str.encode):
        content = target.side_files[path]
        carried = base.side_files.get(path) != content if carry is None else path in carry
        stored = smaller(content)
        parts["side_files"].append([path, len(content), len(stored) if carried else -1])
        delta.digests["side_files"].append(blake3(content).digest())
        if carried:
            delta.entries["file:" + path] = stored
    for file in target.weight_files:
        metadata = None if file.metadata is None else [[*pair] for pair in file.metadata.items()]
        member: list[Any] = ["canonical", metadata]
        if file.header is not None:
            delta.entries["header:" + file.path] = smaller(file.header)
            member = ["stored", len(file.header), len(delta.entries["header:" + file.path])]
        parts["weight_files"].append([file.path, len(file.tensors), member])
        delta.digests["headers"].append(blake3(file.own_header()).digest()[:16])
    parts["empty_folders"] += sorted(target.empty_folders, key=str.encode)
    used = set()
    for place, one in target.places().items():
        source = (sources or {}).get(place, counterpart(base, place))
        used.add(source)
        add_row(delta, place, one, source, base, (codings or {}).get(place[1], default or Coding()))
    delta.structure["base"]["n_unused"] = len(base.places().keys() - used)
    return delta


def same(value: Any) -> Any:
    """Return a value as it is."""
    return value


def chunk_digests(delta: Draft) -> list[bytes]:
    """Return the digests of the chunks, those that are None from the streams."""
    streams: dict[str, bytes] = {}
    for key, data in delta.entries.items():
        if key.startswith("chunk:"):
            i = key.split(":")[1]
            streams[i] = streams.get(i, b"") + data
    given = enumerate(delta.digests["chunks"])
    return [one or blake3(streams.get(str(i), b"")).digest()[:16] for i, one in given]


def assemble(
    delta: Draft,
    *,
    text: Callable[[bytes], bytes] = same,
    pack: Callable[[bytes], bytes] = smaller,
    sizes: Callable[[list[int]], list[int]] = same,
    manifest: Callable[[bytes], bytes] = same,
    header: Callable[[bytes], bytes] = same,
    whole: Callable[[bytes], bytes] = same,
) -> bytes:
    """Return the bytes of a delta; a hook may alter each stage, and later digests are true to it.

    Args:
        delta: what it holds.
        text: alters the JSON of the structure.
        pack: makes the stored bytes of structure and notes.
        sizes: alters the four sizes at the front of the manifest.
        manifest: alters the manifest.
        header: alters the header, its padding included.
        whole: alters the whole file.
    """
    raw = [text(compact(delta.structure))]
    raw.append(delta.notes if isinstance(delta.notes, bytes) else compact(delta.notes))
    stored = [pack(one) for one in raw]
    four = sizes([len(one) for pair in zip(raw, stored, strict=True) for one in pair])
    held = b"".join(size.to_bytes(4, "little") for size in four) + b"".join(stored)
    digests = delta.digests | {"chunks": chunk_digests(delta)}
    held = manifest(held + b"".join(one for kind in DIGESTS for one in digests[kind]))
    payload = b"".join(delta.entries.values())
    written = header(container_header(held, len(payload)))
    return whole(len(written).to_bytes(8, "little") + written + held + payload)


def container_header(manifest: bytes, n_payload: int, size: int | None = None) -> bytes:
    """Return the header of a delta (FORMAT §2), that states this size of the manifest."""
    m, p = len(manifest) if size is None else size, n_payload
    digest = blake3(manifest).hexdigest()
    meta = {"format": "sparsedelta", "format_version": "1", "manifest_digest": digest}
    entry = {"dtype": "U8", "shape": [m], "data_offsets": [0, m]}
    rest = {"dtype": "U8", "shape": [p], "data_offsets": [m, m + p]}
    text = compact({"__metadata__": meta, "manifest": entry, "payload": rest})
    return text + b" " * (-len(text) % 8)
