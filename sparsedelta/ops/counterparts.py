"""Find the base tensor to compare each target tensor with: by file and name, name, prefix or content."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence

from sparsedelta.dtypes import DType
from sparsedelta.files.checkpoint import Checkpoint, Tensor
from sparsedelta.format.records import TensorKey
from sparsedelta.tensors.compare import digest_tensor
from sparsedelta.tensors.parallel import Pace

_Layout = tuple[DType, tuple[int, ...]]


def counterparts(base: Checkpoint, target: Checkpoint, pace: Pace) -> dict[TensorKey, Tensor]:
    """Return the base tensor to compare each target tensor with, by the target's file and name.

    Target tensors without a counterpart are missing from the result. The counterpart is the first of:

    1. the tensor of the same file and name;
    2. the tensor of the same name in a file of the same role (``files.shards``), or in any file if
       base or target has only one role;
    3. the tensor whose name has one prefix more or less, if that prefix fits most names of the file;
    4. a tensor with the same dtype, shape and bytes.

    Args:
        base: the base.
        target: the target.
        pace: can stop the comparison of contents. It must not report progress.
    """
    if target.tensors.keys() <= base.tensors.keys():
        return {key: base.tensors[key] for key in target.tensors}
    by_name: dict[str, list[Tensor]] = defaultdict(list)
    for tensor in base.tensors.values():
        by_name[tensor.name].append(tensor)
    one_role = min(len(set(base.roles.values())), len(set(target.roles.values()))) <= 1
    found: dict[TensorKey, Tensor] = {}
    for file in target.weight_files:
        for tensor in file.tensors:
            exact = base.tensors.get(tensor.key)
            match = exact or _of_name(base, target, tensor, by_name[tensor.name], one_role)
            if match is not None:
                found[tensor.key] = match
        _add_by_prefix(base, target, file.tensors, found, by_name)
    _add_by_content(base, [t for key, t in target.tensors.items() if key not in found], found, pace)
    return found


def _of_name(
    base: Checkpoint,
    target: Checkpoint,
    tensor: Tensor,
    same_name: Sequence[Tensor],
    one_role: bool,
) -> Tensor | None:
    """Return the best of several base tensors with the same name; None if no role fits."""
    if one_role and len(same_name) == 1:
        return same_name[0]
    role = target.roles[tensor.file]
    fitting = [t for t in same_name if one_role or base.roles[t.file] == role]
    return min(
        fitting,
        key=lambda t: (
            not t.spec.same_layout(tensor.spec),
            t.spec.dtype != tensor.spec.dtype,
            base.roles[t.file] != role,
        ),
        default=None,
    )


def _add_by_prefix(
    base: Checkpoint,
    target: Checkpoint,
    tensors: Sequence[Tensor],
    found: dict[TensorKey, Tensor],
    by_name: Mapping[str, Sequence[Tensor]],
) -> None:
    """Add to ``found`` the counterparts whose names have one prefix more or less."""
    left = [tensor for tensor in tensors if tensor.key not in found]
    if not left:
        return
    used = {tensor.key for tensor in found.values()}
    free = {t.name for t in base.tensors.values() if t.key not in used}
    prefix = common_prefix({t.name for t in left}, free)
    if prefix is None:
        return
    more, less = prefix
    for tensor in left:
        name = less + tensor.name.removeprefix(more)
        fitting = [t for t in by_name.get(name, ()) if t.key not in used]
        match = _of_name(base, target, tensor, fitting, True)
        if match is not None and tensor.name.startswith(more):
            found[tensor.key] = match


def common_prefix(names: Collection[str], others: Collection[str]) -> tuple[str, str] | None:
    """Return the prefix to remove from most names, and the one to add, to get a name of ``others``.

    One of the two is empty. None if no prefix gives a counterpart to more than half of the names.
    """
    votes = Counter((prefix, "") for prefix in _prefixes(names, set(others)))
    votes += Counter(("", prefix) for prefix in _prefixes(others, set(names)))
    if not votes:
        return None
    best, n = votes.most_common(1)[0]
    return best if 2 * n > len(names) else None


def _prefixes(names: Iterable[str], others: Collection[str]) -> Iterable[str]:
    """Yield each prefix, up to a dot, whose removal turns a name into one of ``others``."""
    for name in names:
        start = name.find(".") + 1
        while start:
            if name[start:] in others:
                yield name[:start]
            start = name.find(".", start) + 1


def _add_by_content(
    base: Checkpoint, left: Sequence[Tensor], found: dict[TensorKey, Tensor], pace: Pace
) -> None:
    """Add to ``found`` the counterparts with the same dtype, shape and bytes."""
    wanted: dict[_Layout, list[Tensor]] = defaultdict(list)
    for tensor in left:
        if tensor.spec.n_bytes:
            wanted[tensor.spec.dtype, tensor.spec.shape].append(tensor)
    candidates: dict[_Layout, list[Tensor]] = defaultdict(list)
    for tensor in base.tensors.values():
        layout = tensor.spec.dtype, tensor.spec.shape
        if layout in wanted:
            candidates[layout].append(tensor)
    for layout, tensors in candidates.items():
        by_digest = {digest_tensor(tensor, pace): tensor for tensor in reversed(tensors)}
        for tensor in wanted[layout]:
            match = by_digest.get(digest_tensor(tensor, pace))
            if match is not None:
                found[tensor.key] = match
