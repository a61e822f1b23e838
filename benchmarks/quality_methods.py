"""The methods that quality.py compares, each with its trained parameters."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sift_train import SIFT

HEAD = "re:^head"


class Task(Protocol):
    """A model to train, its data and its test."""

    targets: list[str]

    @property
    def n_steps(self) -> int:
        """Optimizer steps of a run."""

    def model(self, seed: int) -> nn.Module:
        """Return a new model."""

    def batches(self, seed: int) -> Iterator[Any]:
        """Yield the batches of a run."""

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the mean loss of a batch."""

    def evaluate(self, model: nn.Module, part: str) -> dict[str, float]:
        """Return the scores on a part of the data."""


@dataclass(frozen=True)
class Method:
    """One way to train a model.

    Attributes:
        name: ``"full"``, ``"lora"``, ``"rslora"``, ``"shira"`` or ``"sift"``.
        rank: rank of an adapter. SIFT trains as many components as an adapter of this rank; a rank below
            1 gives the share of the components instead.
        rule: how SIFT chooses: a rule's name, or ``"proportional"``: without replacement, with a probability
            proportional to the summed |gradient|.
        n_batches: batches whose gradients choose; 0 if the rule needs none.
    """

    name: str
    rank: float = 0
    rule: str = ""
    n_batches: int = 0

    @property
    def label(self) -> str:
        """The method's name in tables."""
        if self.name != "sift":
            return self.name
        several = f", {self.n_batches} batches" if self.n_batches > 1 else ""
        return f"SIFT {self.rule}" + (", 1 batch" if self.n_batches == 1 else several)


@dataclass(frozen=True)
class Trained:
    """The parameters that an optimizer trains.

    Attributes:
        body: those whose learning rate is compared.
        head: those of the head.
        sift: the SIFT, None for other methods.
    """

    body: list[nn.Parameter]
    head: list[nn.Parameter]
    sift: SIFT | None = None

    @property
    def n_trained(self) -> int:
        """Number of trained components, without the head's."""
        return sum(parameter.numel() for parameter in self.body)


def linear_layers(model: nn.Module, targets: Iterable[str]) -> dict[str, nn.Linear]:
    """Return the linear layers whose weights are targets, by name."""
    patterns = [target.removeprefix("re:") for target in targets]
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and any(re.search(pattern, f"{name}.weight") for pattern in patterns)
    }


def rate_of(layers: Mapping[str, nn.Linear], rank: float) -> float:
    """Return the rate at which SIFT trains as many components as an adapter of this rank.

    SIFT rounds the number for each tensor down and adds 1, so its sum is at most one per tensor larger.
    """
    if rank < 1:
        return rank
    n_adapter = sum(rank * sum(layer.weight.shape) for layer in layers.values())
    return n_adapter / sum(layer.weight.numel() for layer in layers.values())


def prepare(
    method: Method, task: Task, model: nn.Module, seed: int, chosen: dict[Any, dict[str, Tensor]]
) -> Trained:
    """Make a model ready for a method.

    Args:
        method: the method.
        task: gives the batches whose gradients choose.
        model: the model, changed in place.
        seed: of the run.
        chosen: choices of earlier runs, by method and seed; a choice does not depend on the learning rate.
            A new one is added.
    """
    if method.name == "full":
        named = list(model.named_parameters())
    elif method.name == "sift":
        if (method, seed) not in chosen:
            chosen[method, seed] = choose(method, task, seed)
        has_head = any(name.startswith("head") for name, _ in model.named_parameters())
        sift = SIFT(
            model,
            exception=[HEAD] if has_head else (),
            selection=chosen[method, seed],
            lr_transfer=False,
        )
        named = list(sift.named_parameters_in_optimizer())
        return Trained(*_split(named), sift)
    else:
        named = _adapt(method, task, model)
    return Trained(*_split(named))


def choose(method: Method, task: Task, seed: int) -> dict[str, Tensor]:
    """Return the flat indices that a method chooses, by parameter name."""
    model = task.model(seed)
    layers = linear_layers(model, task.targets)
    rate = rate_of(layers, method.rank)
    if method.rule == "proportional":
        sums = gradient_sums(task, seed, method.n_batches)
        return draw(sums, rate, torch.Generator().manual_seed(seed))
    weights = [f"re:^{re.escape(name)}\\.weight$" for name in layers]
    with SIFT(model, rate, weights, selection=method.rule, seed=seed, lr_transfer=False) as sift:
        if method.n_batches:
            torch.manual_seed(seed)
            with sift.selecting():
                for batch in itertools.islice(task.batches(seed), method.n_batches):
                    task.loss(model, batch).backward()
        return {name: part.flat_index.clone() for name, part in sift.sparse_mapping.items()}


def draw(sums: Mapping[str, Tensor], rate: float, generator: torch.Generator) -> dict[str, Tensor]:
    """Return flat indices of each tensor, drawn without replacement in proportion to the sums."""
    found = {}
    for name, values in sums.items():
        uniform = torch.rand(values.shape, generator=generator)
        keys = values.log() - (-uniform.log()).log()  # the largest of these are such a draw
        k = min(int(rate * values.numel()) + 1, values.numel())
        found[name] = keys.flatten().topk(k).indices.sort().values
    return found


def gradient_sums(
    task: Task, seed: int, n_batches: int, *, first: int = 0, all_parameters: bool = False
) -> dict[str, Tensor]:
    """Return Σ|gradient| over batches of the untrained model, by parameter name.

    Args:
        task: the model and its batches.
        seed: of the run.
        n_batches: batches to sum.
        first: number of batches to leave out before them.
        all_parameters: also of the parameters that sparse methods leave unchanged.
    """
    model = task.model(seed)
    names = {f"{name}.weight" for name in linear_layers(model, task.targets)}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(all_parameters or name in names)
    own = {name: p for name, p in model.named_parameters() if p.requires_grad}
    sums = {name: torch.zeros_like(p) for name, p in own.items()}
    torch.manual_seed(seed)
    for batch in itertools.islice(task.batches(seed), first, first + n_batches):
        model.zero_grad()
        task.loss(model, batch).backward()
        for name, parameter in own.items():
            if parameter.grad is not None:
                sums[name] += parameter.grad.abs()
    return {name: value for name, value in sums.items() if not name.startswith("head")}


def share_held(chosen: Mapping[str, Tensor], sums: Mapping[str, Tensor]) -> float:
    """Return the share of Σ|gradient| that the chosen components hold."""
    held = sum(float(sums[name].flatten()[index.long()].sum()) for name, index in chosen.items())
    return held / sum(float(sums[name].sum()) for name in chosen)


def _adapt(method: Method, task: Task, model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    from peft import LoraConfig, ShiraConfig, inject_adapter_in_model

    layers = list(linear_layers(model, task.targets))
    rank = int(method.rank)
    config: Any = (
        ShiraConfig(r=rank, target_modules=layers)
        if method.name == "shira"
        else LoraConfig(
            r=rank,
            lora_alpha=2 * rank,
            use_rslora=method.name == "rslora",
            target_modules=layers,
        )
    )
    inject_adapter_in_model(config, model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name or "shira_" in name or name.startswith("head"))
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def _split(
    named: Iterable[tuple[str, nn.Parameter]],
) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    named = list(named)
    return (
        [p for name, p in named if not name.startswith("head")],
        [p for name, p in named if name.startswith("head")],
    )
