"""The mean change of each tensor of a checkpoint, by the checkpoint's names."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from torch import nn

from sift_train.basecheck import Reader, names_in_base, tensor_places
from sift_train.bits import mean_change
from sift_train.sift import SIFT
from sift_train.weightfiles import dtype_of


def mean_changes(
    sift: SIFT, model: nn.Module, *, base: Path, target: Path, is_renamed: bool
) -> dict[str, float]:
    """Return the mean |change| of the changed components of each tensor, by its name in the target.

    A trained parameter that is saved under its own name is compared in memory. The tensors of other
    names, such as those of separate experts, are read from both checkpoints.

    Args:
        sift: the SIFT that trained the model.
        model: the model.
        base: the base, with the same names as the target.
        target: the saved model.
        is_renamed: whether the target has the base's names instead of the module's.
    """
    dtype = dtype_of(model)
    places = tensor_places(target, dtype)
    own = [name for name, _ in model.named_parameters()]
    renamed = names_in_base(model, own, base) if is_renamed else {}
    parts = {renamed.get(name, name): part for name, part in sift.sparse_mapping.items()}
    found = {name: part.mean_change for name, part in parts.items() if name in places}
    if len(found) < len(parts):
        base_places = tensor_places(base, dtype)
        left = places.keys() & base_places.keys() - {renamed.get(name, name) for name in own}
        with ExitStack() as stack:
            read = Reader(stack)
            for name in sorted(left):
                before, after = read(base_places[name], name), read(places[name], name)
                found[name] = mean_change(before, after)
    return {name: mean for name, mean in found.items() if mean is not None}
