"""Finds the weights of linear layers, experts and convolutions, and says which weights are left out.

A linear weight is a matrix that is applied to activations: the weight of a linear layer, or a
parameter that its module holds directly, as fused experts, routers and gates do. Such a parameter
is known by its name, its shape and its module; the model is not run.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection

from torch import nn

# The last word of a parameter's name, such as `gate_up_proj`, `in_proj_weight` or `w1`.
_APPLIED = re.compile(r"(^|_)(weight|proj|kernel|fn)(_|$)|^(q|k|v|o|r|[wv]\d)$")
_ONE_MATRIX = re.compile(r"^(q|k|v|o|r|r_kernel)$")  # 3-D in XLNet and Funnel: its output has heads
_NOT_LINEAR = re.compile("Embedding|Conv|Norm|Parametrization")


def linear_weights(model: nn.Module) -> set[nn.Parameter]:
    """Return the weights of linear layers and experts, without input and output embeddings.

    The output layer counts as output embeddings if its shape is that of the input embeddings.
    """
    apart = _embeddings(model) | _output_embeddings(model)
    return {
        parameter
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter not in apart and _is_linear(module, name, parameter)
    }


def conv_weights(model: nn.Module) -> set[nn.Parameter]:
    """Return the weights of convolutions, of one to three dimensions, transposed ones too."""
    return {
        module.weight
        for module in model.modules()
        if isinstance(module, nn.modules.conv._ConvNd) and isinstance(module.weight, nn.Parameter)
    }


def n_matrices(model: nn.Module) -> dict[nn.Parameter, int]:
    """Return the number of matrices in each 3-D linear weight, such as one for each expert."""
    return {
        parameter: len(parameter)
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None
        and parameter.dim() == 3
        and _is_linear(module, name, parameter)
        and not _ONE_MATRIX.search(name)
    }


def left_out(model: nn.Module, trained: Collection[nn.Parameter]) -> str:
    """Return one sentence that says which share of a model's weights is trained and what is left out."""
    total = sum(parameter.numel() for parameter in model.parameters())
    kinds: Counter[str] = Counter()
    for parameter, kind in _kinds(model).items():
        if parameter not in trained:
            kinds[kind] += parameter.numel()
    reached = sum(parameter.numel() for parameter in trained)
    shares = ", ".join(f"{kind} {n / total:.1%}" for kind, n in kinds.most_common() if n)
    return f"components of {reached / total:.1%} of the weights can be trained; left out: {shares or 'nothing'}"


def reached_share(model: nn.Module, trained: Collection[nn.Parameter]) -> float:
    """Return the share of the weights that are trained, without embeddings and vectors."""
    matrices = [p for p, kind in _kinds(model).items() if kind not in ("embeddings", "vectors")]
    total = sum(parameter.numel() for parameter in matrices)
    return sum(p.numel() for p in matrices if p in trained) / total if total else 1.0


def _kinds(model: nn.Module) -> dict[nn.Parameter, str]:
    """Return the kind of each parameter of a model; embeddings also if they are tied."""
    kinds = dict.fromkeys(model.parameters(), "other tensors")
    for parameter in kinds:
        if sum(size > 1 for size in parameter.shape) < 2:
            kinds[parameter] = "vectors"
    for kind, found in (
        ("linear weights", linear_weights(model)),
        ("convolutions", conv_weights(model)),
        ("output embeddings", _output_embeddings(model)),
        ("embeddings", _embeddings(model)),
    ):
        kinds |= dict.fromkeys(found, kind)
    return kinds


def _is_linear(module: nn.Module, name: str, parameter: nn.Parameter) -> bool:
    if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
        return name == "weight"
    if isinstance(module, nn.Embedding | nn.modules.conv._ConvNd):
        return False
    is_matrix = parameter.dim() >= 2 and min(parameter.shape[-2:]) > 1
    return bool(
        is_matrix and _APPLIED.search(name) and not _NOT_LINEAR.search(type(module).__name__)
    )


def _embeddings(model: nn.Module) -> set[nn.Parameter]:
    return {
        parameter
        for module in model.modules()
        if isinstance(module, nn.Embedding | nn.EmbeddingBag)
        for parameter in module.parameters(recurse=False)
    }


def _output_embeddings(model: nn.Module) -> set[nn.Parameter]:
    outputs = _weight_of(model, "get_output_embeddings")
    inputs = _weight_of(model, "get_input_embeddings")
    if outputs is None or (inputs is not None and inputs.shape != outputs.shape):
        return set()
    return {outputs}


def _weight_of(model: nn.Module, method: str) -> nn.Parameter | None:
    try:
        layer = getattr(model, method, lambda: None)()
    except (NotImplementedError, AttributeError):  # transformers raises them without embeddings
        return None
    weight = getattr(layer, "weight", None)
    return weight if isinstance(weight, nn.Parameter) else None
