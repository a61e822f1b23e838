"""``Trained``: a model and its trained components, and what can be asked of them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from sift_train.buffers import saved_buffers, set_buffers
from sift_train.masters import SparseParameter
from sift_train.memory import MemoryReport, memory_of
from sift_train.optimizer_states import unwrapped


class Trained:
    """A model of which some components are trained.

    Attributes:
        model: the model that is trained.
        sparse_mapping: the trained components of each parameter, by the parameter's name.
        first_buffers: the buffers that the model had before training and that its state dict holds, by name, on the CPU.

    Args:
        model: the model.
        parts: its trained parameters.
    """

    def __init__(self, model: nn.Module, parts: Sequence[SparseParameter]) -> None:
        self.model = model
        self.sparse_mapping: Mapping[str, SparseParameter] = MappingProxyType(
            {part.name: part for part in parts}
        )
        self._requires_grad = {p: p.requires_grad for p in model.parameters()}
        self.first_buffers: dict[str, Tensor] = {
            name: buffer.detach().to("cpu", copy=True)
            for name, buffer in saved_buffers(model).items()
            if not buffer.is_meta
        }
        self._first_config = copy.deepcopy(getattr(model, "config", None))

    def print_trainable_parameters(self) -> None:
        """Print the number of trained components, of all components, and the share."""
        share = 100 * self.n_trained / self.n_total
        print(  # noqa: T201 - the purpose of the method
            f"trainable params: {self.n_trained:,} || all params: {self.n_total:,} || "
            f"trainable%: {share:.4f}"
        )

    def named_parameters_in_optimizer(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the name and the master of each trained parameter."""
        for name, part in self.sparse_mapping.items():
            yield name, part.master

    def parameters_in_optimizer(self) -> list[nn.Parameter]:
        """Return the masters; build the optimizer from all of them and nothing else."""
        return [part.master for part in self.sparse_mapping.values()]

    def named_trainable_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the name and the model's parameter of each trained parameter."""
        for name, part in self.sparse_mapping.items():
            yield name, part.parameter

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Return the model's parameters that are trained, sparsely or densely."""
        return [part.parameter for part in self.sparse_mapping.values()]

    def get_trainable_num(self) -> int:
        """Return the number of trained components."""
        return self.n_trained

    def memory_report(self) -> MemoryReport:
        """Return the memory of this training without activations."""
        return memory_of(self.model, self.sparse_mapping.values())

    @property
    def record(self) -> dict[str, float | None]:
        """The mean |change| of each parameter's changed components, by name; None if none changed."""
        return {name: part.mean_change for name, part in self.sparse_mapping.items()}

    @property
    def masters_device(self) -> str:
        """``"cpu"`` if the masters are kept in the memory of the host, otherwise ``"model"``."""
        is_on_host = any(part.is_on_host for part in self.sparse_mapping.values())
        return "cpu" if is_on_host else "model"

    @property
    def n_trained(self) -> int:
        """Number of trained components."""
        return sum(part.n_trained for part in self.sparse_mapping.values())

    @property
    def n_total(self) -> int:
        """Number of components of the model, tied ones counted once."""
        return sum(p.numel() for p in self._requires_grad)

    @property
    def first_config(self) -> Any:
        """A copy of the config from before training; None if the model has no config."""
        return self._first_config

    @contextmanager
    def _with_first_buffers(self) -> Iterator[None]:
        """Give the model the buffers that it had before training inside the block, such as running statistics."""
        now = {name: buffer.clone() for name, buffer in saved_buffers(self.model).items()}
        set_buffers(self.model, self.first_buffers)
        try:
            yield
        finally:
            set_buffers(self.model, now)

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Check that the optimizer holds all masters and no parameter of the model.

        Raises:
            ValueError: the optimizer lacks a master, or holds a parameter of the model.
        """
        optimizer = unwrapped(optimizer)
        held = {p for group in optimizer.param_groups for p in group["params"]}
        for name, part in self.sparse_mapping.items():
            if part.master not in held:
                raise ValueError(
                    f"the optimizer does not train {name!r}; "
                    "build it from all of sift.parameters_in_optimizer()"
                )
        self._refuse_own_parameters(optimizer, set(self._requires_grad))

    @staticmethod
    def _refuse_own_parameters(
        optimizer: torch.optim.Optimizer, parameters: set[nn.Parameter]
    ) -> None:
        held = {p for group in optimizer.param_groups for p in group["params"]}
        if not held.isdisjoint(parameters):
            raise ValueError(
                "the optimizer holds parameters of the model, whose gradients go to the masters; "
                "build it from sift.parameters_in_optimizer()"
            )

    @property
    def _has_shards(self) -> bool:
        return any(part.shard is not None for part in self.sparse_mapping.values())
