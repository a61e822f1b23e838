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
from sparsedelta.codecs.chunk import (
    CODED_DIGEST_BYTES,
    TOUCHED_BYTES,
    Chunk,
    Coding,
    check_chunk,
    n_streams,
)
from sparsedelta.codecs.indices import INDEX_ENCODINGS
from sparsedelta.codecs.packings import VALUE_PACKINGS
from sparsedelta.codecs.values import VALUE_ENCODINGS
from sparsedelta.codecs.zstd import check_expansion, compress_text, decompress
from sparsedelta.dtypes import DType, check_dtype, tensor_bytes
from sparsedelta.errors import Corrupt, LimitExceeded, UnsupportedFeature
from sparsedelta.format.paths import WEIGHT_SUFFIX, check_path, check_paths
from sparsedelta.format.records import (
    DIGEST_BYTES,
    FILE_DIGEST_BYTES,
    Base,
    BaseTensor,
    Row,
    SideFile,
    Stored,
    Target,
    TensorSpec,
    WeightFile,
    default_keep,
)
from sparsedelta.format.safetensors_header import MAX_DIMENSIONS, METADATA_KEY
from sparsedelta.format.strict_json import compact_json, fixed_items, items, parse_json

MAX_MANIFEST_BYTES = 1 << 27
MAX_STRUCTURE_RATIO, MAX_STRUCTURE_EXTRA = 4, 1 << 19
_VALUES_EXTRA = 1 << 16
MAX_NOTES_BYTES = 1 << 20
MAX_CARRIED_BYTES = 1 << 27
MAX_ROWS = 1 << 19
MAX_CHUNKS = 1 << 20
MAX_FILES = 1 << 16
MAX_EMPTY_FOLDERS = 1 << 12
MAX_NAME_BYTES = 1024
_MAX_BITS = 1 << 63
_SIZES_BYTES = 16

_STRUCTURE = ("requires", "base", "target", "layouts", "tensors", "codings", "chunks")
_BASE = ("id", "n_unused", "files")
_TARGET = ("kind", "digests", "weight_files", "side_files", "empty_folders")
_TENSORS = ("names", "layouts", "base_files", "base_names", "base_layouts", "keep", "n_chunks")
_CHUNKS = ("starts", "spans", "nnz", "codings", "touched", "raw", "stored")


@dataclass(frozen=True, slots=True)
class Manifest:
    """The content of a manifest: a delta without its payload; attributes as in ``Delta``."""

    base: Base
    target: Target
    tensors: tuple[Row, ...]
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
    _at_most(len(notes), MAX_NOTES_BYTES, "bytes of notes (info)")
    digests = b"".join(_digests(manifest))
    stored, stored_notes = compress_text(structure), compress_text(notes)
    n_bytes = _SIZES_BYTES + len(stored) + len(stored_notes) + len(digests)
    if _structure_problem(structure, n_bytes):
        stored = structure  # uncompressed, it makes the manifest large enough for these limits
    sizes = (len(structure), len(stored), len(notes), len(stored_notes))
    head = b"".join(size.to_bytes(4, "little") for size in sizes)
    result = head + stored + stored_notes + digests
    _at_most(len(result), MAX_MANIFEST_BYTES, "bytes of manifest")
    return result


def _check_limits(manifest: Manifest) -> None:
    target = manifest.target
    _at_most(len(manifest.tensors), MAX_ROWS, "tensors")
    _at_most(sum(len(row.chunks) for row in manifest.tensors), MAX_CHUNKS, "chunks")
    _at_most(len(target.weight_files), MAX_FILES, "weight files")
    _at_most(len(target.side_files), MAX_FILES, "side files")
    _at_most(len(target.empty_folders), MAX_EMPTY_FOLDERS, "empty folders")
    for row in manifest.tensors:
        for name in (row.name, row.base.name if row.base else ""):
            _at_most(len(name.encode("utf-8")), MAX_NAME_BYTES, f"bytes of the name {name[:80]!r}")


