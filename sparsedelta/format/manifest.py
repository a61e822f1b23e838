"""The manifest (FORMAT §3–§5): the frozen model of a delta to and from strict JSON.

Reading checks everything that can be known without opening a stream or a base.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from sparsedelta._typing import JSON
from sparsedelta.codecs.chunk import Chunk, check_chunk
from sparsedelta.codecs.indices import INDEX_ENCODINGS
from sparsedelta.codecs.packings import VALUE_PACKINGS
from sparsedelta.codecs.values import VALUE_ENCODINGS
from sparsedelta.dtypes import DTYPES, tensor_bytes
from sparsedelta.errors import Corrupt, LimitExceeded
from sparsedelta.format.paths import check_paths, check_suffixes
from sparsedelta.format.records import (
    DIGEST_BYTES,
    TOUCHED_BYTES,
    Base,
    Change,
    SideFile,
    Target,
    TensorDelta,
    TensorSpec,
    WeightFile,
)
from sparsedelta.format.safetensors_header import MAX_NAME_BYTES, METADATA_KEY, read_shape
from sparsedelta.format.strict_json import (
    boolean,
    compact_json,
    fixed_items,
    hex_bytes,
    integer,
    items,
    members,
    one_of,
    optional,
    parse_json,
    text,
)

MAX_MANIFEST_BYTES = 1 << 27
MAX_CARRIED_BYTES = 1 << 27
MAX_ROWS = 1 << 20
MAX_FILES = 1 << 16
FINGERPRINT_BYTES = 32

_KINDS = {"folder": True, "file": False}
_HEADERS = {"stored": True, "canonical": False}
_INDEX_NAMES = {name: name for name in INDEX_ENCODINGS}
_PACKING_NAMES = {name: name for name in VALUE_PACKINGS if name != "planes"}
_VALUE_NAMES = {name: name for name in VALUE_ENCODINGS}


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a manifest says: a delta without its payload, and that payload's digest."""

    base: Base
    target: Target
    tensors: tuple[TensorDelta, ...]
    info: Mapping[str, JSON]
    payload_digest: bytes


def render_manifest(manifest: Manifest) -> bytes:
    """Return the manifest's JSON text.

    Raises:
        LimitExceeded: the delta is beyond the limits of FORMAT §11.
    """
    target = manifest.target
    _at_most(len(manifest.tensors), MAX_ROWS, "tensors")
    longest = max((len(row.name.encode("utf-8")) for row in manifest.tensors), default=0)
    _at_most(longest, MAX_NAME_BYTES, "bytes of tensor name")
    for files in (target.weight_files, target.side_files, target.empty_folders):
        _at_most(len(files), MAX_FILES, "files of one kind")
    raw = compact_json(
        {
            "base": {"id": manifest.base.id, "fingerprint": manifest.base.fingerprint.hex()},
            "target": {
                "kind": "folder" if target.is_folder else "file",
                "fingerprint": _hex_or_null(target.fingerprint),
                "weight_files": [_weight_file_json(f) for f in target.weight_files],
                "side_files": [_side_file_json(f) for f in target.side_files],
                "empty_folders": list(target.empty_folders),
            },
            "tensors": [_row_json(row) for row in manifest.tensors],
            "info": dict(manifest.info),
            "payload_digest": manifest.payload_digest.hex(),
        }
    )
    _at_most(len(raw), MAX_MANIFEST_BYTES, "bytes of manifest")
    return raw


def parse_manifest(raw: bytes) -> Manifest:
    """Return what a manifest says, checked.

    Raises:
        FormatError: it breaks a rule of FORMAT §12.
    """
    names = ("base", "target", "tensors", "info", "payload_digest")
    base, target, tensors, info, digest = members(
        parse_json(raw, "the manifest"), "the manifest", names
    )
    if type(info) is not dict:
        raise Corrupt("info is not an object")
    parsed_target = _target(target)
    rows = tuple(_row(value) for value in items(tensors, "tensors", MAX_ROWS))
    _check_rows(rows, parsed_target)
    return Manifest(
        _base(base),
        parsed_target,
        rows,
        info,
        hex_bytes(digest, "payload_digest", FINGERPRINT_BYTES),
    )


def _base(value: Any) -> Base:
    base_id, fingerprint = members(value, "base", ("id", "fingerprint"))
    return Base(
        optional(base_id, "base.id", text),
        hex_bytes(fingerprint, "base.fingerprint", FINGERPRINT_BYTES),
    )


