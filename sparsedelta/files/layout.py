"""The target's weight files without their data: header bytes, and where each tensor lies (FORMAT §3.3)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from sparsedelta.errors import Corrupt
from sparsedelta.files.weight_sets import INDEX_SUFFIX, name_prefixes, set_stems, shards_of_index
from sparsedelta.format.container import decompress_text
from sparsedelta.format.delta import Delta
from sparsedelta.format.records import SideFile, TensorDelta, WeightFile, header_key
from sparsedelta.format.safetensors_header import (
    METADATA_KEY,
    HeaderEntry,
    parse_header,
    render_header,
)


@dataclass(frozen=True, slots=True)
class FileLayout:
    """One weight file of the target.

    Attributes:
        path: relative to the target.
        header: its header's bytes, without the length before them.
        rows: its tensors, in the order of the data.
        offsets: of each tensor's first byte, from the start of the file.
        n_bytes: of the whole file.
    """

    path: str
    header: bytes
    rows: tuple[TensorDelta, ...]
    offsets: tuple[int, ...]
    n_bytes: int


def rows_by_file(delta: Delta) -> list[tuple[WeightFile, tuple[TensorDelta, ...]]]:
    """Return the rows of each weight file of the target."""
    result, start = [], 0
    for file in delta.target.weight_files:
        result.append((file, delta.tensors[start : start + file.n_tensors]))
        start += file.n_tensors
    return result


def stored_header(delta: Delta, file: WeightFile, rows: Sequence[TensorDelta]) -> bytes:
    """Return the header bytes that a delta stores for a weight file, checked against its rows.

    Raises:
        Corrupt: it does not parse, or names, dtypes, shapes or offsets are not those of the rows.
        LimitExceeded: it is beyond a limit.
    """
    what = f"stored header of {file.path!r}"
    key = header_key(file.path)
    raw = decompress_text(delta.payload.read(key, 0, delta.payload.n_bytes(key)), what)
    entries = set(parse_header(raw, what).entries)
    if len(entries) != len(rows):
        raise Corrupt(f"{what} has {len(entries)} tensors, its rows are {len(rows)}")
    # The weight sets say what stands before the own names, and so perhaps an index that only the
    # base has. It is the same for the whole file: nothing, or a stem, which as a path has no colon.
    stem, colon, _ = rows[0].name.partition(":") if rows else ("", "", "")
    misplaced = None
    for prefix in ("", stem + colon) if colon else ("",):
        misplaced = next((r for r, entry in _entries(rows, prefix) if entry not in entries), None)
        if misplaced is None:
            return raw
    name = misplaced.name if misplaced else ""
    raise Corrupt(f"{what} does not place tensor {name!r} as its row does")


def target_layout(delta: Delta, read_side_file: Callable[[SideFile], bytes]) -> list[FileLayout]:
    """Return the target's weight files.

    Args:
        delta: what to lay out.
        read_side_file: returns the content of a side file, carried or the base's.

    Raises:
        Corrupt: a stored header, or the name of a tensor, does not fit its file.
    """
    prefixes = file_prefixes(delta, read_side_file)
    result = []
    for file, rows in rows_by_file(delta):
        if file.stored_header:
            header = stored_header(delta, file, rows)
        else:
            header = _canonical_header(file, rows, prefixes[file.path])
        start = 8 + len(header)
        places = _places(rows)
        offsets = tuple(start + begin for _, begin, _ in places)
        end = places[-1][2] if places else 0
        result.append(FileLayout(file.path, header, tuple(rows), offsets, start + end))
    return result


def file_prefixes(delta: Delta, read_side_file: Callable[[SideFile], bytes]) -> dict[str, str]:
    """Return what stands before the own names of each weight file's tensors; see ``target_layout``."""
    paths = [file.path for file in delta.target.weight_files]
    if not delta.target.is_folder:
        return dict.fromkeys(paths, "")
    indexes = {
        file.path: shards_of_index(read_side_file(file), file.path)
        for file in delta.target.side_files
        if file.path.endswith(INDEX_SUFFIX)
    }
    return name_prefixes(set_stems(paths, indexes))


def _canonical_header(file: WeightFile, rows: Sequence[TensorDelta], prefix: str) -> bytes:
    entries = []
    for row, entry in _entries(rows, prefix):
        if entry is None:
            raise Corrupt(f"tensor {row.name!r} cannot lie in {file.path!r}, a file of {prefix!r}")
        if entry.name == METADATA_KEY:
            raise Corrupt(f"a tensor of {file.path!r} cannot be named {METADATA_KEY}")
        entries.append(entry)
    return render_header(file.metadata, entries)


def _entries(
    rows: Sequence[TensorDelta], prefix: str
) -> Iterator[tuple[TensorDelta, HeaderEntry | None]]:
    """Yield each row with its entry in the file's header, None if its name lacks the prefix."""
    for row, begin, end in _places(rows):
        target = row.target
        if target is None or not row.name.startswith(prefix):
            yield row, None
        else:
            name = row.name.removeprefix(prefix)
            yield row, HeaderEntry(name, target.dtype.name, target.shape, begin, end)


def _places(rows: Sequence[TensorDelta]) -> list[tuple[TensorDelta, int, int]]:
    """Return each row with begin and end of its tensor in the file's data."""
    result, begin = [], 0
    for row in rows:
        end = begin + (row.target.n_bytes if row.target else 0)
        result.append((row, begin, end))
        begin = end
    return result
