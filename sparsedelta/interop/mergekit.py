"""Merge configurations of mergekit, run over deltas: linear, task_arithmetic, ties, dare_linear, dare_ties.

Checked against mergekit 0.1.5. Each ``model`` is a delta, and ``base_model`` is its base. Sums are computed in float32
whatever ``dtype`` says, and the result has the dtypes of the base.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from sparsedelta._typing import AnyPath
from sparsedelta.files.checkpoint import Checkpoint
from sparsedelta.ops.merging.recipe import Method

_METHODS: dict[str, Method] = {
    "linear": "linear",
    "task_arithmetic": "task-arithmetic",
    "ties": "ties",
    "dare_linear": "dare",
    "dare_ties": "dare-ties",
}
_KEYS = {"merge_method", "base_model", "models", "parameters", "dtype", "out_dtype"}
_PARAMETERS = {"weight", "density", "normalize", "lambda", "rescale", "int8_mask"}
_LARGEST = 1e38  # of a weight, which is a float32 number
_DTYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64"}
# PyYAML takes seconds for such a file, and far longer for deeper ones.
_MAX_BYTES, _MAX_DEPTH = 1 << 16, 16


class MergeOptions(TypedDict):
    """Keyword arguments of ``merge``."""

    method: Method
    weights: Sequence[float] | None
    density: Sequence[float] | None
    normalize: bool | None
    scale: float


@dataclass(frozen=True, slots=True)
class MergePlan:
    """What a merge configuration asks for, as arguments of ``merge``.

    Attributes:
        base: path or repository of the base.
        deltas: path or repository of each delta.
        method, weights, density, normalize, scale: as for ``merge``; ``density`` is None where the method
            keeps all changes.
        dtype: the dtype that the floating-point tensors of the result shall have; None if it is not stated.
    """

    base: str
    deltas: tuple[str, ...]
    method: Method
    weights: tuple[float, ...]
    density: tuple[float, ...] | None
    normalize: bool | None
    scale: float
    dtype: str | None

    @property
    def options(self) -> MergeOptions:
        """The keyword arguments of ``merge``."""
        return {
            "method": self.method,
            "weights": self.weights,
            "density": self.density,
            "normalize": self.normalize,
            "scale": self.scale,
        }

    def check_dtypes(self, base: AnyPath) -> None:
        """Check that the result has the dtype that the configuration states.

        Raises:
            ValueError: a floating-point tensor of the base has another dtype.
        """
        with Checkpoint(base, include=(), whole=False, complete=False) as opened:
            for tensor in opened.tensors.values():
                found = tensor.spec.dtype.name
                if self.dtype is not None and found in _DTYPES.values() and found != self.dtype:
                    raise ValueError(
                        f"the configuration asks for {self.dtype}, but tensor {tensor.name!r} of the base is"
                        f" {found}, and merge keeps the dtypes of the base; state out_dtype as that of the base"
                    )


def read_configuration(path: AnyPath) -> MergePlan:
    """Return what a configuration file of mergekit asks for.

    Raises:
        ModuleNotFoundError: PyYAML is not installed.
        ValueError: the file is not such a configuration, or asks for something that ``merge`` does not do.
    """
    config = _parsed(Path(path))
    unknown = config.keys() - _KEYS
    if unknown:
        raise ValueError(
            f"'{path}' has the key {_shown(unknown)}; only {', '.join(sorted(_KEYS))} are supported"
        )
    method = _METHODS.get(str(config.get("merge_method")))
    if method is None:
        raise ValueError(
            f"merge_method is {_shown([config.get('merge_method')])}, expected one of {', '.join(_METHODS)}"
        )
    base, models = config.get("base_model"), config.get("models")
    if not isinstance(base, str):
        raise ValueError(f"'{path}' has no base_model; name the base of the deltas")
    if not isinstance(models, list) or not all(isinstance(one, dict) for one in models):
        raise ValueError(f"'{path}' has no list of models; each names a delta of the base")
    shared = _parameters(config, "parameters")
    deltas = [one for one in models if one.get("model") != base]
    own = [
        {**shared, **_parameters(one, f"the parameters of {_shown([one.get('model')])}")}
        for one in deltas
    ]
    names = tuple(_name(one) for one in deltas)
    weights = tuple(_number(one, "weight", name) for one, name in zip(own, names, strict=True))
    keeps_all = method in ("linear", "task-arithmetic")
    density = tuple(
        _number({"density": 1.0, **one}, "density", n) for one, n in zip(own, names, strict=True)
    )
    normalize = _flag(shared, "normalize")
    if _flag(shared, "rescale") not in (None, method in ("dare", "dare-ties")):
        raise ValueError(f"rescale is {shared['rescale']!r}, which merge does not do for {method}")
    scale = _number({"lambda": 1.0, **shared}, "lambda", "the merge")
    if method == "linear":
        in_base = [
            {**shared, **_parameters(one, "the base")} for one in models if one not in deltas
        ]
        scale = _linear_scale(
            weights, sum(_number(one, "weight", base) for one in in_base), normalize
        )
        normalize = True
    return MergePlan(
        base,
        names,
        method,
        weights,
        None if keeps_all else density,
        normalize,
        scale,
        _dtype(config),
    )


def _parsed(path: Path) -> dict[str, Any]:
    try:
        import yaml  # type: ignore[import-untyped]
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "merge configurations need PyYAML, which is not installed; install it with:"
            " pip install 'sparsedelta[interop]'",
            name="yaml",
        ) from error
    if path.stat().st_size > _MAX_BYTES:
        raise ValueError(f"'{path}' has more than {_MAX_BYTES} bytes; it is no merge configuration")
    try:
        text = path.read_text("utf-8")
        _check_tokens(yaml.scan(text), path)
        found = yaml.safe_load(text)
    except _Refused:
        raise
    except (yaml.YAMLError, ValueError, LookupError, OverflowError, RecursionError) as error:
        where = getattr(error, "problem_mark", None)
        line = f" in line {where.line + 1}" if where else ""
        raise ValueError(f"'{path}' is not YAML: there is an error{line}") from error
    if not isinstance(found, dict):
        raise ValueError(f"'{path}' is not a merge configuration: it holds no keys")
    return found


class _Refused(ValueError):
    """The file is YAML, and uses something that no merge configuration needs."""


def _check_tokens(tokens: Iterable[Any], path: Path) -> None:
    """Check that YAML has no aliases, and is not nested deeply; values of such files can take any amount of time."""
    depth = 0
    for token in tokens:
        name = type(token).__name__
        if name == "AliasToken":
            raise _Refused(f"'{path}' uses aliases of YAML (*name); write the values out")
        depth += name.endswith("StartToken") and not name.startswith(("Stream", "Document"))
        depth -= name in ("BlockEndToken", "FlowSequenceEndToken", "FlowMappingEndToken")
        if depth > _MAX_DEPTH:
            raise _Refused(
                f"'{path}' is nested deeper than {_MAX_DEPTH} levels; it is no merge configuration"
            )


def _shown(values: Iterable[Any]) -> str:
    """Return the first of some values, as it is shown in a message."""
    return min(repr(value)[:80] for value in values)


def _name(model: Mapping[str, Any]) -> str:
    name = model.get("model")
    if not isinstance(name, str):
        raise ValueError(f"a model is {_shown([name])}, expected the path or repository of a delta")
    return name


def _parameters(holder: Mapping[str, Any], what: str) -> dict[str, Any]:
    found = holder.get("parameters") or {}
    if not isinstance(found, dict):
        raise ValueError(f"{what} are not keys and values")
    unknown = found.keys() - _PARAMETERS
    if unknown:
        raise ValueError(f"{what} have the key {_shown(unknown)}, which merge does not know")
    return {key: _plain(key, value) for key, value in found.items()}


def _plain(key: str, value: Any) -> Any:
    """Return a value that holds for all tensors. mergekit writes it alone, or as the only item without a filter."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict):
        value = value[0].get("value") if value[0].keys() == {"value"} else value
    if isinstance(value, list | dict):
        raise ValueError(
            f"{key} differs between layers or tensors, and merge takes one value for all"
        )
    return value


