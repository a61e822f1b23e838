"""Task vectors: a safetensors file of dense differences, target minus base, of each changed tensor."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from sparsedelta.files.checkpoint import Checkpoint
from sparsedelta.interop.abilities import FLOATS, Abilities
from sparsedelta.interop.additive import Addition, differences
from sparsedelta.interop.files import Array, TensorFile, write_safetensors
from sparsedelta.interop.form import Form, Reading, Setting
from sparsedelta.interop.source import Source
from sparsedelta.interop.transition import Transition
from sparsedelta.interop.view import PatchedCheckpoint
from sparsedelta.ops.merging.floats import to_numbers

_MARK = {"format": "task_vector"}


class TaskVector(Form):
    """Dense float differences. Only a file with our mark is recognised; others must be named."""

    name = "task-vector"
    title = "Task vector: dense differences of floating-point numbers"
    source = "no specification: safetensors, the names of the checkpoint, target minus base"
    abilities = Abilities(dtypes=FLOATS, signed_zero=False, nan=False, additive=True)

    def recognise(self, source: Source) -> bool:
        """Return whether the metadata has the mark that ``write`` writes."""
        return source.metadata.get("format") == _MARK["format"]

    def accepts(self, source: Source) -> bool:
        """Return whether the file can be read as this form if the caller says so: any safetensors file can."""
        return bool(source.tensors)

    def read(self, source: Source, base: Checkpoint) -> Reading:
        """Return the delta, opened with its base; see ``Form.read``."""
        patches = {}
        with TensorFile(source.path) as file:
            for name, tensor in file.tensors.items():
                bits = file.bits(name, *FLOATS, n_dimensions=None).reshape(-1)
                patches[name] = Addition(
                    name, None, to_numbers(tensor.spec.dtype, bits).astype(np.float32)
                )
        return Reading(PatchedCheckpoint(base, patches), "none")

    def write(self, change: Transition, out: Path, settings: Mapping[str, Setting]) -> None:
        """Write the form; see ``Form.write``. Unchanged elements of a changed tensor get the difference −0."""
        tensors: dict[str, Array] = {}
        for one in change.changed():
            numbers, exact = differences(one)
            if not exact.all():
                change.lose(
                    f"{int((~exact).sum())} elements of {one.name!r}, because no float32 number added to the base"
                    " gives the target",
                    n_elements=int((~exact).sum()),
                )
            dense = np.full(one.spec.n_elements, np.float32(-0.0))
            dense[one.indices[exact]] = numbers[exact]
            tensors[one.name] = Array("F32", one.spec.shape, dense)
        write_safetensors(out, tensors, _MARK)
