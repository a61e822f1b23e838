"""``Lean``: what a parameter keeps between the steps in place of its masters.

The masters have values only during a step. Before it they are made from the weights, and after it they are rounded
to the weights' dtype: at random, so that no update is lost on average, or with the rounding error kept in 16 bits
beside the weights. Weights in fp32 or fp64 hold their masters exactly.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sift_train.host import MASTERS_DEVICES
from sift_train.selection import seeded_generator

MASTERS = ("fp32", "stochastic", "kahan")


def check_masters(masters: str, device: str = "model") -> None:
    """Check the settings ``masters`` and ``masters_device``.

    Raises:
        ValueError: one is unknown, or they exclude each other.
    """
    if masters not in MASTERS:
        raise ValueError(f"masters is {masters!r}; choose one of {', '.join(MASTERS)}")
    if device not in MASTERS_DEVICES:
        raise ValueError(
            f"masters_device is {device!r}; choose one of {', '.join(MASTERS_DEVICES)}"
        )
    if device == "cpu" and masters != "fp32":
        raise ValueError(
            f"masters_device is 'cpu' and masters is {masters!r}, which keeps no masters between the steps; use masters"
            " 'fp32' with it"
        )


class Rounding:
    """The random numbers of stochastic rounding; they depend on the seed, the step and the parameter's name only.

    Attributes:
        n_steps: number of steps so far.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self.n_steps = 0

    def generator(self, name: str, device: torch.device) -> torch.Generator:
        """Return a generator for one parameter at this step."""
        seed = seeded_generator(self._seed, f"rounding/{self.n_steps}/{name}").initial_seed()
        return torch.Generator(device).manual_seed(seed)


class Lean:
    """Makes the masters of one parameter from its weights, and rounds them.

    Attributes:
        masters: ``"stochastic"`` or ``"kahan"``.
        is_loaded: whether the masters have values now.
        compensation: what rounding has cut off the masters, shape (k,), in the weights' dtype; None if nothing is kept.

    Args:
        masters: ``"stochastic"`` or ``"kahan"``.
        name: of the parameter.
        parameter: the parameter.
        rounding: the random numbers.

    Raises:
        ValueError: the parameter's dtype cannot be rounded at random.
    """

    def __init__(
        self, masters: str, name: str, parameter: nn.Parameter, rounding: Rounding
    ) -> None:
        self.masters = masters
        self._name = name
        self._rounding = rounding
        is_narrow = parameter.dtype.itemsize < 4
        self._is_random = is_narrow and masters == "stochastic"
        self._is_compensated = is_narrow and masters == "kahan"
        if self._is_random and parameter.dtype != torch.bfloat16:
            raise ValueError(
                f"masters is 'stochastic', but parameter {name!r} is {parameter.dtype}, and only bfloat16 is rounded at"
                " random; use 'kahan'"
            )
        self.is_loaded = False
        self.compensation: Tensor | None = None

    def begin(self, held: Tensor) -> None:
        """Start with weights that are the masters, shape (k,)."""
        self.compensation = torch.zeros_like(held) if self._is_compensated else None

    def masters_of(self, held: Tensor, dtype: torch.dtype) -> Tensor:
        """Return a copy of the masters of weights, shape (k,), in a dtype."""
        masters = held.to(dtype, copy=True)
        return masters if self.compensation is None else masters.add_(self.compensation)

    def rounded(self, masters: Tensor, held: Tensor, may_write: Tensor | None) -> Tensor:
        """Return the weights of masters, shape (k,), and keep the rounding error.

        Args:
            masters: shape (k,).
            held: the weights so far.
            may_write: as for ``SIFT``; if it is False, the weights so far are returned.
        """
        weights = self._round(masters, held.dtype)
        before = self.compensation
        self.keep_error(masters, weights)
        if may_write is None:
            return weights
        if self.compensation is not None and before is not None:
            self.compensation = torch.where(may_write, self.compensation, before)
        return torch.where(may_write, weights, held)

    def keep_error(self, masters: Tensor, weights: Tensor) -> None:
        """Keep the difference between masters and the weights that hold them."""
        if self._is_compensated:
            self.compensation = (masters - weights).to(weights.dtype)

    def follow(self, device: torch.device) -> None:
        """Move what is kept to a device."""
        if self.compensation is not None:
            self.compensation = self.compensation.to(device)

    def _round(self, masters: Tensor, dtype: torch.dtype) -> Tensor:
        if not self._is_random:
            return masters.to(dtype)
        generator = self._rounding.generator(self._name, masters.device)
        return stochastic_bfloat16(masters, generator)


def stochastic_bfloat16(values: Tensor, generator: torch.Generator) -> Tensor:
    """Return fp32 values in bfloat16, each rounded up or down with the probabilities that keep its mean.

    Args:
        values: fp32; infinities and NaNs stay.
        generator: on the device of the values.
    """
    bits = torch.randint(
        1 << 16, values.shape, generator=generator, device=values.device, dtype=torch.int32
    )
    bits.add_(values.view(torch.int32)).bitwise_and_(-1 << 16)
    return torch.where(values.isfinite(), bits.view(torch.float32), values).bfloat16()
