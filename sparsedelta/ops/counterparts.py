"""Which base tensor each target tensor is best made from: by file and name, by name, by prefix, by content."""

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
    """Return the base tensor that each target tensor is compared with; those that have none are missing.

    In this order: the tensor of the same file and name; of the same name in a file of the same role
    (``files.shards``), or in any file if base or target has files of one role only; of the name
    with one prefix more or less, if most of the file's tensors have that; of the same content.

    Args:
        base: the base.
        target: the target.
        pace: told of nothing, but stops the reading of tensors that are compared by content.
    """
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
    """Return the best of the base tensors of one name."""
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
    """Add counterparts of the names with one prefix more or less."""
    left = [tensor for tensor in tensors if tensor.key not in found]
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
    """Return the prefix that most names have more than others, and the one they have less; one is empty.

    None: fewer than half of the names have a counterpart by any one prefix.
    """
    votes = Counter((prefix, "") for prefix in _prefixes(names, set(others)))
    votes += Counter(("", prefix) for prefix in _prefixes(others, set(names)))
    if not votes:
        return None
    best, n = votes.most_common(1)[0]
    return best if 2 * n > len(names) else None


def _prefixes(names: Iterable[str], others: Collection[str]) -> Iterable[str]:
    """Yield for each name every prefix of whole parts without which it is one of ``others``."""
    for name in names:
        start = name.find(".") + 1
        while start:
            if name[start:] in others:
                yield name[:start]
            start = name.find(".", start) + 1


def _add_by_content(
    base: Checkpoint, left: Sequence[Tensor], found: dict[TensorKey, Tensor], pace: Pace
) -> None:
    """Add counterparts that have the same bytes."""
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
