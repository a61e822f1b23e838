"""The target's weight files without their data: header bytes, and where each tensor lies (FORMAT §3.3)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sparsedelta.container import decompress_text
from sparsedelta.delta import Delta, SideFile, TensorDelta, WeightFile, header_key
from sparsedelta.errors import Corrupt
from sparsedelta.headers import METADATA_KEY, HeaderEntry, parse_header, render_header
from sparsedelta.weightsets import INDEX_SUFFIX, name_prefixes, set_stems, shards_of_index


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
    entries = parse_header(raw, what).entries
    if len(entries) != len(rows):
        raise Corrupt(f"{what} has {len(entries)} tensors, its rows are {len(rows)}")
    # A row's name is the own name or ends in a colon and that name; the weight sets say which, and
    # so perhaps an index that only the base has. Empty tensors that share an offset have no order.
    by_place: dict[tuple[str, tuple[int, ...], int, int], set[str]] = {}
    for entry in entries:
        by_place.setdefault((entry.dtype, entry.shape, entry.begin, entry.end), set()).add(
            entry.name
        )
    for row, begin, end in _places(rows):
        target = row.target
        place = (target.dtype.name, target.shape, begin, end) if target else None
        names = by_place.get(place, set()) if place else set()
        own = next((name for name in _own_names(row.name) if name in names), None)
        if own is None:
            raise Corrupt(f"{what} does not place tensor {row.name!r} as its row does")
        names.remove(own)
    return raw


def _own_names(name: str) -> list[str]:
    """Return what the own name of a row's tensor can be; a stem, being a path, has no colon."""
    _, colon, own = name.partition(":")
    return [name, own] if colon else [name]


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
    for row, begin, end in _places(rows):
        if not row.name.startswith(prefix) or row.target is None:
            raise Corrupt(f"tensor {row.name!r} cannot lie in {file.path!r}, a file of {prefix!r}")
        name, target = row.name.removeprefix(prefix), row.target
        if name == METADATA_KEY:
            raise Corrupt(f"a tensor of {file.path!r} cannot be named {METADATA_KEY}")
        entries.append(HeaderEntry(name, target.dtype.name, target.shape, begin, end))
    return render_header(file.metadata, entries)


def _places(rows: Sequence[TensorDelta]) -> list[tuple[TensorDelta, int, int]]:
    """Return each row with begin and end of its tensor in the file's data."""
    result, begin = [], 0
    for row in rows:
        end = begin + (row.target.n_bytes if row.target else 0)
        result.append((row, begin, end))
        begin = end
    return result
