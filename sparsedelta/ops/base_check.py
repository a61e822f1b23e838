"""Whether a checkpoint is a delta's base: its structure first, then what a wrong tensor means (FORMAT §10)."""

from __future__ import annotations

from collections.abc import Sequence

from sparsedelta.errors import (
    AlreadyApplied,
    BaseMismatch,
    MismatchError,
    PartlyApplied,
    StructureMismatch,
)
from sparsedelta.files import junk
from sparsedelta.files.checkpoint import Checkpoint, Tensor
from sparsedelta.format.delta import Delta
from sparsedelta.format.records import DIGEST_BYTES, TensorDelta, TensorSpec
from sparsedelta.progress import Silent
from sparsedelta.tensors.compare import digest_tensor
from sparsedelta.tensors.parallel import Pace


def included(delta: Delta) -> Sequence[str] | None:
    """Return what ``Checkpoint`` includes where this delta is used: all if the delta names ``files.junk``.

    Otherwise such files are left out, as they were when the delta was made.
    """
    target = delta.target
    paths = [file.path for file in target.weight_files]
    paths += [file.path for file in target.side_files]
    paths += [row.name.rpartition(":")[0] for row in delta.tensors if ":" in row.name]
    names_junk = any(
        junk.matches(component, junk.NOT_PART)
        for path in set(paths)
        for component in path.split("/")
    )
    return None if names_junk else ()


def check_structure(delta: Delta, base: Checkpoint) -> None:
    """Check that the base has just the tensors that the delta was made from, by name, dtype, shape.

    Weight sets of which the delta names no tensor are not looked at.

    Raises:
        StructureMismatch: it has not.
    """
    for row in delta.tensors:
        found = base.tensors.get(row.name)
        if row.base and (found is None or not _fits(found, row.base)):
            raise _structure_error(delta, base, row.name, found, row.base)
    named = {row.name for row in delta.tensors}
    expected = {row.name for row in delta.tensors if row.base}
    for group in base.sets:
        further = sorted(group - expected)
        if further and not group.isdisjoint(named):
            raise _structure_error(delta, base, further[0], base.tensors[further[0]], None)


def explain_mismatch(
    delta: Delta, base: Checkpoint, row: TensorDelta, digest: bytes
) -> MismatchError:
    """Return the error that tells what the base is, one of its tensors not being the delta's base's.

    Args:
        delta: being applied; the structure of ``base`` has been checked.
        base: what it is applied to.
        row: of the tensor found to differ.
        digest: that tensor's digest in ``base``.
    """
    other = _neither(delta, row, digest)
    if other is None:
        pace = Pace(Silent())
        n_target = 0
        for changed in delta.tensors:
            if changed.base is None or (changed.change is None and changed.target is not None):
                continue
            found = digest_tensor(base.tensors[changed.name], pace)
            if found[:DIGEST_BYTES] == changed.base.digest:
                continue
            n_target += 1
            other = _neither(delta, changed, found)
            if other is not None:
                break
        else:
            return _applied_error(delta, base, row, n_target)
    return other


def _applied_error(
    delta: Delta, base: Checkpoint, row: TensorDelta, n_target: int
) -> MismatchError:
    due = [r for r in delta.tensors if r.change is not None or r.target is None]
    if n_target == len(due):
        return AlreadyApplied(
            f"'{base.path}' already is this delta's target; there is nothing to do", tensor=row.name
        )
    return PartlyApplied(
        f"'{base.path}' has {n_target} of {len(due)} changed tensors as in this delta's target,"
        f" {row.name!r} among them, and the others as in its base; apply it to the base{_made_from(delta)}",
        tensor=row.name,
    )


def _neither(delta: Delta, row: TensorDelta, digest: bytes) -> BaseMismatch | None:
    """Return the error for a tensor that is neither the base's nor the target's."""
    found = digest[:DIGEST_BYTES]
    if row.change is not None and row.target is not None and row.target.digest == found:
        return None
    expected = row.base.digest if row.base and row.base.digest else b""
    return BaseMismatch(
        f"tensor {row.name!r} has digest {found.hex()[:12]}… in the base, expected"
        f" {expected.hex()[:12]}…; this is not the base that the delta was made"
        f" from{_made_from(delta)}",
        tensor=row.name,
        expected=expected.hex(),
        found=found.hex(),
    )


def _structure_error(
    delta: Delta, base: Checkpoint, name: str, found: Tensor | None, expected: TensorSpec | None
) -> StructureMismatch:
    hint = "; it is the target: the delta is applied already" if _is_target(delta, base) else ""
    return StructureMismatch(
        f"tensor {name!r} in '{base.path}' is {_shown(found)}, expected {_shown(expected)}; this is"
        f" not the base that the delta was made from{_made_from(delta)}{hint}",
        tensor=name,
        expected=_shown(expected),
        found=_shown(found),
    )


def _is_target(delta: Delta, base: Checkpoint) -> bool:
    """Return whether a checkpoint has the target's tensors, and its bytes in the smallest that is changed."""
    alters_structure = any(
        row.base is None or row.target is None or not row.base.same_layout(row.target)
        for row in delta.tensors
    )
    if not alters_structure:
        return False
    targets = {row.name: row.target for row in delta.tensors if row.target}
    if not all(n in base.tensors and _fits(base.tensors[n], spec) for n, spec in targets.items()):
        return False
    changed = [row.name for row in delta.tensors if row.change and row.name in targets]
    if not changed:
        return False
    name = min(changed, key=lambda name: targets[name].n_bytes)
    digest = digest_tensor(base.tensors[name], Pace(Silent()))[:DIGEST_BYTES]
    return digest == targets[name].digest


def _fits(found: Tensor, spec: TensorSpec) -> bool:
    return found.dtype is spec.dtype and found.shape == spec.shape


def _shown(tensor: Tensor | TensorSpec | None) -> str:
    return f"{tensor.dtype.name} {list(tensor.shape)}" if tensor else "absent"


def _made_from(delta: Delta) -> str:
    return f", {delta.base.id}" if delta.base.id else ""
