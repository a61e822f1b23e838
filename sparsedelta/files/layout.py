"""The layout of the target's weight files: header bytes, and the offset of each tensor (FORMAT §3.2)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from blake3 import blake3

from sparsedelta.errors import Corrupt, FormatError
from sparsedelta.format.delta import Delta
from sparsedelta.format.manifest import read_text
from sparsedelta.format.records import DIGEST_BYTES, Row, Stored, TensorSpec, WeightFile
from sparsedelta.format.safetensors_header import HeaderEntry, parse_header, render_header


@dataclass(frozen=True, slots=True)
class FileLayout:
    """The layout of one weight file of the target.

    Attributes:
        path: relative to the target.
        header: the bytes of its header, without the length before them.
        rows: its tensors, in the order of their data.
        offsets: position of each tensor's first byte in the file.
        n_bytes: size of the whole file.
    """

    path: str
    header: bytes
    rows: tuple[Row, ...]
    offsets: tuple[int, ...]
    n_bytes: int


def rows_by_file(delta: Delta) -> list[tuple[WeightFile, tuple[Row, ...]]]:
    """Return each weight file of the target with its rows."""
    rows: dict[str, list[Row]] = {file.path: [] for file in delta.target.weight_files}
    for row in delta.tensors:
        rows[row.file].append(row)
    return [(file, tuple(rows[file.path])) for file in delta.target.weight_files]


def target_layout(delta: Delta) -> list[FileLayout]:
    """Return the layout of each weight file of the target.

    Raises:
        Corrupt: a header does not have the digest in the manifest, or a stored header does not
            describe the tensors of its file.
        LimitExceeded: a stored header exceeds a limit.
    """
    result = []
    for file, rows in rows_by_file(delta):
        entries = list(_entries((row.name, row.target) for row in rows))
        header = _header(delta, file, entries)
        start = 8 + len(header)
        offsets = tuple(start + entry.begin for entry in entries)
        end = entries[-1].end if entries else 0
        result.append(FileLayout(file.path, header, rows, offsets, start + end))
    return result


def _header(delta: Delta, file: WeightFile, entries: Sequence[HeaderEntry]) -> bytes:
    """Return the header bytes of a weight file; their digest is checked."""
    if file.stored:
        raw = _read_stored(delta, file, file.stored, entries)
    else:
        raw = render_header(file.metadata, entries)
    found = blake3(raw).digest()[:DIGEST_BYTES]
    if found != file.digest:
        raise Corrupt(
            f"the header of {file.path!r} does not match its digest; the delta is damaged",
            expected=file.digest.hex(),
            found=found.hex(),
        )
    return raw


def _read_stored(
    delta: Delta, file: WeightFile, stored: Stored, entries: Sequence[HeaderEntry]
) -> bytes:
    what = f"the stored header of {file.path!r}"
    raw = read_text(delta.payload.read(stored.offset, stored.stored_bytes), stored.n_bytes)
    try:
        header = parse_header(raw, what)
    except FormatError as error:
        raise Corrupt(str(error)) from error
    if not header.only_known_members or set(header.entries) != set(entries):
        raise Corrupt(f"{what} describes other tensors than the delta; the delta is inconsistent")
    return raw


def canonical_header(file: WeightFile, tensors: Iterable[tuple[str, TensorSpec]]) -> bytes:
    """Return the bytes of a file's canonical header, with its metadata.

    Args:
        file: gives the metadata.
        tensors: name and spec of each tensor, in the order of the data.
    """
    return render_header(file.metadata, _entries(tensors))


def _entries(tensors: Iterable[tuple[str, TensorSpec]]) -> Iterator[HeaderEntry]:
    begin = 0
    for name, spec in tensors:
        end = begin + spec.n_bytes
        yield HeaderEntry(name, spec.dtype.name, spec.shape, begin, end)
        begin = end