def _structure(manifest: Manifest) -> dict[str, JSON]:
    layouts: dict[tuple[DType, tuple[int, ...]], int] = {}
    codings: dict[Coding, int] = {}
    base_files: dict[str, int] = {}
    tensors: dict[str, list[Any]] = {name: [] for name in _TENSORS}
    chunks: dict[str, list[Any]] = {name: [] for name in _CHUNKS}

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
    requires, base, target, layouts, tensors, codings, chunks = _objects(
        parsed, "structure", _STRUCTURE
    )
    _strings(requires, "requires")
    if requires:
        raise UnsupportedFeature(
            f"the delta requires the feature {requires[0][:80]!r}, which this release does not know; a"
            " newer sparsedelta may read it"
        )
    reader = _DigestReader(digests)
    base_id, n_unused, base_files = _objects(base, "base", _BASE)
    if base_id is not None and type(base_id) is not str:
        raise Corrupt("base.id is neither null nor a string")
    _integers([n_unused], "base.n_unused")
    _strings(base_files, "base.files", MAX_FILES)
    for path in base_files:
        check_path(path)
    files, counts, known, offset = _parse_target(target, reader)
    known_layouts = [_layout(value) for value in items(layouts, "layouts")]
    known_codings = [_coding(value) for value in items(codings, "codings")]
    rows = _Rows(files, counts, base_files, known_layouts, tensors)
    columns = _Chunks(rows, known_codings, chunks)
    result = columns.finish(rows.finish(reader, known), reader, known=known, offset=offset)
    reader.finish()
    if columns.end != payload_bytes:
        raise Corrupt(
            f"the payload has {payload_bytes} bytes, expected {columns.end} by the manifest"
        )
    return Manifest(Base(base_id, n_unused), files, tuple(result), _info(notes))


def _split(raw: bytes) -> tuple[bytes, bytes, bytes]:
    """Return structure, notes and digests of a manifest."""
    if len(raw) < _SIZES_BYTES:
        raise Corrupt(f"the manifest has {len(raw)} bytes, expected at least {_SIZES_BYTES}")
    sizes = [int.from_bytes(raw[at : at + 4], "little") for at in range(0, _SIZES_BYTES, 4)]
    n_structure, stored_structure, n_notes, stored_notes = sizes
    _at_most(n_structure, _max_structure(len(raw)), "bytes of structure")
    _at_most(n_notes, MAX_NOTES_BYTES, "bytes of notes")
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


def _parse_target(value: Any, reader: _DigestReader) -> tuple[Target, list[int], bool, int]:
    """Return the target, and what is needed to read its rows.

    Returns:
        The target; the number of rows of each weight file; whether the digests of all target tensors
        are given; the payload offset of the first chunk.
    """
    kind, known, weight_files, side_files, folders = _objects(value, "target", _TARGET)
    if type(known) is not bool:
        raise Corrupt("target.digests is not a boolean")
    if kind not in ("folder", "file"):
        _known_name(kind, "target.kind", ("folder", "file"))
    parsed_weights, counts = [], []
    for item in items(weight_files, "weight_files", MAX_FILES):
        path, n, header = fixed_items(item, "a weight file", 3)
        _integers([n], "rows of a weight file")
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
        _strings([path], "path of a side file")
        _integers([n_bytes, stored], "sizes of a side file", least=-1)
        _integers([n_bytes], "size of a side file")
        digest = reader.take(FILE_DIGEST_BYTES)
        parsed_sides.append(SideFile(path, n_bytes, digest, placed(_stored(n_bytes, stored))))
    weights = [replace(file, stored=placed(file.stored)) for file in parsed_weights]
    _strings(folders, "empty_folders", MAX_EMPTY_FOLDERS)
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
    _at_most(n_bytes, MAX_CARRIED_BYTES, "bytes of a stored file")
    if stored > n_bytes or (not stored and n_bytes):
        raise Corrupt(f"a stream of {n_bytes} bytes cannot be stored in {stored} bytes")
    if stored < n_bytes:
        check_expansion(n_bytes, stored)
    return Stored(n_bytes, stored, -1)


