"""The loss of a causal language model, with options that save time and memory.

All options give the same loss. If a model does not support an option, a check raises an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sift_train.instructions import IGNORED, split_batch

LOSSES = ("plain", "chunked")
N_PROBED = 16  # tokens of each example with which a model is checked
CHUNK = 256  # tokens; torch's own choice for small batches is a few, which is ten times slower


def chunked_loss(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Return the same loss, computing logits in chunks and only for labelled tokens; needs torch 2.13."""
    inputs, targets = split_batch(batch)
    states = model.base_model(**inputs, use_cache=False).last_hidden_state[:, :-1]
    is_learnt = targets != IGNORED
    head = model.get_output_embeddings()
    states, weight, bias = states.flatten(0, 1)[is_learnt], head.weight, head.bias
    kind = states.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    functional: Any = nn.functional
    options: Any = nn
    loss: Tensor = functional.linear_cross_entropy(
        states.to(dtype),
        weight.to(dtype),
        targets[is_learnt],
        linear_bias=None if bias is None else bias.to(dtype),
        reduction="sum",
        options=options.LinearCrossEntropyOptions(batch_chunk_size=CHUNK),
    )
    return loss.float() / batch["n_learnt"]


def check_chunked(model: Any) -> None:
    """Check that the model's logits are its last states times its output embeddings.

    Raises:
        ValueError: the logits are computed otherwise, or torch is too old.
    """
    if not hasattr(nn, "LinearCrossEntropyOptions"):
        raise ValueError(
            f"torch {torch.__version__} has no chunked cross-entropy, 2.13 has; use the plain loss"
        )
    ids = _probe(model, 1)
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits.float()
        head = model.get_output_embeddings()
        states = getattr(model, "base_model", model)(input_ids=ids, use_cache=False)
        if head is None or not hasattr(states, "last_hidden_state"):
            found = torch.full_like(logits, torch.inf)
        else:
            found = head(states.last_hidden_state).float()
    # A cap on logits changes only large ones, which may not occur here.
    is_capped = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    differs = found.shape != logits.shape or (
        (found - logits).abs().max() > 0.01 * logits.abs().max()
    )
    if is_capped or differs:
        raise ValueError(
            f"the logits of {type(model).__name__} are not just its last states times its output "
            "embeddings, so they cannot be computed in chunks; use the plain loss"
        )


def check_packing(model: Any, *, is_flat: bool) -> None:
    """Check that examples in one row do not attend to each other.

    The first of two examples is changed. The second's logits may change by at most a tenth of the
    change that they have if both examples are one text.

    Args:
        model: the model to train with packed rows.
        is_flat: whether the model gets one row at a time.

    Raises:
        ValueError: they attend to each other.
    """
    ids = _probe(model, 1 if is_flat else 2)
    changed = ids.clone()
    changed[:, :N_PROBED] = changed[:, :N_PROBED].flip(1).roll(3, 1)
    one_text = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    packed = one_text % N_PROBED
    moved = []
    with torch.no_grad():
        for positions in (packed, one_text):
            try:
                left, right = (
                    model(input_ids=x, position_ids=positions, use_cache=False).logits[:, N_PROBED:]
                    for x in (ids, changed)
                )
            except TypeError:  # the model accepts no position ids
                moved.append(torch.tensor(1.0))
            else:
                moved.append((left - right).float().abs().max())
    if not moved[0] < 0.1 * moved[1]:
        raise ValueError(
            f"packed examples would attend to each other in {type(model).__name__} with "
            f"{model.config._attn_implementation} attention; leave packing off"
        )


def compile_layers(model: nn.Module) -> int:
    """Make each layer compile separately at its first run; return the number of layers.

    A compiled whole model would keep all dense gradients until the end of the backward pass. The
    names in the state dict do not change.

    Raises:
        ValueError: the model has no layers that transformers marks, or no compiler is installed.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    _try_compiler(next(model.parameters()).device)
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no layers that can be compiled one by one; leave it off"
        )
    for layer in layers:
        layer.compile(dynamic=True)
    return len(layers)


def _try_compiler(device: torch.device) -> None:
    def add_one(x: Tensor) -> Tensor:
        return x + 1

    try:
        torch.compile(add_one)(torch.ones(1, device=device))
    except Exception as error:
        first_line = str(error).strip().split("\n")[0]
        raise ValueError(
            f"nothing can be compiled here ({first_line}); install a C++ compiler, or leave it off"
        ) from error


def _probe(model: Any, n_rows: int) -> Tensor:
    """Return random tokens, two examples per row, without using the global random generator."""
    n_tokens = model.get_input_embeddings().num_embeddings
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, n_tokens, (n_rows, 2 * N_PROBED), generator=generator)
    return ids.to(next(model.parameters()).device)
