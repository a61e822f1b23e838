"""Read the structure of a manifest and check all its rules, for the reference decoder (FORMAT §3 to §5)."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate, islice, pairwise
from typing import Any
from unicodedata import normalize

from _reference_json import Refused, check, compact

# dtype: (bits per value, element type)
DTYPES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E8M0"), (8, "i1")),
    **dict.fromkeys(("F8_E5M2", "F8_E4M3", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), (8, "f1")),
    "F4": (4, "i1"),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), (6, "i1")),
    **dict.fromkeys(("U16", "I16"), (16, "i2")),
    **dict.fromkeys(("F16", "BF16"), (16, "f2")),
    **dict.fromkeys(("U32", "I32"), (32, "i4")),
    "F32": (32, "f4"),
    **dict.fromkeys(("U64", "I64", "C64"), (64, "i8")),
    "F64": (64, "f8"),
}
ELEMENTS = {f"{order}{width}" for order in "if" for width in (1, 2, 4, 8)}
RESERVED = {"CON", "PRN", "AUX", "NUL"} | {f"{a}{n}" for a in ("COM", "LPT") for n in range(10)}


@dataclass
class Layout:
    """Dtype, element type and shape of a tensor."""

    dtype: str
    bits: int
    element: str
    shape: list[int]

    @property
    def n_bits(self) -> int:
        """The size in bits."""
        return self.bits * math.prod(self.shape)

    @property
    def width(self) -> int:
        """The size of an element in bytes."""
        return int(self.element[1])

    @property
    def n_elements(self) -> int:
        """The number of elements."""
        return self.n_bits // 8 // self.width


@dataclass
class Chunk:
    """A chunk of a row (§5). Decoding fills in `streams`, `digest` and `touched`."""

    start: int
    span: int
    nnz: int
    coding: tuple[str, str, str, int]  # values, index, packing, classes
    has_touched: int
    raw: list[int] = field(default_factory=list)
    stored: list[int] = field(default_factory=list)
    streams: list[bytes] = field(default_factory=list)
    digest: bytes = b""
    touched: bytes | None = None


@dataclass
class Row:
    """A tensor of the target (§4).

    Without a base tensor, `base_file` is None, and `base_name` and `base_layout` are the row's own.
    """

    file: str
    name: str
    layout: Layout
    base_file: str | None
    base_name: str
    base_layout: Layout
    keep: int
    chunks: list[Chunk]
    base_digest: bytes = b""
    target_digest: bytes | None = None

    @property
    def is_copied(self) -> bool:
        """Whether the target tensor equals its base tensor (§4)."""
        sizes = {self.keep, self.layout.n_elements, self.base_layout.n_elements}
        return self.base_file is not None and not self.chunks and len(sizes) == 1


@dataclass
class WeightFile:
    """A weight file of the target; `stored` is the raw and the stored size of a stored header."""

    path: str
    rows: list[Row]
    metadata: list[list[str]] | None
    stored: tuple[int, int] | None
    digest: bytes = b""
    header: bytes = b""


@dataclass
class SideFile:
    """A side file of the target; `stored` is −1 if it is the base's."""

    path: str
    n_bytes: int
    stored: int
    digest: bytes = b""
    content: bytes = b""


@dataclass
class Delta:
    """The content of a structure; decoding adds streams, headers and digests."""

    kind: str
    has_target_digests: bool
    weight_files: list[WeightFile]
    side_files: list[SideFile]
    empty_folders: list[str]
    rows: list[Row]

    @property
    def chunks(self) -> list[Chunk]:
        """All chunks in order."""
        return [chunk for row in self.rows for chunk in row.chunks]


def header_member(value: Any) -> bool:
    """Return whether a value is a header of a weight file (§3.2).

    A header of an unknown kind is accepted here and refused later as an unsupported feature.
    """
    known: dict[str, tuple[Any, ...]] = {"stored": (str, int, int)}
    known["canonical"] = (str, lambda m: m is None or fits(m, [(str, str)]))
    kind = value[0] if type(value) is list and value else None
    return type(kind) is str and (kind not in known or fits(value, known[kind]))


STRUCTURE = {
    "requires": [str],
    "base": {"id": {None, str}, "n_unused": int, "files": [str]},
    "target": {
        "kind": str,
        "digests": bool,
        "weight_files": [(str, int, header_member)],
        "side_files": [(str, int, {-1, int})],
        "empty_folders": [str],
    },
    "layouts": [(str, int, str, [int])],
    "tensors": {
        "names": [str],
        "layouts": [int],
        "base_files": [{-1, int}],
        "base_names": [(int, str)],
        "base_layouts": [(int, int)],
        "keep": [(int, int)],
        "n_chunks": [int],
    },
    "codings": [(str, str, str, {0, 1})],
    "chunks": {
        "starts": [int],
        "spans": [int],
        "nnz": [int],
        "codings": [int],
        "touched": [{0, 1}],
        "raw": [int],
        "stored": [int],
    },
}


