"""The names that users of PEFT know: ``get_sift_model`` and ``from_pretrained``."""

from __future__ import annotations

import logging
from os import PathLike
from typing import Any, TypeVar

from torch import nn

import sparsedelta
from sift_train.known import names_checked
from sift_train.sift_config import SiftConfig
from sift_train.yaml_files import names_of

logger = logging.getLogger(__name__)

M = TypeVar("M", bound=nn.Module)


@names_checked(
    elsewhere=names_of(SiftConfig), where="a setting of SiftConfig, which is given as config"
)
def get_sift_model(model: M, config: SiftConfig | None = None, *, grad_acc: int = 1) -> M:
    """Return the same model, with a SIFT as its attribute ``sift``; no module is replaced or wrapped.

    ``model.sift`` has ``parameters_in_optimizer``, ``print_trainable_parameters``, ``push_to_hub`` and ``close``.
    ``model.save_pretrained`` and ``model.push_to_hub`` are those of the model and save all weights. In a deep copy of the
    model ``sift`` is None.

    Args:
        model: a module without wrappers for several devices.
        config: what is trained; by default ``SiftConfig()``. ``selection_batches`` and ``reselection`` are for the Trainer's mixin only.
        grad_acc: micro-batches per optimizer step.

    Raises:
        TypeError: the model is not a module.
        ValueError: as ``SIFT``, or the model has another attribute ``sift``.
    """
    from torch import nn

    from sift_train.sift import SIFT

    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model is of type {type(model).__name__}, expected a torch.nn.Module; load it first, for example with"
            " transformers' from_pretrained"
        )
    if not isinstance(getattr(model, "sift", None), SIFT | None):
        raise ValueError(
            f"{type(model).__name__} has an attribute 'sift' of its own; build SIFT(model, ...) instead"
        )
    for name in ("reselection", "selection_batches"):
        if config is not None and getattr(config, name) is not None:
            logger.warning(
                "%s of the SiftConfig is for SiftTrainerMixin; in a loop of your own use %s",
                name,
                "sift.reselecting()" if name == "reselection" else "sift.selecting()",
            )
    holder: Any = model
    holder.sift = (config or SiftConfig()).build(model, grad_acc=grad_acc)
    return model


def from_pretrained(
    name: str | PathLike[str],
    *,
    base: str | PathLike[str] | None = None,
    model_class: Any = None,
    dtype: Any = "auto",
    device_map: Any = None,
) -> Any:
    """Return a transformers model with a delta applied, from a repository or a file.

    The repository's delta names its base at a commit; this commit is downloaded, and each tensor is checked.

    Args:
        name: a repository such as ``org/name`` or ``org/name@revision``, or an ``.sd`` file.
        base: the folder of the base; for a repository it may be left out.
        model_class: a transformers class; by default the one that the target's configuration names.
        dtype: as for ``from_pretrained`` of transformers.
        device_map: as for ``from_pretrained`` of transformers.

    Raises:
        SparseDeltaError: the repository is not available, the delta cannot be read, or the base is another one.
        ValueError: ``base`` is missing.
    """
    return sparsedelta.load_model(
        name, base=base, model_class=model_class, dtype=dtype, device_map=device_map
    )
