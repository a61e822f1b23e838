"""``WrittenBack``: the weights of a model and their masters stay equal, whoever changes one of them.

Before the model is used, the masters are written to it, or take what something else has written to it. The weights from
before training can be restored at any time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from sift_train.identity import Identity
from sift_train.masters import SparseParameter
from sift_train.ranks.group import Ranks
from sift_train.ranks.shard import reshard
from sift_train.ranks.sync import Synchronizer
from sift_train.sift.trained import Trained


class WrittenBack(Trained):
    """A trained model whose weights and masters are kept equal.

    Attributes:
        lr_transfer: whether each step divides the learning rate of sparse parameters by ``lr_share``.
        may_write: a bool tensor on the device, or None, which means True. If it is False, weights
            are not overwritten. The host does not read it, so a loop need not wait for a loss to
            know whether it is finite.

    Args:
        model: the model.
        parts: its trained parameters.
        sync: keeps the masters equal on all ranks.
        lr_transfer: as for ``SIFT``.
    """

    def __init__(
        self,
        model: nn.Module,
        parts: Sequence[SparseParameter],
        sync: Synchronizer,
        *,
        lr_transfer: bool,
    ) -> None:
        super().__init__(model, parts)
        self.lr_transfer = lr_transfer
        self.may_write: Tensor | None = None
        self._sync = sync
        self._identity = Identity(model, parts)
        self._is_reverted = False  # inside ``reverted``
        self._is_stepped = False
        self._is_stepped_by_torch = False

    @property
    def ranks(self) -> Ranks:
        """The processes that train this model together; one if nothing connects several."""
        return self._sync.ranks

    def check_parameters(self) -> None:
        """Check that the model still uses every trained parameter, under its name.

        ``export_delta``, ``state_dict`` and the first step call it.

        Raises:
            ValueError: a parameter was replaced, converted to another dtype, renamed or removed.
        """
        self._identity.check_names()

    def check_ranks(self) -> None:
        """Compare the choice and the masters of all ranks, as is done at the first and every 100th step.

        Raises:
            RuntimeError: they differ, or another rank has stopped.
        """
        self._sync.check()

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
        """Give the model its weights and buffers from before training inside the block, bit for bit."""
        self.before_use()
        parts = [part for part in self.sparse_mapping.values() if part.is_selected]
        self.reshard()
        trained = [(part, part.swap_original()) for part in parts]
        self._is_reverted = True
        try:
            with self._with_first_buffers():
                yield
        finally:
            self._is_reverted = False
            self.reshard()
            for part, values in trained:
                part.swap_original(values)

    def reshard(self) -> None:
        """Free the unsharded copies of parameters that FSDP2 may still hold after a forward pass."""
        if self._has_shards:
            reshard(self.model)

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
                if part.is_arriving:
                    raise ValueError(
                        f"the master of {part.name!r} was changed before its gradient had arrived on the CPU; with"
                        " masters_device='cpu', call sift.sync_gradients() before the step of an optimizer that is not"
                        " torch's"
                    )
                self.reshard()
                part.write(self.may_write)

    def _refuse_step_without_scale(self) -> None:
        is_scaled = any(not part.trains_all for part in self.sparse_mapping.values())
        if self.lr_transfer and is_scaled and not self._is_stepped_by_torch:
            raise ValueError(
                "the masters were changed by something else than the step of a torch optimizer, so lr_transfer"
                " could not scale its learning rate; give lr_transfer=False and a larger learning rate"
            )

    def _check_identity(self) -> None:
        if self._has_shards:
            if self._is_stepped:
                return  # in a forward pass, FSDP2 puts unsharded parameters in place of the shards
            self.reshard()
        if self._is_stepped:
            self._identity.check()
        else:
            self._identity.check_names()