def fits(value: Any, template: Any) -> bool:
    """Return whether a value matches a template.

    `int` matches 0 to 2^63 - 1, `str` and `bool` any string and boolean. None and integers match
    themselves. A set matches what one of its members matches. A function matches what it accepts. A dict
    matches an object with the same members in the same order. A list matches a list of any length whose
    items all match its one item. A tuple matches a list of the same length, item by item.
    """
    if template is int:
        return type(value) is int and 0 <= value < 1 << 63
    if template in (str, bool):
        return type(value) is template
    if template is None or isinstance(template, int):
        return type(value) is type(template) and value == template
    if isinstance(template, set):
        return any(fits(value, one) for one in template)
    if isinstance(template, dict):
        return (
            type(value) is dict
            and list(value) == list(template)
            and all(fits(value[name], template[name]) for name in template)
        )
    if isinstance(template, list):
        return type(value) is list and all(fits(item, template[0]) for item in value)
    if isinstance(template, tuple):
        return (
            type(value) is list and len(value) == len(template) and all(map(fits, value, template))
        )
    return bool(template(value))


def parse(raw: bytes) -> dict[str, Any]:
    """Return the JSON value of a structure; its spelling, members and types are checked (§3.1)."""
    try:
        value = json.loads(raw)
        spelled = compact(value)
    except (ValueError, RecursionError) as error:
        raise Refused("corrupt", f"the structure is not JSON: {error}") from error
    check(spelled == raw, "corrupt", "the structure is not compact JSON")
    check(fits(value, STRUCTURE), "corrupt", "the structure has wrong members or types")
    return dict(value)


def read_layouts(items: list[list[Any]]) -> list[Layout]:
    """Return the layouts (§1.1)."""
    out = [Layout(*item) for item in items]
    for layout in out:
        known = layout.element in ELEMENTS
        check(known, "unsupported_feature", f"element type {layout.element!r:.20}")
        named = (layout.bits, layout.element)
        valid = DTYPES.get(layout.dtype, named) == named
        check(valid, "corrupt", f"bits or element type of {layout.dtype!r:.40}")
        valid = len(layout.dtype.encode()) <= 64
        check(valid, "limit_exceeded", f"dtype {layout.dtype!r:.40} is too long")
        check(layout.bits <= 1024, "limit_exceeded", f"{layout.bits} bits per value")
        check(len(layout.shape) <= 64, "limit_exceeded", f"{len(layout.shape)} dimensions")
        check(layout.n_bits < 1 << 63, "limit_exceeded", "a tensor of 2^63 bits or more")
        whole = layout.n_bits % (8 * layout.width) == 0
        check(whole, "corrupt", "a tensor is not a whole number of elements")
    return out


def check_paths(paths: list[str]) -> None:
    """Check each path by the rules of §3.4 that concern one path."""
    for path in paths:
        parts = path.split("/")
        valid = len(parts) <= 64 and len(path.encode()) <= 4096
        check(valid, "corrupt", f"length of path {path!r:.60}")
        check(not re.search(r'[\x00-\x1f\x7f\\:*?"<>|]', path), "corrupt", f"path {path!r:.60}")
        for part in parts:
            check(0 < len(part.encode()) <= 255, "corrupt", f"path {path!r:.60}")
            check(not part.endswith((".", " ")), "corrupt", f"path {path!r:.60}")
            reserved = part.lower() == ".git" or part.split(".")[0].upper() in RESERVED
            check(not reserved, "corrupt", f"path {path!r:.60}")


def check_apart(paths: list[str]) -> None:
    """Check that no two paths of the target are equal, and none is a parent folder of another (§3.4)."""
    folded = [normalize("NFC", normalize("NFC", path).casefold()) for path in paths]
    check(len(set(folded)) == len(folded), "corrupt", "a path occurs twice")
    parents = {path[:i] for path in folded for i, letter in enumerate(path) if letter == "/"}
    check(parents.isdisjoint(folded), "corrupt", "a path is a parent folder of another")


