"""``SIFT``: sparse training in place, by the method of arXiv 2312.11875.

Gradient hooks move the selected gradients to the masters; each optimizer step writes the masters
back to the model. The model keeps its modules, parameters and state dict, and its weights are
always those after the last optimizer step.
"""

from __future__ import annotations

import copy
import logging
import re
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from os import PathLike
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Any, Self
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

import sparsedelta
from sift_train import saved
from sift_train.checkpointing import disable_checkpointing, enable_checkpointing
from sift_train.chooser import Chooser, choose_by_hand
from sift_train.groups import BASE_DECAY
from sift_train.hooks import BeforeUse
from sift_train.identity import Identity
from sift_train.lean import Lean, Rounding, check_masters
from sift_train.lr_transfer import LearningRate
from sift_train.masks import find_masks
from sift_train.masters import SparseParameter
from sift_train.memory import MemoryReport, memory_of
from sift_train.optimizer_states import unwrapped
from sift_train.ranks.group import Ranks
from sift_train.ranks.norm import clip_shards
from sift_train.ranks.shard import is_sharded, local_gradient, reshard
from sift_train.ranks.sync import Synchronizer
from sift_train.reselection import check_move
from sift_train.reselector import Reselector
from sift_train.rules import RULES, Selection, find_rule
from sift_train.steps import add_listener, current_listeners, remove_listener
from sift_train.structure import Block, check_block
from sift_train.targets import ALL_LINEAR, Names, find_targets, warn_of_adapters
from sift_train.zeroing import extend_zero_grad, restore_zero_grad

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from transformers import Trainer

logger = logging.getLogger(__name__)


