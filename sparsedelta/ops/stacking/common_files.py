"""Combine the target files of sibling deltas into one target.

Two deltas that change the same file, or the set of tensors, in different ways are a conflict. The files
of the base are known only if a delta takes them from the base.
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
    """A side file and a delta that describes it: the delta carries its content or takes it from the base."""

    delta: Delta
    file: SideFile


def common_files(deltas: Sequence[Delta]) -> tuple[Target, Delta, list[Carrier]]:
    """Return a target with the files of all deltas.

    Returns:
        The target, the delta whose weight files it has, and the carriers of its side files.

    Raises:
        ConflictError: two deltas change a file, or the set of tensors, in different ways.
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
    """Return the delta whose weight files and order of tensors the common target gets.

    This is the one delta that adds, removes, renames or reshapes tensors, or else the first.

    Raises:
        ConflictError: more than one delta does so, or the deltas place the tensors in different files
            or in another order.
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
            f"deltas {first + 1} and {second + 1} both add, remove, rename, retype or reshape tensors of the"
            " base; apply one of them and create the other again from the result"
        )
    n_chosen = structural[0] if structural else 0
    chosen = deltas[n_chosen]
    for number, delta in enumerate(deltas, 1):
        other = _other_layout(delta, chosen, whole=not structural)
        if other:
            raise ConflictError(
                f"the targets of deltas {n_chosen + 1} and {number} {other}, so they have no common target; save one of"
                " the targets as the other is saved, and make its delta again"
            )
    return chosen


def _in_place(row: Row) -> bool:
    return row.keeps_all and row.base is not None and row.base.name == row.name


def _other_layout(one: Delta, other: Delta, *, whole: bool) -> str | None:
    """Return how two targets differ in where their common tensors are, as a clause; None if they do not.

    If ``whole`` is true, the weight files of the targets must also have the same headers.
    """
    if one.target.is_folder != other.target.is_folder:
        return "are a folder and a single file"
    left, right = _numbered_tensors(one), _numbered_tensors(other)
    have_names_in_common = not {name for _, name in left}.isdisjoint(name for _, name in right)
    are_apart = have_names_in_common and left.keys().isdisjoint(right)
    if are_apart or (whole and left.keys() != right.keys()):
        return "have their tensors in other files"
    if [key for key in left if key in right] != [key for key in right if key in left]:
        return "have their tensors in another order"
    if whole and _headers(one) != _headers(other):
        return "have other headers in their files"
    return None


def _numbered_tensors(delta: Delta) -> dict[TensorKey, int]:
    folder = delta.target.is_folder  # the path of a single file is only a suggestion (FORMAT §3.1)
    return {(row.file if folder else "", row.name): n for n, row in enumerate(delta.tensors)}


def _headers(delta: Delta) -> list[bytes]:
    return [file.digest for file in delta.target.weight_files]


def side_files(deltas: Sequence[Delta]) -> list[Carrier]:
    """Return the carriers of the common target's side files, sorted by path.

    A file that one delta takes from the base and another delta lacks counts as removed. A file that one
    delta carries and another lacks counts as added.

    Raises:
        ConflictError: two deltas carry different content for a file, or expect different base files.
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
