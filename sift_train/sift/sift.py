"""``SIFT``: sparse training in place, by the method of arXiv 2312.11875.

Gradient hooks move the selected gradients to the masters; each optimizer step writes the masters
back to the model. The model keeps its modules, parameters and state dict, and its weights are
always those after the last optimizer step.
"""

from __future__ import annotations

import logging
import re
import weakref
from collections.abc import Mapping, Sequence
from functools import partial
from os import PathLike
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

import sparsedelta
from sift_train import saved
from sift_train.checkpointing import disable_checkpointing, enable_checkpointing
from sift_train.chooser import Chooser, choose_by_hand
from sift_train.hooks import BeforeUse
from sift_train.known import as_int, check_integer, names_checked
from sift_train.lean import Rounding
from sift_train.linear import LayerHandle, layers_of
from sift_train.lr_transfer import LearningRate
from sift_train.masks import find_masks
from sift_train.plain import plain
from sift_train.ranks.shard import local_gradient
from sift_train.ranks.sync import Synchronizer
from sift_train.rules import RULES, Selection, find_rule
from sift_train.sift.parts import trained_parts
from sift_train.sift.stepping import Stepping
from sift_train.steps import add_listener, current_listeners, remove_listener
from sift_train.structure import Block, check_block
from sift_train.targets import ALL_LINEAR, Names, warn_of_adapters
from sift_train.zeroing import extend_zero_grad, restore_zero_grad

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from transformers import Trainer

    from sift_train.masters import SparseParameter


logger = logging.getLogger(__name__)


