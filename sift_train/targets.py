"""Finds the parameters to train, sparsely or densely; a tied parameter is found once.

A parameter that cannot be trained in place raises an error before the model is changed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sift_train.ranks.shard import is_sharded, local_part

ALL_LINEAR = "all-linear"
REGEX = "re:"

Names = str | re.Pattern[str] | Sequence[str | re.Pattern[str]]

TRAINABLE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_SHARDED = "is sharded over several devices; train an unsharded model"
_WRAPPERS = ("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel")


@dataclass(frozen=True)
class Target:
    """One parameter to train.

    Attributes:
        name: the parameter's first name in the model.
        parameter: the parameter itself, not a copy.
        dense: whether all of its components are trained.
    """

    name: str
    parameter: nn.Parameter
    dense: bool


def find_targets(
    model: nn.Module, sparse_module: Names, exception: Names, *, needs_values: bool = True
) -> list[Target]:
    """Return the parameters to train, in the model's order.

    A fragment matches a parameter if it occurs in any of its names; a tied weight has several. A
    regular expression, compiled or written ``"re:..."``, matches if it is found anywhere in a name.

    Args:
        model: not wrapped for several devices.
        sparse_module: name fragments, or ``"all-linear"``: the weights of all linear layers except
            the output embeddings.
        exception: name fragments of parameters to train densely, also if ``sparse_module`` matches
            them.
        needs_values: raise for parameters on the meta device.

    Raises:
        ValueError: a fragment matches nothing, or a matched parameter cannot be trained in place.
    """
    _check_unwrapped(model)
    names = _names_of_parameters(model)
    dense = _matching(names, _fragments(exception), "exception")
    if sparse_module == ALL_LINEAR:
        sparse = _linear_weights(model)
    else:
        sparse = _matching(names, _fragments(sparse_module), "sparse_module")
    targets = [
        Target(own[0], parameter, parameter in dense)
        for parameter, own in names.items()
        if (parameter in dense or parameter in sparse) and parameter.numel()
    ]
    if not targets:
        raise ValueError(
            f"{type(model).__name__}: no parameter is selected for training; "
            f"name fragments of parameters in sparse_module, such as {next(iter(names.values()))[0]!r}"
            if names
            else f"{type(model).__name__} has no parameters; there is nothing to train"
        )
    _refuse_untrainable(model, targets, needs_values=needs_values)
    return targets


def _fragments(value: Names) -> tuple[str | re.Pattern[str], ...]:
    fragments: tuple[Any, ...] = (value,) if isinstance(value, str | re.Pattern) else tuple(value)
    for fragment in fragments:
        if not isinstance(fragment, str | re.Pattern) or not fragment:
            raise ValueError(f"name fragment {fragment!r} is not a non-empty string")
    return tuple(map(_compiled, fragments))


def _compiled(fragment: str | re.Pattern[str]) -> str | re.Pattern[str]:
    if not isinstance(fragment, str) or not fragment.startswith(REGEX):
        return fragment
    try:
        return re.compile(fragment.removeprefix(REGEX))
    except re.error as error:
        raise ValueError(f"{fragment!r} is not a regular expression: {error}") from error


def _occurs(fragment: str | re.Pattern[str], name: str) -> bool:
    return fragment in name if isinstance(fragment, str) else fragment.search(name) is not None


def _names_of_parameters(model: nn.Module) -> dict[nn.Parameter, list[str]]:
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    return names


def _matching(
    names: dict[nn.Parameter, list[str]],
    fragments: tuple[str | re.Pattern[str], ...],
    argument: str,
) -> set[nn.Parameter]:
    found: set[nn.Parameter] = set()
    for fragment in fragments:
        matches = {p for p, own in names.items() if any(_occurs(fragment, name) for name in own)}
        if not matches:
            shown = fragment if isinstance(fragment, str) else REGEX + fragment.pattern
            raise ValueError(
                f"{argument} has {shown!r}, which occurs in no parameter name; "
                "compare it with the names that model.named_parameters() gives"
            )
        found |= matches
    return found


def _linear_weights(model: nn.Module) -> set[nn.Parameter]:
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return {
        module.weight
        for module in model.modules()
        if (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D")
        and module is not head
        and isinstance(module.weight, nn.Parameter)
    }


def check_saves_weights(model: nn.Module, *, may_be_sharded: bool = False) -> None:
    """Check that a model is saved with the parameters that are trained.

    Raises:
        ValueError: it is wrapped for several devices, sharded, or has PEFT adapters.
    """
    _check_unwrapped(model)
    if not may_be_sharded:
        check_unsharded(model)
    for module in model.modules():
        kind = type(module).__name__
        if kind.startswith("PeftModel") or _is_adapter(module):
            raise ValueError(
                f"the model contains a {kind} of PEFT, and a model with adapters is saved as its adapters"
                " alone; give the model without them, or what merge_and_unload() returns"
            )


def _check_unwrapped(model: nn.Module) -> None:
    for module in model.modules():
        kind = type(module).__name__
        if kind in _WRAPPERS:
            raise ValueError(
                f"the model contains a {kind}, whose gradients differ from those of the parameters;"
                " give the model without this wrapper"
            )
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "ds_id"):
            raise ValueError(f"parameter {name!r} {_SHARDED}")


def check_unsharded(model: nn.Module) -> None:
    """Check that this process holds the whole model.

    Raises:
        ValueError: a parameter is a DTensor.
    """
    for name, parameter in model.named_parameters():
        if is_sharded(parameter):
            raise ValueError(f"parameter {name!r} {_SHARDED}")


def _is_adapter(module: nn.Module) -> bool:
    return any(base.__name__ == "BaseTunerLayer" for base in type(module).__mro__)


def _refuse_untrainable(model: nn.Module, targets: list[Target], *, needs_values: bool) -> None:
    sparse_gradients = {
        parameter
        for module in model.modules()
        if getattr(module, "sparse", False) and isinstance(module, nn.Embedding | nn.EmbeddingBag)
        for parameter in module.parameters(recurse=False)
    }
    first_at: dict[tuple[torch.device, int], str] = {}
    for target in targets:
        parameter = target.parameter
        problem = _problem(parameter, sparse_gradients, needs_values=needs_values)
        if problem:
            raise ValueError(f"parameter {target.name!r} {problem}")
        held = local_part(parameter)
        if held.is_meta or not held.numel():
            continue
        other = first_at.setdefault((held.device, held.data_ptr()), target.name)
        if other != target.name:
            raise ValueError(
                f"parameters {other!r} and {target.name!r} share the same memory; "
                "make them one parameter, or leave one of them out"
            )


def _problem(
    parameter: nn.Parameter, sparse_gradients: set[nn.Parameter], *, needs_values: bool
) -> str | None:
    if is_sharded(parameter):
        sharded: Any = parameter
        if not all(each.is_shard() or each.is_replicate() for each in sharded.placements):
            return f"has the placements {sharded.placements}, expected shards or replicas"
    held = local_part(parameter)
    if type(held) is not Tensor:
        return (
            f"holds a {type(held).__name__}, expected a plain tensor; "
            "load the model unquantized and with its weights, or leave this parameter out"
        )
    if held.is_meta and needs_values:
        return "is on the meta device and has no values; load the model's weights first"
    if parameter.dtype not in TRAINABLE:
        return (
            f"has dtype {parameter.dtype}, expected float16, bfloat16, float32 or float64; "
            "load the model unquantized, or leave this parameter out"
        )
    if parameter in sparse_gradients:
        return "belongs to an embedding with sparse=True; build the embedding with sparse=False"
    if not held.is_contiguous():
        return (
            f"is not contiguous (shape {tuple(parameter.shape)}, strides {parameter.stride()}); "
            "replace its data by data.contiguous()"
        )
    return None
