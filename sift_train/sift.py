"""Sparse training in place: hooks move the selected gradients out, the optimizer step writes back.

Method: SIFT (arXiv 2312.11875). The model keeps its modules, its parameters and its state dict; at
any moment its weights are those that the last optimizer step produced.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from types import MappingProxyType, TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sift_train.checkpointing import disable_checkpointing, enable_checkpointing
from sift_train.masters import SparseParameter
from sift_train.scores import GradientScores
from sift_train.selection import Rule, find_rule, index_dtype, n_selected, seeded_generator, top_k
from sift_train.targets import ALL_LINEAR, find_targets


class SIFT:
    """Trains a sparse set of a model's components in place.

    Example:
        >>> sift = SIFT(model, sparse_rate=0.01, sparse_module=["query", "value"])
        >>> optimizer = torch.optim.AdamW(sift.parameters_in_optimizer(), lr=1e-4)
        >>> sift.attach(optimizer)

    All parameters that are not trained are frozen until ``close``. The components are chosen from
    the gradients of the first optimizer step's micro-batches, which are trained on as well, or of
    the backward passes inside ``selecting()``. A tensor that has no finite gradient other than
    zero there is chosen as soon as it gets one.

    Args:
        model: on its final device; wrap nothing around its parameters.
        sparse_rate: share of each tensor's components to train, 0 to 1.
        sparse_module: name fragments of the parameters to train sparsely, or ``"all-linear"``.
        exception: name fragments of the parameters to train densely.
        grad_acc: micro-batches per optimizer step. Above 1 the first step's dense gradients are
            kept, on the CPU, until that step chooses among them.
        gradient_checkpointing: switch the model's activation checkpointing on, non-reentrant.
        selection: name of a rule, or a rule.
        seed: of ties and of random selection.

    Raises:
        ValueError: an argument is out of range, or a parameter cannot be trained in place.
    """

    def __init__(
        self,
        model: nn.Module,
        sparse_rate: float = 0.01,
        sparse_module: str | Sequence[str] = ALL_LINEAR,
        exception: str | Sequence[str] = (),
        grad_acc: int = 1,
        gradient_checkpointing: bool = False,
        *,
        selection: str | Rule = "gradient",
        seed: int = 0,
    ) -> None:
        if grad_acc < 1:
            raise ValueError(f"grad_acc is {grad_acc}; it counts micro-batches and is at least 1")
        self.model = model
        self._rule = find_rule(selection)
        self._seed = seed
        self._grad_acc = grad_acc
        self._only_scoring = False
        self._attached = False
        self._handles: list[RemovableHandle] = []
        self._scores: dict[str, GradientScores] = {}
        targets = find_targets(model, sparse_module, exception)
        parts = []
        for target in targets:
            numel = target.parameter.numel()
            k = numel if target.dense else n_selected(numel, sparse_rate)
            parts.append(SparseParameter(target.name, target.parameter, k))
        self._checkpointing = gradient_checkpointing and enable_checkpointing(model)
        self._requires_grad = {p: p.requires_grad for p in model.parameters()}
        self.sparse_mapping: Mapping[str, SparseParameter] = MappingProxyType(
            {part.name: part for part in parts}
        )
        self._select_without_gradients()
        self._freeze_and_hook()

    def named_parameters_in_optimizer(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield each trained parameter's name in the model and its master."""
        for name, part in self.sparse_mapping.items():
            yield name, part.master

    def parameters_in_optimizer(self) -> list[nn.Parameter]:
        """Return the masters, which are all that an optimizer is to be built from."""
        return [part.master for part in self.sparse_mapping.values()]

    @property
    def n_trained(self) -> int:
        """Components trained."""
        return sum(part.train_num for part in self.sparse_mapping.values())

    @property
    def n_total(self) -> int:
        """Components of the model, tied ones counted once."""
        return sum(p.numel() for p in self._requires_grad)

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Have every step of the optimizer written back to the model as part of the step.

        Without it the model is brought up to date before its next forward pass, whenever its
        state dict is taken, and on ``close``.

        Raises:
            ValueError: the optimizer lacks a master, or trains a parameter of the model itself.
        """
        while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
            optimizer = inner
        held = {p for group in optimizer.param_groups for p in group["params"]}
        for name, part in self.sparse_mapping.items():
            if part.master not in held:
                raise ValueError(
                    f"the optimizer does not train {name!r}; "
                    "build it from all of sift.parameters_in_optimizer()"
                )
        if not held.isdisjoint(self._requires_grad):
            raise ValueError(
                "the optimizer holds parameters of the model, which get no gradient here; "
                "build it from sift.parameters_in_optimizer()"
            )
        self._handles.append(optimizer.register_step_pre_hook(self._before_step))
        self._handles.append(optimizer.register_step_post_hook(self._after_step))
        self._attached = True

    @contextmanager
    def selecting(self) -> Iterator[None]:
        """Choose the components from the backward passes inside; train on none of them.

        Buffers of the model that change meanwhile, such as running statistics, are restored.
        """
        buffers = [(buffer, buffer.clone()) for buffer in self.model.buffers()]
        self._only_scoring = True
        try:
            yield
            self.finish_selection()
        finally:
            self._only_scoring = False
            self._scores.clear()
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)

    def finish_selection(self) -> None:
        """Choose among the gradients seen so far, as an attached optimizer's first step does.

        Call it before anything that reads the masters' gradients ahead of the first step, such as
        a gradient scaler, when ``grad_acc`` is above 1. Without effect once all is chosen.
        """
        for name in list(self._scores):
            self._choose(self.sparse_mapping[name], self._scores.pop(name))

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Clip the gradient of exactly what is trained; return its norm from before."""
        self.finish_selection()
        return nn.utils.clip_grad_norm_(self.parameters_in_optimizer(), max_norm)

    def zero_grad(self) -> None:
        """Drop the masters' gradients."""
        for master in self.parameters_in_optimizer():
            master.grad = None

    def write_back(self) -> None:
        """Overwrite the selected weights by their masters; idempotent."""
        for part in self.sparse_mapping.values():
            if part.is_selected:
                part.write()

    def revert(self) -> None:
        """Give the model, and the masters, the weights from before the training, bit for bit."""
        for part in self.sparse_mapping.values():
            part.revert()

    @contextmanager
    def reverted(self) -> Iterator[None]:
        """Lend the model its weights from before the training, bit for bit."""
        parts = [part for part in self.sparse_mapping.values() if part.is_selected]
        trained = [(part, part.swap_original()) for part in parts]
        try:
            yield
        finally:
            for part, values in trained:
                part.swap_original(values)

    def close(self) -> None:
        """Write the last update back, remove all hooks, unfreeze what was frozen; idempotent."""
        if not self._handles:
            return
        self.write_back()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._scores.clear()
        for parameter, requires_grad in self._requires_grad.items():
            parameter.requires_grad_(requires_grad)
        if self._checkpointing:
            disable_checkpointing(self.model)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _select_without_gradients(self) -> None:
        for name, part in self.sparse_mapping.items():
            numel = part.parameter.numel()
            if part.trains_all:
                part.choose(torch.arange(numel, dtype=index_dtype(numel)))
            elif self._rule.from_weight is not None:
                generator = seeded_generator(self._seed, name)
                scores = self._rule.from_weight(part.parameter.detach(), generator)
                part.choose(top_k(scores, part.train_num, generator))

    def _freeze_and_hook(self) -> None:
        trained = {part.parameter for part in self.sparse_mapping.values()}
        for parameter in self._requires_grad:
            parameter.requires_grad_(parameter in trained)
            parameter.grad = None  # a left-over gradient would be added to the first one
        for part in self.sparse_mapping.values():
            hook = partial(self._on_gradient, part)
            hooked: Any = part.parameter  # the method is untyped
            self._handles.append(hooked.register_post_accumulate_grad_hook(hook))
        model: Any = self.model
        self._handles.append(model.register_forward_pre_hook(self._before_use))
        self._handles.append(model.register_state_dict_pre_hook(self._before_use))

    def _on_gradient(self, part: SparseParameter, parameter: Tensor) -> None:
        gradient = parameter.grad
        if gradient is None:
            return
        parameter.grad = None
        if not part.is_selected:
            self._score(part, gradient)
        elif not self._only_scoring:
            part.collect(gradient)

    def _score(self, part: SparseParameter, gradient: Tensor) -> None:
        at_once = self._grad_acc == 1 and not self._only_scoring
        scores = self._scores.get(part.name)
        if scores is None:
            device = gradient.device if at_once else torch.device("cpu")
            scores = GradientScores(self._rule, device, keeps_gradient=not self._only_scoring)
            self._scores[part.name] = scores
        scores.add(part.parameter.detach(), gradient)
        if at_once:
            self._choose(part, self._scores.pop(part.name))

    def _choose(self, part: SparseParameter, scores: GradientScores) -> None:
        if scores.tells_apart:
            generator = seeded_generator(self._seed, part.name)
            part.choose(top_k(scores.total, part.train_num, generator))
            if scores.gradient is not None:
                part.collect(scores.gradient.to(part.parameter.device))
        elif scores.gradient is not None:
            # A gradient scaler looks for overflow here; _before_step drops the stand-in.
            overflow = scores.gradient.sum().to(part.master)
            part.master.grad = overflow.expand(part.train_num).clone()

    def _before_step(self, *_: Any) -> None:
        self.finish_selection()
        for part in self.sparse_mapping.values():
            if not part.is_selected:
                part.master.grad = None

    def _after_step(self, *_: Any) -> None:
        self.write_back()

    def _before_use(self, *_: Any) -> None:
        if not self._attached:
            self.write_back()


def grouped_parameters(sift: SIFT, weight_decay: float) -> list[dict[str, Any]]:
    """Return optimizer groups: weight decay on matrices and up, none on 1-D parameters."""
    parts: Iterable[SparseParameter] = sift.sparse_mapping.values()
    matrices = [part.master for part in parts if part.parameter.dim() > 1]
    vectors = [part.master for part in parts if part.parameter.dim() <= 1]
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