def _weight_file(path: Any, header: Any, digest: bytes) -> WeightFile:
    _strings([path], "path of a weight file")
    kind, *rest = items(header, "header of a weight file") or [None]
    _known_name(kind, "header kind", ("canonical", "stored"))
    if kind == "stored":
        n_bytes, stored = fixed_items(rest, "a stored header", 2)
        _integers([n_bytes, stored], "sizes of a stored header")
        return WeightFile(path, digest, None, _stored(n_bytes, stored))
    (pairs,) = fixed_items(rest, "a canonical header", 1)
    if pairs is None:
        return WeightFile(path, digest, None, None)
    metadata: dict[str, str] = {}
    for pair in items(pairs, "header metadata"):
        key, item = fixed_items(pair, "header metadata", 2)
        _strings([key, item], "header metadata")
        if key in metadata:
            raise Corrupt(f"the header metadata have the key {key[:80]!r} twice")
        metadata[key] = item
    return WeightFile(path, digest, metadata, None)


def _layout(value: Any) -> TensorSpec:
    name, bits, element, shape = fixed_items(value, "a layout", 4)
    _strings([name, element], "a layout")
    _integers([bits], "bits of a layout")
    _integers(items(shape, "shape", MAX_DIMENSIONS), "shape")
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


class _Rows:
    """The columns of ``tensors``, checked; ``finish`` returns the rows."""

    def __init__(
        self,
        target: Target,
        counts: Sequence[int],
        base_files: Sequence[str],
        layouts: Sequence[TensorSpec],
        columns: Any,
    ) -> None:
        names, own, files, base_names, base_layouts, keep, n_chunks = _objects(
            columns, "tensors", _TENSORS
        )
        n = len(items(names, "names", MAX_ROWS))
        _strings(names, "names")
        _column(own, "layouts of tensors", n, below=len(layouts))
        _column(files, "base_files", n, least=-1, below=len(base_files))
        _column(n_chunks, "n_chunks", n)
        if sum(counts) != n:
            raise Corrupt(f"the weight files have {sum(counts)} rows, but there are {n} names")
        _check_names(names, counts)
        self.n = n
        self.n_chunks: list[int] = n_chunks
        self._layouts = layouts
        self._sizes = [spec.n_elements for spec in layouts]
        self._own: list[int] = own
        self.names: list[str] = names
        self.files = [
            file.path
            for file, count in zip(target.weight_files, counts, strict=True)
            for _ in range(count)
        ]
        self._base_files = [base_files[i] if i >= 0 else None for i in files]
        self._base_names = self._exceptions(base_names, "base_names")
        other_layouts = self._exceptions(base_layouts, "base_layouts", len(layouts))
        for exceptions, usual in ((self._base_names, names), (other_layouts, own)):
            if any(usual[row] == item for row, item in exceptions.items()):
                raise Corrupt(
                    "base_names or base_layouts repeat the name or layout of the tensor itself"
                )
        self._base_own = other_layouts
        self._keep = self._exceptions(keep, "keep", _MAX_BITS)
        _check_name_bytes(self._base_names.values())
        self._check_total()

    def finish(self, reader: _DigestReader, known: bool) -> list[Row]:
        """Return the rows without their chunks. Takes the digests of base and target from ``reader``."""
        keeps: dict[tuple[int, int], int] = {}  # by layouts of base and target
        rows, own, layouts, sizes = [], self._own, self._layouts, self._sizes
        base_digests = [
            None if file is None else reader.take(DIGEST_BYTES) for file in self._base_files
        ]
        for number, (file, name, base_file, base_digest, n_chunks) in enumerate(
            zip(self.files, self.names, self._base_files, base_digests, self.n_chunks, strict=True)
        ):
            spec, base, keep, is_copied = layouts[own[number]], None, 0, False
            other = own[number]
            if base_file is not None:
                other = self._base_own.get(number, other)
                base_name = self._base_names.get(number, name)
                base = BaseTensor(base_file, base_name, layouts[other].with_digest(base_digest))
                pair = other, own[number]
                if pair not in keeps:
                    keeps[pair] = default_keep(base.spec, spec)
                most = keeps[pair]
                keep = self._keep.get(number, most)
                if number in self._keep and keep >= most:
                    raise Corrupt(
                        f"tensor {name!r} keeps {keep} elements, expected fewer than {most}"
                    )
                is_copied = not n_chunks and keep == sizes[other] == sizes[own[number]]
            if is_copied and base:
                same = other == own[number]
                spec = base.spec if same else spec.with_digest(base_digest)
            elif base is None or known:
                spec = spec.with_digest(reader.take(DIGEST_BYTES))
            rows.append(Row(file, name, spec, base, keep, ()))
        return rows

    def _exceptions(self, value: Any, what: str, below: int | None = None) -> dict[int, Any]:
        """Return a list of pairs ``[row, value]`` as a mapping from row numbers to values.

        The values must be strings, or integers below ``below`` if that is given.
        """
        pairs = [fixed_items(item, what, 2) for item in items(value, what, MAX_ROWS)]
        rows = [row for row, _ in pairs]
        values = [item for _, item in pairs]
        _column(rows, what, len(pairs), below=self.n)
        if any(a >= b for a, b in itertools.pairwise(rows)):
            raise Corrupt(f"{what}: the row numbers do not ascend")
        if any(self._base_files[row] is None for row in rows):
            raise Corrupt(f"{what}: a row without a base is listed")
        if below is None:
            _strings(values, what)
        else:
            _column(values, what, len(pairs), below=below)
        return dict(pairs)

    def _check_total(self) -> None:
        widths = [8 * spec.dtype.width for spec in self._layouts]
        total = sum(widths[i] * self._sizes[i] for i in self._own)
        if total >= _MAX_BITS:
            raise LimitExceeded(f"the target has {total} bits, expected fewer than 2^63")


