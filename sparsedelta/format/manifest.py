"""The manifest as records and as bytes (FORMAT §3–§5 and §9).

Reading checks everything that needs neither payload nor base. Its time and memory grow at most linearly
with the size of the manifest: each row, chunk and side file has digests, and digests are not compressed.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sparsedelta._typing import JSON
from sparsedelta.codecs.chunk import Chunk, Coding
from sparsedelta.codecs.indices import INDEX_ENCODINGS
from sparsedelta.codecs.packings import VALUE_PACKINGS
from sparsedelta.codecs.values import VALUE_ENCODINGS
from sparsedelta.codecs.zstd import check_expansion, compress_text, decompress
from sparsedelta.dtypes import DType, check_dtype, tensor_bytes
from sparsedelta.errors import Corrupt, LimitExceeded, UnsupportedFeature
from sparsedelta.format.columns import Rows
from sparsedelta.format.paths import WEIGHT_SUFFIX, check_path, check_paths
from sparsedelta.format.read_columns import (
    CHUNKS,
    MAX_CHUNKS,
    MAX_NAME_BYTES,
    MAX_ROWS,
    TENSORS,
    read_columns,
)
from sparsedelta.format.records import (
    DIGEST_BYTES,
    FILE_DIGEST_BYTES,
    Base,
    Row,
    SideFile,
    Stored,
    Target,
    TensorSpec,
    WeightFile,
    default_keep,
)
from sparsedelta.format.safetensors_header import MAX_DIMENSIONS
from sparsedelta.format.strict_json import compact_json, fixed_items, items, parse_json
from sparsedelta.format.structure import DigestReader, at_most, integers, objects, strings

MAX_MANIFEST_BYTES = 1 << 27
MAX_STRUCTURE_RATIO, MAX_STRUCTURE_EXTRA = 4, 1 << 19
_VALUES_EXTRA = 1 << 16
MAX_NOTES_BYTES = 1 << 20
MAX_CARRIED_BYTES = 1 << 27
MAX_FILES = 1 << 16
MAX_EMPTY_FOLDERS = 1 << 12
_SIZES_BYTES = 16

_STRUCTURE = ("requires", "base", "target", "layouts", "tensors", "codings", "chunks")
_BASE = ("id", "n_unused", "files")
_TARGET = ("kind", "digests", "weight_files", "side_files", "empty_folders")


@dataclass(frozen=True, slots=True)
class Manifest:
    """The content of a manifest: a delta without its payload; attributes as in ``Delta``."""

    base: Base
    target: Target
    tensors: Sequence[Row]
    info: Mapping[str, JSON]

    @property
    def target_digests(self) -> bool:
        """Whether the digests of all target tensors are known."""
        return all(row.target.digest is not None for row in self.tensors)

    def stored(self) -> Iterator[Stored | Chunk]:
        """Yield the record of each part of the payload, in the order of the payload (FORMAT §5)."""
        yield from (file.stored for file in self.target.side_files if file.stored)
        yield from (file.stored for file in self.target.weight_files if file.stored)
        for row in self.tensors:
            yield from row.chunks


# ---- writing


def render_manifest(manifest: Manifest) -> bytes:
    """Return the bytes of a manifest.

    Raises:
        LimitExceeded: it exceeds a limit of FORMAT §11.
    """
    _check_limits(manifest)
    structure = compact_json(_structure(manifest))
    notes = compact_json({"info": dict(manifest.info)})
    at_most(len(notes), MAX_NOTES_BYTES, "bytes of notes (info)")
    digests = b"".join(_digests(manifest))
    stored, stored_notes = compress_text(structure), compress_text(notes)
    n_bytes = _SIZES_BYTES + len(stored) + len(stored_notes) + len(digests)
    if _structure_problem(structure, n_bytes):
        stored = structure  # uncompressed, it makes the manifest large enough for these limits
    sizes = (len(structure), len(stored), len(notes), len(stored_notes))
    head = b"".join(size.to_bytes(4, "little") for size in sizes)
    result = head + stored + stored_notes + digests
    at_most(len(result), MAX_MANIFEST_BYTES, "bytes of manifest")
    return result


def _check_limits(manifest: Manifest) -> None:
    target = manifest.target
    at_most(len(manifest.tensors), MAX_ROWS, "tensors")
    at_most(sum(len(row.chunks) for row in manifest.tensors), MAX_CHUNKS, "chunks")
    at_most(len(target.weight_files), MAX_FILES, "weight files")
    at_most(len(target.side_files), MAX_FILES, "side files")
    at_most(len(target.empty_folders), MAX_EMPTY_FOLDERS, "empty folders")
    for row in manifest.tensors:
        for name in (row.name, row.base.name if row.base else ""):
            at_most(len(name.encode("utf-8")), MAX_NAME_BYTES, f"bytes of the name {name[:80]!r}")


def _structure(manifest: Manifest) -> dict[str, JSON]:
    layouts: dict[tuple[DType, tuple[int, ...]], int] = {}
    codings: dict[Coding, int] = {}
    base_files: dict[str, int] = {}
    tensors: dict[str, list[Any]] = {name: [] for name in TENSORS}
    chunks: dict[str, list[Any]] = {name: [] for name in CHUNKS}

    def layout(spec: TensorSpec) -> int:
        return layouts.setdefault((spec.dtype, spec.shape), len(layouts))

    for number, row in enumerate(manifest.tensors):
        own, base = layout(row.target), row.base
        tensors["names"].append(row.name)
        tensors["layouts"].append(own)
        tensors["n_chunks"].append(len(row.chunks))
        if base is None:
            tensors["base_files"].append(-1)
        else:
            tensors["base_files"].append(base_files.setdefault(base.file, len(base_files)))
            if base.name != row.name:
                tensors["base_names"].append([number, base.name])
            if layout(base.spec) != own:
                tensors["base_layouts"].append([number, layout(base.spec)])
            if row.keep != default_keep(base.spec, row.target):
                tensors["keep"].append([number, row.keep])
        for chunk in row.chunks:
            chunks["starts"].append(chunk.start)
            chunks["spans"].append(chunk.span)
            chunks["nnz"].append(chunk.nnz)
            chunks["codings"].append(codings.setdefault(chunk.coding, len(codings)))
            chunks["touched"].append(int(chunk.touched is not None))
            chunks["raw"] += chunk.raw
            chunks["stored"] += chunk.stored
    target = manifest.target
    counts = {file.path: 0 for file in target.weight_files}
    for row in manifest.tensors:
        counts[row.file] += 1
    return {
        "requires": [],
        "base": {
            "id": manifest.base.id,
            "n_unused": manifest.base.n_unused,
            "files": [*base_files],
        },
        "target": {
            "kind": "folder" if target.is_folder else "file",
            "digests": manifest.target_digests,
            "weight_files": [
                [file.path, counts[file.path], _header_json(file)] for file in target.weight_files
            ],
            "side_files": [
                [file.path, file.n_bytes, file.stored.stored_bytes if file.stored else -1]
                for file in target.side_files
            ],
            "empty_folders": list(target.empty_folders),
        },
        "layouts": [
            [dtype.name, dtype.bits, dtype.element, list(shape)] for dtype, shape in layouts
        ],
        "tensors": {**tensors},
        "codings": [[c.values, c.index, c.packing, int(c.classes)] for c in codings],
        "chunks": {**chunks},
    }


def _header_json(file: WeightFile) -> list[JSON]:
    if file.stored:
        return ["stored", file.stored.n_bytes, file.stored.stored_bytes]
    pairs = file.metadata
    return ["canonical", None if pairs is None else [[key, pairs[key]] for key in pairs]]


def _digests(manifest: Manifest) -> Iterator[bytes]:
    rows = manifest.tensors
    yield from (file.digest for file in manifest.target.weight_files)
    yield from (file.digest for file in manifest.target.side_files)
    yield from (row.base.spec.digest or b"" for row in rows if row.base)
    known = manifest.target_digests
    yield from (
        row.target.digest or b""
        for row in rows
        if row.base is None or (known and not row.is_copied)
    )
    chunks = [chunk for row in rows for chunk in row.chunks]
    yield from (chunk.digest for chunk in chunks)
    yield from (digest for chunk in chunks if chunk.touched for digest in chunk.touched)


# ---- reading


def parse_manifest(raw: bytes, payload_bytes: int) -> Manifest:
    """Return the checked content of a manifest.

    Args:
        raw: the bytes of the manifest.
        payload_bytes: size of the payload that follows it.

    Raises:
        FormatError: it breaks a rule of FORMAT §12.
    """
    structure, notes, digests = _split(raw)
    parsed = _parse_structure(structure)
    requires, base, target, layouts, tensors, codings, chunks = objects(
        parsed, "structure", _STRUCTURE
    )
    strings(requires, "requires")
    if requires:
        raise UnsupportedFeature(
            f"the delta requires the feature {requires[0][:80]!r}, which this release does not know; a"
            " newer sparsedelta may read it"
        )
    reader = DigestReader(digests)
    base_id, n_unused, base_files = objects(base, "base", _BASE)
    if base_id is not None and type(base_id) is not str:
        raise Corrupt("base.id is neither null nor a string")
    integers([n_unused], "base.n_unused")
    strings(base_files, "base.files", MAX_FILES)
    for path in base_files:
        check_path(path)
    files, counts, known, offset = _parse_target(target, reader)
    known_layouts = [_layout(value) for value in items(layouts, "layouts")]
    known_codings = [_coding(value) for value in items(codings, "codings")]
    columns = read_columns(
        files,
        counts,
        base_files,
        known_layouts,
        known_codings,
        tensors,
        chunks,
        reader,
        known=known,
        offset=offset,
        payload_bytes=payload_bytes,
    )
    reader.finish()
    return Manifest(Base(base_id, n_unused), files, Rows(columns), _info(notes))


def _split(raw: bytes) -> tuple[bytes, bytes, bytes]:
    """Return structure, notes and digests of a manifest."""
    if len(raw) < _SIZES_BYTES:
        raise Corrupt(f"the manifest has {len(raw)} bytes, expected at least {_SIZES_BYTES}")
    sizes = [int.from_bytes(raw[at : at + 4], "little") for at in range(0, _SIZES_BYTES, 4)]
    n_structure, stored_structure, n_notes, stored_notes = sizes
    at_most(n_structure, _max_structure(len(raw)), "bytes of structure")
    at_most(n_notes, MAX_NOTES_BYTES, "bytes of notes")
    texts, at = [], _SIZES_BYTES
    for n_bytes, stored in ((n_structure, stored_structure), (n_notes, stored_notes)):
        coded = raw[at : at + stored]
        at += stored
        if len(coded) != stored:
            raise Corrupt("the manifest ends within its structure or notes")
        texts.append(_read_stream(coded, n_bytes))
    problem = _structure_problem(texts[0], len(raw))
    if problem:
        raise LimitExceeded(problem)
    return texts[0], texts[1], raw[at:]


def _max_structure(manifest_bytes: int) -> int:
    return MAX_STRUCTURE_RATIO * manifest_bytes + MAX_STRUCTURE_EXTRA


def _structure_problem(structure: bytes, manifest_bytes: int) -> str | None:
    """Return why a structure is too large for a manifest of that size; None if it is not.

    The cost of parsing grows with the length and with the number of values. The number of commas and
    opening brackets bounds the number of values.
    """
    most_bytes = _max_structure(manifest_bytes)
    if len(structure) > most_bytes:
        return (
            f"a manifest of {manifest_bytes} bytes has {len(structure)} bytes of structure, the limit is"
            f" {most_bytes}"
        )
    n_values = sum(map(structure.count, (b",", b"[", b"{")))
    most_values = manifest_bytes // 3 + _VALUES_EXTRA
    if n_values > most_values:
        return (
            f"a manifest of {manifest_bytes} bytes has {n_values} values in its structure, the limit is"
            f" {most_values}"
        )
    return None


def read_text(coded: bytes, n_bytes: int) -> bytes:
    """Return the content of a header or side file from its stream (FORMAT §8).

    Args:
        coded: the stream as it is in the payload.
        n_bytes: size of the content.

    Raises:
        Corrupt: ``coded`` is not a stream of that size.
        LimitExceeded: the content is too large for the size of ``coded``.
    """
    check_expansion(n_bytes, len(coded))
    return _read_stream(coded, n_bytes)


def _read_stream(coded: bytes, n_bytes: int) -> bytes:
    if len(coded) > n_bytes or (not coded and n_bytes):
        raise Corrupt(f"a stream of {n_bytes} bytes cannot be stored in {len(coded)} bytes")
    return coded if len(coded) == n_bytes else decompress(coded, n_bytes)


def _parse_structure(raw: bytes) -> Any:
    """Return the value of compact JSON; any other spelling of the value raises Corrupt."""
    try:
        value = json.loads(raw, parse_float=_refuse, parse_constant=_refuse)
        same = compact_json(value) == raw
    except (ValueError, RecursionError) as error:
        raise Corrupt(f"the structure is not JSON: {error}") from error
    if not same:
        raise Corrupt("the structure is not compact JSON")
    return value


def _refuse(token: str) -> float:
    raise ValueError(f"{token[:24]} is not an integer")


def _info(notes: bytes) -> Mapping[str, JSON]:
    parsed = parse_json(notes, "notes", any_numbers=True)
    if type(parsed) is not dict:
        raise Corrupt("the notes are not an object")
    info = parsed.get("info", {})
    return info if type(info) is dict else {}


def _parse_target(value: Any, reader: DigestReader) -> tuple[Target, list[int], bool, int]:
    """Return the target, and what is needed to read its rows.

    Returns:
        The target; the number of rows of each weight file; whether the digests of all target tensors
        are given; the payload offset of the first chunk.
    """
    kind, known, weight_files, side_files, folders = objects(value, "target", _TARGET)
    if type(known) is not bool:
        raise Corrupt("target.digests is not a boolean")
    if kind not in ("folder", "file"):
        _known_name(kind, "target.kind", ("folder", "file"))
    parsed_weights, counts = [], []
    for item in items(weight_files, "weight_files", MAX_FILES):
        path, n, header = fixed_items(item, "a weight file", 3)
        integers([n], "rows of a weight file")
        counts.append(n)
        parsed_weights.append(_weight_file(path, header, reader.take(DIGEST_BYTES)))
    offset = 0

    def placed(stored: Stored | None) -> Stored | None:
        nonlocal offset
        if stored is not None:
            stored = replace(stored, offset=offset)
            offset += stored.stored_bytes
        return stored

    parsed_sides = []
    for item in items(side_files, "side_files", MAX_FILES):
        path, n_bytes, stored = fixed_items(item, "a side file", 3)
        strings([path], "path of a side file")
        integers([n_bytes, stored], "sizes of a side file", least=-1)
        integers([n_bytes], "size of a side file")
        digest = reader.take(FILE_DIGEST_BYTES)
        parsed_sides.append(SideFile(path, n_bytes, digest, placed(_stored(n_bytes, stored))))
    weights = [replace(file, stored=placed(file.stored)) for file in parsed_weights]
    strings(folders, "empty_folders", MAX_EMPTY_FOLDERS)
    target = Target(kind == "folder", tuple(weights), tuple(parsed_sides), tuple(folders))
    _check_files(target)
    return target, counts, known, offset


def _check_files(target: Target) -> None:
    """Check paths and kind of a target's files (FORMAT §3.1, §3.4)."""
    weights = [file.path for file in target.weight_files]
    sides = [file.path for file in target.side_files]
    check_paths([*weights, *sides, *target.empty_folders])
    for paths, what in ((sides, "side_files"), (target.empty_folders, "empty_folders")):
        coded = [path.encode("utf-8") for path in paths]
        if any(a >= b for a, b in itertools.pairwise(coded)):
            raise Corrupt(f"the paths of {what} are not sorted, or one occurs twice")
    if not target.is_folder:
        if len(weights) != 1 or "/" in weights[0] or sides or target.empty_folders:
            raise Corrupt("a target of kind 'file' must be one weight file and nothing else")
        return
    for path in weights:
        if not path.endswith(WEIGHT_SUFFIX):
            raise Corrupt(f"weight file {path[:200]!r} does not end in {WEIGHT_SUFFIX}")
    for path in sides:
        if path.endswith(WEIGHT_SUFFIX):
            raise Corrupt(f"side file {path[:200]!r} ends in {WEIGHT_SUFFIX}")