def _number(parameters: Mapping[str, Any], key: str, of: str) -> float:
    value = parameters.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < _LARGEST:
        raise ValueError(f"{key} of {of!r} is {_shown([value])}, expected a number")
    return float(value)


def _flag(parameters: Mapping[str, Any], key: str) -> bool | None:
    value = parameters.get(key)
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"{key} is {_shown([value])}, expected true or false")
    return value


def _linear_scale(weights: tuple[float, ...], of_base: float, normalize: bool | None) -> float:
    """Return the factor for the weighted average of the differences that gives mergekit's weighted average."""
    total = sum(weights) + of_base
    if normalize is False and not math.isclose(total, 1.0):
        raise ValueError(
            f"normalize is false and the weights sum to {total:g}: the result would be {total:g} times a model;"
            " set normalize to true, or give the base a weight that makes the sum 1"
        )
    if total == 0:
        raise ValueError("the weights sum to 0; give weights that do not")
    return sum(weights) / total


def _dtype(config: Mapping[str, Any]) -> str | None:
    wanted = config.get("out_dtype") or config.get("dtype")
    if wanted is None:
        return None
    if not isinstance(wanted, str) or wanted not in _DTYPES:
        raise ValueError(f"dtype is {_shown([wanted])}, expected one of {', '.join(_DTYPES)}")
    return _DTYPES[wanted]
