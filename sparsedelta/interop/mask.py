"""Masks of the changed elements, which ``sift_train`` accepts as a selection. A mask holds no values."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import numpy as np

from sparsedelta.interop.abilities import Abilities
from sparsedelta.interop.files import Array, write_safetensors
from sparsedelta.interop.form import Form, Setting
from sparsedelta.interop.source import Source
from sparsedelta.interop.transition import Transition

_MARK = {"format": "mask"}


class Mask(Form):
    """One boolean tensor for each changed tensor, in a safetensors file."""

    name = "mask"
    title = "Mask of the changed elements, for sift_train"
    source = "sift_train, sparse_mapping"
    abilities = Abilities()
    not_read: ClassVar[str | None] = (
        "a mask says which elements change, and not to what; give it to sift_train as a selection"
    )

    def recognise(self, source: Source) -> bool:
        """Return whether the metadata has the mark that ``write`` writes."""
        return source.metadata.get("format") == _MARK["format"]

    def write(self, change: Transition, out: Path, settings: Mapping[str, Setting]) -> None:
        """Write the form; see ``Form.write``."""
        tensors: dict[str, Array] = {}
        for one in change.changed():
            mask = np.zeros(one.spec.n_elements, np.uint8)
            mask[one.indices] = 1
            tensors[one.name] = Array("BOOL", one.spec.shape, mask)
        change.lose("the new values: a mask holds positions only")
        write_safetensors(out, tensors, _MARK)
