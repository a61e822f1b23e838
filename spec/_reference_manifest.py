"""The manifest for the reference decoder: every member checked as FORMAT §3 to §5 and §11 ask."""

from __future__ import annotations

import math
import re
import unicodedata
from dataclasses import dataclass, field
from typing import Any

from _reference_json import check, hexadecimal, integer, listed, members, one_of, parse_json, string

SPAN = 1 << 24  # elements of a chunk
# dtype: (bits per value, width in bytes, float order)
DTYPES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E8M0"), (8, 1, False)),
    **dict.fromkeys(("F8_E5M2", "F8_E4M3", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), (8, 1, True)),
    "F4": (4, 1, False),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), (6, 1, False)),
    **dict.fromkeys(("U16", "I16"), (16, 2, False)),
    **dict.fromkeys(("F16", "BF16"), (16, 2, True)),
    **dict.fromkeys(("U32", "I32"), (32, 4, False)),
    "F32": (32, 4, True),
    **dict.fromkeys(("U64", "I64", "C64"), (64, 8, False)),
    "F64": (64, 8, True),
}
RESERVED = {"CON", "PRN", "AUX", "NUL"} | {
    f"{name}{n}" for name in ("COM", "LPT") for n in range(10)
}


@dataclass
class Tensor:
    """A tensor of base or target, as a row tells it."""

    dtype: str
    shape: list[int]
    digest: bytes | None
    n_bytes: int


@dataclass
class Chunk:
    """Where and how one span is coded; `streams` are filled in by decoding."""

    number: int
    length: int
    nnz: int
    encoding: str
    sizes: list[int]
    packing: str
    stream_bytes: list[int]  # of all streams before compression
    streams: list[bytes] = field(default_factory=list)

    @property
    def needs_base(self) -> bool:
        """Whether the base's bits are needed to read it."""
        return self.encoding == "exponent" or self.packing == "exponent_steps"


@dataclass
class Row:
    """One tensor's way from base to target; `changes` is None for null."""

    name: str
    base: Tensor | None
    target: Tensor | None
    keep: int
    values: str
    touched: list[bytes] | None
    changes: list[Chunk] | None


@dataclass
class WeightFile:
    """A weight file of the target; decoding fills in a stored header."""

    path: str
    rows: list[Row]
    metadata: dict[str, str] | None
    is_stored: bool
    header: bytes = b""


@dataclass
class SideFile:
    """A side file of the target; decoding fills in what is carried."""

    path: str
    n_bytes: int
    digest: bytes
    is_carried: bool
    content: bytes = b""


@dataclass
class Delta:
    """What a manifest says."""

    kind: str
    base_fingerprint: bytes
    target_fingerprint: bytes | None
    weight_files: list[WeightFile]
    side_files: list[SideFile]
    empty_folders: list[str]
    rows: list[Row]
    payload_digest: bytes


