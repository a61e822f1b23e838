"""Turns what transformers' Trainer prepares for an optimizer into groups of masters."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from sift_train.groups import grouped_parameters
from sift_train.ranks.shard import fsdp_modules
from sift_train.sift import SIFT

# Their methods need the gradients of whole matrices; a master is a vector.
_OF_MATRICES = ("galore", "apollo", "lomo", "adalomo", "muon", "dion", "normuon")


def refuse_matrix_optimizer(name: str) -> None:
    """Refuse an optimizer that works on matrices or replaces the backward pass.

    Raises:
        ValueError: ``optim`` of the training arguments names one.
    """
    if name.split("_")[0] in _OF_MATRICES:
        raise ValueError(
            f"optim is {name!r}, which needs the gradients of whole matrices, but SIFT trains vectors of"
            " selected components; use 'adamw_torch' or another elementwise optimizer"
        )


def check_open(sift: Any) -> None:
    """Check that something is a SIFT that trains its model.

    Raises:
        TypeError: it is something else.
        ValueError: it is closed.
    """
    if not isinstance(sift, SIFT):
        raise TypeError(
            f"sift is of type {type(sift).__name__}, expected a SIFT; build one, SIFT(model, …), or give a SiftConfig to"
            " SiftTrainerMixin"
        )
    if sift.is_closed:
        raise ValueError("the SIFT is closed, so it trains nothing; build another one of the model")


def refuse_other_model(sift: SIFT, model: nn.Module) -> None:
    """Refuse a model that does not hold the parameters that a SIFT trains.

    Raises:
        ValueError: the model is another one.
    """
    if not set(sift.trainable_parameters()) <= set(model.parameters()):
        raise ValueError(
            f"the Trainer trains another {type(model).__name__} than the SIFT, as with model_init; give"
            " SiftTrainerMixin a SiftConfig, from which it builds the SIFT of its own model"
        )


def refuse_fsdp(args: Any, model: nn.Module | None) -> None:
    """Refuse FSDP under a Trainer, which would shard the model after its SIFT was built.

    Args:
        args: the training arguments.
        model: the Trainer's model, if it has one yet.

    Raises:
        ValueError: the arguments or accelerate's configuration ask for FSDP, or the model is sharded.
    """
    is_asked = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("true", "1")
    if args.fsdp or is_asked or (model is not None and fsdp_modules(model)):
        raise ValueError(
            "FSDP is not supported under a Trainer, which shards the model after its SIFT has taken the parameters;"
            " call fully_shard on the model and train it with sift_train.fit or in your own loop"
        )


def optimizer_groups(sift: SIFT, weight_decay: float, kwargs: dict[str, Any]) -> list[Any]:
    """Return the parameter groups of an optimizer, and remove those that the keyword arguments hold.

    A Trainer may prepare groups of its own, such as those of sentence-transformers with a learning
    rate for each pattern of names. In these, masters replace the model's parameters. Parameters
    outside the model, such as those of a loss, are trained as they are.

    Args:
        sift: the SIFT of the Trainer's model.
        weight_decay: of matrices, if the Trainer has prepared no groups.
        kwargs: the optimizer's keyword arguments, from ``get_optimizer_cls_and_kwargs``.
    """
    prepared: Sequence[Mapping[str, Any]] | None = None
    for key in ("params", "optimizer_dict"):
        prepared = kwargs.pop(key, prepared)
    if prepared is None:
        return grouped_parameters(sift, weight_decay)
    masters = {part.parameter: part.master for part in sift.sparse_mapping.values()}
    own = set(sift.model.parameters())
    groups = [
        {
            **group,
            "params": [masters.get(p, p) for p in group["params"] if p in masters or p not in own],
        }
        for group in prepared
    ]
    return [group for group in groups if group["params"]]


def log_sparse_lr(sift: SIFT, logs: dict[str, Any]) -> None:
    """Add the learning rate of sparsely trained parameters to an entry of Trainer's log, if it is another."""
    if sift.lr_transfer and "learning_rate" in logs:
        logs["sparse_learning_rate"] = sift.sparse_lr(logs["learning_rate"])
