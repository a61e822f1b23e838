"""A model with Llama's shape in plain torch; its random weights are created on the device.

It needs no files, no host memory for weights and no package other than torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Shape:
    """The shape of a Llama: seven projections per layer; embeddings and head are not tied."""

    hidden: int
    inner: int
    n_layers: int
    n_heads: int
    vocabulary: int = 32_000


SHAPES = {
    "toy": Shape(64, 172, 2, 4, 128),
    "100m": Shape(768, 2048, 8, 12),
    "1b": Shape(2048, 5632, 22, 32),
    "7b": Shape(4096, 11_008, 32, 32),
}


class Layer(nn.Module):
    """One layer: attention and feed-forward, each with a norm before it."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        wide, inner = shape.hidden, shape.inner
        self.n_heads = shape.n_heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            nn.Linear(wide, wide, bias=False) for _ in range(4)
        )
        self.gate_proj, self.up_proj = (nn.Linear(wide, inner, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(inner, wide, bias=False)
        self.before, self.between = nn.RMSNorm(wide), nn.RMSNorm(wide)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Return the next hidden states, (batch, length, hidden)."""
        normed = self.before(x)
        query, key, value = (
            project(normed).unflatten(-1, (self.n_heads, -1)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = _turned(query, cos, sin), _turned(key, cos, sin)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.o_proj(mixed.transpose(1, 2).flatten(2))
        normed = self.between(x)
        out: Tensor = x + self.down_proj(
            functional.silu(self.gate_proj(normed)) * self.up_proj(normed)
        )
        return out


class Llama(nn.Module):
    """Returns the next-token loss of a batch of tokens; activations are recomputed per layer."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embed = nn.Embedding(shape.vocabulary, shape.hidden)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.n_layers))
        self.norm = nn.RMSNorm(shape.hidden)
        self.head = nn.Linear(shape.hidden, shape.vocabulary, bias=False)
        self.head_width = shape.hidden // shape.n_heads

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the mean loss, a scalar.

        Args:
            tokens: (batch, length), int64.
        """
        x = self.embed(tokens)
        at = torch.arange(tokens.shape[1], device=x.device, dtype=torch.float32)
        even = torch.arange(0, self.head_width, 2, device=x.device, dtype=torch.float32)
        angles = at[:, None] * 10_000.0 ** (-even / self.head_width)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        for layer in self.layers:
            x = checkpoint(layer, x, cos, sin, use_reentrant=False, preserve_rng_state=False)
        logits = self.head(self.norm(x))[:, :-1].float()
        return functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


class Lora(nn.Module):
    """A frozen projection plus a trained low-rank product in fp32, as in PEFT."""

    def __init__(self, frozen: nn.Linear, rank: int) -> None:
        super().__init__()
        self.frozen = frozen.requires_grad_(False)
        device, wide = frozen.weight.device, torch.float32
        self.down = nn.Parameter(
            torch.randn(rank, frozen.in_features, device=device, dtype=wide) * 0.02
        )
        self.up = nn.Parameter(torch.zeros(frozen.out_features, rank, device=device, dtype=wide))

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum of both."""
        beside = x.to(self.down.dtype) @ self.down.T @ self.up.T
        out: Tensor = self.frozen(x) + beside.to(x.dtype)
        return out


def make_model(shape: Shape, device: str, dtype: torch.dtype = torch.bfloat16) -> Llama:
    """Return a model with weights drawn from N(0, 0.02) on the device."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            model = Llama(shape)
    finally:
        torch.set_default_dtype(before)
    if device == "meta":
        return model
    model.to_empty(device=device)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.02)
            else:
                parameter.fill_(1.0)
    return model.train()


def add_lora(model: Llama, n_trained: int) -> list[nn.Parameter]:
    """Add LoRA to all projections with about the given number of parameters; return these."""
    model.requires_grad_(False)
    found = [(layer, name, getattr(layer, name)) for layer in model.layers for name in PROJECTIONS]
    per_rank = sum(linear.in_features + linear.out_features for _, _, linear in found)
    rank = max(1, round(n_trained / per_rank))
    trained: list[nn.Parameter] = []
    for layer, name, linear in found:
        adapter = Lora(linear, rank)
        setattr(layer, name, adapter)
        trained += [adapter.down, adapter.up]
    return trained


def batches(
    shape: Shape, n: int, device: str, length: int = 512, n_rows: int = 1
) -> Sequence[Tensor]:
    """Return batches of sequences of random tokens, each (n_rows, length)."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, shape.vocabulary, (n, n_rows, length), generator=generator)
    return list(tokens.to(device))


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    one, other = x.chunk(2, dim=-1)
    return torch.cat([one * cos - other * sin, other * cos + one * sin], dim=-1)
