"""Sparse training in place: hooks move the selected gradients out, the optimizer step writes back.

Method: SIFT (arXiv 2312.11875). The model keeps its modules, its parameters and its state dict; at
any moment its weights are those that the last optimizer step produced.
"""

from __future__ import annotations

import copy
import re
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from os import PathLike
from types import MappingProxyType, TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sift_train import saved
from sift_train.checkpointing import disable_checkpointing, enable_checkpointing
from sift_train.chooser import Chooser, choose_by_hand
from sift_train.groups import BASE_DECAY
from sift_train.masters import SparseParameter
from sift_train.memory import MemoryReport, memory_of
from sift_train.rules import RULES, Selection, find_rule
from sift_train.selection import n_selected
from sift_train.steps import listen, listening, silence
from sift_train.targets import ALL_LINEAR, Names, find_targets
from sift_train.zeroing import zero_with, zero_without


class SIFT:
    """Trains a sparse set of a model's components in place.

    Example:
        >>> sift = SIFT(model, sparse_rate=0.01, sparse_module=["query", "value"])
        >>> optimizer = torch.optim.AdamW(sift.parameters_in_optimizer(), lr=1e-4)

    All parameters that are not trained are frozen until ``close``. The components are chosen from
    the gradients of the first optimizer step's micro-batches, which are trained on as well, or of
    the backward passes inside ``selecting()``. A tensor that has no finite gradient other than
    zero there is chosen as soon as it gets one. Where a parameter's gradient comes in parts, as
    from a module used twice under reentrant checkpointing, each part is scored by itself.

    Every ``torch.optim.Optimizer`` built from the masters writes them back as part of its step.
    After any other optimizer the model is brought up to date before its next forward pass,
    whenever its state dict is taken, and on ``write_back`` and ``close``. A model that is moved to
    another device before its first step takes its masters along, in the next forward pass.

    Attributes:
        model: what is trained.
        sparse_mapping: what is trained of each parameter, by the parameter's name.
        may_write: a bool on the device, or None. Where it is False no weights are overwritten,
            without the host knowing: for a loop that does not wait to see whether a loss is finite.

    Args:
        model: wrap nothing around its parameters.
        sparse_rate: share of each tensor's components to train, 0 to 1.
        sparse_module: name fragments of the parameters to train sparsely, regular expressions
            (compiled, or as ``"re:..."``), or ``"all-linear"``.
        exception: the same of the parameters to train densely.
        grad_acc: micro-batches per optimizer step. Above 1 the first step's dense gradients are
            kept, on the CPU, until that step chooses among them.
        gradient_checkpointing: switch the model's activation checkpointing on, non-reentrant.
        selection: name of a rule; a ``Rule``; a function of weight and gradient that gives scores;
            or a mapping of parameter names to what to train of each: a bool mask, flat indices or
            coordinates. The mapping's names take the place of ``sparse_module`` and its counts
            that of ``sparse_rate``.
        budget: ``"tensor"``: the rate holds for each tensor; ``"global"``: for all of them
            together, wherever the scores are largest. How many each tensor gets is then known only
            once all are chosen.
        seed: of ties and of random selection.

    Raises:
        ValueError: an argument is out of range, or a parameter cannot be trained in place.
    """

    def __init__(
        self,
        model: nn.Module,
        sparse_rate: float = 0.01,
        sparse_module: Names = ALL_LINEAR,
        exception: Names = (),
        grad_acc: int = 1,
        gradient_checkpointing: bool = False,
        *,
        selection: Selection = "gradient",
        budget: str = "tensor",
        seed: int = 0,
    ) -> None:
        if grad_acc < 1:
            raise ValueError(f"grad_acc is {grad_acc}; it counts micro-batches and is at least 1")
        _refuse_second(model)
        self.model = model
        self._grad_acc = grad_acc
        self.may_write: Tensor | None = None
        self._only_scoring = False
        self._is_stepped_by_torch = False
        self._handles: list[RemovableHandle] = []
        masks = selection if isinstance(selection, Mapping) else {}
        if masks:
            if sparse_module != ALL_LINEAR:
                raise ValueError("selection names the parameters itself; leave sparse_module out")
            sparse_module = [re.compile(f"^{re.escape(name)}$") for name in masks]
        parts = []
        for target in find_targets(model, sparse_module, exception):
            numel = target.parameter.numel()
            k = numel if target.dense else n_selected(numel, sparse_rate)
            parts.append(SparseParameter(target.name, target.parameter, k, is_dense=target.dense))
        self.sparse_mapping: Mapping[str, SparseParameter] = MappingProxyType(
            {part.name: part for part in parts}
        )
        self._by_master = {id(part.master): part for part in parts}
        rule = find_rule(selection) or RULES["gradient"]
        self._chooser = Chooser(self.sparse_mapping, rule, budget, seed)
        choose_by_hand(model, self.sparse_mapping.values(), masks)
        self._checkpointing = gradient_checkpointing and enable_checkpointing(model)
        self._requires_grad = {p: p.requires_grad for p in model.parameters()}
        self._first_config = copy.deepcopy(getattr(model, "config", None))
        self._chooser.choose_without_gradients()
        self._freeze_and_hook()

    def print_trainable_parameters(self) -> None:
        """Print how many components are trained, of how many, and their share."""
        share = 100 * self.n_trained / self.n_total
        print(  # noqa: T201 - what it is for
            f"trainable params: {self.n_trained:,} || all params: {self.n_total:,} || "
            f"trainable%: {share:.4f}"
        )

    def named_parameters_in_optimizer(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield each trained parameter's name in the model and its master."""
        for name, part in self.sparse_mapping.items():
            yield name, part.master

    def parameters_in_optimizer(self) -> list[nn.Parameter]:
        """Return the masters, which are all that an optimizer is to be built from."""
        return [part.master for part in self.sparse_mapping.values()]

    def named_trainable_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield name and parameter of what is trained, the model's own parameters."""
        for name, part in self.sparse_mapping.items():
            yield name, part.parameter

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Return the model's own parameters that are trained, sparsely or densely."""
        return [part.parameter for part in self.sparse_mapping.values()]

    def get_trainable_num(self) -> int:
        """Return how many components are trained."""
        return self.n_trained

    def memory_report(self) -> MemoryReport:
        """Return what the training keeps in memory beside the activations."""
        return memory_of(self.model, self.sparse_mapping.values())

    @property
    def n_trained(self) -> int:
        """Components trained."""
        return sum(part.train_num for part in self.sparse_mapping.values())

    @property
    def n_total(self) -> int:
        """Components of the model, tied ones counted once."""
        return sum(p.numel() for p in self._requires_grad)

    @property
    def first_config(self) -> Any:
        """The model's config from before the training, None if it has none; models edit theirs."""
        return self._first_config

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Find out before the first step whether the optimizer trains what it should.

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
        self._refuse_own_parameters(optimizer, set(self._requires_grad))

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
            self._chooser.clear()
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)

    def finish_selection(self) -> None:
        """Choose among the gradients seen so far, as the optimizer's first step does.

        Call it before anything that reads the masters' gradients ahead of the first step, such as
        a gradient scaler, when ``grad_acc`` is above 1. Without effect once all is chosen.
        """
        self._chooser.finish()

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Clip the gradient of exactly what is trained; return its norm from before."""
        self.finish_selection()
        return nn.utils.clip_grad_norm_(self.parameters_in_optimizer(), max_norm)

    def zero_grad(self) -> None:
        """Drop the masters' gradients, as ``model.zero_grad()`` does, too."""
        for master in self.parameters_in_optimizer():
            master.grad = None

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def write_back(self) -> None:
        """Overwrite the selected weights by their masters; idempotent."""
        for part in self.sparse_mapping.values():
            if part.is_selected:
                part.write(self.may_write)

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

    def state_dict(self) -> dict[str, Tensor]:
        """Return choices, originals, masters and the model's buffers, copied to the CPU."""
        return saved.state_of(self)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on where ``state_dict`` was taken; the model holds the base's or the trained weights.

        Raises:
            ValueError: the state is of other parameters, or the model holds other weights.
        """
        saved.restore(self, state)

    def save(self, path: str | PathLike[str]) -> None:
        """Write ``state_dict`` as a safetensors file."""
        saved.write_state(self.state_dict(), path)

    def load(self, path: str | PathLike[str]) -> None:
        """Take up what ``save`` wrote.

        Raises:
            ValueError: the file is not such a state, or ``load_state_dict`` refuses it.
        """
        self.load_state_dict(saved.read_state(path))

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Make the masters ready for an optimizer's step; called by every one of torch.

        Raises:
            ValueError: the optimizer trains parameters of the model that are trained here.
        """
        if not self._parts_of(optimizer):
            self._refuse_own_parameters(optimizer, set(self.trainable_parameters()))
            return
        self.after_closure(optimizer)
        for group in optimizer.param_groups:
            for master in group["params"]:
                part = self._by_master.get(id(master))
                if part is not None and part.is_selected and group.get(BASE_DECAY):
                    part.decay_to_original(float(group["lr"]) * group[BASE_DECAY])

    def after_closure(self, optimizer: torch.optim.Optimizer) -> None:
        """Choose among the gradients that a step is about to use; none are left of what waits."""
        parts = self._parts_of(optimizer)
        if parts:
            self.finish_selection()
        for part in parts:
            if not part.is_selected:
                part.master.grad = None

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Write the masters that an optimizer has stepped; called by every one of torch."""
        for part in self._parts_of(optimizer):
            self._is_stepped_by_torch = True
            part.spend()
            if part.is_selected:
                part.write(self.may_write)

    def close(self) -> None:
        """Write the last update back, remove all hooks, unfreeze what was frozen; idempotent."""
        if not self._handles:
            return
        self.write_back()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._chooser.clear()
        silence(self)
        zero_without(self.model)
        for parameter, requires_grad in self._requires_grad.items():
            parameter.requires_grad_(requires_grad)
        if self._checkpointing:
            disable_checkpointing(self.model)

    def __repr__(self) -> str:
        parts = self.sparse_mapping.values()
        n_selected = sum(part.is_selected for part in parts)
        return (
            f"SIFT({type(self.model).__name__}: {self.n_trained:,} of {self.n_total:,} components "
            f"trained, {100 * self.n_trained / self.n_total:.2f} %; {n_selected:,} of "
            f"{len(parts):,} parameters chosen{'' if self._handles else '; closed'})"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        # A copied model takes its hooks along; they must go on serving the model that is trained.
        return self

    def _freeze_and_hook(self) -> None:
        trained = {part.parameter for part in self.sparse_mapping.values()}
        for parameter in self._requires_grad:
            parameter.requires_grad_(parameter in trained)
            parameter.grad = None  # a left-over gradient would be added to the first one
        # A parameter's hooks are beyond the garbage collector: they must not hold what holds them.
        me = weakref.ref(self)
        for name, part in self.sparse_mapping.items():
            hooked: Any = part.parameter  # the method is untyped
            hook = partial(_on_gradient, me, name)
            self._handles.append(hooked.register_post_accumulate_grad_hook(hook))
        model: Any = self.model
        self._handles.append(model.register_forward_pre_hook(self._before_use))
        self._handles.append(model.register_state_dict_pre_hook(self._before_use))
        listen(self)
        zero_with(self.model, self.zero_grad)

    def _on_gradient(self, name: str, parameter: Tensor) -> None:
        part = self.sparse_mapping[name]
        gradient = parameter.grad
        if gradient is None:
            return
        parameter.grad = None
        part.follow()
        if not part.is_selected:
            at_once = self._grad_acc == 1 and not self._only_scoring
            self._chooser.score(
                part, gradient, at_once=at_once, is_trained_on=not self._only_scoring
            )
        elif not self._only_scoring:
            part.collect(gradient)

    def _parts_of(self, optimizer: torch.optim.Optimizer) -> list[SparseParameter]:
        masters = (master for group in optimizer.param_groups for master in group["params"])
        return [self._by_master[id(m)] for m in masters if id(m) in self._by_master]

    @staticmethod
    def _refuse_own_parameters(
        optimizer: torch.optim.Optimizer, parameters: set[nn.Parameter]
    ) -> None:
        held = {p for group in optimizer.param_groups for p in group["params"]}
        if not held.isdisjoint(parameters):
            raise ValueError(
                "the optimizer holds parameters of the model, which get no gradient here; "
                "build it from sift.parameters_in_optimizer()"
            )

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _before_use(self, *_: Any) -> None:
        for part in self.sparse_mapping.values():
            part.follow()
            # Not without need: a write between two forwards of one loss would spoil its backward.
            # An optimizer that is not torch's may work on `.data`, which leaves the version as it was.
            may_differ = part.is_behind or not self._is_stepped_by_torch
            if part.is_selected and may_differ and part.differs:
                part.write(self.may_write)


def _refuse_second(model: nn.Module) -> None:
    own = set(model.parameters())
    for other in listening():
        if isinstance(other, SIFT) and not own.isdisjoint(other._requires_grad):
            raise ValueError(
                f"the {type(model).__name__} is trained by a SIFT already, whose hooks take its "
                "gradients; close() that one first, which keeps the trained weights"
            )


def _on_gradient(me: weakref.ref[SIFT], name: str, parameter: Tensor) -> None:
    sift = me()
    if sift is not None:
        sift._on_gradient(name, parameter)