def read_target(target: dict[str, Any], rows: list[Row]) -> Delta:
    """Return the target with its files; each row is assigned to its weight file (§3.1, §3.2)."""
    kind, digests, weights, sides, folders = target.values()
    weight_files = []
    left = iter(rows)
    known = kind in ("folder", "file")
    check(known, "unsupported_feature", f"kind {kind!r:.40}")
    for path, n, (header, *members) in weights:
        known = header in ("canonical", "stored")
        check(known, "unsupported_feature", f"header {header!r:.40}")
        stored = (members[0], members[1]) if header == "stored" else None
        metadata = None if stored else members[0]
        keys = [key for key, _ in metadata or []]
        check(len(set(keys)) == len(keys), "corrupt", f"metadata of {path!r:.40}")
        valid = not stored or stored[0] <= 1 << 27
        check(valid, "limit_exceeded", f"header of {path!r:.40}")
        mine = list(islice(left, n))
        for row in mine:
            row.file = path
        names = {row.name for row in mine}
        check(len(names) == n, "corrupt", f"names of {path!r:.40}")
        weight_files.append(WeightFile(path, mine, metadata, stored))
    side_files = [SideFile(*side) for side in sides]
    for side in side_files:
        valid = side.stored < 0 or side.n_bytes <= 1 << 27
        check(valid, "limit_exceeded", f"carried file of {side.n_bytes} bytes")
    weight_paths = [file.path for file in weight_files]
    side_paths = [file.path for file in side_files]
    check_paths(weight_paths + side_paths + folders)
    check_apart(weight_paths + side_paths + folders)
    for paths in (side_paths, folders):
        check(paths == sorted(paths, key=str.encode), "corrupt", "paths are not sorted")
    if kind == "file":
        one_name = len(weight_paths) == 1 and "/" not in weight_paths[0]
        valid = one_name and not sides and not folders
        check(valid, "corrupt", "a target of kind file must be one file")
    else:
        valid = all(path.endswith(".safetensors") for path in weight_paths)
        check(valid, "corrupt", "a weight file does not end in .safetensors")
    valid = not any(path.endswith(".safetensors") for path in side_paths)
    check(valid, "corrupt", "a side file ends in .safetensors")
    return Delta(kind, digests, weight_files, side_files, folders, rows)


def pairs_by_row(pairs: list[tuple[int, Any]], base_files: list[int]) -> dict[int, Any]:
    """Return a list of pairs `[row, value]` as a dict (§4)."""
    valid = all(a[0] < b[0] for a, b in pairwise(pairs))
    check(valid, "corrupt", "pairs do not ascend by row")
    valid = all(row < len(base_files) and base_files[row] >= 0 for row, _ in pairs)
    check(valid, "corrupt", "a pair names a row without a base")
    return dict(pairs)


def read_rows(tensors: dict[str, Any], files: list[str], layouts: list[Layout]) -> list[Row]:
    """Return the rows; their weight files and chunks are not set yet (§4)."""
    names, own, base_files, *pairs, n_chunks = tensors.values()
    check(len(names) <= 1 << 19, "limit_exceeded", f"{len(names)} rows")
    sizes = {len(names), len(own), len(base_files), len(n_chunks)}
    check(len(sizes) == 1, "corrupt", "columns of rows differ in length")
    base_names, base_layouts, keep = (pairs_by_row(column, base_files) for column in pairs)
    every = own + list(base_layouts.values())
    check(all(index < len(layouts) for index in every), "corrupt", "the index of a layout")
    check(all(index < len(files) for index in base_files), "corrupt", "the index of a base file")
    differs = [name != names[row] for row, name in base_names.items()]
    differs += [index != own[row] for row, index in base_layouts.items()]
    check(all(differs), "corrupt", "a pair repeats the name or layout of its row")
    for name in names + list(base_names.values()):
        check(len(name.encode()) <= 1024, "limit_exceeded", "a name is longer than 1024 bytes")
    check("__metadata__" not in names, "corrupt", "a tensor named __metadata__")
    out = []
    for i, name in enumerate(names):
        layout, base = layouts[own[i]], layouts[base_layouts.get(i, own[i])]
        kinds = {(one.dtype, one.bits, one.element) for one in (layout, base)}
        may_keep = min(layout.n_elements, base.n_elements) if len(kinds) == 1 else 0
        may_keep = may_keep if base_files[i] >= 0 else 0
        check(i not in keep or keep[i] < may_keep, "corrupt", f"keep of {name!r:.40}")
        file = files[base_files[i]] if base_files[i] >= 0 else None
        kept = keep.get(i, may_keep)
        out.append(Row("", name, layout, file, base_names.get(i, name), base, kept, []))
    valid = sum(row.layout.n_bits for row in out) < 1 << 63
    check(valid, "limit_exceeded", "tensors of 2^63 bits or more")
    return out


