"""Checks that a model still uses the parameters that a SIFT trains.

``resize_token_embeddings``, sharding, adapters and a new head replace parameters. The masters of the
old ones would then train nothing.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from sift_train.masters import SparseParameter
from sift_train.targets import names_of_parameters


class Identity:
    """The places at which a model holds its trained parameters.

    Args:
        model: the model.
        parts: its trained parameters.
    """

    def __init__(self, model: nn.Module, parts: Iterable[SparseParameter]) -> None:
        self._model = model
        self._parts = {part.name: part for part in parts}
        self._first = {
            name: (part.parameter.dtype, tuple(part.parameter.shape))
            for name, part in self._parts.items()
        }
        by_id = {id(part.parameter): part for part in self._parts.values()}
        self._places = [
            (by_id[id(parameter)], module._parameters, attribute)
            for module in model.modules()
            for attribute, parameter in module._parameters.items()
            if id(parameter) in by_id
        ]

    def check(self) -> None:
        """Check the modules that held the parameters at first; takes microseconds.

        Raises:
            ValueError: a parameter was replaced, converted or resized.
        """
        for part, held, attribute in self._places:
            if held.get(attribute) is not part.parameter:
                self._refuse(part.name, "was replaced after SIFT was created")
            first = self._first[part.name]
            now = (part.parameter.dtype, tuple(part.parameter.shape))
            if now != first:
                self._refuse(
                    part.name,
                    f"had {first[0]} and shape {first[1]} and now has {now[0]} and shape {now[1]}",
                )

    def check_names(self) -> None:
        """Check also that these modules are still in the model, under the same names.

        Raises:
            ValueError: a parameter was replaced, converted, resized, renamed or removed.
        """
        self.check()
        named = {
            name: parameter
            for parameter, names in names_of_parameters(self._model).items()
            for name in names
        }
        for name, part in self._parts.items():
            if named.get(name) is not part.parameter:
                self._refuse(name, "is no longer in the model under this name")

    def _refuse(self, name: str, problem: str) -> None:
        raise ValueError(
            f"parameter {name!r} {problem}, so the SIFT no longer fits it; change the model before SIFT is created, or after its"
            " delta is written"
        )
