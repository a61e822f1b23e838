"""Whether a tensor of a model is the one that a row of a delta describes, and can be changed in place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from sparsedelta.errors import StructureMismatch
from sparsedelta.format.records import Row, TensorKey, TensorSpec
from sparsedelta.live.bits import (
    is_read_only,
    overlaps_itself,
    shape_in_file,
    torch_dtype,
    wire_name,
)
from sparsedelta.live.held import Held, parts_of, whole_digest
from sparsedelta.live.slots import AnySlot, memory_of

if TYPE_CHECKING:
    import torch


def matching_rows(
    rows: Sequence[Row], slot: AnySlot | None, slot_of: Callable[[TensorKey], AnySlot | None]
) -> list[Row]:
    """Return the rows that describe a tensor of the model: one changed row, else all unchanged rows that fit.

    If no row fits and none is changed, all rows are returned.

    Args:
        rows: the rows with the tensor's name, from different files.
        slot: the tensor; None if the model has no tensor of this name.
        slot_of: returns the slot of a tensor of the base, or None.

    Raises:
        StructureMismatch: several rows with different changes fit; or no row fits, and one of them is changed.
    """
    tensor = None if slot is None else slot.tensor()
    fitting = [row for row in rows if is_in_place(row) and fits(row, tensor)]
    changed = [row for row in fitting if row.chunks]
    for other in changed[1:]:
        if not same_change(changed[0], other):
            raise _ambiguous_error(changed[0], other)
    if fitting:
        return changed[:1] or fitting
    for row in rows:
        if is_in_place(row):
            if row.chunks and tensor is not None:
                raise misfit_error(row, tensor)
        elif not _is_tied_copy(row, slot, slot_of):
            raise _not_in_place_error(row, tensor)
    return [*rows]


def is_in_place(row: Row) -> bool:
    """Return whether a row only changes elements, so that name, dtype and shape are those of the base."""
    return row.base is not None and row.base.name == row.name and row.keeps_all


def fits(row: Row, tensor: Held | None) -> bool:
    """Return whether a tensor has the dtype and the shape of a row's target."""
    target = row.target
    return (
        tensor is not None
        and tensor.dtype == torch_dtype(target.dtype)
        and shape_in_file(tensor.dtype, tensor.shape) == target.shape
    )


def _is_tied_copy(
    row: Row, slot: AnySlot | None, slot_of: Callable[[TensorKey], AnySlot | None]
) -> bool:
    """Return whether a row is a copy of another tensor of the base that the model ties to this one."""
    if slot is None or row.base is None or not (row.is_copied and row.keeps_all):
        return False
    base_slot = slot_of(row.base.key)
    return base_slot is not None and memory_of(base_slot.tensor()) == memory_of(slot.tensor())


def same_change(row: Row, other: Row) -> bool:
    """Return whether two rows have the same tensor in the base, and the same in the target."""
    if row is other:
        return True
    if row.base is None or other.base is None or row.base.spec != other.base.spec:
        return False
    if row.target.digest is not None and other.target.digest is not None:
        return row.target == other.target
    # If a digest is missing, compare the spans and counts of the chunks and the digests of touched values.
    changes = [[(c.start, c.span, c.nnz, c.touched) for c in one.chunks] for one in (row, other)]
    return changes[0] == changes[1] and all(chunk.touched for chunk in row.chunks)


def has_contents(row: Row, tensor: Held) -> bool:
    """Return whether a tensor of a model has the contents of a tensor of the base or of the target."""
    known = {row.target.digest, row.base.spec.digest if row.base else None} - {None}
    return not known or whole_digest(tensor) in known


def _not_in_place_error(row: Row, tensor: Held | None) -> StructureMismatch:
    base, name = row.base, repr(row.name)
    if base is None:
        problem = f"{'adds' if tensor is None else 'replaces'} tensor {name}"
    elif base.name != row.name:
        problem = f"makes tensor {name} from tensor {base.name!r}"
    else:
        problem = f"changes tensor {name} from {shown(base.spec)} to {shown(row.target)}"
    return StructureMismatch(
        f"the delta {problem}, which is not possible in a model in memory; load the target (load_model)",
        tensor=row.name,
        expected=shown(base.spec if base else None),
        found=shown(row.target),
    )


def _ambiguous_error(row: Row, other: Row) -> StructureMismatch:
    return StructureMismatch(
        f"tensor {row.name!r} of the model may be that of {row.file!r} or of {other.file!r}, and the delta"
        f" changes both; leave one out, as with names={{({other.file!r}, {other.name!r}): None}}",
        tensor=row.name,
    )


def misfit_error(row: Row, tensor: Held) -> StructureMismatch:
    """Return the error of a tensor whose dtype or shape is not that of a row's target."""
    shape = shape_in_file(tensor.dtype, tensor.shape)
    expected, found = row.target, f"{wire_name(tensor.dtype)} {list(shape)}"
    other_dtype = shape == expected.shape
    hint = f"; load the model in {expected.dtype.name}" if other_dtype else ""
    if other_dtype and found.startswith("F32"):
        hint += ", or load the target (load_model) if transformers always keeps this tensor in F32"
    return StructureMismatch(
        f"tensor {row.name!r} is {found} in the model, expected {shown(expected)}{hint}",
        tensor=row.name,
        expected=shown(expected),
        found=found,
    )


def check_usable(row: Row, tensor: Held) -> None:
    """Raise StructureMismatch unless the elements of a tensor can be read and changed one by one."""
    problem = next(filter(None, map(_unusable, parts_of(tensor))), None)
    if problem:
        raise StructureMismatch(
            f"tensor {row.name!r} {problem}, so its elements cannot be changed in place",
            tensor=row.name,
        )


def check_writable(row: Row, tensor: Held) -> None:
    """Raise StructureMismatch if a tensor is in read-only memory."""
    if any(map(is_read_only, parts_of(tensor))):
        raise StructureMismatch(
            f"tensor {row.name!r} is in read-only memory, such as a file mapped for reading; replace it in"
            " the model by a copy",
            tensor=row.name,
        )


def _unusable(tensor: torch.Tensor) -> str | None:
    import torch

    if tensor.is_meta:
        return (
            "holds no data (it is on the meta device); load the model without offloading, or load the target"
            " (load_model)"
        )
    if type(tensor.data) is not torch.Tensor:
        return f"is of type {type(tensor.data).__name__}, not a plain tensor"
    if tensor.layout != torch.strided or overlaps_itself(tensor):
        return "has elements that share memory, or is not a strided tensor"
    if tensor.is_inference() and not torch.is_inference_mode_enabled():
        return "was made in inference mode, which has ended"
    return None


def shown(spec: TensorSpec | None) -> str:
    """Return a tensor's dtype and shape as errors show them."""
    return "absent" if spec is None else f"{spec.dtype.name} {list(spec.shape)}"