class _Chunks:
    """The columns of ``chunks``, checked; ``finish`` adds the chunks to the rows."""

    def __init__(self, rows: _Rows, codings: Sequence[Coding], columns: Any) -> None:
        starts, spans, nnz, coding, touched, raw, stored = _objects(columns, "chunks", _CHUNKS)
        n = len(items(starts, "starts", MAX_CHUNKS))
        if sum(rows.n_chunks) != n:
            raise Corrupt(f"the rows have {sum(rows.n_chunks)} chunks, but {n} are listed")
        for column, what in ((starts, "starts"), (spans, "spans"), (nnz, "nnz")):
            _column(column, f"{what} of chunks", n)
        _column(coding, "codings of chunks", n, below=len(codings))
        _column(touched, "touched of chunks", n, below=2)
        _column(raw, "raw sizes", None)
        _column(stored, "stored sizes", None)
        self._columns = zip(starts, spans, nnz, coding, touched, strict=True)
        self._codings = codings
        self._raw, self._stored = raw, stored
        self._n_chunks = rows.n_chunks
        self.end = 0  # size of the payload in bytes, known after finish()

    def finish(
        self, rows: Sequence[Row], reader: _DigestReader, *, known: bool, offset: int
    ) -> list[Row]:
        """Return the rows with their chunks. Takes the digests of the chunks from ``reader``.

        Args:
            rows: the rows without chunks.
            reader: gives the digests.
            known: whether the digests of all target tensors are given.
            offset: payload offset of the first chunk.
        """
        result = []
        n = sum(self._n_chunks)
        coded = [reader.take(CODED_DIGEST_BYTES) for _ in range(n)]
        number = raw_at = stored_at = 0
        for row, n_chunks in zip(rows, self._n_chunks, strict=True):
            if not n_chunks:
                result.append(row)
                continue
            dtype, n_elements, end, chunks = row.target.dtype, row.target.n_elements, 0, []
            for start, span, nnz, coding, touched in itertools.islice(self._columns, n_chunks):
                code = self._codings[coding]
                n_stored, n_raw = n_streams(code, dtype.width)
                chunk = Chunk(
                    start,
                    span,
                    nnz,
                    code,
                    tuple(self._raw[raw_at : raw_at + n_raw]),
                    tuple(self._stored[stored_at : stored_at + n_stored]),
                    coded[number],
                    (reader.take(TOUCHED_BYTES), reader.take(TOUCHED_BYTES)) if touched else None,
                    offset,
                )
                offset += chunk.stored_bytes
                if len(chunk.raw) != n_raw or len(chunk.stored) != n_stored:
                    raise Corrupt(f"tensor {row.name!r}: the sizes of some streams are missing")
                check_chunk(chunk, dtype, n_elements)
                if start < end:
                    raise Corrupt(f"tensor {row.name!r}: its chunks overlap or do not ascend")
                if not (touched or known):
                    raise Corrupt(
                        f"tensor {row.name!r}: it has no target digest, and a chunk has no touched digests"
                    )
                end = start + span
                raw_at, stored_at, number = raw_at + n_raw, stored_at + n_stored, number + 1
                chunks.append(chunk)
            result.append(row.with_chunks(tuple(chunks)))
        if raw_at != len(self._raw) or stored_at != len(self._stored):
            raise Corrupt("the chunks list more stream sizes than there are streams")
        self.end = offset
        return result