def read_codings(codings: list[list[Any]]) -> None:
    """Check that all codings are those of version 1 (§5)."""
    for values, index, packing, classes in codings:
        known = values in ("target", "ulp") and packing in ("planes", "steps", "scaled")
        known = known and index in ("gaps", "bitmap", "rice", "tiles")
        check(known, "unsupported_feature", f"coding {[values, index, packing]!r:.60}")
        valid = not classes or index == "rice" or packing == "steps"
        check(valid, "corrupt", "classes without rice or steps")


def stream_sizes(chunk: Chunk, width: int, raw: Iterator[int]) -> None:
    """Set the raw sizes of a chunk's streams; stated sizes are taken from `raw` (§6, §7)."""

    def stated(low: int, high: int) -> int:
        size = next(raw, -1)
        check(low <= size <= high, "corrupt", "a raw size is missing or not possible")
        return size

    span, nnz = chunk.span, chunk.nnz
    if chunk.coding[1] == "bitmap":
        chunk.raw = [(span + 7) // 8]
    elif chunk.coding[1] == "gaps":
        chunk.raw = [stated(nnz, nnz + span // 255)]
    else:
        chunk.raw = [stated(2 if chunk.coding[1] == "rice" else 8, span // 4 + 32768)]
    if chunk.coding[2] == "planes":
        chunk.raw += [nnz] * width
    elif chunk.coding[2] == "steps":
        chunk.raw += [stated(4, (width + 1) * nnz + 32768)]
    else:
        chunk.raw += [nnz, stated(0, min(width, 4) * nnz)]


def read_chunks(columns: dict[str, Any], codings: list[Any], n_chunks: list[int]) -> list[Chunk]:
    """Return the chunks; the sizes of their streams are not set yet (§5)."""
    each = list(columns.values())[:5]  # the columns with one entry a chunk
    check(sum(n_chunks) <= 1 << 20, "limit_exceeded", f"{sum(n_chunks)} chunks")
    valid = {len(column) for column in each} == {sum(n_chunks)}
    check(valid, "corrupt", "columns of chunks differ in length")
    check(all(index < len(codings) for index in each[3]), "corrupt", "the index of a coding")
    return [
        Chunk(start, span, nnz, tuple(codings[index]), touched)
        for start, span, nnz, index, touched in zip(*each, strict=True)
    ]


def place_chunks(rows: list[Row], raw: Iterator[int], stored: Iterator[int]) -> None:
    """Check the position of each chunk in its row, and set the sizes of its streams (§5)."""
    for row in rows:
        end = 0
        for chunk in row.chunks:
            valid = 1 <= chunk.nnz <= chunk.span <= 1 << 24
            check(valid, "corrupt", f"nnz or span of a chunk of {row.name!r:.40}")
            check(chunk.start >= end, "corrupt", f"order of chunks of {row.name!r:.40}")
            end = chunk.start + chunk.span
            check(end <= row.layout.n_elements, "corrupt", f"a chunk beyond {row.name!r:.40}")
            stream_sizes(chunk, row.layout.width, raw)
            chunk.stored = list(islice(stored, len(chunk.raw)))
            valid = len(chunk.stored) == len(chunk.raw)
            check(valid, "corrupt", "stored sizes are missing")
    check(not [*raw, *stored], "corrupt", "there are more sizes than streams")


def read_structure(text: bytes) -> Delta:
    """Return the content of a structure (§3.1)."""
    value = parse(text)
    requires, base, target, layouts, tensors, codings, chunk_columns = value.values()
    check(not requires, "unsupported_feature", f"requires {requires!r:.60}")
    for items in (target["weight_files"], target["side_files"], base["files"]):
        check(len(items) <= 1 << 16, "limit_exceeded", f"{len(items)} files")
    check(len(target["empty_folders"]) <= 1 << 12, "limit_exceeded", "too many empty folders")
    check_paths(base["files"])
    rows = read_rows(tensors, base["files"], read_layouts(layouts))
    n_rows = sum(n for _, n, _ in target["weight_files"])
    check(n_rows == len(rows), "corrupt", "rows and weight files disagree")
    delta = read_target(target, rows)
    read_codings(codings)
    chunks = read_chunks(chunk_columns, codings, tensors["n_chunks"])
    ends = accumulate(tensors["n_chunks"])
    for row, n, end in zip(rows, tensors["n_chunks"], ends, strict=True):
        row.chunks = chunks[end - n : end]
    place_chunks(rows, iter(chunk_columns["raw"]), iter(chunk_columns["stored"]))
    valid = delta.has_target_digests or all(chunk.has_touched for chunk in chunks)
    check(valid, "corrupt", "there are neither target digests nor touched digests for a chunk")
    return delta