def read_tensor(value: Any, digest_may_be_null: bool) -> Tensor | None:
    """Return the tensor of a row (§4), or None for null."""
    if value is None:
        return None
    dtype, shape, digest = members(value, "dtype shape digest")
    bits = DTYPES[one_of(dtype, DTYPES)][0] * math.prod(map(integer, listed(shape, 64)))
    check(bits < 1 << 63, "limit_exceeded", "a tensor of 2^63 bits or more")
    check(bits % 8 == 0, "corrupt", "a tensor is no whole number of bytes")
    known = None if digest is None and digest_may_be_null else hexadecimal(digest, 16)
    return Tensor(dtype, shape, known, bits // 8)


def read_chunk(value: Any, after: int, width: int, n_elements: int) -> Chunk:
    """Return one chunk of a tensor (§5), its number above `after`."""
    fields = listed(value)
    check(len(fields) in (5, 7), "corrupt", "a chunk is a list of five or seven")
    number, nnz, n = integer(fields[0]), integer(fields[1]), integer(fields[3])
    sizes = [integer(size) for size in listed(fields[4])]
    check(number > after, "corrupt", "chunks are not in ascending order")
    check(number * SPAN < n_elements, "corrupt", f"chunk {number} lies outside its tensor")
    length = min(SPAN, n_elements - number * SPAN)
    check(1 <= nnz <= length, "corrupt", f"{nnz} positions in a span of {length}")
    encoding = one_of(fields[2], ("gap8", "gap16", "bitmap", "all", "exponent", "tiles", "rice"))
    possible = {
        "gap8": nnz <= n <= nnz + length // 255,
        "gap16": n % 2 == 0 and nnz <= n // 2 <= nnz + length // 65535,
        "bitmap": n == (length + 7) // 8,
        "all": n == 0 and nnz == length,
        "exponent": 3 <= n <= length // 4 + 32768,
        "tiles": 8 <= n <= length // 4 + 32768,
        "rice": 1 <= n <= length // 4 + 32768,
    }
    check(possible[encoding], "corrupt", f"{encoding} stream of {n} bytes cannot be")
    packing, stated = "planes", 0
    if len(fields) == 7:
        packing = one_of(fields[5], ("steps", "scaled", "exponent_steps"))
        stated = integer(fields[6])
    streams, fair = {
        "planes": ([n] + [nnz] * width, True),
        "scaled": ([n, nnz, stated], stated <= min(width, 4) * nnz),
    }.get(packing, ([n, stated], 4 <= stated <= (width + 1) * nnz + 32768))
    check(fair, "corrupt", f"{packing} of {stated} bytes cannot be")
    check(len(sizes) == len(streams), "corrupt", f"not {len(streams)} coded sizes")
    for i, (size, n_bytes) in enumerate(zip(sizes, streams, strict=True)):
        may_be_left_out = i > 0 and packing == "planes"
        fair = (size == 0) == (n_bytes == 0) or (may_be_left_out and size == 0)
        check(fair, "corrupt", "a stream wrongly left out or stored")
    return Chunk(number, length, nnz, encoding, sizes, packing, streams)


def read_row(value: Any, target_known: bool) -> Row:
    """Return one row, checked by itself (§4)."""
    name, base_value, target_value, delta = members(value, "name base target delta")
    n_name = len(string(name).encode())
    check(n_name <= 65535, "limit_exceeded", "a tensor name above 65 535 bytes")
    check(name != "__metadata__", "corrupt", "no tensor can be named __metadata__")
    base, target = read_tensor(base_value, False), read_tensor(target_value, True)
    check(base is not None or target is not None, "corrupt", f"row {name!r:.40} holds no tensor")
    same = base and target and base == target
    due = target is not None and not same
    check((delta is not None) == due, "corrupt", f"row {name!r:.40}: delta wrongly there or not")
    if delta is None or target is None:
        return Row(name, base, target, 0, "", None, None)
    check((target.digest is not None) == target_known, "corrupt", "target digest and fingerprint")
    keep, values, touched, chunks = members(delta, "keep values touched chunks")
    width = DTYPES[target.dtype][1]
    may_keep = 0
    if base is not None and base.dtype == target.dtype:
        may_keep = min(base.n_bytes, target.n_bytes) // width
    check(integer(keep) <= may_keep, "corrupt", f"keep is {keep}, at most {may_keep}")
    one_of(values, ("ulp", "target"))
    if touched is not None:
        touched = [hexadecimal(digest, 8) for digest in listed(touched)]
        check(len(touched) == 2, "corrupt", "touched is a list of two")
    changes: list[Chunk] = []
    for chunk in listed(chunks):
        after = changes[-1].number if changes else -1
        changes.append(read_chunk(chunk, after, width, target.n_bytes // width))
    return Row(name, base, target, keep, values, touched, changes)


def check_paths(paths: list[str]) -> None:
    """Refuse paths that break §3.4."""
    for path in paths:
        plain = not re.search(r'[\x00-\x1f\x7f\\:*?"<>|]', path) and len(path.encode()) <= 4096
        check(plain, "corrupt", f"path {path!r:.60}")
        check(path.count("/") < 64, "limit_exceeded", f"components of path {path!r:.60}")
        for part in path.split("/"):
            fair = part not in ("", ".", "..") and len(part.encode()) <= 255
            fair = fair and not part.endswith((".", " ")) and part.lower() != ".git"
            fair = fair and part.split(".")[0].upper() not in RESERVED
            check(fair, "corrupt", f"path {path!r:.60}")
    folded = {fold(path) for path in paths}
    check(len(folded) == len(paths), "corrupt", "a path occurs twice")
    above = {path[:i] for path in folded for i, letter in enumerate(path) if letter == "/"}
    check(above.isdisjoint(folded), "corrupt", "a path is a leading part of another")


def fold(path: str) -> str:
    """Return a path as it is compared with others."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", path).casefold())


def in_order(names: list[str]) -> bool:
    """Return whether names ascend as bytes."""
    return names == sorted(names, key=str.encode)


def read_weight_files(value: Any, placed: list[Row]) -> list[WeightFile]:
    """Return the weight files; `placed` are the rows with a target, which they share out."""
    files, n_placed = [], 0
    for item in listed(value, 1 << 16):
        path, n_tensors, header, metadata = members(item, "path n_tensors header metadata")
        is_stored = one_of(header, ("canonical", "stored")) == "stored"
        fair = metadata is None or (type(metadata) is dict and not is_stored)
        check(fair, "corrupt", "metadata of a weight file")
        for text in (metadata or {}).values():
            string(text)
        rows = placed[n_placed : n_placed + integer(n_tensors)]
        check(len(rows) == n_tensors, "corrupt", "n_tensors add up to more than the rows")
        n_placed += n_tensors
        files.append(WeightFile(string(path), rows, metadata, is_stored))
    check(n_placed == len(placed), "corrupt", "n_tensors add up to less than the rows")
    return files


def read_side_file(value: Any) -> SideFile:
    """Return one side file."""
    path, n_bytes, digest, is_carried = members(value, "path n_bytes digest carried")
    check(type(is_carried) is bool, "corrupt", "carried is no boolean")
    fair = integer(n_bytes) <= 1 << 27 or not is_carried
    check(fair, "limit_exceeded", f"a carried file of {n_bytes} bytes")
    return SideFile(string(path), n_bytes, hexadecimal(digest, 32), is_carried)


def read_manifest(raw: bytes) -> Delta:
    """Return what the JSON of a manifest says (§3.3)."""
    top = parse_json(raw, "corrupt")
    base, target, tensors, info, payload = members(top, "base target tensors info payload_digest")
    base_id, base_fingerprint = members(base, "id fingerprint")
    check(base_id is None or type(base_id) is str, "corrupt", "base.id is no string")
    check(type(info) is dict, "corrupt", "info is no object")
    parts = members(target, "kind fingerprint weight_files side_files empty_folders")
    kind, fingerprint = one_of(parts[0], ("folder", "file")), parts[1]

    rows = [read_row(row, fingerprint is not None) for row in listed(tensors, 1 << 20)]
    check(len({row.name for row in rows}) == len(rows), "corrupt", "a name occurs twice")
    placed = [row for row in rows if row.target is not None]
    removed = rows[len(placed) :]
    fair = all(row.target is None for row in removed) and in_order([row.name for row in removed])
    check(fair, "corrupt", "rows are out of order")

    weight_files = read_weight_files(parts[2], placed)
    side_files = [read_side_file(item) for item in listed(parts[3], 1 << 16)]
    empty_folders = [string(path) for path in listed(parts[4], 1 << 16)]
    weights, sides = [file.path for file in weight_files], [file.path for file in side_files]
    check_paths(weights + sides + empty_folders)
    check(in_order(sides) and in_order(empty_folders), "corrupt", "paths are not sorted")
    alone = len(weights) == 1 and "/" not in weights[0] and not sides and not empty_folders
    check(kind == "folder" or alone, "corrupt", "a target of kind file is one file")
    named = all(path.endswith(".safetensors") for path in weights)
    named = named and not any(path.endswith(".safetensors") for path in sides)
    check(kind == "file" or named, "corrupt", "the suffix of a weight or side file")
    return Delta(
        kind,
        hexadecimal(base_fingerprint, 32),
        None if fingerprint is None else hexadecimal(fingerprint, 32),
        weight_files,
        side_files,
        empty_folders,
        rows,
        hexadecimal(payload, 32),
    )