class _DigestReader:
    """Reads the digests at the end of a manifest, in order."""

    def __init__(self, raw: bytes) -> None:
        self._raw = raw
        self._at = 0

    def take(self, n_bytes: int) -> bytes:
        """Return the next digest."""
        digest = self._raw[self._at : self._at + n_bytes]
        self._at += n_bytes
        if len(digest) != n_bytes:
            raise Corrupt(
                f"the manifest ends within its digests: it has only {len(self._raw)} bytes of them"
            )
        return digest

    def finish(self) -> None:
        """Check that all digests were taken; raises Corrupt if bytes are left."""
        if self._at != len(self._raw):
            raise Corrupt(f"{len(self._raw) - self._at} bytes follow the last digest")


def _check_names(names: list[str], counts: Sequence[int]) -> None:
    _check_name_bytes(names)
    start = 0
    for count in counts:
        own = names[start : start + count]
        start += count
        if len(set(own)) != count:
            raise Corrupt("a weight file has two tensors of the same name")
        if METADATA_KEY in own:
            raise Corrupt(f"a tensor cannot be named {METADATA_KEY}")


def _check_name_bytes(names: Iterable[str]) -> None:
    for name in names:
        if len(name) > MAX_NAME_BYTES or len(name.encode("utf-8")) > MAX_NAME_BYTES:
            raise LimitExceeded(f"tensor name {name[:80]!r}… is longer than {MAX_NAME_BYTES} bytes")


def _objects(value: Any, what: str, names: Sequence[str]) -> list[Any]:
    if type(value) is not dict or [*value] != [*names]:
        raise Corrupt(f"{what}: expected an object of {', '.join(names)}, in this order")
    return [*value.values()]


def _strings(value: Any, what: str, limit: int | None = None) -> None:
    if not set(map(type, items(value, what, limit))) <= {str}:
        raise Corrupt(f"{what}: expected strings")


def _integers(values: list[Any], what: str, *, least: int = 0) -> None:
    if not set(map(type, values)) <= {int}:
        raise Corrupt(f"{what}: expected integers")
    if values and not (least <= min(values) and max(values) < _MAX_BITS):
        raise Corrupt(f"{what}: an integer is out of range")


def _column(
    value: Any, what: str, n: int | None, *, least: int = 0, below: int | None = None
) -> None:
    _integers(items(value, what), what, least=least)
    if n is not None and len(value) != n:
        raise Corrupt(f"{what}: {len(value)} entries, expected {n}")
    if below is not None and value and max(value) >= below:
        raise Corrupt(f"{what}: found {max(value)}, expected less than {below}")


def _known_name(value: Any, what: str, known: Iterable[str]) -> None:
    if type(value) is not str:
        raise Corrupt(f"{what}: expected a string")
    if value not in known:
        raise UnsupportedFeature(
            f"{what} is {value[:80]!r}, but this release knows only {', '.join(sorted(known))}; a newer"
            " sparsedelta may read it"
        )


def _at_most(found: int, limit: int, what: str) -> None:
    if found > limit:
        raise LimitExceeded(f"{found} {what}, the limit is {limit}")
