"""Four methods to train the same layers of a model: SIFT, full, and PEFT's LoRA and SHiRA.

SIFT, LoRA and SHiRA train the weights of the same linear layers and, when compared, equal numbers of
components. All of them train the modules in ``dense``, such as a new head, densely.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

import sift_train
from sift_train.checkpointing import enable_checkpointing

METHODS = ("sift", "full", "lora", "shira")
ADAPTERS = ("lora", "shira")
ALL_LINEAR = "all-linear"


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The choice of parameters to train.

    Attributes:
        targets: name fragments of the linear layers to train sparsely or to adapt, or
            ``"all-linear"``: all except the output embeddings and the modules in ``dense``.
        dense: names of modules to train densely, such as ``classifier``.
        rate: share of each layer's weight that SIFT trains.
        rank: rank of LoRA and SHiRA; None: the one nearest to the rate.
        selection: the rule by which SIFT chooses components.
        seed: seeds all randomness.
    """

    targets: Sequence[str] = (ALL_LINEAR,)
    dense: Sequence[str] = ()
    rate: float = 0.01
    rank: int | None = None
    selection: Any = "gradient"
    seed: int = 0


@dataclass(kw_only=True)
class Adapted:
    """A model prepared for training by one method.

    Attributes:
        model: the model to train; for LoRA and SHiRA the given model in a wrapper of PEFT.
        trained: the parameters for the optimizer, by name; for SIFT the masters.
        n_trained: number of components in ``trained``, without those of ``dense``.
        n_dense: number of components of ``dense``.
        sift: the SIFT, None for other methods.
    """

    method: str
    model: Any
    trained: dict[str, nn.Parameter]
    n_trained: int
    n_dense: int
    dense: Sequence[str]
    sift: sift_train.SIFT | None = None
    decays: frozenset[str] = frozenset()

    def groups(
        self, lr: float, *, weight_decay: float = 0.0, dense_lr: float | None = None
    ) -> list[dict[str, Any]]:
        """Return optimizer groups: weight decay on all but biases and norms."""
        found: dict[tuple[bool, bool], list[nn.Parameter]] = {}
        for name, parameter in self.trained.items():
            key = (is_of(name, self.dense), name in self.decays)
            found.setdefault(key, []).append(parameter)
        return [
            {
                "params": parameters,
                "lr": dense_lr if is_dense and dense_lr is not None else lr,
                "weight_decay": weight_decay if decays else 0.0,
            }
            for (is_dense, decays), parameters in found.items()
        ]

    def callbacks(self) -> list[TrainerCallback]:
        """Return the callbacks that a Trainer of transformers needs."""
        return [sift_train.SiftCallback(self.sift)] if self.sift is not None else []

    def select(self, batches: Iterable[Mapping[str, Any]]) -> None:
        """Choose the components by the gradients of these batches, if the rule uses gradients."""
        parts = [] if self.sift is None else self.sift.sparse_mapping.values()
        if self.sift is None or all(part.is_selected for part in parts):
            return
        self.model.train()
        with self.sift.selecting():
            for batch in batches:
                here = {name: value.to(self.model.device) for name, value in batch.items()}
                self.model(**here).loss.backward()

    def snapshot(self) -> dict[str, Tensor]:
        """Return the current state of the training, copied to the CPU."""
        return {n: p.detach().to("cpu", copy=True) for n, p in self.trained.items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Restore a snapshot."""
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(state[name])
        if self.sift is not None:
            self.sift.write_back()

    def finish(self) -> Any:
        """Return the trained model with adapters merged and hooks removed."""
        if self.sift is not None:
            self.sift.close()
            return self.model
        return self.model.merge_and_unload() if self.method in ADAPTERS else self.model


def adapt(
    model: Any, method: str, choice: Choice, *, grad_acc: int = 1, checkpointing: bool = False
) -> Adapted:
    """Prepare a model, in place, for training by a method.

    Args:
        model: a model of transformers on its final device.
        method: one of ``METHODS``.
        choice: the parameters to train.
        grad_acc: micro-batches per optimizer step.
        checkpointing: recompute activations in the backward pass.

    Raises:
        ValueError: the choice matches nothing, or the method is not known.
    """
    layers = find_layers(model, choice)
    if checkpointing:
        model.config.use_cache = False
        enable_checkpointing(model)
    if method == "sift":
        return _sparse(model, choice, layers, grad_acc)
    if method == "full":
        model.requires_grad_(True)
    elif method in ADAPTERS:
        model = _with_adapters(model, method, choice, layers, checkpointing=checkpointing)
    else:
        raise ValueError(f"method is {method!r}; choose one of {', '.join(METHODS)}")
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    n_dense = sum(p.numel() for n, p in trained.items() if is_of(n, choice.dense))
    return Adapted(
        method=method,
        model=model,
        trained=trained,
        n_trained=sum(p.numel() for p in trained.values()) - n_dense,
        n_dense=n_dense,
        dense=choice.dense,
        decays=frozenset(n for n, p in trained.items() if p.dim() > 1 or "shira_" in n),
    )


def _sparse(model: Any, choice: Choice, layers: Mapping[str, nn.Module], grad_acc: int) -> Adapted:
    sift = sift_train.SIFT(
        model,
        choice.rate,
        *sift_names(layers, choice),
        grad_acc=grad_acc,
        selection=choice.selection,
        seed=choice.seed,
        lr_transfer=False,
    )
    parts = sift.sparse_mapping
    n_dense = sum(part.train_num for part in parts.values() if part.is_dense)
    return Adapted(
        method="sift",
        model=model,
        trained={name: part.master for name, part in parts.items()},
        n_trained=sift.n_trained - n_dense,
        n_dense=n_dense,
        dense=choice.dense,
        sift=sift,
        decays=frozenset(name for name, part in parts.items() if part.parameter.dim() > 1),
    )


def sift_names(layers: Iterable[str], choice: Choice) -> tuple[list[str], list[str]]:
    """Return the arguments that give SIFT or ``plan`` the same layers and dense modules."""
    return (
        [f"re:^{re.escape(name)}[.]weight$" for name in layers],
        [f"re:(^|[.]){re.escape(name)}[.]" for name in choice.dense],
    )


def _with_adapters(
    model: Any, method: str, choice: Choice, layers: Mapping[str, Any], *, checkpointing: bool
) -> Any:
    from peft import LoraConfig, ShiraConfig, get_peft_model  # takes seconds

    rank = rank_of(choice, layers)
    # Name each leaf module: PEFT's SHiRA cannot merge with a module that only contains others.
    dense = [
        name
        for name, module in model.named_modules()
        if is_of(f"{name}.", choice.dense)
        and next(module.parameters(recurse=False), None) is not None
    ]
    shared: dict[str, Any] = {
        "r": rank, "target_modules": list(layers), "modules_to_save": dense or None,
    }  # fmt: skip
    if method == "lora":
        config: Any = LoraConfig(lora_alpha=2 * rank, **shared)
    else:
        config = ShiraConfig(random_seed=choice.seed, **shared)
        # SHiRA does not set whether its sparse tensors are checked, so torch warns.
        torch.sparse.check_sparse_tensor_invariants.disable()
    if checkpointing:
        model.enable_input_require_grads()
    with warnings.catch_warnings():
        # PEFT 0.21 uses a name that transformers 5.23 has changed.
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        return get_peft_model(model, config)


def find_layers(model: Any, choice: Choice) -> dict[str, Any]:
    """Return the linear layers that a choice names.

    Raises:
        ValueError: a fragment of ``targets`` or a name in ``dense`` occurs in no module name.
    """
    modules = dict(model.named_modules())
    for name in choice.dense:
        if not any(is_of(f"{module}.", [name]) for module in modules):
            raise ValueError(
                f"{type(model).__name__} has no module {name!r} to train densely; "
                f"it has {', '.join(n for n, _ in model.named_children())}"
            )
    head = getattr(model, "get_output_embeddings", lambda: None)()
    linear = {
        name: module
        for name, module in modules.items()
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
        if module is not head and not is_of(f"{name}.", choice.dense)
    }
    found = {}
    for fragment in choice.targets:
        own = {n: m for n, m in linear.items() if fragment == ALL_LINEAR or fragment in n}
        if not own:
            raise ValueError(
                f"no linear layer of {type(model).__name__} has {fragment!r} in its name; "
                f"there are, for example, {', '.join(list(linear)[:8])}"
            )
        found.update(own)
    return {name: module for name, module in linear.items() if name in found}


def is_of(parameter: str, modules: Sequence[str]) -> bool:
    """Return whether a parameter belongs to one of these modules."""
    return any(f".{name}." in f".{parameter}" for name in modules)


def rank_of(choice: Choice, layers: Mapping[str, Any]) -> int:
    """Return the chosen rank, or the one whose adapter is nearest to the rate."""
    if choice.rank is not None:
        return choice.rank
    n_all, n_per_rank = sizes(layers)
    return max(1, round(choice.rate * n_all / n_per_rank))


def equalized(model: Any, choice: Choice, methods: Sequence[str]) -> Choice:
    """Return a choice with which all methods train equal numbers of components.

    The rank of adapters is an integer, so it determines the number. If SIFT is compared with an
    adapter, it gets the rate that gives the same number, up to one component per layer.
    """
    if not set(methods) & set(ADAPTERS):
        return choice
    layers = find_layers(model, choice)
    rank = rank_of(choice, layers)
    n_all, n_per_rank = sizes(layers)
    rate = rank * n_per_rank / n_all
    if rate > 1:
        raise ValueError(f"rank {rank} is more than these layers have components; lower it")
    return replace(choice, rank=rank, rate=rate if "sift" in methods else choice.rate)


def sizes(layers: Mapping[str, Any]) -> tuple[int, int]:
    """Return the number of components of the layers' weights, and of adapters of rank 1."""
    shapes = [module.weight.shape for module in layers.values()]
    return sum(math.prod(shape) for shape in shapes), sum(sum(shape) for shape in shapes)
