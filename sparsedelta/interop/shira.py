"""SHiRA adapters of PEFT: numbers that are added at row and column indices of linear layers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sparsedelta.errors import Corrupt, StructureMismatch
from sparsedelta.files.checkpoint import Checkpoint
from sparsedelta.format.records import TensorSpec
from sparsedelta.interop.abilities import FLOATS, Abilities
from sparsedelta.interop.adapter import (
    WEIGHTS,
    check_unused,
    config_of,
    kind_of,
    module_of,
    module_of_tensor,
    tensor_of,
    write_adapter,
)
from sparsedelta.interop.additive import Addition, Numbers, differences
from sparsedelta.interop.files import Array, TensorFile
from sparsedelta.interop.form import Form, Reading, Setting
from sparsedelta.interop.source import Source
from sparsedelta.interop.transition import Changed, Transition
from sparsedelta.interop.view import PatchedCheckpoint, named

_INDICES, _WEIGHT = ".shira_indices", ".shira_weight"
_KNOWN = frozenset({
    "auto_mapping", "base_model_name_or_path", "inference_mode", "init_weights", "mask_type", "peft_type",
    "peft_version", "r", "random_seed", "revision", "target_modules", "task_type",
})  # fmt: skip


class Shira(Form):
    """Additive float32 values, as many in each layer as a LoRA adapter of the same rank has."""

    name = "shira"
    title = "PEFT, SHiRA adapter"
    source = "peft 0.21.2, tuners/shira"
    is_folder = True
    abilities = Abilities(dtypes=FLOATS, signed_zero=False, nan=False, additive=True)

    def recognise(self, source: Source) -> bool:
        """Return whether the folder is an adapter of the type SHIRA."""
        return kind_of(source) == "SHIRA"

    def read(self, source: Source, base: Checkpoint) -> Reading:
        """Return the delta, opened with its base; see ``Form.read``."""
        check_unused(config_of(source), _KNOWN, source)
        with TensorFile(source.path / WEIGHTS) as file:
            modules = {
                module_of(key, _INDICES if key.endswith(_INDICES) else _WEIGHT)
                for key in file.tensors
            }
            shapes = {t.name: t.spec for t in named(base, dict.fromkeys(map(tensor_of, modules)))}
            patches = {
                tensor_of(module): _addition(file, module, shapes[tensor_of(module)])
                for module in sorted(modules)
            }
        return Reading(PatchedCheckpoint(base, patches), "none")

    def write(self, change: Transition, out: Path, settings: Mapping[str, Setting]) -> None:
        """Write the form; see ``Form.write``.

        PEFT expects r · (rows + columns) values in each layer. Where a layer has fewer changes, −0 is added to
        further elements, which leaves their bits as they are.
        """
        kept: dict[str, tuple[Changed, npt.NDArray[np.int64], Numbers]] = {}
        for one in change.changed():
            module = module_of_tensor(one.name)
            if module is None or len(one.spec.shape) != 2:
                change.lose(
                    f"the {len(one.indices)} changed elements of {one.name!r}, because it is not the weight of a"
                    " linear layer",
                    n_tensors=1,
                    n_elements=len(one.indices),
                )
                continue
            numbers, exact = differences(one)
            if not exact.all():
                change.lose(
                    f"{int((~exact).sum())} elements of {one.name!r}, because no float32 number added to the base"
                    " gives the target",
                    n_tensors=int(not exact.any()),
                    n_elements=int((~exact).sum()),
                )
            if exact.any():
                kept[module] = one, one.indices[exact], numbers[exact]
        if not kept:
            raise ValueError(
                "no layer has a change that a SHiRA adapter can hold; choose another form"
            )
        rank = max(-(-len(indices) // sum(one.spec.shape)) for one, indices, _ in kept.values())
        tensors: dict[str, Array] = {}
        for module, (one, indices, numbers) in kept.items():
            indices, numbers = _filled(one, indices, numbers, rank)
            columns = one.spec.shape[1]
            places = np.stack([indices // columns, indices % columns]).astype("<i4")
            tensors[module + _INDICES] = Array("I32", (2, len(indices)), places)
            tensors[module + _WEIGHT] = Array("F32", (len(indices),), numbers)
        config = {
            "auto_mapping": None, "base_model_name_or_path": None, "fan_in_fan_out": False, "inference_mode": True,
            "init_weights": True, "mask_type": "random", "modules_to_save": None, "peft_type": "SHIRA", "r": rank,
            "random_seed": None, "revision": None, "target_modules": sorted(kept), "task_type": None,
        }  # fmt: skip
        write_adapter(out, config, tensors)


def _addition(file: TensorFile, module: str, spec: TensorSpec) -> Addition:
    name = tensor_of(module)
    places = file.bits(module_key(module, _INDICES), "I32", n_dimensions=2).view(np.int32)
    numbers = file.bits(module_key(module, _WEIGHT), "F32").view(np.float32)
    if len(spec.shape) != 2:
        raise StructureMismatch(
            f"tensor {name!r} has shape {list(spec.shape)} in the base, but a SHiRA adapter changes linear layers",
            tensor=name,
        )
    if len(places) != 2:
        raise Corrupt(f"the indices of {module!r} have {len(places)} rows, expected 2", tensor=name)
    rows, columns = places.astype(np.int64)
    if len(rows) and (min(rows.min(), columns.min()) < 0 or columns.max() >= spec.shape[1]):
        raise Corrupt(f"the indices of {module!r} lie outside the layer", tensor=name)
    indices = rows * spec.shape[1] + columns
    order = np.argsort(indices, kind="stable")
    return Addition(name, indices[order], numbers[order] if len(numbers) == len(order) else numbers)


def module_key(module: str, suffix: str) -> str:
    """Return the key of a module's tensor in the adapter's file."""
    return f"base_model.model.{module}{suffix}"


def _filled(
    one: Changed, indices: npt.NDArray[np.int64], numbers: Numbers, rank: int
) -> tuple[npt.NDArray[np.int64], Numbers]:
    """Return positions and numbers with elements added whose number is −0, in order of the positions."""
    n_wanted = rank * sum(one.spec.shape)
    if n_wanted > one.spec.n_elements:
        raise ValueError(
            f"a SHiRA adapter of rank {rank} has {n_wanted} values for {one.name!r}, which has only"
            f" {one.spec.n_elements} elements; too much has changed, choose another form"
        )
    free = np.ones(one.spec.n_elements, np.bool_)
    free[indices] = False
    more = np.flatnonzero(free)[: n_wanted - len(indices)]
    everything = np.concatenate([indices, more])
    order = np.argsort(everything, kind="stable")
    zeros = np.full(len(more), np.float32(-0.0))
    return everything[order], np.concatenate([numbers, zeros]).astype(np.float32)[order]