class SIFT:
    """Trains a sparse set of a model's components in place.

    Example:
        >>> sift = SIFT(model, sparse_rate=0.01, sparse_module=["query", "value"])
        >>> optimizer = torch.optim.AdamW(sift.parameters_in_optimizer(), lr=1e-4)

    All parameters that are not trained are frozen until ``close``. The components are chosen by the
    gradients of the first optimizer step's micro-batches, which are also trained on, or by the
    gradients of the backward passes inside ``selecting()``. If all gradients of a parameter are
    zero or non-finite there, its components are chosen at its first other gradient. If a parameter
    gets its gradient in several parts, as a module used twice under reentrant checkpointing does,
    each part is scored separately.

    The step of every ``torch.optim.Optimizer`` built from the masters writes them back to the
    model. After a step of another optimizer, they are written back before the next forward pass,
    when the state dict is taken, and by ``write_back`` and ``close``. If the model is moved to
    another device before its first step, the next forward pass moves the masters there.

    Attributes:
        model: the model that is trained.
        sparse_mapping: the trained components of each parameter, by the parameter's name.
        lr_transfer: whether each step divides the learning rate of sparse parameters by ``lr_share``.
        rounding: the random numbers of ``masters="stochastic"``.
        may_write: a bool tensor on the device, or None, which means True. If it is False, weights
            are not overwritten. The host does not read it, so a loop need not wait for a loss to
            know whether it is finite.

    Args:
        model: a module without wrappers for several devices.
        sparse_rate: share of each tensor's components to train, 0 to 1; in a 3-D tensor of experts, of
            each expert's.
        sparse_module: name fragments or regular expressions (compiled, or written ``"re:..."``) of
            the parameters to train sparsely; ``"all-linear"``: the weights of linear layers and experts;
            ``"all-conv"``: those of convolutions.
        exception: name fragments or regular expressions of the parameters to train densely; None
            means none.
        grad_acc: micro-batches per optimizer step. Above 1 the dense gradients of the first step
            are summed on the CPU until the components are chosen at that step.
        gradient_checkpointing: switch the model's activation checkpointing on, non-reentrant.
        selection: the rule that ranks components: a rule's name, a ``Rule``, or a function of
            weight and gradient that returns scores. Or an explicit choice, which replaces ``sparse_module`` and
            ``sparse_rate``: a mapping of parameter names to bool masks, flat indices or coordinates; the path
            of a mask (``.safetensors``, ``.npz``, ``.pt``); or a delta or its path (``.sd``), whose changed components are
            trained; the model must hold the delta's base then.
        budget: ``"tensor"``: the rate holds for each tensor; ``"row"``: for each row; ``"global"``: for all tensors
            together, and the largest scores of all are chosen. The number for each tensor is then
            known only after the choice.
        block: choose whole ``"row"``s, ``"column"``s or blocks of (height, width) by their mean score; the rate is
            the share of blocks. A row belongs to one index of the first dimension, which is an output of a linear
            layer. None: single components.
        seed: seeds the choice among equal scores, and random selection.
        process_group: the processes that train this model together; None: all that
            ``torch.distributed`` connects. Before each step the gradients of the trained components
            are averaged over them.
        reduce_dtype: dtype in which these gradients are sent and summed: ``torch.bfloat16`` or
            ``torch.float32``; None: the masters' dtype.
        lr_transfer: the optimizer's learning rate is that of full fine-tuning. Each step divides it by
            ``lr_share`` for sparsely trained parameters; dense ones keep it. For AdamW and other optimizers that
            move each component by about the learning rate. If it is false, the learning rate is used as it is.
        masters: ``"fp32"``: an fp32 master of each component is kept. Otherwise masters exist during a step only, which
            saves their memory; fp32 weights then train with the same bits. bf16 weights are rounded after each step:
            ``"stochastic"``: up or down at random, seeded, and nothing is kept; ``"kahan"``: to nearest, and the
            rounding error is kept in 16 bits. Only with steps of torch optimizers, and without shards.

    Raises:
        ValueError: an argument is out of range, or a parameter cannot be trained in place.
    """

    def __init__(
        self,
        model: nn.Module,
        sparse_rate: float = 0.01,
        sparse_module: Names = ALL_LINEAR,
        exception: Names | None = (),
        grad_acc: int = 1,
        gradient_checkpointing: bool = False,
        *,
        selection: Selection = "random",
        budget: str = "tensor",
        block: Block | None = None,
        seed: int = 0,
        process_group: ProcessGroup | None = None,
        reduce_dtype: torch.dtype | None = None,
        lr_transfer: bool = True,
        masters: str = "fp32",
    ) -> None:
        self.grad_acc = grad_acc
        _refuse_second(model)
        warn_of_adapters(model)
        self.model = model
        self.may_write: Tensor | None = None
        self._only_scoring = False
        self._reselector: Reselector | None = None  # inside ``reselecting``
        self._is_reverted = False  # inside ``reverted``
        self._is_stepped_by_torch = False
        self._handles: list[RemovableHandle] = []
        check_block(block)
        masks = find_masks(selection, model)
        if masks:
            if sparse_module != ALL_LINEAR:
                raise ValueError("selection is a mask of named parameters; leave sparse_module out")
            sparse_module = [re.compile(f"^{re.escape(name)}$") for name in masks]
        check_masters(masters)
        self.rounding = Rounding(seed)
        parts = []
        for target in find_targets(model, sparse_module, exception or ()):
            parts.append(
                SparseParameter(
                    target.name,
                    target.parameter,
                    target.n_trained(sparse_rate, budget, block),
                    is_dense=target.dense,
                    n_matrices=target.n_matrices,
                    lean=self._lean(masters, target.name, target.parameter),
                )
            )
        self.sparse_mapping: Mapping[str, SparseParameter] = MappingProxyType(
            {part.name: part for part in parts}
        )
        self._sync = Synchronizer(model, self.sparse_mapping, process_group, reduce_dtype)
        self._identity = Identity(model, parts)
        self._is_stepped = False
        self._optimizers: WeakSet[torch.optim.Optimizer] = WeakSet()  # that have stepped
        self._without_optimizer = set(self.sparse_mapping)
        self._by_master = {id(part.master): part for part in parts}
        rule = find_rule(selection) or RULES["gradient"]
        self.lr_transfer = lr_transfer
        self._n_reselections = 0
        self._learning_rate = LearningRate(
            self.sparse_mapping, is_uniform=rule.is_uniform and not masks
        )
        meter = self._learning_rate if lr_transfer else None
        self._chooser = Chooser(
            self.sparse_mapping, rule, budget, seed, sparse_rate, block, learning_rate=meter
        )
        choose_by_hand(model, self.sparse_mapping.values(), masks)
        self._checkpointing = gradient_checkpointing and enable_checkpointing(model)
        self._requires_grad = {p: p.requires_grad for p in model.parameters()}
        self._first_config = copy.deepcopy(getattr(model, "config", None))
        self._chooser.choose_without_gradients()
        self._freeze_and_hook()

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
    def ranks(self) -> Ranks:
        """The processes that train this model together; one if nothing connects several."""
        return self._sync.ranks

    @property
    def grad_acc(self) -> int:
        """Micro-batches per optimizer step; may be set until the components are chosen."""
        return self._grad_acc

    @grad_acc.setter
    def grad_acc(self, value: int) -> None:
        if value < 1:
            raise ValueError(
                f"grad_acc is {value}; it is a number of micro-batches and must be at least 1"
            )
        self._grad_acc = value

    @property
    def record(self) -> dict[str, float | None]:
        """The mean |change| of each parameter's changed components, by name; None if none changed."""
        return {name: part.mean_change for name, part in self.sparse_mapping.items()}

    def set_trainer(self, trainer: Trainer) -> None:
        """Add a ``SiftCallback`` to a Trainer whose optimizer holds the masters."""
        from sift_train.trainer import SiftCallback  # takes seconds

        trainer.add_callback(SiftCallback(self))

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

    @staticmethod
    def of(model: nn.Module) -> SIFT | None:
        """Return the SIFT that trains this model and is not closed; None if there is none."""
        own = set(model.parameters())
        for other in current_listeners():
            if isinstance(other, SIFT) and not own.isdisjoint(other._requires_grad):
                return other
        return None

    @property
    def lr_share(self) -> float | None:
        """Share of the sum of |gradient| over the sparsely trained parameters that the chosen components hold.

        With ``lr_transfer`` it is measured by the gradients that choose, or anew by those inside
        ``measuring_share()``. If masks or a rule without gradients
        choose, by those inside ``selecting()`` or of the first step. With ``"random"`` it is the share of
        components that are chosen. None until then, and without ``lr_transfer``.
        """
        return self._learning_rate.share

    @lr_share.setter
    def lr_share(self, share: float | None) -> None:
        self._learning_rate.share = share

    @property
    def n_reselections(self) -> int:
        """Number of times that ``reselecting`` has moved the choice."""
        return self._n_reselections

    @n_reselections.setter
    def n_reselections(self, number: int) -> None:
        self._n_reselections = number
        self._learning_rate.has_moved = number > 0

    def sparse_lr(self, lr: float) -> float:
        """Return the learning rate of sparsely trained parameters for a stated one."""
        return float(self._learning_rate.sparse(lr))

    def check_parameters(self) -> None:
        """Check that the model still uses every trained parameter, under its name.

        ``export_delta``, ``state_dict`` and the first step call it.

        Raises:
            ValueError: a parameter was replaced, converted to another dtype, renamed or removed.
        """
        self._identity.check_names()

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

    @contextmanager
    def selecting(self) -> Iterator[None]:
        """Choose the components by the backward passes inside the block, without training on them.

        The model's buffers, such as running statistics, are restored afterwards.
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

    @contextmanager
    def reselecting(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        share: float = 0.2,
        drop: str = "change",
        grow: Selection = "random",
        dropped: str = "revert",
    ) -> Iterator[None]:
        """Drop trained components and grow as many others, by the backward passes inside the block.

        The block is not trained on, and is empty if ``grow`` ranks without gradients. The choice moves at its
        end. Call it between two steps, with no gradients waiting. Masters and optimizer states of the components that
        stay are not changed; the states of grown ones are 0. With ``lr_transfer`` the share is measured anew, by
        ``measuring_share()`` afterwards or by the next step's gradients. The model's buffers are restored. All ranks
        must call it together.

        Args:
            optimizer: the one that holds all masters.
            share: share of the trained components that may be replaced, 0 to 1; at least one if it is above 0.
            drop: which are dropped: smallest ``"change"``, smallest first ``"moment"``, ``"random"``, or smallest
                ``"score"``, as for ``Reselection``.
            grow: the rule that ranks the components that are not trained.
            dropped: ``"revert"``: dropped components get their original value; ``"keep"``: they keep the trained one.

        Raises:
            RuntimeError: the components are not chosen yet, or gradients wait for a step.
            ValueError: a setting is out of range; the optimizer lacks a master; its states cannot move, such as 8-bit
                ones; blocks are trained, or parameters are sharded.
        """
        rule = check_move(share=share, drop=drop, grow=grow, dropped=dropped)
        self.check_reselecting(optimizer)
        optimizer = unwrapped(optimizer)
        parts = self.sparse_mapping.values()
        if not all(part.is_selected for part in parts):
            raise RuntimeError(
                "the components are not chosen yet, so the choice cannot move; choose them before, for example inside"
                " sift.selecting()"
            )
        if any(part.pending_gradient is not None for part in parts):
            raise RuntimeError(
                "gradients wait for a step, and would belong to other components afterwards; call reselecting() after"
                " optimizer.step() or zero_grad()"
            )
        self.before_use()
        self._reselector = self._chooser.reselector(
            optimizer,
            rule,
            share=share,
            drop=drop,
            keeps=dropped == "keep",
            number=self.n_reselections,
        )
        try:
            with self.selecting():
                yield
            if self._reselector.finish(self._sync.ranks):
                self.n_reselections += 1
                self._learning_rate.forget()
        finally:
            self._reselector = None

    def check_reselecting(self, optimizer: torch.optim.Optimizer) -> None:
        """Check that ``reselecting`` can move the choice and the states that the optimizer has so far.

        Raises:
            ValueError: as ``reselecting``.
        """
        self.attach(optimizer)
        self._chooser.check_movable(unwrapped(optimizer))

    @contextmanager
    def measuring_share(self) -> Iterator[None]:
        """Measure ``lr_share`` anew by the backward passes inside the block, without training on them.

        Rules that choose by gradients fit the micro-batches that choose, so the share measured there is too
        large. Give other micro-batches here, after the choice. If the block has no finite gradient, or raises,
        the share stays. With ``"random"`` and without ``lr_transfer`` nothing is measured. The model's
        buffers are restored afterwards. All ranks must call it together.

        Raises:
            RuntimeError: the components are not chosen yet.
        """
        if not all(part.is_selected for part in self.sparse_mapping.values()):
            raise RuntimeError(
                "the components are not chosen yet, so their share of the gradient cannot be measured; choose"
                " them before, for example inside sift.selecting()"
            )
        with self._learning_rate.measured_anew(), self.selecting():
            yield

    def finish_selection(self) -> None:
        """Choose the components by the gradients seen so far, as the optimizer's first step does.

        If ``grad_acc`` is above 1 and something reads the masters' gradients before the first step,
        such as a gradient scaler, call this first. It has no effect if all components are chosen.
        """
        self._chooser.finish(self._sync.ranks)
        if self.lr_transfer:
            self._learning_rate.finish(self._sync.ranks)

    def sync_gradients(self, weight: float | None = None) -> None:
        """Average the masters' gradients over the ranks; no effect in a single process.

        ``clip_grad_norm_`` and the step of a torch optimizer call it. Call it yourself to give a weight,
        before a gradient scaler's ``unscale_`` or ``step``, and before the step of another optimizer.

        Args:
            weight: share of this rank in the mean, such as its number of examples or tokens; 0 if it
                has no batch. All ranks must give one, or none, which means equal shares.

        Raises:
            ValueError: the model is wrapped for several devices; the ranks hold different weights
                before the first step; or the weights are negative or all 0.
            RuntimeError: another rank has stopped.
        """
        self.finish_selection()
        self._sync.average(weight)

    def check_ranks(self) -> None:
        """Compare the choice and the masters of all ranks, as is done at the first and every 100th step.

        Raises:
            RuntimeError: they differ, or another rank has stopped.
        """
        self._sync.check()

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Clip the gradient of the trained components; return its norm before clipping."""
        self.sync_gradients()
        if not self._has_shards:
            return nn.utils.clip_grad_norm_(self.parameters_in_optimizer(), max_norm)
        return clip_shards(self.sparse_mapping.values(), max_norm)

    def zero_grad(self) -> None:
        """Drop the masters' gradients; ``model.zero_grad()`` also does this."""
        for master in self.parameters_in_optimizer():
            master.grad = None

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def write_back(self) -> None:
        """Overwrite the selected weights with their masters; idempotent.

        Weights that ``load_state_dict`` has overwritten since are kept, and the masters take them.
        """
        self.reshard()
        for part in self.sparse_mapping.values():
            if part.is_selected:
                part.settle(self.may_write)

    def revert(self) -> None:
        """Restore the weights from before training, bit for bit, in the model and the masters."""
        self.reshard()
        for part in self.sparse_mapping.values():
            part.revert()

    @contextmanager
    def reverted(self) -> Iterator[None]:
        """Give the model its weights from before training inside the block, bit for bit."""
        self.before_use()
        parts = [part for part in self.sparse_mapping.values() if part.is_selected]
        self.reshard()
        trained = [(part, part.swap_original()) for part in parts]
        self._is_reverted = True
        try:
            yield
        finally:
            self._is_reverted = False
            self.reshard()
            for part, values in trained:
                part.swap_original(values)

    def state_dict(self) -> dict[str, Tensor]:
        """Return copies, on the CPU, of the indices, originals, masters and the model's buffers."""
        self.check_parameters()
        self.before_use()
        return saved.state_of(self)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore a state; the model must hold the base's weights or the trained weights.

        Raises:
            ValueError: the state is of other parameters, or the model holds other weights.
        """
        saved.restore(self, state)

    def save(self, path: str | PathLike[str]) -> None:
        """Write ``state_dict`` as a safetensors file."""
        saved.write_state(self.state_dict(), path)

    def load(self, path: str | PathLike[str]) -> None:
        """Restore the state in a file that ``save`` wrote.

        Raises:
            ValueError: the file is not a training state, or ``load_state_dict`` raises.
        """
        self.load_state_dict(saved.read_state(path))

    def push_to_hub(
        self,
        repo_id: str,
        *,
        base: str | PathLike[str] | None = None,
        base_id: str | None = None,
        private: bool | None = None,
        revision: str | None = None,
        commit_message: str | None = None,
        token: str | bool | None = None,
        dry_run: bool = False,
    ) -> sparsedelta.PushReport:
        """Upload the delta of the training so far, with a model card; the base is pinned to a commit.

        Args:
            repo_id: ``org/name``; created if it does not exist.
            base: the folder of the base; by default the folder or the cached repository that a transformers model
                was loaded from.
            base_id: repository of the base, ``org/model`` or ``org/model@revision``; by default the repository and
                commit that the model was loaded from.
            private: whether a new repository is private.
            revision: branch to push to.
            commit_message: first line of the commit message.
            token: access token for the Hub; None: that of `hf auth login`.
            dry_run: upload nothing, only return the report.

        Raises:
            MismatchError: the base on the Hub is not the base of the delta.
            RemoteError: the Hub cannot be reached or refuses.
            ValueError: the base is not known, or as ``export_delta``.
        """
        from sift_train.pushing import push_delta  # export imports this module

        return push_delta(
            self,
            repo_id,
            base=base,
            base_id=base_id,
            private=private,
            revision=revision,
            commit_message=commit_message,
            token=token,
            dry_run=dry_run,
        )

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Prepare the masters for an optimizer's step; every torch optimizer calls it.

        Raises:
            ValueError: the optimizer holds parameters of the model that this SIFT trains, or a trained
                parameter was replaced, converted or renamed.
        """
        parts = self._parts_of(optimizer)
        if not parts:
            self._refuse_own_parameters(optimizer, set(self.trainable_parameters()))
            return
        self._check_identity()
        self._warn_without_optimizer(optimizer, parts)
        for part in parts:
            if part.is_overwritten:
                part.adopt()
        if self._is_lean:
            self.rounding.n_steps += 1
        self.after_closure(optimizer)
        for group in optimizer.param_groups:
            for master in group["params"]:
                trained = self._by_master.get(id(master))
                if trained is not None and trained.is_selected and group.get(BASE_DECAY):
                    trained.decay_to_original(float(group["lr"]) * group[BASE_DECAY])

    def after_closure(self, optimizer: torch.optim.Optimizer) -> None:
        """Choose by the gradients of this step; drop the gradients of masters not chosen yet."""
        parts = self._parts_of(optimizer)
        if parts:
            self.sync_gradients()
        for part in parts:
            part.load()
            if not part.is_selected:
                part.master.grad = None
        if parts and self.lr_transfer:
            self._learning_rate.scale(optimizer)

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Write the masters of an optimizer back after its step; every torch optimizer calls it."""
        parts = self._parts_of(optimizer)
        if parts:
            self._learning_rate.restore()
        for part in parts:
            self._is_stepped_by_torch = self._is_stepped = True
            part.spend()
            if part.is_selected:
                part.write(self.may_write)
            part.release()
        if parts:
            self.reshard()
            self._sync.after_step()

    def reshard(self) -> None:
        """Free the unsharded copies of parameters that FSDP2 may still hold after a forward pass."""
        if self._has_shards:
            reshard(self.model)

    def close(self) -> None:
        """Call ``write_back``, remove all hooks and restore ``requires_grad``; idempotent."""
        if not self._handles:
            return
        self.write_back()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._chooser.clear()
        remove_listener(self)
        restore_zero_grad(self.model)
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
        # Copying the model copies its hooks; they must keep pointing to this SIFT.
        return self

    def _freeze_and_hook(self) -> None:
        trained = {part.parameter for part in self.sparse_mapping.values()}
        for parameter in self._requires_grad:
            parameter.requires_grad_(parameter in trained)
            parameter.grad = None  # an old gradient would be added to the first one
        # The garbage collector does not see a parameter's hooks: a strong reference would leak.
        me = weakref.ref(self)
        for name, part in self.sparse_mapping.items():
            hooked: Any = part.parameter  # the method is untyped
            hook = partial(_on_gradient, me, name)
            self._handles.append(hooked.register_post_accumulate_grad_hook(hook))
        model: Any = self.model
        before_use = BeforeUse(self)
        # Before the hook of fully_shard, which copies the shards.
        self._handles.append(model.register_forward_pre_hook(before_use, prepend=True))
        self._handles.append(model.register_state_dict_pre_hook(before_use))
        add_listener(self)
        extend_zero_grad(self.model, self.zero_grad)

    def _on_gradient(self, name: str, parameter: Tensor) -> None:
        part = self.sparse_mapping[name]
        gradient = local_gradient(parameter)
        if gradient is None:
            return
        parameter.grad = None
        part.follow()
        if not self._only_scoring:
            self._sync.note_gradient()
        if not part.is_selected:
            is_alone = self._sync.ranks.size == 1
            at_once = is_alone and self.grad_acc == 1 and not self._only_scoring
            self._chooser.score(
                part, gradient, at_once=at_once, is_trained_on=not self._only_scoring
            )
        else:
            if self._reselector is not None:
                self._reselector.score(part, gradient)
            elif self.lr_transfer:
                self._learning_rate.add(part, gradient)
            if not self._only_scoring:
                part.collect(gradient)

    def _warn_without_optimizer(
        self, optimizer: torch.optim.Optimizer, parts: list[SparseParameter]
    ) -> None:
        """Warn once, at an optimizer's second step, of masters that no optimizer has stepped."""
        self._without_optimizer -= {part.name for part in parts}
        if self._without_optimizer and optimizer in self._optimizers:
            logger.warning(
                "no optimizer trains %d of the %d masters, such as %r; build the optimizer from all of"
                " sift.parameters_in_optimizer()",
                len(self._without_optimizer),
                len(self.sparse_mapping),
                min(self._without_optimizer),
            )
            self._without_optimizer.clear()
        self._optimizers.add(optimizer)

    def _check_identity(self) -> None:
        if self._has_shards:
            if self._is_stepped:
                return  # in a forward pass, FSDP2 puts unsharded parameters in place of the shards
            self.reshard()
        if self._is_stepped:
            self._identity.check()
        else:
            self._identity.check_names()

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
                "the optimizer holds parameters of the model, whose gradients go to the masters; "
                "build it from sift.parameters_in_optimizer()"
            )

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def before_use(self) -> None:
        """Make masters and weights equal; called before a forward pass and by ``state_dict``.

        Raises:
            ValueError: a trained parameter was replaced, converted or renamed; or a master without values was replaced.
        """
        self._sync.before_forward()
        self._check_identity()
        for part in self.sparse_mapping.values():
            part.follow()
            if part.is_replaced:
                raise ValueError(
                    f"the master of {part.name!r} was replaced between two steps, where it has no values; with"
                    " masters='stochastic' and 'kahan' only the steps of torch optimizers can train it"
                )
            if part.is_overwritten and not self._is_reverted:
                part.adopt()
            # Write only if needed: a write between two forward passes of one loss breaks backward.
            # Optimizers other than torch's may edit `.data`, which does not change the version.
            may_differ = part.is_behind or not self._is_stepped_by_torch
            if part.is_selected and may_differ and not self._is_reverted and part.differs:
                self._sync.refuse_step_without_average()
                self._refuse_step_without_scale()
                self.reshard()
                part.write(self.may_write)

    def _refuse_step_without_scale(self) -> None:
        is_scaled = any(not part.trains_all for part in self.sparse_mapping.values())
        if self.lr_transfer and is_scaled and not self._is_stepped_by_torch:
            raise ValueError(
                "the masters were changed by something else than the step of a torch optimizer, so lr_transfer"
                " could not scale its learning rate; give lr_transfer=False and a larger learning rate"
            )

    def _lean(self, masters: str, name: str, parameter: nn.Parameter) -> Lean | None:
        if masters == "fp32":
            return None
        if is_sharded(parameter):
            raise ValueError(
                f"masters is {masters!r}, but parameter {name!r} is sharded; use 'fp32' with shards"
            )
        return Lean(masters, name, parameter, self.rounding)

    @property
    def _is_lean(self) -> bool:
        return any(part.lean is not None for part in self.sparse_mapping.values())

    @property
    def _has_shards(self) -> bool:
        return any(part.shard is not None for part in self.sparse_mapping.values())


def _refuse_second(model: nn.Module) -> None:
    if SIFT.of(model) is not None:
        raise ValueError(
            f"the {type(model).__name__} is trained by another SIFT, whose hooks take its "
            "gradients; call SIFT.of(model).close() first, the model keeps the trained weights"
        )


def _on_gradient(me: weakref.ref[SIFT], name: str, parameter: Tensor) -> None:
    sift = me()
    if sift is not None:
        sift._on_gradient(name, parameter)