class SIFT(Stepping):
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

    On a CPU, the gradient of the weight of an ``nn.Linear`` is a sparse tensor of the chosen components, once these suffice.
    ``linear`` says when.

    The step of every ``torch.optim.Optimizer`` built from the masters writes them back to the
    model. After a step of another optimizer, they are written back before the next forward pass,
    when the state dict is taken, and by ``write_back`` and ``close``. If the model is moved to
    another device before its first step, the next forward pass moves the masters there, unless they are kept on the CPU.

    Attributes:
        model: the model that is trained.
        sparse_mapping: the trained components of each parameter, by the parameter's name.
        lr_transfer: whether each step divides the learning rate of sparse parameters by ``lr_share``.
        rounding: the random numbers of ``masters="stochastic"``.
        settings: the arguments that decide what is trained and how, as plain JSON.
        may_write: a bool tensor on the device, or None, which means True. If it is False, weights
            are not overwritten. The host does not read it, so a loop need not wait for a loss to
            know whether it is finite.

    Args:
        model: a module without wrappers for several devices.
        sparse_rate: share of each tensor's components to train, above 0 to 1; in a 3-D tensor of experts, of
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
        masters_device: ``"model"``: masters and optimizer states are on the model's device; ``"cpu"``: they are in the
            memory of the host, where the optimizer steps. Only with fp32 masters, and without shards and gradient scalers.

    Raises:
        TypeError: ``model`` is no module, or ``process_group`` no process group.
        ValueError: an argument is out of range, or a parameter cannot be trained in place.
    """

    @names_checked()
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
        masters_device: str = "model",
    ) -> None:
        self.grad_acc = grad_acc
        _check_model(model)
        _refuse_second(model)
        warn_of_adapters(model)
        check_block(block)
        check_integer("seed", seed := as_int(seed))
        masks, names = find_masks(selection, model), sparse_module
        if sparse_rate == 1 and not masks:
            logger.warning(
                "sparse_rate is 1, so all components of the chosen parameters are trained; 1 % is sparse_rate=0.01"
            )
        if masks:
            if sparse_module != ALL_LINEAR:
                raise ValueError("selection is a mask of named parameters; leave sparse_module out")
            sparse_module = [re.compile(f"^{re.escape(name)}$") for name in masks]
        rounding = Rounding(seed)
        parts = trained_parts(
            model,
            sparse_rate,
            sparse_module,
            exception or (),
            budget=budget,
            block=block,
            masters=masters,
            masters_device=masters_device,
            rounding=rounding,
        )
        by_name = {part.name: part for part in parts}
        rule = find_rule(selection) or RULES["gradient"]
        learning_rate = LearningRate(by_name, is_uniform=rule.is_uniform and not masks)
        super().__init__(
            model,
            parts,
            Synchronizer(model, by_name, process_group, reduce_dtype),
            Chooser(
                by_name,
                rule,
                budget,
                seed,
                sparse_rate,
                block,
                learning_rate=learning_rate if lr_transfer else None,
            ),
            learning_rate,
            rounding,
            lr_transfer=lr_transfer,
        )
        if block is not None:
            _warn_of_large_blocks(parts, sparse_rate, block)
        given = {
            "sparse_rate": sparse_rate,
            "sparse_module": names,
            "exception": exception or (),
            "selection": selection,
            "budget": budget,
            "block": block,
            "seed": seed,
            "reduce_dtype": None if reduce_dtype is None else str(reduce_dtype),
            "lr_transfer": lr_transfer,
            "masters": masters,
        }
        self.settings = {name: plain(value) for name, value in given.items()}
        self._handles: list[RemovableHandle | LayerHandle] = []
        choose_by_hand(model, parts, masks)
        self._checkpointing = gradient_checkpointing and enable_checkpointing(model)
        self._chooser.choose_without_gradients()
        self._freeze_and_hook()

    @property
    def grad_acc(self) -> int:
        """Micro-batches per optimizer step; may be set until the components are chosen."""
        return self._grad_acc

    @grad_acc.setter
    def grad_acc(self, value: int) -> None:
        check_integer("grad_acc", value := as_int(value), least=1)
        self._grad_acc = value

    def set_trainer(self, trainer: Trainer) -> None:
        """Add a ``SiftCallback`` to a Trainer whose optimizer holds the masters."""
        from sift_train.trainer import SiftCallback  # takes seconds

        # Before those that report what is logged, because it adds to that.
        handler: Any = trainer.callback_handler
        callback = SiftCallback(self)
        callback.precedes_reporters = True
        handler.callbacks.insert(0, callback)

    @staticmethod
    def of(model: nn.Module) -> SIFT | None:
        """Return the SIFT that trains this model and is not closed; None if there is none."""
        own = set(model.parameters())
        for other in current_listeners():
            if isinstance(other, SIFT) and not own.isdisjoint(other._requires_grad):
                return other
        return None

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

        Call it on rank 0 only, or, if ranks divide the model, on all ranks together.

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

    @property
    def is_closed(self) -> bool:
        """Whether ``close`` was called; nothing is trained any more."""
        return not self._handles

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """Return None: the copy of a model is a plain model, which this SIFT does not train."""

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a SIFT cannot be copied or pickled; write its state with sift.save(path), and the model with save_pretrained or its state_dict"
            " (a model of get_sift_model: after `sift.close()` and `del model.sift`)"
        )

    def __repr__(self) -> str:
        parts = self.sparse_mapping.values()
        n_selected = sum(part.is_selected for part in parts)
        return (
            f"SIFT({type(self.model).__name__}: {self.n_trained:,} of {self.n_total:,} components "
            f"trained, {100 * self.n_trained / self.n_total:.2f} %; {n_selected:,} of "
            f"{len(parts):,} parameters chosen{'; closed' if self.is_closed else ''})"
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

    def _freeze_and_hook(self) -> None:
        trained = {part.parameter for part in self.sparse_mapping.values()}
        frozen = [
            n for n, part in self.sparse_mapping.items() if not self._requires_grad[part.parameter]
        ]
        # All are, if someone froze the model first, as is done for adapters.
        if 0 < len(frozen) < len(trained):
            logger.warning(
                "%d of the %d parameters that are trained were frozen (requires_grad=False), such as %r; a SIFT trains what the"
                " arguments name (sparse_module, exception, a mask), so name only the others there",
                len(frozen), len(trained), frozen[0],
            )  # fmt: skip
        for parameter in self._requires_grad:
            parameter.requires_grad_(parameter in trained)
            parameter.grad = None  # an old gradient would be added to the first one
        # The garbage collector does not see a parameter's hooks: a strong reference would leak.
        me = weakref.ref(self)
        for name, part in self.sparse_mapping.items():
            hooked: Any = part.parameter  # the method is untyped
            hook = partial(_on_gradient, me, name)
            self._handles.append(hooked.register_post_accumulate_grad_hook(hook))
        for layer, part in layers_of(self.model, self.sparse_mapping.values()):
            self._handles.append(LayerHandle(layer, part, partial(_wanted, me, part.name)))
        model: Any = self.model
        before_use = BeforeUse(self)
        # Before the hook of fully_shard, which copies the shards.
        self._handles.append(model.register_forward_pre_hook(before_use, prepend=True))
        self._handles.append(model.register_state_dict_pre_hook(before_use))
        add_listener(self)
        extend_zero_grad(self.model, self.zero_grad)

    def _wanted(self, name: str) -> Tensor | None:
        """Return the components of a parameter whose gradients suffice now, flat; None if all gradients are needed."""
        part = self.sparse_mapping[name]
        hooked: Any = part.parameter
        if not self._handles:
            return None  # closed after the forward pass
        if hooked._backward_hooks or len(hooked._post_accumulate_grad_hooks or ()) > 1:
            return None  # hooks of others expect a dense gradient
        if self._reselector is not None:
            ranks_all = self._reselector.needs_gradients
        else:
            ranks_all = self.lr_transfer and self._learning_rate.is_measuring
        return part.flat_index if part.is_selected and not (ranks_all or part.trains_all) else None

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
            if gradient.is_sparse:
                pass  # nothing needs the other components
            elif self._reselector is not None:
                self._reselector.score(part, gradient)
            elif self.lr_transfer:
                self._learning_rate.add(part, gradient)
            if not self._only_scoring:
                part.collect(gradient)


def _check_model(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model is of type {type(model).__name__}, expected a module; load the model first, as with from_pretrained"
        )


def _warn_of_large_blocks(parts: Sequence[SparseParameter], rate: float, block: Block) -> None:
    """Warn if whole blocks, of which each matrix trains at least one, are far more than the rate."""
    sparse = [part for part in parts if not part.is_dense]
    share = sum(part.n_wanted for part in sparse) / max(1, sum(part.numel for part in sparse))
    if share > 2 * rate:
        logger.warning(
            "block is %r, and each matrix trains at least one block, so %.3g %% of the components are trained in place of %.3g %%;"
            " give smaller blocks, or the rate that you want",
            block, 100 * share, 100 * rate,
        )  # fmt: skip


def _refuse_second(model: nn.Module) -> None:
    if SIFT.of(model) is not None:
        raise ValueError(
            f"the {type(model).__name__} is trained by another SIFT, whose hooks take its "
            "gradients; call SIFT.of(model).close() first, the model keeps the trained weights"
        )


def _wanted(me: weakref.ref[SIFT], name: str) -> Tensor | None:
    sift = me()
    return None if sift is None else sift._wanted(name)


def _on_gradient(me: weakref.ref[SIFT], name: str, parameter: Tensor) -> None:
    sift = me()
    if sift is not None:
        sift._on_gradient(name, parameter)