def _stored(n_bytes: int, stored: int) -> Stored | None:
    if stored < 0:
        return None
    at_most(n_bytes, MAX_CARRIED_BYTES, "bytes of a stored file")
    if stored > n_bytes or (not stored and n_bytes):
        raise Corrupt(f"a stream of {n_bytes} bytes cannot be stored in {stored} bytes")
    if stored < n_bytes:
        check_expansion(n_bytes, stored)
    return Stored(n_bytes, stored, -1)


def _weight_file(path: Any, header: Any, digest: bytes) -> WeightFile:
    strings([path], "path of a weight file")
    kind, *rest = items(header, "header of a weight file") or [None]
    _known_name(kind, "header kind", ("canonical", "stored"))
    if kind == "stored":
        n_bytes, stored = fixed_items(rest, "a stored header", 2)
        integers([n_bytes, stored], "sizes of a stored header")
        return WeightFile(path, digest, None, _stored(n_bytes, stored))
    (pairs,) = fixed_items(rest, "a canonical header", 1)
    if pairs is None:
        return WeightFile(path, digest, None, None)
    metadata: dict[str, str] = {}
    for pair in items(pairs, "header metadata"):
        key, item = fixed_items(pair, "header metadata", 2)
        strings([key, item], "header metadata")
        if key in metadata:
            raise Corrupt(f"the header metadata have the key {key[:80]!r} twice")
        metadata[key] = item
    return WeightFile(path, digest, metadata, None)


