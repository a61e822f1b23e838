"""Finds the parameters to train, sparsely or densely; a tied parameter is found once.

A parameter that cannot be trained in place raises an error before the model is changed.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sift_train.ranks.shard import is_sharded, local_part
from sift_train.reach import conv_weights, left_out, linear_weights, n_matrices, reached_share
from sift_train.selection import n_selected
from sift_train.structure import Block, n_of_blocks, n_of_rows

logger = logging.getLogger(__name__)

ALL_LINEAR = "all-linear"
ALL_CONV = "all-conv"
REGEX = "re:"
_KINDS = {ALL_LINEAR: linear_weights, ALL_CONV: conv_weights}

Names = str | re.Pattern[str] | Sequence[str | re.Pattern[str]]

TRAINABLE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_COMPILED = "_orig_mod."
_SHARDED = "is sharded over several devices; train an unsharded model"
_QUANTIZERS = ("bitsandbytes", "torchao", "optimum", "quanto", "hqq")  # packages
_NOT_EXACT = (
    "a packed weight holds rounded numbers, so a delta cannot state a trained component exactly; load the model"
    " unquantized, or train parameters that are not quantized, such as norms (sparse_module)"
)
_WRAPPERS = ("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel")


@dataclass(frozen=True)
class Target:
    """One parameter to train.

    Attributes:
        name: the parameter's first name in the model.
        parameter: the parameter itself, not a copy.
        dense: whether all of its components are trained.
        n_matrices: number of matrices in it, such as one for each expert; the rate holds for each.
    """

    name: str
    parameter: nn.Parameter
    dense: bool
    n_matrices: int = 1

    def n_trained(self, rate: float, budget: str = "tensor", block: Block | None = None) -> int:
        """Return the number of components that a rate selects, all of them if it is dense.

        If the blocks at the edge of a matrix are smaller than others, it is the largest number.
        """
        numel = self.parameter.numel()
        if self.dense:
            return numel
        if block is not None:
            return n_of_blocks(self.parameter.shape, self.n_matrices, rate, block)
        if budget == "row":
            return n_of_rows(self.parameter.shape, self.n_matrices, rate)
        return self.n_matrices * n_selected(numel // self.n_matrices, rate)


def find_targets(
    model: nn.Module, sparse_module: Names, exception: Names, *, needs_values: bool = True
) -> list[Target]:
    """Return the parameters to train, in the model's order.

    A fragment matches a parameter if it occurs in any of its names; a tied weight has several. A
    regular expression, compiled or written ``"re:..."``, matches if it is found anywhere in a name.

    Args:
        model: not wrapped for several devices.
        sparse_module: name fragments, or ``"all-linear"``: the weights of all linear layers and
            experts, without the output embeddings; or ``"all-conv"``: those of all convolutions. Both
            may also be in a list.
        exception: name fragments of parameters to train densely, also if ``sparse_module`` matches
            them.
        needs_values: raise for parameters on the meta device.

    Raises:
        ValueError: a fragment matches nothing, or a matched parameter cannot be trained in place.
    """
    _check_unwrapped(model)
    names = names_of_parameters(model)
    dense = _matching(model, names, _fragments(exception, "exception"), "exception")
    sparse = _matching(model, names, _fragments(sparse_module, "sparse_module"), "sparse_module")
    stacked = n_matrices(model)
    targets = [
        Target(own[0], parameter, parameter in dense, stacked.get(parameter, 1))
        for parameter, own in names.items()
        if (parameter in dense or parameter in sparse) and parameter.numel()
    ]
    if not targets and (kind := _quantizer_of(model)):
        raise ValueError(
            f"{type(model).__name__}: no parameter is selected for training; its weights are quantized ({kind}),"
            f" and {_NOT_EXACT}"
        )
    if not targets:
        raise ValueError(
            f"{type(model).__name__}: no parameter is selected for training, because none matches sparse_module,"
            f" {sparse_module!r}; give fragments of names, such as {next(iter(names.values()))[0]!r}"
            if names
            else f"{type(model).__name__} has no parameters; there is nothing to train"
        )
    _refuse_untrainable(model, targets, needs_values=needs_values)
    if sparse_module == ALL_LINEAR:
        _log_left_out(model, {target.parameter for target in targets})
    return targets


def _log_left_out(model: nn.Module, trained: set[nn.Parameter]) -> None:
    level = logging.WARNING if reached_share(model, trained) < 0.5 else logging.INFO
    logger.log(level, "%r: %s", ALL_LINEAR, left_out(model, trained))


def _fragments(value: Names, argument: str) -> tuple[str | re.Pattern[str], ...]:
    if not isinstance(value, str | re.Pattern | Iterable):
        raise ValueError(
            f"{argument} is {value!r}; it must be a name fragment, or a list of them, such as {ALL_LINEAR!r}"
        )
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


def names_of_parameters(model: nn.Module) -> dict[nn.Parameter, list[str]]:
    """Return all names of each parameter, without the prefix that ``torch.compile`` adds."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name.replace(_COMPILED, ""))
    return names


def _matching(
    model: nn.Module,
    names: dict[nn.Parameter, list[str]],
    fragments: tuple[str | re.Pattern[str], ...],
    argument: str,
) -> set[nn.Parameter]:
    found: set[nn.Parameter] = set()
    for fragment in fragments:
        if isinstance(fragment, str) and fragment in _KINDS:
            found |= _KINDS[fragment](model)
            continue
        matches = {p for p, own in names.items() if any(_occurs(fragment, name) for name in own)}
        if not matches:
            shown = fragment if isinstance(fragment, str) else REGEX + fragment.pattern
            similar = next(
                (n for own in names.values() for n in own if shown.lower() in n.lower()), None
            )
            hint = (
                f"but {similar!r} differs only in upper and lower case"
                if similar
                else "compare it with the names that model.named_parameters() gives"
            )
            raise ValueError(f"{argument} has {shown!r}, which occurs in no parameter name; {hint}")
        found |= matches
    return found


def check_saves_weights(model: nn.Module, *, may_be_sharded: bool = False) -> None:
    """Check that a model is saved with the parameters that are trained.

    Raises:
        ValueError: it is wrapped for several devices, sharded, or has PEFT adapters.
    """
    _check_unwrapped(model)
    if not may_be_sharded:
        check_unsharded(model)
    problem = _adapters_in(model)
    if problem:
        raise ValueError(problem)


def warn_of_adapters(model: nn.Module) -> None:
    """Log a warning if a model has PEFT adapters, since ``export_delta`` will not write its delta."""
    problem = _adapters_in(model)
    if problem:
        logger.warning("export_delta will refuse this model: %s", problem)


def _adapters_in(model: nn.Module) -> str | None:
    for module in model.modules():
        kind = type(module).__name__
        if kind.startswith("PeftModel") or _is_adapter(module):
            return (
                f"the model contains a {kind} of PEFT, and a model with adapters is saved as its adapters"
                " alone; give the model without them, or what merge_and_unload() returns"
            )
    return None


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


def _quantizer_of(model: nn.Module) -> str | None:
    """Return the class name of the quantizer with which transformers has loaded a model, None if there is none."""
    found = (getattr(module, "hf_quantizer", None) for module in model.modules())
    return next((type(one).__name__ for one in found if one is not None), None)


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
    for kind in (type(parameter), type(held)):
        if kind.__module__.partition(".")[0] in _QUANTIZERS:
            return f"is quantized ({kind.__name__}), and {_NOT_EXACT}"
    if type(held) is not Tensor:
        return (
            f"holds a {type(held).__name__}, expected a plain tensor; "
            "load the model with plain weights, or leave this parameter out"
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
