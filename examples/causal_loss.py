"""The loss of a causal language model, and what makes it and its layers faster and smaller.

Whatever is switched on, the loss is the same: what a model cannot do is found out and refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from instructions import IGNORED
from torch import Tensor, nn

LOSSES = ("plain", "chunked")
N_PROBED = 16  # tokens of each example that a model is tried with
CHUNK = 256  # tokens; torch's own choice is a few for small batches, which takes ten times as long


def plain_loss(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Return the summed loss of all labels, divided by ``n_learnt``; logits are held at once."""
    inputs, targets = _split_batch(batch)
    logits = model(**inputs, use_cache=False).logits[:, :-1]
    flat = logits.float().flatten(0, 1)
    loss = nn.functional.cross_entropy(flat, targets, ignore_index=IGNORED, reduction="sum")
    return loss / batch["n_learnt"]


def chunked_loss(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Return the same, with logits of labelled tokens only, some at a time (torch 2.13 or newer)."""
    inputs, targets = _split_batch(batch)
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
    """Find out whether the model's logits are its last states times its output embeddings.

    Raises:
        ValueError: they are not, or torch is too old.
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
    # A cap on logits shows only in large ones, which a model may not have here.
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
    """Find out whether examples in one row do not see each other.

    The first of two examples is changed: the second's logits may change by no more than a tenth of
    what they change by where the two are one text.

    Args:
        model: to be trained with packed rows.
        is_flat: rows come one at a time.

    Raises:
        ValueError: they do.
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
            except TypeError:  # it takes no positions
                moved.append(torch.tensor(1.0))
            else:
                moved.append((left - right).float().abs().max())
    if not moved[0] < 0.1 * moved[1]:
        raise ValueError(
            f"packed examples would see each other in {type(model).__name__} with "
            f"{model.config._attn_implementation} attention; leave packing off"
        )


def compile_layers(model: nn.Module) -> int:
    """Compile each layer by itself when it first runs; return how many.

    One by one, since a compiled whole model keeps all dense gradients until its end. The state dict
    keeps its names.

    Raises:
        ValueError: the model has no layers that transformers knows, or nothing can be compiled here.
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


def _split_batch(batch: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    inputs = {name: batch[name] for name in batch if name not in ("labels", "n_learnt")}
    return inputs, batch["labels"][:, 1:].flatten()


def _probe(model: Any, n_rows: int) -> Tensor:
    """Return tokens of two examples a row, drawn without touching the global generator."""
    n_tokens = model.get_input_embeddings().num_embeddings
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, n_tokens, (n_rows, 2 * N_PROBED), generator=generator)
    return ids.to(next(model.parameters()).device)