def _layout(value: Any) -> TensorSpec:
    name, bits, element, shape = fixed_items(value, "a layout", 4)
    strings([name, element], "a layout")
    integers([bits], "bits of a layout")
    integers(items(shape, "shape", MAX_DIMENSIONS), "shape")
    dtype = check_dtype(name, bits, element)
    tensor_bytes(dtype, shape)
    return TensorSpec(dtype, tuple(shape), None)


def _coding(value: Any) -> Coding:
    values, index, packing, classes = fixed_items(value, "a coding", 4)
    _known_name(values, "value encoding", VALUE_ENCODINGS)
    _known_name(index, "index encoding", INDEX_ENCODINGS)
    _known_name(packing, "value packing", VALUE_PACKINGS)
    if type(classes) is not int or classes not in (0, 1):
        raise Corrupt("classes of a coding: expected 0 or 1")
    if classes and not (INDEX_ENCODINGS[index].has_classes or VALUE_PACKINGS[packing].has_classes):
        raise Corrupt(f"a coding has classes, but {index} and {packing} cannot have any")
    return Coding(values, index, packing, bool(classes))


def _known_name(value: Any, what: str, known: Iterable[str]) -> None:
    if type(value) is not str:
        raise Corrupt(f"{what}: expected a string")
    if value not in known:
        raise UnsupportedFeature(
            f"{what} is {value[:80]!r}, but this release knows only {', '.join(sorted(known))}; a newer"
            " sparsedelta may read it"
        )
