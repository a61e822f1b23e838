"""LoRA adapters of PEFT, merged as ``merge_and_unload`` merges them into a model of the base's dtype on a CPU."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from sparsedelta.codecs.values import Bits
from sparsedelta.errors import Corrupt, LimitExceeded, UnsupportedFeature
from sparsedelta.files.checkpoint import Checkpoint
from sparsedelta.format.records import TensorSpec
from sparsedelta.interop.abilities import FLOATS, Abilities
from sparsedelta.interop.adapter import (
    WEIGHTS,
    check_unused,
    config_of,
    kind_of,
    module_of,
    tensor_of,
)
from sparsedelta.interop.additive import Numbers, check_addable
from sparsedelta.interop.files import TensorFile
from sparsedelta.interop.form import Form, Reading
from sparsedelta.interop.source import Source
from sparsedelta.interop.view import PatchedCheckpoint
from sparsedelta.ops.merging.floats import to_numbers

if TYPE_CHECKING:
    import torch

_SUFFIXES = {
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_embedding_A": "embedding_A",
    ".lora_embedding_B": "embedding_B",
}
# Options that do not change what is merged, and those that are read below.
_KNOWN = frozenset({
    "auto_mapping", "base_model_name_or_path", "bias", "exclude_modules", "fan_in_fan_out", "inference_mode",
    "init_lora_weights", "layers_pattern", "layers_to_transform", "lora_alpha", "lora_dropout", "megatron_core",
    "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "alpha_pattern", "revision",
    "target_modules", "task_type", "use_rslora",
})  # fmt: skip
# Other initial values change the base when the adapter is created.
_INITIAL = (True, False, None, "gaussian", "orthogonal", "eva")
_MAX_PATTERNS = 1 << 12
_LARGEST = 1 << 53  # of a rank or alpha
_PLAIN_PATTERN = re.compile(r"\^?[\w.]{1,500}")


class Lora(Form):
    """Two matrices for each adapted layer; their product is added to the weight."""

    name = "lora"
    title = "PEFT, LoRA adapter"
    source = "peft 0.21.2, tuners/lora"
    is_folder = True
    abilities = Abilities(dtypes=FLOATS, signed_zero=False, nan=False, additive=True)
    not_written: ClassVar[str | None] = (
        "a change of a few elements has full rank, so two small matrices cannot hold it; publish the delta itself, or"
        " extract an approximation with a tool for that"
    )

    def recognise(self, source: Source) -> bool:
        """Return whether the folder is an adapter of the type LORA."""
        return kind_of(source) == "LORA"

    def read(self, source: Source, base: Checkpoint) -> Reading:
        """Return the delta, opened with its base; see ``Form.read``."""
        config = config_of(source)
        check_unused(config, _KNOWN, source)
        if (
            config.get("bias") not in (None, "none")
            or config.get("init_lora_weights", True) not in _INITIAL
        ):
            raise UnsupportedFeature(
                f"'{source.path}' trains biases, or changes the base before training (init_lora_weights); merge the"
                " adapter with PEFT, and make a delta of the result"
            )
        parts: dict[str, dict[str, Numbers]] = {}
        with TensorFile(source.path / WEIGHTS) as file:
            for key, tensor in file.tensors.items():
                suffix = next((s for s in _SUFFIXES if key.endswith(s)), None)
                if suffix is None or tensor.spec.dtype.name not in FLOATS:
                    raise UnsupportedFeature(
                        f"the adapter holds {key!r} of dtype {tensor.spec.dtype.name}, which this release cannot merge;"
                        " merge the adapter with PEFT, and make a delta of the result"
                    )
                bits = file.bits(key, *FLOATS, n_dimensions=2)
                numbers = to_numbers(tensor.spec.dtype, bits.reshape(-1)).reshape(bits.shape)
                parts.setdefault(module_of(key, suffix), {})[_SUFFIXES[suffix]] = numbers.astype(
                    np.float32
                )
        patches = {
            tensor_of(module): _product(module, part, config) for module, part in parts.items()
        }
        return Reading(PatchedCheckpoint(base, patches), "none")


@dataclass(frozen=True, slots=True)
class _Product:
    """The product of two matrices.

    Attributes:
        name: name of the tensor.
        left, right: the matrices.
        scaling: what the product is multiplied by.
        transposed: whether the product is transposed.
        is_embedding: PEFT rounds the change of an embedding to the dtype of the weight before it adds it, but that of
            a linear layer only with the sum.
    """

    name: str
    left: Numbers
    right: Numbers
    scaling: float
    transposed: bool
    is_embedding: bool

    def __call__(self, old: Bits, spec: TensorSpec) -> Bits:
        """Return the new bits; see ``Patch``."""
        check_addable(spec, self.name)
        shape = self.left.shape[0], self.right.shape[1]
        shape = shape[::-1] if self.transposed else shape
        if spec.shape != shape:
            raise Corrupt(
                f"tensor {self.name!r} has shape {list(spec.shape)} in the base, but the adapter's product has"
                f" {list(shape)}; use the base that the adapter was trained on",
                tensor=self.name,
            )
        import torch

        product = torch.from_numpy(self.left) @ torch.from_numpy(self.right)
        change = (product.T if self.transposed else product) * self.scaling
        weight = (
            torch.from_numpy(old.view(f"i{spec.dtype.width}")).view(_dtype(spec)).reshape(shape)
        )
        weight += change.to(weight.dtype) if self.is_embedding else change
        return old


def _dtype(spec: TensorSpec) -> torch.dtype:
    import torch

    return {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}[spec.dtype.name]


def _product(module: str, part: Mapping[str, Numbers], config: Mapping[str, Any]) -> _Product:
    prefix = "embedding_" if "embedding_A" in part or "embedding_B" in part else ""
    if part.keys() != {f"{prefix}A", f"{prefix}B"}:
        raise Corrupt(f"the adapter does not hold both matrices of {module!r}; it is damaged")
    right, left = part[f"{prefix}A"], part[f"{prefix}B"]
    rank = _of_module(config, "rank_pattern", "r", module)
    alpha = _of_module(config, "alpha_pattern", "lora_alpha", module)
    if left.shape[1] != right.shape[0] or rank != right.shape[0] or not rank:
        raise Corrupt(
            f"the matrices of {module!r} have shapes {list(left.shape)} and {list(right.shape)}, which do not fit rank"
            f" {rank}; the adapter is damaged"
        )
    scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    transposed = bool(prefix) or bool(config.get("fan_in_fan_out"))
    return _Product(tensor_of(module), left, right, scaling, transposed, bool(prefix))


def _ends_with(module: str, pattern: str) -> bool:
    """Return whether a name ends with a pattern of plain characters, at its begin or after a dot."""
    name = pattern.removeprefix("^")
    if not module.endswith(name.rpartition(".")[2]):
        return False
    end, rest = module[len(module) - len(name) :], module[: len(module) - len(name)]
    if len(end) != len(name) or any(c not in (".", d) for c, d in zip(name, end, strict=True)):
        return False
    return not rest or (rest.endswith(".") and name == pattern)


def _of_module(config: Mapping[str, Any], patterns: str, default: str, module: str) -> float:
    """Return the rank or alpha of a module: by the first pattern that matches the end of its name, or the default."""
    found: Any = config.get(default)
    given = config.get(patterns) or {}
    if not isinstance(given, dict):
        raise Corrupt(f"{patterns} is no JSON object; the adapter is damaged")
    if len(given) > _MAX_PATTERNS:
        raise LimitExceeded(
            f"{patterns} has {len(given)} names, the limit is {_MAX_PATTERNS}; merge the adapter with PEFT, and make a"
            " delta of the result"
        )
    for pattern, value in given.items():
        if not _PLAIN_PATTERN.fullmatch(pattern):
            raise UnsupportedFeature(
                f"{patterns} holds the expression {pattern[:60]!r}, expected a name; merge the adapter with PEFT, and make"
                " a delta of the result"
            )
        if _ends_with(module, pattern):
            found = value
            break
    if isinstance(found, bool) or not isinstance(found, int | float) or abs(found) > _LARGEST:
        raise Corrupt(f"{default} of {module!r} is {str(found)[:40]!r}, expected a number")
    return found
