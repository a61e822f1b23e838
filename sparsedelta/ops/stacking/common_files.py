"""The files of deltas of one base, side by side: one target that has the changes of all.

Nothing is guessed: what two of them change in different ways is a conflict. What the base has is known
only as far as a delta takes it from there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sparsedelta.errors import ConflictError, Corrupt
from sparsedelta.format.delta import Delta
from sparsedelta.format.paths import check_paths
from sparsedelta.format.records import Row, SideFile, Target, TensorKey


@dataclass(frozen=True, slots=True)
class Carrier:
    """A side file, and the delta that carries its content or says that it is the base's."""

    delta: Delta
    file: SideFile


def common_files(deltas: Sequence[Delta]) -> tuple[Target, Delta, list[Carrier]]:
    """Return the target that has the files of all.

    With it the delta whose weight files they are, and where the side files come from.

    Raises:
        ConflictError: two change files, or the set of tensors, in different ways.
    """
    chosen = layout_delta(deltas)
    carriers = side_files(deltas)
    paths = [file.path for file in chosen.target.weight_files] + [c.file.path for c in carriers]
    folders = {folder for delta in deltas for folder in delta.target.empty_folders}
    filled = {parent for path in (*paths, *folders) for parent in _parents(path)}
    empty = sorted(folders - filled, key=str.encode)
    try:
        check_paths([*paths, *empty])
    except Corrupt as error:
        raise ConflictError(f"the deltas have no common target: {error}") from error
    files = tuple(carrier.file for carrier in carriers)
    target = Target(chosen.target.is_folder, chosen.target.weight_files, files, tuple(empty))
    return target, chosen, carriers


def _parents(path: str) -> Iterator[str]:
    while "/" in path:
        path = path.rpartition("/")[0]
        yield path


def layout_delta(deltas: Sequence[Delta]) -> Delta:
    """Return the delta whose weight files, and order of tensors, are those of all together.

    Raises:
        ConflictError: more than one adds, removes, renames or reshapes tensors, or they lay the others
            out in different ways.
    """
    used = [{row.base.name for row in delta.tensors if row.base} for delta in deltas]
    everything = set().union(*used)
    structural = [
        number
        for number, delta in enumerate(deltas)
        if used[number] != everything or not all(_in_place(row) for row in delta.tensors)
    ]
    if len(structural) > 1:
        first, second = structural[:2]
        raise ConflictError(
            f"deltas {first + 1} and {second + 1} both add, remove, rename, retype or reshape tensors of one"
            " base; apply one of them and make the other anew from the result"
        )
    chosen = deltas[structural[0] if structural else 0]
    for number, delta in enumerate(deltas, 1):
        if not _same_layout(delta, chosen, whole=not structural):
            raise ConflictError(
                f"delta {number} lays the tensors out in files, or spells the headers of these, in"
                " another way than the other deltas of its base; they have no common target"
            )
    return chosen


def _in_place(row: Row) -> bool:
    return row.keeps_all and row.base is not None and row.base.name == row.name


def _same_layout(one: Delta, other: Delta, *, whole: bool) -> bool:
    """Return whether two targets place the tensors that both have in the same files and order."""
    if one.target.is_folder != other.target.is_folder:
        return False
    if whole and _headers(one) != _headers(other):
        return False
    left, right = _places(one), _places(other)
    return [key for key in left if key in right] == [key for key in right if key in left]


def _places(delta: Delta) -> dict[TensorKey, int]:
    folder = delta.target.is_folder  # else the path is but a suggestion (FORMAT §3.1)
    return {(row.file if folder else "", row.name): n for n, row in enumerate(delta.tensors)}


def _headers(delta: Delta) -> list[bytes]:
    return [file.digest for file in delta.target.weight_files]


def side_files(deltas: Sequence[Delta]) -> list[Carrier]:
    """Return the side files of all together, sorted by path.

    A file that one takes from the base and another lacks is gone; one that one carries and another
    lacks is taken to be new.

    Raises:
        ConflictError: two carry different content, or know different base files.
    """
    found = [{f.path: Carrier(delta, f) for f in delta.target.side_files} for delta in deltas]
    result = []
    for path in sorted({path for files in found for path in files}, key=str.encode):
        carriers = [files[path] for files in found if path in files]
        carried = [c for c in carriers if c.file.stored]
        for alike in (carried, [c for c in carriers if not c.file.stored]):
            if len({c.file.digest for c in alike}) > 1:
                what = "carry" if alike is carried else "were made from"
                raise ConflictError(
                    f"the deltas {what} different files {path!r}; they have no common target"
                )
        if carried:
            result.append(carried[0])
        elif len(carriers) == len(deltas):
            result.append(carriers[0])
    return result