def _target(value: Any) -> Target:
    names = ("kind", "fingerprint", "weight_files", "side_files", "empty_folders")
    kind, fingerprint, weight_files, side_files, folders = members(value, "target", names)
    target = Target(
        optional(fingerprint, "target.fingerprint", _hex(FINGERPRINT_BYTES)),
        one_of(kind, "target.kind", _KINDS),
        tuple(_weight_file(v) for v in items(weight_files, "weight_files", MAX_FILES)),
        tuple(_side_file(v) for v in items(side_files, "side_files", MAX_FILES)),
        tuple(text(v, "empty_folders") for v in items(folders, "empty_folders", MAX_FILES)),
    )
    side_paths = [file.path for file in target.side_files]
    _check_sorted(side_paths, "side_files")
    _check_sorted(list(target.empty_folders), "empty_folders")
    weight_paths = [file.path for file in target.weight_files]
    check_paths([*weight_paths, *side_paths, *target.empty_folders])
    if target.is_folder:
        check_suffixes(weight_paths, side_paths)
    elif (
        len(target.weight_files) != 1
        or "/" in target.weight_files[0].path
        or target.side_files
        or target.empty_folders
    ):
        raise Corrupt("a target of kind 'file' is one weight file without a folder, and no more")
    return target


def _weight_file(value: Any) -> WeightFile:
    names = ("path", "n_tensors", "header", "metadata")
    path, n_tensors, header, metadata = members(value, "weight file", names)
    stored = one_of(header, "weight file header", _HEADERS)
    if metadata is not None:
        if type(metadata) is not dict or stored:
            raise Corrupt(
                "weight file metadata is neither null nor the object of a canonical header"
            )
        for item in metadata.values():
            text(item, "weight file metadata")
    return WeightFile(
        text(path, "weight file path"), integer(n_tensors, "n_tensors"), metadata, stored
    )


def _weight_file_json(file: WeightFile) -> dict[str, JSON]:
    return {
        "path": file.path,
        "n_tensors": file.n_tensors,
        "header": "stored" if file.stored_header else "canonical",
        "metadata": None if file.metadata is None else dict(file.metadata),
    }


def _side_file(value: Any) -> SideFile:
    path, n_bytes, digest, carried = members(
        value, "side file", ("path", "n_bytes", "digest", "carried")
    )
    file = SideFile(
        text(path, "side file path"),
        integer(n_bytes, "side file n_bytes"),
        hex_bytes(digest, "side file digest", FINGERPRINT_BYTES),
        boolean(carried, "side file carried"),
    )
    if file.carried:
        _at_most(file.n_bytes, MAX_CARRIED_BYTES, "bytes of a carried file")
    return file


def _side_file_json(file: SideFile) -> dict[str, JSON]:
    return {
        "path": file.path,
        "n_bytes": file.n_bytes,
        "digest": file.digest.hex(),
        "carried": file.carried,
    }


def _row(value: Any) -> TensorDelta:
    name, base, target, delta = members(value, "tensor row", ("name", "base", "target", "delta"))
    _at_most(len(text(name, "tensor name").encode("utf-8")), MAX_NAME_BYTES, "bytes of tensor name")
    where = f"tensor {name[:200]!r}"
    row = TensorDelta(
        name,
        optional(base, f"{where}, base", _spec),
        optional(target, f"{where}, target", _spec),
        optional(delta, f"{where}, delta", _change),
    )
    _check_row(row, where)
    return row


def _row_json(row: TensorDelta) -> dict[str, JSON]:
    return {
        "name": row.name,
        "base": _spec_json(row.base),
        "target": _spec_json(row.target),
        "delta": _change_json(row.change),
    }


def _spec(value: Any, where: str) -> TensorSpec:
    dtype_name, sizes, digest = members(value, where, ("dtype", "shape", "digest"))
    dtype = one_of(dtype_name, f"{where}, dtype", DTYPES)
    shape = read_shape(sizes, where)
    try:
        tensor_bytes(dtype, shape)
    except OverflowError as error:
        raise LimitExceeded(f"{where}: {error}") from error
    except ValueError as error:
        raise Corrupt(f"{where}: {error}") from error
    return TensorSpec(dtype, shape, optional(digest, f"{where}, digest", _hex(DIGEST_BYTES)))


def _spec_json(spec: TensorSpec | None) -> dict[str, JSON] | None:
    if spec is None:
        return None
    return {
        "dtype": spec.dtype.name,
        "shape": list(spec.shape),
        "digest": _hex_or_null(spec.digest),
    }


def _change(value: Any, where: str) -> Change:
    keep, values, touched, chunks = members(value, where, ("keep", "values", "touched", "chunks"))
    parsed = None
    if touched is not None:
        before, after = fixed_items(touched, f"{where}, touched", 2)
        parsed = (
            hex_bytes(before, f"{where}, touched", TOUCHED_BYTES),
            hex_bytes(after, f"{where}, touched", TOUCHED_BYTES),
        )
    return Change(
        integer(keep, f"{where}, keep"),
        one_of(values, f"{where}, values", _VALUE_NAMES),
        parsed,
        tuple(_chunk(chunk, where) for chunk in items(chunks, f"{where}, chunks")),
    )


def _change_json(change: Change | None) -> dict[str, JSON] | None:
    if change is None:
        return None
    return {
        "keep": change.keep,
        "values": change.values,
        "touched": [digest.hex() for digest in change.touched] if change.touched else None,
        "chunks": [_chunk_json(chunk) for chunk in change.chunks],
    }


def _chunk_json(chunk: Chunk) -> list[JSON]:
    coded: list[JSON] = [*chunk.coded_bytes]
    listed: list[JSON] = [chunk.number, chunk.nnz, chunk.index_encoding, chunk.index_bytes, coded]
    if chunk.value_packing != "planes":
        listed += [chunk.value_packing, chunk.value_bytes]
    return listed


def _chunk(value: Any, where: str) -> Chunk:
    what = f"{where}, chunk"
    found = items(value, what)
    plain = len(found) == 5  # in planes
    number, nnz, encoding, index_bytes, coded, *rest = fixed_items(value, what, 5 if plain else 7)
    packing, value_bytes = rest or ("planes", 0)
    return Chunk(
        integer(number, what),
        integer(nnz, what),
        one_of(encoding, f"{what}, index encoding", _INDEX_NAMES),
        integer(index_bytes, what),
        tuple(integer(size, what) for size in items(coded, what)),
        packing if plain else one_of(packing, f"{what}, value packing", _PACKING_NAMES),
        integer(value_bytes, what),
    )


def _check_row(row: TensorDelta, where: str) -> None:
    base, target, change = row.base, row.target, row.change
    if base is None and target is None:
        raise Corrupt(f"{where} is neither in the base nor in the target")
    if base is not None and base.digest is None:
        raise Corrupt(f"{where}: the base's digest is null")
    unchanged = base is not None and base == target
    if (change is None) != (target is None or unchanged):
        raise Corrupt(f"{where}: delta is {'absent' if change is None else 'present'} wrongly")
    if target is None or change is None:
        return
    most = 0
    if base is not None and base.dtype is target.dtype:
        most = min(base.n_elements, target.n_elements)
    if change.keep > most:
        raise Corrupt(
            f"{where} keeps {change.keep} elements of the base, at most {most} can be kept"
        )
    previous = -1
    for chunk in change.chunks:
        if chunk.number <= previous:
            raise Corrupt(f"{where}: chunk {chunk.number} does not follow chunk {previous}")
        check_chunk(chunk, target.dtype, target.n_elements)
        previous = chunk.number


def _check_rows(rows: tuple[TensorDelta, ...], target: Target) -> None:
    if len({row.name for row in rows}) != len(rows):
        raise Corrupt("a tensor has two rows")
    n_target = sum(row.target is not None for row in rows)
    if any(row.target is None for row in rows[:n_target]):
        raise Corrupt("rows of removed tensors do not come last")
    _check_sorted([row.name for row in rows[n_target:]], "rows of removed tensors")
    n_listed = sum(file.n_tensors for file in target.weight_files)
    if n_listed != n_target:
        raise Corrupt(f"weight files list {n_listed} tensors, there are {n_target}")
    for row in rows[:n_target]:
        known = row.target is not None and row.target.digest is not None
        if row.change is not None and known != (target.fingerprint is not None):
            raise Corrupt(f"tensor {row.name!r}: its digest is null, or the fingerprint, not both")
    if any(row.name == METADATA_KEY for row in rows):
        raise Corrupt(f"a tensor cannot be named {METADATA_KEY}")


def _check_sorted(names: list[str], what: str) -> None:
    coded = [name.encode("utf-8") for name in names]
    if any(a >= b for a, b in itertools.pairwise(coded)):
        raise Corrupt(f"{what} are not sorted, or one is there twice")


def _hex(n_bytes: int) -> Callable[[Any, str], bytes]:
    return lambda value, what: hex_bytes(value, what, n_bytes)


def _hex_or_null(value: bytes | None) -> str | None:
    return None if value is None else value.hex()


def _at_most(found: int, limit: int, what: str) -> None:
    if found > limit:
        raise LimitExceeded(f"{found} {what}, the limit is {limit}")
